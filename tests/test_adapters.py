"""Adapters as files: PEFT puts the text path's onto transformers' Llama, ours takes them back, and merged they stay."""

import json
from dataclasses import replace

import pytest
import torch
from test_documents import folder_of_images
from test_llama import TOKENS, begun, run_config, text_logits, write_llama
from test_train import assert_same_runs, cut
from test_transformer import outputs, random_model, row

from transfusion.adapters import load_adapters, merge, save_adapters
from transfusion.checkpoint import latest_checkpoint
from transfusion.data.documents import DataConfig
from transfusion.export import export
from transfusion.metrics import MetricsConfig
from transfusion.model.lora import TARGETS, LoraConfig
from transfusion.model.paths import is_adapter
from transfusion.model.transformer import SEPARABLE, ModelConfig, build_model
from transfusion.optim import OptimConfig
from transfusion.pretrained import load
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.train import train
from transfusion.weights import read_weights

FROZEN = OptimConfig(lr=1e-2, warmup_steps=1, ema=0.5, freeze=("text", "image"))


def with_adapters(folder, lora: LoraConfig):
    """Our model of a Llama folder with random adapters."""
    config = run_config(folder, optim=FROZEN)
    model, *_ = begun(replace(config, model=replace(config.model, lora=lora)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.normal_(0, 0.3)
    return model


# ---- PEFT ----


@pytest.mark.filterwarnings("ignore")  # of the libraries about each other
@pytest.mark.parametrize("lora", [LoraConfig(4, 12.0, TARGETS), LoraConfig(2, 1.0, ("wq", "wv"), ("text",))], ids=str)
def test_peft_loads_the_text_adapter_onto_transformers_llama(tmp_path, lora):
    peft = pytest.importorskip("peft")
    llama, folder = write_llama(tmp_path / "llama")
    model = with_adapters(folder, lora)
    save_adapters(model.state_dict(), lora, tmp_path / "out")
    with torch.no_grad():
        before = llama(TOKENS).logits[0]
        theirs = peft.PeftModel.from_pretrained(llama, tmp_path / "out" / "text").eval()
        found = theirs(TOKENS).logits[0]
        torch.testing.assert_close(text_logits(model, TOKENS)[:, :280], found[:, :280], rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_saved_comes_into_our_text_path(tmp_path):
    peft = pytest.importorskip("peft")
    llama, folder = write_llama(tmp_path / "llama")
    lora = LoraConfig(4, 8.0, ("wq", "w2"), ("text",))
    theirs = peft.get_peft_model(
        llama, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "adapters" / "text")
    model = with_adapters(folder, lora)
    load_adapters(model, tmp_path / "adapters")
    with torch.no_grad():
        found = theirs.eval()(TOKENS).logits[0]
    torch.testing.assert_close(text_logits(model, TOKENS)[:, :280], found[:, :280], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paths", [("text",), ("image",), ("text", "image")], ids=str)
def test_adapters_come_back_from_their_files(tmp_path, paths):
    lora = LoraConfig(3, 2.0, ("wk", "wo", "w1"), paths)
    model, other = random_model(lora=lora), random_model(lora=lora)
    save_adapters(model.state_dict(), lora, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(paths)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if is_adapter(name):
                p.zero_()
    load_adapters(other, tmp_path)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_adapters_of_another_kind_are_refused(tmp_path):
    lora = LoraConfig(3, 2.0, ("wk", "w1"))
    model = random_model(lora=lora)
    save_adapters(model.state_dict(), lora, tmp_path)
    for other, message in (
        (LoraConfig(2, 2.0, ("wk", "w1")), "r = 3 instead of 2"),
        (LoraConfig(3, 4.0, ("wk", "w1")), "lora_alpha = 2.0 instead of 4.0"),
        (LoraConfig(3, 2.0, ("wk",)), "target_modules"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapters(random_model(lora=other), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit: base_model\.model\.model\.layers\.2"):
        load_adapters(random_model(lora=lora, n_layers=3), tmp_path)
    with pytest.raises(ValueError, match="does not fit: it has other sizes"):
        load_adapters(random_model(lora=lora, ffn_dim=64), tmp_path)
    file = tmp_path / "image" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora = True"):
        load_adapters(model, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no .*image.adapter_config\.json: model\.lora\.paths asks for it"):
        load_adapters(model, tmp_path)


# ---- merged ----


@pytest.mark.parametrize("separate", [(), ("ffn",), SEPARABLE], ids=str)
@pytest.mark.parametrize("paths", [("text",), ("image",), ("text", "image")], ids=str)
@pytest.mark.parametrize("targets", [("wq", "wo"), ("w1", "w2"), TARGETS], ids=str)
def test_a_merged_model_computes_the_same_without_adapters(separate, paths, targets):
    model = random_model(separate=separate, qk_norm=True, lora=LoraConfig(2, 0.5, targets, paths))
    tensors, config = merge(model.state_dict(), model.config)
    merged = build_model(config).eval()
    merged.load_state_dict(tensors)
    assert not config.lora.r and set(separate) <= set(config.separate)
    b, z, t = row({})
    for a, c in zip(outputs(merged, b, z, t), outputs(model, b, z, t)):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


# ---- trained ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> RunConfig:
    """A run of adapters from a trained base."""
    folder = tmp_path_factory.mktemp("adapters")
    base = RunConfig(
        model=ModelConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=64, patch_size=4),
        data=DataConfig((str(folder_of_images(folder / "images", 12)),), (), image_size=8, image_share=1.0),
        optim=OptimConfig(lr=3e-3, warmup_steps=1, ema=0.5),
        train=TrainConfig(steps=4, rows=4, seq_len=48, precision="fp32", log_every=1, save_every=2, keep=99),
        sample=SampleConfig(steps=2),
        metrics=MetricsConfig(sinks=("jsonl",)),
        device="cpu",
    )
    train(base, folder / "base")
    model = replace(base.model, lora=LoraConfig(4, target_modules=TARGETS))
    return replace(base, init=str(folder / "base"), model=model, optim=FROZEN)


@pytest.mark.parametrize("freeze", [("text", "image"), ("text", "image", "patches")], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_base_stays_to_the_bit_while_the_adapters_train_and_a_killed_run_goes_on(
    tiny, tmp_path, monkeypatch, freeze, optimizer, capsys
):
    config = replace(tiny, optim=replace(tiny.optim, freeze=freeze, name=optimizer))
    saved = train(config, tmp_path / "whole")
    assert "parameters train" in capsys.readouterr().out
    base = read_weights(latest_checkpoint(tmp_path / tiny.init / "checkpoints"))
    for averaged in (False, True):
        after = read_weights(saved, averaged)
        assert {name for name in after if name not in base} == {name for name in after if is_adapter(name)}
        moved = {name for name in base if not torch.equal(base[name], after[name])}
        assert moved == {name for name in base if name.startswith("patches.") and "patches" not in freeze}
        assert all(after[name].any() for name in after if is_adapter(name))
    cut(config, tmp_path / "cut", [1, 3], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_an_export_is_one_plain_model_with_the_adapters_beside_it_and_they_start_another_run(tiny, tmp_path):
    train(tiny, tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", dtype="fp32")
    run, plain = load(tmp_path / "run", "cpu"), load(out, "cpu")
    assert plain.config.model.separate == ("ffn", "attention") and not plain.config.model.lora.r
    pixels = [torch.tensor([*e.draw(["picture"])[0].tobytes()]) for e in (run, plain)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1
    still = replace(tiny.optim, lr=1e-30, min_lr=0.0, weight_decay=0.0)
    again = replace(tiny, adapter=str(out / "adapters"), optim=still, train=replace(tiny.train, steps=1))
    begun = read_weights(train(again, tmp_path / "again"), averaged=False)
    trained = read_weights(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert all(torch.equal(begun[name], trained[name]) for name in trained if is_adapter(name))


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"r": -1}, "r = -1"),
        ({"alpha": 0.0}, "alpha = 0"),
        ({"target_modules": ("q_proj",)}, r"target_modules = \['q_proj'\]: choose some of wq"),
        ({"target_modules": ()}, "target_modules"),
        ({"paths": ("text", "text")}, "paths"),
    ],
)
def test_impossible_adapters_are_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"r": 4, **lora})


def test_adapters_beside_weights_that_train_are_refused_with_the_remedy():
    model = ModelConfig(lora=LoraConfig(4))
    for freeze in ((), ("text",), ("image", "patches")):
        with pytest.raises(ValueError, match=r"set optim\.freeze=image(,patches)?,text$"):
            RunConfig(model=model, optim=OptimConfig(freeze=freeze))
    RunConfig(model=replace(model, lora=LoraConfig(4, paths=("text",))), optim=OptimConfig(freeze=("text",)))
    with pytest.raises(ValueError, match=r"model\.lora\.r is 0"):
        RunConfig(adapter="somewhere")
