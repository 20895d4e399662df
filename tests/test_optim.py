"""Optimizers: who is in which group, the lr at key steps, clipping, and the average against a naive loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transfusion.model.lora import LoraConfig
from transfusion.model.transformer import SEPARABLE, ModelConfig, build_model
from transfusion.optim import (
    OptimConfig,
    averaged,
    build_optimizers,
    clip_gradients,
    ema_decay_at,
    freeze,
    init_ema,
    lr_at,
    part_of,
    set_lr,
    update_ema,
)


def toy() -> nn.Module:
    """A model with one parameter of each kind, named as the real one's."""
    torch.manual_seed(0)
    layer = lambda: nn.ModuleDict({"wq": nn.Linear(8, 8, bias=False), "norm": nn.RMSNorm(8)})  # noqa: E731
    patches = nn.ModuleDict({"proj": nn.Linear(4, 8), "conv": nn.Conv2d(2, 2, 3)})
    modules = {"tok_embeddings": nn.Embedding(10, 8), "layers": nn.ModuleList([layer(), layer()]), "patches": patches}
    return nn.ModuleDict({**modules, "norm": nn.RMSNorm(8), "output": nn.Linear(8, 10, bias=False)})


def names(optimizer, decays: bool) -> set[str]:
    return {n for g in optimizer.param_groups if (g["weight_decay"] > 0) == decays for n in g["param_names"]}


MATRICES = {"layers.0.wq.weight", "layers.1.wq.weight"}
OTHERS = {"tok_embeddings.weight", "patches.proj.weight", "patches.conv.weight", "output.weight"}
VECTORS = {"layers.0.norm.weight", "layers.1.norm.weight", "norm.weight", "patches.proj.bias", "patches.conv.bias"}


def test_adamw_decays_weights_but_not_norms_and_biases():
    (adamw,) = build_optimizers(toy(), OptimConfig())
    assert names(adamw, decays=True) == MATRICES | OTHERS
    assert names(adamw, decays=False) == VECTORS
    assert adamw.defaults["fused"] and adamw.defaults["betas"] == (0.9, 0.95)


def test_muon_covers_exactly_the_layer_matrices():
    muon, adamw = build_optimizers(toy(), OptimConfig(name="muon"))
    assert isinstance(muon, torch.optim.Muon) and names(muon, decays=True) == MATRICES
    assert names(adamw, decays=True) == OTHERS and names(adamw, decays=False) == VECTORS


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    model = toy()
    model["output"].weight.requires_grad_(False)
    held = [p for o in build_optimizers(model, OptimConfig(name=name)) for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} - {id(model["output"].weight)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_learn(name):
    model, x = toy(), torch.arange(10)
    optimizers = build_optimizers(model, OptimConfig(name=name, lr=1e-2))

    def loss():
        h = model["tok_embeddings"](x)
        for layer in model["layers"]:
            h = h + layer["wq"](layer["norm"](h))
        return nn.functional.cross_entropy(model["output"](model["norm"](h)), x.roll(1))

    first = loss().item()
    for _ in range(60):
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss().item() < 0.3 * first


def test_lr_at_key_steps():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    at = [lr_at(step, 110, config) for step in range(130)]
    assert at[0] == 0.1 and at[4] == 0.5 and at[9] == 1.0
    assert at[59] == pytest.approx(0.55)  # half way: the mean of both ends
    assert at[34] == pytest.approx(0.1 + 0.9 * 0.8535534)  # a quarter: (1 + cos 45) / 2
    assert at[109] == pytest.approx(0.1) and at[129] == pytest.approx(0.1)
    assert lr_at(34, 110, OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, decay="linear")) == pytest.approx(0.775)


@given(st.integers(0, 50), st.integers(1, 200), st.sampled_from(["cosine", "linear"]))
def test_lr_rises_then_falls_within_its_bounds(warmup, steps, decay):
    config = OptimConfig(lr=1.0, min_lr=0.05, warmup_steps=warmup, decay=decay)
    at = [lr_at(step, steps, config) for step in range(steps)]
    top = max(0, warmup - 1)
    assert at[:top] == sorted(at[:top]) and at[top:] == sorted(at[top:], reverse=True)
    assert all(0 < x <= 1 for x in at)


def test_set_lr_gives_muon_its_own():
    config = OptimConfig(name="muon", lr=1.0, min_lr=0.0, muon_lr=4.0, warmup_steps=2)
    muon, adamw = optimizers = build_optimizers(toy(), config)
    assert set_lr(optimizers, 0, 10, config) == 0.5
    assert [g["lr"] for g in muon.param_groups] == [2.0] and [g["lr"] for g in adamw.param_groups] == [0.5, 0.5]
    same = OptimConfig(name="muon", lr=1.0, min_lr=0.0, warmup_steps=2)
    muon, _ = optimizers = build_optimizers(toy(), same)
    set_lr(optimizers, 0, 10, same)
    assert muon.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("clip, left", [(1.0, 1.0), (0.0, 10.0), (100.0, 10.0)])
