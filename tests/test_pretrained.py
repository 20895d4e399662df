"""From a name to an engine: every kind of name leads to the averaged weights, wrong ones to a remedy."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_codec_load import saved
from test_documents import folder_of_images
from test_hub import Hub

import transfusion
from transfusion import hub, pretrained
from transfusion.checkpoint import latest_checkpoint, read_state, save_checkpoint
from transfusion.cli import main
from transfusion.config import to_dict
from transfusion.data.documents import DataConfig
from transfusion.export import export
from transfusion.metrics import MetricsConfig
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.optim import OptimConfig
from transfusion.pretrained import find, load
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.train import train
from transfusion.weights import load_weights, read_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run of three steps, the last two saved."""
    folder = tmp_path_factory.mktemp("pretrained")
    images = folder_of_images(folder / "images", 6)
    config = RunConfig(
        model=ModelConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=64, patch_size=4),
        data=DataConfig((str(images),), (), image_size=8, image_share=1.0),
        optim=OptimConfig(lr=3e-3, warmup_steps=1, ema=0.9),
        train=TrainConfig(steps=3, rows=2, seq_len=48, precision="fp32", save_every=2),
        sample=SampleConfig(steps=2),
        metrics=MetricsConfig(sinks=("jsonl",)),
    )
    train(config, folder / "run")
    return folder / "run"


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_loads_as_the_averaged_weights_of_its_newest_checkpoint(run):
    newest = latest_checkpoint(run / "checkpoints")
    loaded = weights(transfusion.load(run, device="cpu"))
    assert newest.name == "step_00000003"
    assert same(loaded, read_weights(newest))
    assert not same(loaded, read_weights(newest, averaged=False))


def test_a_checkpoint_loads_as_itself_wherever_one_stands(run, monkeypatch):
    older = run / "checkpoints" / "step_00000002"
    want = read_weights(older)
    assert same(weights(load(older)), want) and same(weights(load(str(older))), want)
    monkeypatch.chdir(run / "checkpoints")
    assert same(weights(load("step_00000002")), want)
    monkeypatch.chdir(older)
    assert same(weights(load(".")), want)


def test_a_run_without_an_average_loads_as_its_weights(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = latest_checkpoint(copy / "checkpoints")
    engine, state = load(copy), read_state(newest)
    load_weights(engine.model, newest, averaged=False)
    later = save_checkpoint(
        newest.parent, state["step"] + 1, model=engine.model, optimizers=[], state={"config": state["config"]}
    ).result()
    assert same(weights(load(copy)), read_weights(later)) and same(read_weights(later), read_weights(newest, False))


def test_an_exported_folder_in_full_precision_is_the_model_to_the_bit_and_draws_the_same(run, tmp_path):
    engine, exported = load(run, "cpu"), load(export(run, tmp_path / "deep" / "out", dtype="fp32"), "cpu")
    assert same(weights(engine), weights(exported))
    assert exported.config == replace(engine.config, out="", init="", device="auto")
    assert engine.tokenizer.encode("any text") == exported.tokenizer.encode("any text")
    assert engine.draw(["picture"]) == exported.draw(["picture"])


def test_an_exported_folder_in_bf16_is_the_model_within_rounding(run, tmp_path):
    want, got = weights(load(run)), weights(load(export(run, tmp_path / "out")))
    assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    for name, tensor in want.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], tensor, rtol=2**-8, atol=1e-30)
    again = weights(load(export(tmp_path / "out", tmp_path / "again")))  # bf16 to bf16 loses nothing more
    assert same(got, again)


@pytest.mark.filterwarnings("ignore")  # of diffusers
@pytest.mark.parametrize("where", ["", "vae"])
def test_an_exported_folder_carries_its_autoencoder_of_diffusers_and_draws_elsewhere(where, run, tmp_path):
    theirs = tmp_path / "theirs"
    saved(theirs / where, "AutoencoderDC")
    for name in ("unet.safetensors", ".cache") if where else (".cache",):
        (theirs / name).touch()  # of no use to a codec
    config = replace(find(run).config, init="")
    model = replace(config.model, patch_size=2, channels=0, vocab_size=0)
    data = replace(config.data, codec=f"diffusers:{theirs}", factor=0)
    train(replace(config, model=model, data=data), tmp_path / "run")
    want, out = load(tmp_path / "run", "cpu").draw(["picture"]), export(tmp_path / "run", tmp_path / "out", "fp32")
    there = {p.relative_to(theirs / where).as_posix() for p in (theirs / where).iterdir()} - {".cache"}
    assert "config.json" in there and there == {p.name for p in (out / "codec").iterdir()}
    assert json.loads((out / "config.json").read_text())["data"]["codec"] == "diffusers:codec"
    shutil.rmtree(theirs), shutil.rmtree(tmp_path / "run")
    assert load(out.rename(tmp_path / "elsewhere"), "cpu").draw(["picture"]) == want
    again = export(tmp_path / "elsewhere", tmp_path / "again", "fp32")
    assert load(again, "cpu").draw(["picture"]) == want


