"""What a run begins with, and a frozen text path that ends as it began."""

import math
from dataclasses import replace

import pytest
import torch
from test_documents import folder_of_images
from test_llama import text_logits, write_llama
from test_train import assert_same_runs, cut

from transfusion.checkpoint import latest_checkpoint
from transfusion.data.documents import DataConfig
from transfusion.metrics import MetricsConfig, read_records
from transfusion.model.paths import text_twin
from transfusion.model.transformer import SEPARABLE, ModelConfig
from transfusion.optim import OptimConfig
from transfusion.pretrained import load
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.train import train
from transfusion.weights import read_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> RunConfig:
    """A run that begins with a trained dense model."""
    folder = tmp_path_factory.mktemp("beginning")
    (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    base = RunConfig(
        model=ModelConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=64, patch_size=4, qk_norm=True),
        data=DataConfig((str(folder_of_images(folder / "images", 12)),), (str(folder / "words.txt"),), image_size=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=1, ema=0.5),
        train=TrainConfig(steps=4, rows=4, seq_len=48, precision="fp32", save_every=2, keep=99),
        sample=SampleConfig(steps=2),
        metrics=MetricsConfig(sinks=("jsonl",)),
        device="cpu",
    )
    train(base, folder / "base")
    return replace(base, init=str(folder / "base"))


def with_paths(config: RunConfig, separate=SEPARABLE, **optim) -> RunConfig:
    model, optim = replace(config.model, separate=separate), replace(config.optim, **optim)
    return replace(config, model=model, optim=optim)


@pytest.mark.parametrize("separate", [("ffn",), SEPARABLE], ids=str)
def test_weights_that_patches_gain_begin_as_a_copy_and_are_named(tiny, tmp_path, capsys, separate):
    still = with_paths(tiny, separate, lr=1e-30, min_lr=0.0, weight_decay=0.0)
    begun = read_weights(train(replace(still, train=replace(tiny.train, steps=1)), tmp_path / "run"), averaged=False)
    base = read_weights(latest_checkpoint(tmp_path / tiny.init / "checkpoints"))
    assert all(torch.equal(begun[name], base[text_twin(name) or name]) for name in begun)
    assert len(begun) > len(base)
    printed = capsys.readouterr().out
    copied = {line.split()[1] for line in printed.splitlines() if "begins as a copy of the text path's" in line}
    own = {name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.*.") for name in begun.keys() - base}
    assert copied == own and "layers.*.feed_forward.w1.image_weight" in copied


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_text_path_reads_text_to_the_bit_as_before_while_images_are_learned(
    tiny, tmp_path, monkeypatch, capsys, optimizer
):
    config = with_paths(tiny, freeze=("text",), name=optimizer, weight_decay=0.1, clip=1.0)
    saved = train(config, tmp_path / "whole")
    assert "parameters train" in capsys.readouterr().out
    tokens = torch.randint(6, 2000, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = text_logits(load(tiny.init, "cpu").model, tokens)
        assert torch.equal(text_logits(load(tmp_path / "whole", "cpu").model, tokens), before)
    base = read_weights(latest_checkpoint(tmp_path / tiny.init / "checkpoints"))
    for averaged in (False, True):
        after = read_weights(saved, averaged)
        still = {name for name in after if torch.equal(after[name], base[text_twin(name) or name])}
        assert still == {name for name in base if not name.startswith("patches.")}
    cut(config, tmp_path / "cut", [1, 3], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_frozen_llama_reads_text_to_the_bit_as_before(tiny, tmp_path):
    _, folder = write_llama(tmp_path / "llama")
    data = replace(tiny.data, image_share=1.0, text=())
    config = replace(tiny, init=f"hf:{folder}", model=ModelConfig(patch_size=4, separate=SEPARABLE), data=data)
    frozen = replace(config, optim=replace(tiny.optim, freeze=("text",), ema=0.0))
    still = replace(frozen, optim=OptimConfig(lr=1e-30, min_lr=0.0, weight_decay=0.0, ema=0.0))
    tokens = torch.randint(6, 280, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = []
    for name, c, steps in (("still", still, 1), ("trained", frozen, 4)):
        train(replace(c, train=replace(c.train, steps=steps)), tmp_path / name)
        with torch.no_grad():
            logits.append(text_logits(load(tmp_path / name, "cpu").model, tokens))
    assert torch.equal(*logits)


def test_steps_of_text_alone_are_no_error_where_text_is_frozen(tiny, tmp_path):
    config = with_paths(replace(tiny, data=replace(tiny.data, image_share=0.0, images=())), freeze=("text",))
    train(config, tmp_path)
    assert all(math.isfinite(r["lm_loss"]) and r["grad_norm"] == 0 for r in read_records(tmp_path / "metrics.jsonl"))


def test_a_dense_run_does_not_begin_with_a_model_of_two_paths(tiny, tmp_path):
    train(with_paths(tiny), tmp_path / "two")
    with pytest.raises(ValueError, match=r"it has .*image_weight, which the model lacks"):
        train(replace(tiny, init=str(tmp_path / "two")), tmp_path / "one")