def test_clipping_returns_the_norm_from_before_it(clip, left):
    model = nn.Linear(4, 1)
    model.weight.grad = torch.full((1, 4), 4.0)  # norm of both: sqrt(4 * 16 + 36) = 10
    model.bias.grad = torch.full((1,), 6.0)
    norm = clip_gradients(model, clip)
    assert isinstance(norm, torch.Tensor) and norm.item() == pytest.approx(10)
    after = torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm().item()
    assert after == pytest.approx(left, rel=1e-5)


def test_average_is_that_of_a_naive_loop():
    model = toy()
    ema = init_ema(model)
    slow = [p.detach().double().clone() for p in model.parameters()]
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        update_ema(ema, model, step, 0.6)
        d = min(0.6, (1 + step) / (10 + step))
        slow = [d * e + (1 - d) * p.detach().double() for e, p in zip(slow, model.parameters())]
    torch.testing.assert_close([e.double() for e in ema], slow, rtol=1e-5, atol=1e-6)
    assert ema_decay_at(0, 0.9999) == 0.1 and ema_decay_at(10**6, 0.9999) == 0.9999


def test_average_of_a_half_precision_model_is_float32():
    model = toy().bfloat16()
    ema = init_ema(model)
    update_ema(ema, model, 0, 0.9)
    assert {e.dtype for e in ema} == {torch.float32}
    with averaged(model, ema):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_averaged_weights_are_in_the_model_only_inside_the_block():
    model = toy()
    own, pointers = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    ema = [torch.full_like(p, 7.0) for p in own]
    with pytest.raises(KeyError), averaged(model, ema):
        assert all((p == 7).all() for p in model.parameters())
        assert [p.data_ptr() for p in model.parameters()] == [e.data_ptr() for e in ema]
        raise KeyError
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), own)) and all((e == 7).all() for e in ema)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "sgd"}, "name must be one of adamw, muon, got 'sgd'"),
        ({"decay": "step"}, "decay must be one of cosine, linear"),
        ({"lr": 1e-5}, r"min_lr in \[0, lr\]"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"clip": -1.0}, "clip must not be negative"),
    ],
)
def test_config_refuses_values_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


# ---- frozen parts ----


def test_each_parameter_of_a_model_belongs_to_the_part_that_its_path_says():
    lora = LoraConfig(2, target_modules=("wq",))
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "channels": 3, "qk_norm": True, "refine_width": 2}
    model = build_model(ModelConfig(**sizes, separate=SEPARABLE, lora=lora), "meta")
    parts: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(part_of(name), set()).add(name)
    of_layer = {"attention_norm", "ffn_norm", *(f"attention.{x}" for x in ("wq", "wk", "wv", "wo", "q_norm", "k_norm"))}
    of_layer |= {f"feed_forward.{x}" for x in ("w1", "w2", "w3")}
    trunk = {f"layers.0.{module}" for module in of_layer} | {"norm"}
    assert parts["text"] == {f"{module}.weight" for module in trunk | {"tok_embeddings", "output"}}
    assert parts["image"] == {f"{module}.image_weight" for module in trunk}
    assert parts["adapters"] == {f"layers.0.attention.wq.{p}lora_{m}" for p in ("", "image_") for m in "AB"}
    assert {name.partition(".")[0] for name in parts["patches"]} == {"patches", "refine"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_have_no_optimizer_no_average_and_no_part_in_the_norm(name):
    model = toy()
    freeze(model, ("patches",))
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.startswith("patches.")}
    optimizers, ema = build_optimizers(model, OptimConfig(name=name, weight_decay=0.5)), init_ema(model)
    assert len(ema) == len(list(model.parameters())) - len(frozen)
    x = model["patches"]["proj"](torch.ones(3, 4))
    model["output"](model["norm"](x + model["layers"][0]["wq"](x))).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    want = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    torch.testing.assert_close(clip_gradients(model, 1.0), want)
    for optimizer in optimizers:
        optimizer.step()
    update_ema(ema, model, 0, 0.9)
    with averaged(model, ema):
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(torch.equal(p, frozen[n]) and p.grad is None for n, p in model.named_parameters() if n in frozen)


def test_a_part_without_weights_of_its_own_is_frozen_with_those_of_text_or_refused():
    sizes = {"dim": 32, "n_layers": 1, "ffn_dim": 16, "vocab_size": 40, "channels": 3}
    dense, two = build_model(ModelConfig(**sizes)), build_model(ModelConfig(**sizes, separate=("ffn",)))
    codes = build_model(ModelConfig(**sizes, patches="codes", patch_size=1))
    for model, part in ((dense, "image"), (codes, "patches")):
        with pytest.raises(ValueError, match=rf"\['{part}'\]: .* no {part} weights .* add text, leave {part} out"):
            freeze(model, (part,))
    freeze(dense, ("text", "image"))
    assert {part_of(n) for n, p in dense.named_parameters() if p.requires_grad} == {"patches"}
    freeze(two, ("image",))
    assert {part_of(n) for n, p in two.named_parameters() if p.requires_grad} == {"text", "patches"}


def test_what_leaves_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(toy(), ("text", "image", "patches"))
    model = toy()
    freeze(model, ("text",))
    with pytest.raises(ValueError, match=r"no matrix of the layers trains: set optim\.name=adamw"):
        build_optimizers(model, OptimConfig(name="muon"))
    with pytest.raises(ValueError, match=r"freeze = \['vision'\]: choose some of text, image, patches"):
        OptimConfig(freeze=("vision",))