def test_an_autoencoder_of_the_hub_stays_a_name_in_an_exported_folder(run, tmp_path):
    out = export(run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["data"]["codec"] = "diffusers:owner/name"
    (out / "config.json").write_text(json.dumps(config))
    again = export(out, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["data"]["codec"] == "diffusers:owner/name"
    assert not (again / "codec").exists()


def test_an_export_of_a_version_that_counted_micro_batches_is_read(run, tmp_path):
    file = export(run, tmp_path / "out") / "config.json"
    saved = json.loads(file.read_text())
    saved["train"] = {**saved["train"], "rows": 8, "accumulate": 4}
    del saved["train"]["micro_batch"]
    file.write_text(json.dumps(saved))
    assert find(tmp_path / "out").config.train.micro_batch == 2


def test_the_card_of_an_exported_folder_says_what_it_is(run, tmp_path):
    out = export(run, tmp_path / "mine", license="CC-BY-4.0")
    older = export(run / "checkpoints" / "step_00000002", tmp_path / "older")
    card, older = ((path / "README.md").read_text() for path in (out, older))
    n = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert "license: CC-BY-4.0" in card and "# mine" in card and f"parameters: {n:,}, stored as bf16" in card
    assert "transfusion generate" in card and "patch_size = 4" in card
    assert "training: 3 steps of 96 positions" in card and "training: 2 steps of 96 positions" in older
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert not [*tmp_path.glob(".tmp*")]


def test_an_export_never_overwrites(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already: remove it or name another"):
        export(run, tmp_path / "there")


def test_a_shipped_model_loads_by_its_name_and_a_wrong_name_lists_what_is_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PRETRAINED", tmp_path)
    with pytest.raises(ValueError, match="there is no pretrained:emoji; shipped with this version: none"):
        find("pretrained:emoji")
    export(run, tmp_path / "emoji", dtype="fp32")
    assert same(weights(load("pretrained:emoji")), weights(load(run)))
    with pytest.raises(ValueError, match=r"no pretrained:emojis; shipped with this version: pretrained:emoji$"):
        find("pretrained:emojis")


def test_wrong_names_are_errors_that_say_what_to_name(run, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere: name a run, a checkpoint, an exported folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no checkpoint .* has saved nothing yet"):
        load(tmp_path)
    out = export(run, tmp_path / "out")
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors: export"):
        load(out)


def test_weights_of_another_model_are_refused_by_name(run, tmp_path):
    out = export(run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["model"]["ffn_dim"] = 128
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit this model"):
        load(out)


def test_an_unknown_device_is_an_error_with_a_remedy(run):
    with pytest.raises(ValueError, match="device=cpu"):
        load(run, device="abacus")


def test_a_loaded_engine_samples_as_the_run_says_unless_told_otherwise(run):
    engine = load(run, "cpu")
    assert engine.config.sample == SampleConfig(steps=2)
    assert engine.draw(["picture"]) == engine.draw(["picture"], steps=2)
    assert np.asarray(engine.draw(["picture"])[0]).shape == (8, 8, 3)


def test_a_model_is_sampled_in_the_precision_asked_for_else_in_the_runs_own(run):
    own, full, half = load(run, "cpu"), load(run, "cpu", "fp32"), load(run, "cpu", "bf16")
    assert own.config.train.precision == "fp32" and own.draw(["picture"]) == full.draw(["picture"])
    matrices = [engine.sampled.layers[0].attention.wq.weight.dtype for engine in (own, full, half)]
    assert matrices == [torch.float32, torch.float32, torch.bfloat16]
    assert half.model.layers[0].attention.wq.weight.dtype == torch.float32, "likelihoods are scored in full precision"
    a, b = (np.asarray(engine.draw(["picture"])[0], int) for engine in (full, half))
    assert np.abs(a - b).max() < 40 and np.abs(a - b).mean() < 6
    with pytest.raises(ValueError, match="choose one of"):
        load(run, "cpu", "fp8")


# ---- the hub ----


def test_a_model_that_is_pushed_to_the_hub_is_loaded_from_there(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "client", lambda: Hub(tmp_path))
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "fp32", "--push", "me/mine"]) == 0
    assert "https://hub/me/mine\nits name from now on: hub:me/mine" in capsys.readouterr().out
    assert 'transfusion generate hub:me/mine "' in (tmp_path / "me/mine/README.md").read_text()
    assert same(weights(load("hub:me/mine")), weights(load(run)))
    with pytest.raises(ValueError, match=r"hub:me/other is not to be had: 404: no me/other$"):
        load("hub:me/other")
    shutil.copytree(run, tmp_path / "me/run")
    with pytest.raises(ValueError, match=r"hub:me/run has no config.json"):
        load("hub:me/run")  # a checkpoint's metadata is a pickle


EXPORT = """
import sys
from pathlib import Path
import torch.distributed.checkpoint
from transfusion.export import export

def most():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = most()
export(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_export_takes_little_more_memory_than_the_model(run, tmp_path):
    config = replace(find(run).config, model=replace(find(run).config.model, dim=1024, ffn_dim=4096, n_layers=6))
    model = build_model(config.model)
    size, big = sum(4 * p.numel() for p in model.parameters()), tmp_path / "big"
    averages = [p.detach().clone() for p in model.parameters()]
    state = {"config": to_dict(config)}
    save_checkpoint(big / "checkpoints", 1, model=model, ema=averages, optimizers=[], state=state)
    shutil.copyfile(run / "tokenizer.json", big / "tokenizer.json")
    found = subprocess.run(
        [sys.executable, "-c", EXPORT, big, tmp_path / "out", "bf16"], capture_output=True, text=True
    )
    assert size > 3e8 and int(found.stdout) < 1.2 * size, found.stderr
