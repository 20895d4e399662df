"""The loop by itself: what it calls at which step, with any model; trainings of models and codecs test the rest."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from transfusion import checkpoint, loop
from transfusion.checkpoint import latest_checkpoint
from transfusion.config import to_dict
from transfusion.loop import Step, find_checkpoint, restore, run_steps, start
from transfusion.metrics import MetricsConfig, read_records
from transfusion.optim import OptimConfig, averaged, build_optimizers
from transfusion.weights import read_weights


@pytest.fixture(autouse=True)
def plain_config(monkeypatch):
    """Lets a bare namespace be a config."""
    monkeypatch.setattr(loop.configs, "to_dict", lambda c: {} if isinstance(c, SimpleNamespace) else to_dict(c))


def config(**train) -> SimpleNamespace:
    intervals = {
        "steps": 7,
        "log_every": 1,
        "sample_every": 3,
        "save_every": 4,
        "max_bad_steps": 2,
        "keep": 9,
        "keep_every": 0,
        "save_async": False,
    } | train
    optim = OptimConfig(lr=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.0, ema=0.5)
    return SimpleNamespace(train=SimpleNamespace(**intervals), optim=optim, metrics=MetricsConfig(("jsonl",)))


def run(folder, c, resume=False, reached=lambda step: None):
    """Trains one number towards the batch's; returns (checkpoint, weights seen by each sample, batches computed)."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    optimizers = build_optimizers(model, c.optim)
    found = find_checkpoint(folder, resume)
    training = restore(found, model, optimizers, c) if found else start(model, optimizers, c)
    sampled, computed = [], []

    def compute(step, batch):
        reached(step)
        computed.append((step, batch))
        model.weight.grad = torch.sign(model.weight.detach() - batch)
        return Step(model.weight.grad.norm(), {"images": 2}, lambda: {"loss": float(batch)})

    def sample(path):
        with averaged(model, training.ema):
            sampled.append((path.name, model.weight.item()))

    saved = run_steps(
        folder,
        c,
        training,
        (10.0 * s for s in range(training.step, c.train.steps)),
        compute,
        sample,
    )
    return saved, sampled, computed, model, training


def test_every_batch_is_computed_once_and_each_interval_kept(tmp_path):
    saved, sampled, computed, _, training = run(tmp_path, config())
    assert computed == [(s, 10.0 * s) for s in range(7)]
    assert [name for name, _ in sampled] == ["step_00000003.png", "step_00000006.png"]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000004", "step_00000007"]
    assert saved == training.saved == latest_checkpoint(tmp_path / "checkpoints")
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["skipped"]) for r in records] == [(s + 1, 10.0 * s, 0) for s in range(7)]
    assert all(r["images_per_second"] > 0 and r["lr"] == pytest.approx(0.1) for r in records)
    assert all(0 <= r["data_wait"] < 1 and r["memory"] > 1e7 and "straggler" not in r for r in records)


def test_what_batches_take_is_waited_for_and_flops_are_a_share_of_the_peak(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1000.0)

    def batches():
        for step in range(7):
            clock.now += 3
            yield float(step)

    def compute(step, batch):
        clock.now += 1
        model.weight.grad = torch.ones_like(model.weight)
        return Step(model.weight.grad.norm(), {"flops": 2000}, dict)

    c, model = config(), nn.Linear(1, 1)
    training = start(model, build_optimizers(model, c.optim), c)
    run_steps(tmp_path, c, training, batches(), compute, lambda path: None)
    assert {r["data_wait"] for r in read_records(tmp_path / "metrics.jsonl")} == {0.75}
    assert {r["mfu"] for r in read_records(tmp_path / "metrics.jsonl")} == {0.5}, "2000 in 4 s, of 1000 a second"


def test_samples_see_the_average_and_the_model_has_its_own_weights_after(tmp_path):
    _, sampled, _, model, training = run(tmp_path, config(sample_every=7))
    assert sampled[0][1] == pytest.approx(training.ema[0].item())
    assert model.weight.item() != pytest.approx(training.ema[0].item())


def test_an_async_checkpoint_is_written_while_steps_go_on_with_the_weights_of_its_own(tmp_path, monkeypatch):
    run(tmp_path / "waited", config(steps=8, save_every=4))
    write, later, waited = checkpoint.write, threading.Event(), []

    def slow(*of_it):
        waited.append(later.wait(60))
        return write(*of_it)

    monkeypatch.setattr(checkpoint, "write", slow)
    c = config(steps=8, save_every=4, save_async=True)
    saved, *_ = run(tmp_path / "async", c, reached=lambda step: step == 6 and later.set())
    assert saved.name == "step_00000008" and waited == [True, True], "step 6 came while that of step 4 was written"
    for step in (4, 8):
        a, b = (read_weights(tmp_path / name / f"checkpoints/step_0000000{step}") for name in ("async", "waited"))
        assert all(torch.equal(a[name], b[name]) for name in a | b)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, capsys):
    run(tmp_path, config())
    four, seven = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (4, 7))
    part = seven / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:10])
    assert find_checkpoint(tmp_path, resume=True) == four
    said = capsys.readouterr().out
    assert f"{seven} is damaged (its __0_0.distcp has 10 bytes instead of" in said and "from step_00000004" in said
    (four / "state.json").unlink()
    with pytest.raises(ValueError, match=r"00000004 is damaged \(it has no state.json\); .*move it away to begin anew"):
        find_checkpoint(tmp_path, resume=True)


def test_a_resumed_loop_begins_with_the_next_step(tmp_path):
    whole = run(tmp_path / "whole", config())[3].weight.item()
    run(tmp_path / "cut", config(steps=4))
    _, _, computed, model, _ = run(tmp_path / "cut", config(), resume=True)
    assert [step for step, _ in computed] == [4, 5, 6] and model.weight.item() == whole
    with pytest.raises(ValueError, match="--resume"):
        run(tmp_path / "cut", config())
