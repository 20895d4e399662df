"""Training: resumed runs are bitwise the uninterrupted ones, whatever ended them; bad steps are skipped and counted."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from test_documents import folder_of_images
from tiny_run import stored

from transfusion import config as configs
from transfusion import train as loop
from transfusion.checkpoint import latest_checkpoint, read_state, step_of
from transfusion.codec.codec import PIXELS
from transfusion.data.documents import Corpus, DataConfig
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.loss import Losses
from transfusion.metrics import MetricsConfig, read_records
from transfusion.model.transformer import ModelConfig
from transfusion.optim import OptimConfig
from transfusion.run import RunConfig, SampleConfig, TrainConfig, same_codec
from transfusion.tokenizer import train_tokenizer
from transfusion.train import train
from transfusion.weights import read_weights

SPEEDS = ("images_per_second", "tokens_per_second", "flops_per_second", "data_wait", "memory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> RunConfig:
    """A run of a few milliseconds a step, on a folder of images and a text of our own."""
    folder = tmp_path_factory.mktemp("data")
    images = folder_of_images(folder / "images", 12)
    (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    train_tokenizer(["the quick brown fox", "picture number"], 270).save(folder / "tokenizer.json")
    return RunConfig(
        model=ModelConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=64, patch_size=4),
        data=DataConfig((str(images),), (str(folder / "words.txt"),), str(folder / "tokenizer.json"), image_size=8),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_steps=3, ema=0.9),
        train=TrainConfig(steps=8, rows=4, seq_len=48, precision="fp32", log_every=1, save_every=2, keep=99),
        sample=SampleConfig(steps=2),
        metrics=MetricsConfig(sinks=("jsonl",)),
        device="cpu",
    )


def with_train(config: RunConfig, **fields) -> RunConfig:
    return replace(config, train=replace(config.train, **fields))


def same_tensors(a, b) -> bool:
    """Whether two nests of tensors and numbers are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def assert_same_runs(a: Path, b: Path):
    """Same last step, weights, average, optimizer, counters and records, to the last bit."""
    x, y = latest_checkpoint(a / "checkpoints"), latest_checkpoint(b / "checkpoints")
    assert x.name == y.name
    assert same_tensors(stored(x), stored(y))
    assert all(read_state(x)[key] == read_state(y)[key] for key in ("skipped", "optimizers"))
    assert records(a) == records(b)


def records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speeds, nan as None."""
    return [
        {k: None if math.isnan(v) else v for k, v in record.items() if k not in SPEEDS}
        for record in read_records(run / "metrics.jsonl")
    ]


class Stop(Exception):
    pass


def cut(config: RunConfig, run: Path, steps: list[int], monkeypatch):
    """Trains with the process dying in the middle of each of these steps, and resumes until the end."""
    compute = loop.gradients

    for at in steps:

        def dying(model, micro, config, step, *more, at=at):
            if step == at:
                raise Stop
            return compute(model, micro, config, step, *more)

        monkeypatch.setattr(loop, "gradients", dying)
        with pytest.raises(Stop):
            train(config, run, resume=True)
    monkeypatch.setattr(loop, "gradients", compute)
    return train(config, run, resume=True)


# ---- resume ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tiny, tmp_path, monkeypatch, optimizer, micro_batch):
    config = with_train(replace(tiny, optim=replace(tiny.optim, name=optimizer)), micro_batch=micro_batch)
    train(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", [1, 4, 5, 7], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert [r["step"] for r in records(tmp_path / "cut")] == list(range(1, 9))


def test_a_run_without_an_average_resumes_too_and_so_does_one_with_workers(tiny, tmp_path, monkeypatch):
    config = replace(tiny, optim=replace(tiny.optim, ema=0.0))
    train(config, tmp_path / "whole")
    cut(replace(config, data=replace(config.data, workers=2)), tmp_path / "cut", [3], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert not any(name.startswith("ema.") for name in stored(latest_checkpoint(tmp_path / "cut" / "checkpoints")))


def test_training_changes_the_weights_the_average_and_lowers_the_loss(tiny, tmp_path):
    saved = train(with_train(tiny, steps=60, save_every=0), tmp_path)
    state, own = records(tmp_path), read_weights(saved, averaged=False)
    averages = read_weights(saved)
    assert all(not torch.equal(own[name], averages[name]) for name in own)
    assert state[-1]["lm_loss"] < 0.7 * state[0]["lm_loss"]
    assert sum(r["image_loss"] for r in state[-10:]) < 0.9 * sum(r["image_loss"] for r in state[:10])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000060"]


def test_micro_batches_train_as_the_whole_batch_does(tiny, tmp_path):
    for size in (0, 1, 2):
        train(with_train(tiny, micro_batch=size), tmp_path / f"{size}")
    one, *others = (records(tmp_path / f"{size}") for size in (0, 1, 2))
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-3)


def test_a_finished_run_that_is_resumed_does_nothing_and_says_so(tiny, tmp_path, capsys):
    saved = train(tiny, tmp_path)
    before, n = records(tmp_path), tiny.train.steps
    assert "nothing is left" not in capsys.readouterr().out
    for steps in (n, n - 1):
        assert train(with_train(tiny, steps=steps), tmp_path, resume=True) == saved
        assert f"nothing is left to do: {n} steps are done of {steps}" in capsys.readouterr().out
    assert records(tmp_path) == before


def test_a_second_start_in_the_same_folder_is_refused(tiny, tmp_path):
    train(tiny, tmp_path)
    before = records(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        train(tiny, tmp_path)
    assert records(tmp_path) == before


def test_only_the_last_checkpoints_are_kept_and_the_folder_says_what_ran(tiny, tmp_path):
    train(with_train(tiny, keep=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]
    resolved = configs.load_config(RunConfig, tmp_path / "config.toml")
    assert resolved.model.vocab_size == 270 and resolved.train == with_train(tiny, keep=2).train
    assert (tmp_path / "tokenizer.json").is_file()


# ---- killed ----


def command(config: RunConfig, run: Path, *options: str) -> list[str]:
    path = run.with_suffix(".toml")
    path.write_text(configs.to_toml(replace(config, out=str(run))))
    return [sys.executable, "-m", "transfusion.cli", "train", str(path), *options]


def start(config: RunConfig, run: Path, *options: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(config, run, *options), env=environment, start_new_session=True, **pipes)


def wait_for_record(run: Path, n: int, process: subprocess.Popen):
    """Returns when n steps are logged or the process has ended."""
    while process.poll() is None:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_bytes().splitlines()) >= n:
            return
        time.sleep(0.005)


def test_a_run_killed_at_any_moment_and_resumed_is_bitwise_the_uninterrupted_one(tiny, tmp_path):
    config = with_train(tiny, steps=60, save_every=3, keep=2)
    torch.manual_seed(99)  # the process's own random state must not matter
    train(config, tmp_path / "whole")
    dice, run = random.Random(0), tmp_path / "killed"
    for n in (8, 25, 45):
        process = start(config, run, "--resume")
        wait_for_record(run, n, process)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        process.communicate()
    process = start(config, run, "--resume")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_runs(tmp_path / "whole", run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000057", "step_00000060"]


@pytest.mark.parametrize("name, workers", [("SIGTERM", 0), ("SIGINT", 2)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_resuming_goes_on_from_it(tiny, tmp_path, name, workers):
    config = with_train(replace(tiny, data=replace(tiny.data, workers=workers)), steps=10**6, save_every=0)
    run = tmp_path / "run"
    process = start(config, run)
    wait_for_record(run, 5, process)
    kill = os.killpg if workers else os.kill  # Ctrl-C reaches the whole group, workers included
    kill(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = read_state(latest_checkpoint(run / "checkpoints"))["step"]
    assert f"stopped by {name} at step {step} of 1000000" in out and "--resume" in out
    assert records(run)[-1]["step"] == step >= 5
    saved = train(replace(with_train(config, steps=step + 2), data=tiny.data), run, resume=True)
    assert read_state(saved)["step"] == step + 2
    assert [r["step"] for r in records(run)] == list(range(1, step + 3))


# ---- steps that go wrong ----


def poison(monkeypatch, steps: set[int]):
    """Makes the losses of these steps nan."""
    compute, draw, at = loop.losses, loop.draw_noise, []

    def noise(batch, config, seed, step):
        at.append(step)
        return draw(batch, config, seed, step)

    def losses(*inputs):
        lm, image = compute(*inputs)
        return Losses(lm * (math.nan if at[-1] in steps else 1), image)

    monkeypatch.setattr(loop, "draw_noise", noise)
    monkeypatch.setattr(loop, "losses", losses)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 5})
    config = with_train(tiny, save_every=1)
    train(config, tmp_path)
    steps = [tmp_path / "checkpoints" / f"step_{n:08d}" for n in range(1, 9)]
    changed = [
        not same_tensors(read_weights(a, averaged), read_weights(b, averaged))
        for averaged in (False, True)
        for a, b in pairwise(steps)
    ]
    assert changed == [True, True, False, True, False, True, True] * 2
    assert [r["skipped"] for r in records(tmp_path)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [r["lm_loss"] is None for r in records(tmp_path)] == [n in (4, 6) for n in range(1, 9)]
    assert read_state(steps[-1])["skipped"] == 2
    assert all(p.isfinite().all() for p in read_weights(steps[-1], averaged=False).values())


def test_a_run_with_skipped_steps_resumes_bitwise_with_its_count(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5})
    train(tiny, tmp_path / "whole")
    cut(tiny, tmp_path / "cut", [4, 7], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_remedy(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 4, 5, 6, 7})
    with pytest.raises(ValueError, match=r"3 steps in a row .* step 6: lower optim.lr .*step_00000006$"):
        train(with_train(tiny, max_bad_steps=3), tmp_path)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 8))


# ---- samples, minutes, text alone ----


def test_sample_sheets_are_drawn_at_their_steps_and_leave_training_as_it_is(tiny, tmp_path):
    train(tiny, tmp_path / "plain")
    train(with_train(tiny, sample_every=4), tmp_path / "drawn")
    sheets = sorted((tmp_path / "drawn" / "samples").iterdir())
    assert [s.name for s in sheets] == ["step_00000004.png", "step_00000008.png"]
    for sheet in sheets:
        assert len(PIL.Image.open(sheet).convert("RGB").getcolors(10**6)) > 12  # the originals alone are 12 colours
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    assert_same_runs(tmp_path / "plain", tmp_path / "drawn")


def test_a_sheet_that_cannot_be_written_is_told_and_training_goes_on(tiny, tmp_path, capsys):
    (tmp_path / "samples").write_text("a file where the folder should be")
    saved = train(with_train(tiny, steps=4, sample_every=2, save_every=2), tmp_path)
    assert step_of(saved) == 4 and capsys.readouterr().out.count("no sheet is drawn, as it cannot be written") == 2


def test_a_sheet_for_which_there_is_no_room_is_left_out_and_training_goes_on(tiny, tmp_path, monkeypatch, capsys):
    def full(*inputs):
        raise torch.OutOfMemoryError("all taken")

    monkeypatch.setattr(loop, "draw_samples", full)
    assert read_state(train(with_train(tiny, sample_every=8), tmp_path))["step"] == 8
    assert "no sheet is drawn, as memory does not suffice beside the training (all taken)" in capsys.readouterr().out


def test_minutes_become_steps_and_the_run_is_the_run_of_so_many_steps(tiny, tmp_path, monkeypatch):
    measured = loop.seconds_per_step

    def known(*inputs):
        assert measured(*inputs) > 0  # moves the weights, as ever
        return 0.5

    monkeypatch.setattr(loop, "seconds_per_step", known)
    config = with_train(tiny, minutes=0.05, steps=0)
    cut(config, tmp_path / "minutes", [3], monkeypatch)  # 3 seconds: 6 steps
    train(with_train(tiny, steps=6), tmp_path / "steps")
    assert configs.load_config(RunConfig, tmp_path / "minutes" / "config.toml").train.steps == 6
    assert_same_runs(tmp_path / "minutes", tmp_path / "steps")
    monkeypatch.setattr(loop, "seconds_per_step", lambda *inputs: 0.01)
    assert read_state(train(config, tmp_path / "minutes", resume=True))["step"] == 6  # not measured again
    with pytest.raises(ValueError, match=r"has 6 steps since it began: for another number, set train.steps"):
        train(with_train(config, minutes=9.0), tmp_path / "minutes", resume=True)


def test_a_number_of_steps_wins_over_minutes(tiny, tmp_path):
    assert read_state(train(with_train(tiny, minutes=60.0, steps=2), tmp_path))["step"] == 2
    with pytest.raises(ValueError, match="one of them must be above 0"):
        with_train(tiny, minutes=0.0, steps=0)


def test_a_vocabulary_that_the_tokenizer_never_uses_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"vocab_size = 32000, and only \d+ tokens are ever used: name the data.tokenizer"
    ):
        train(replace(tiny, model=replace(tiny.model, vocab_size=32000)), tmp_path)
    assert not list(tmp_path.iterdir()), "before anything is written"


def test_a_run_is_not_resumed_with_other_tokens(tiny, tmp_path):
    train(tiny, tmp_path / "run")
    other = tmp_path / "other.json"
    train_tokenizer(["other words altogether"] * 9, 270).save(other)
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"trained with other tokens: set data\.tokenizer=.*run/tokenizer\.json"):
        train(replace(tiny, data=replace(tiny.data, tokenizer=str(other))), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_a_run_on_text_alone_trains_and_draws_nothing(tiny, tmp_path):
    data = replace(tiny.data, image_share=0.0, images=())
    saved = train(with_train(replace(tiny, data=data), sample_every=4), tmp_path)
    assert read_state(saved)["step"] == 8
    assert all(r["image_loss"] is None and math.isfinite(r["lm_loss"]) for r in records(tmp_path))
    assert not (tmp_path / "samples").exists()


def test_a_run_on_images_alone_trains(tiny, tmp_path):
    train(replace(tiny, data=replace(tiny.data, image_share=1.0, text=())), tmp_path)
    assert all(math.isfinite(r["image_loss"]) and math.isfinite(r["lm_loss"]) for r in records(tmp_path))


def test_a_model_with_too_few_tokens_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"model.vocab_size = 100, 270 tokens are needed"):
        train(replace(tiny, model=replace(tiny.model, vocab_size=100)), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_config_in_a_checkpoint_is_the_resolved_one(tiny, tmp_path):
    saved = train(tiny, tmp_path)
    assert json.loads((saved / "state.json").read_text())["config"]["model"]["vocab_size"] == 270


def test_a_run_with_init_begins_with_the_averaged_weights_of_that_model(tiny, tmp_path, capsys):
    first = train(tiny, tmp_path / "first")
    capsys.readouterr()
    # one step at a learning rate that changes no float32: the weights are those of step 0
    still = replace(tiny, init=str(tmp_path / "first"), optim=OptimConfig(lr=1e-30, min_lr=0.0, weight_decay=0.0))
    second = train(with_train(still, steps=1), tmp_path / "second")
    begun, averaged = read_weights(second, averaged=False), read_weights(first)
    assert all(torch.equal(begun[name], averaged[name]) for name in averaged)
    assert "init:" not in capsys.readouterr().out
    flow = replace(still, diffusion=DiffusionConfig(prediction="flow"))
    train(with_train(flow, steps=1), tmp_path / "flow")
    assert "init: diffusion.prediction was eps, now flow" in capsys.readouterr().out
    refined = train(
        with_train(replace(still, model=replace(tiny.model, refine_width=4)), steps=1), tmp_path / "refined"
    )
    assert "init: refine.conv_in.weight is not in" in capsys.readouterr().out
    begun = read_weights(refined, averaged=False)
    assert all(torch.equal(begun[name], averaged[name]) for name in averaged) and begun["refine.conv_in.weight"].any()
    fresh = train(with_train(replace(still, init=""), steps=1), tmp_path / "fresh")
    assert not torch.equal(read_weights(fresh, averaged=False)["output.weight"], averaged["output.weight"])


def test_a_run_whose_init_does_not_fit_or_is_not_there_is_refused(tiny, tmp_path):
    train(tiny, tmp_path / "first")
    wider = replace(tiny, init=str(tmp_path / "first"), model=replace(tiny.model, dim=64))
    with pytest.raises(ValueError, match="does not fit this model"):
        train(wider, tmp_path / "second")
    with pytest.raises(ValueError, match="there is no folder"):
        train(replace(tiny, init=str(tmp_path / "nowhere")), tmp_path / "second")


def test_latents_keep_the_statistics_of_the_model_that_a_run_begins_with_whatever_the_codecs_name(monkeypatch, capsys):
    codec = replace(PIXELS, name="elsewhere/codec", key="weights")
    given = {"latent_mean": (0.1, 0.2, 0.3), "latent_std": (1.0, 2.0, 3.0), "codec_key": "weights"}
    base = RunConfig(data=DataConfig(codec="a/codec", **given))
    monkeypatch.setattr(loop, "find", lambda _: SimpleNamespace(config=base))
    fine_tuned = RunConfig(init="a", data=DataConfig(codec="elsewhere/codec"))
    data = loop.with_statistics(fine_tuned, codec, None).data
    assert (data.latent_mean, data.latent_std, data.codec_key) == tuple(given.values()) and not capsys.readouterr().out
    assert loop.with_statistics(fine_tuned, replace(codec, key="others"), None) == fine_tuned
    assert "a has learned latents of other weights (a/codec)" in capsys.readouterr().out


@pytest.mark.parametrize("given", [(), (0.5, 0.5, 0.5)])
def test_a_resumed_run_is_held_to_the_codec_that_it_began_with(given, monkeypatch):
    began = {"latent_mean": (0.1, 0.2, 0.3), "latent_std": (1.0, 2.0, 3.0), "codec_key": "old"}
    saved = {"config": configs.to_dict(RunConfig(data=DataConfig(codec="codec", **began)))}
    monkeypatch.setattr(loop.checkpoint, "read_state", lambda _: saved)
    now = RunConfig(data=DataConfig(codec="codec", latent_mean=given, latent_std=given))
    resumed = loop.with_statistics(now, replace(PIXELS, name="codec", key="new"), Path("step"))
    assert resumed.data.latent_mean == (given or began["latent_mean"])
    with pytest.raises(ValueError, match="changed since the model learned its latents"):
        same_codec(replace(PIXELS, name="codec", key="new"), resumed.data)
    assert same_codec(replace(PIXELS, name="codec", key="old"), resumed.data).key == "old"


# ---- data ----


def test_a_checkpoint_holds_one_number_a_source_and_a_run_with_another_goes_on_in_each(tiny, tmp_path):
    saved = train(with_train(tiny, save_every=4), tmp_path / "one")
    cursors = read_state(saved)["data"]
    assert set(map(type, cursors.values())) == {int} and min(cursors.values()) > 0
    other = tmp_path / "other"
    shutil.copytree(Path(tiny.data.images[0]), other)
    more = replace(tiny.data, images=(*tiny.data.images, str(other)), image_weights=(1.0, 3.0))
    longer = with_train(replace(tiny, data=more), steps=16)
    after = read_state(train(longer, tmp_path / "one", resume=True))["data"]
    assert after.keys() - cursors.keys() == {"images other"}
    taken = {name: after[name] - cursors.get(name, 0) for name in after}
    (first,) = [name for name in cursors if name.startswith("images")]
    assert 0 < taken[first] and 2 < taken["images other"] / taken[first] < 4


def test_documents_that_cannot_be_read_are_named_and_too_many_stop_the_run(tiny, tmp_path, monkeypatch):
    fill = Corpus.fill

    def failing(corpus, plans):
        return [f"{plan.name}: gone" if i == 0 else x for i, (plan, x) in enumerate(zip(plans, fill(corpus, plans)))]

    monkeypatch.setattr(Corpus, "fill", failing)
    train(tiny, tmp_path / "some")
    names = (tmp_path / "some/lost.txt").read_text().splitlines()
    assert len(names) >= tiny.train.steps - 1 and all(name.endswith(": gone") for name in names)
    assert records(tmp_path / "some")[-1]["lost"] == len(names)
    with pytest.raises(ValueError, match=r"3 documents could not be read, more than data.max_lost = 2: .*lost.txt"):
        train(replace(tiny, data=replace(tiny.data, max_lost=2)), tmp_path / "many")
    with pytest.raises(ValueError, match=r"data.max_lost = -1: a number of documents, at least 0"):
        train(replace(tiny, data=replace(tiny.data, max_lost=-1)), tmp_path / "less than none")
