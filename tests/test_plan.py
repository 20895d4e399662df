"""The plan against what a real step counts: FLOPs by torch's counter, bytes by what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from test_documents import corpus_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion import train as loop
from transfusion.data.documents import DataConfig
from transfusion.data.loader import Packer
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.optim import build_optimizers, init_ema
from transfusion.plan import count_flops, estimate_memory, plan
from transfusion.run import RunConfig, TrainConfig
from transfusion.sequence import Format

CONFIG = RunConfig(
    model=ModelConfig(dim=64, n_layers=3, n_heads=4, ffn_dim=176, vocab_size=512, patch_size=4, channels=3),
    data=DataConfig(image_size=16, factor=1),
    train=TrainConfig(steps=1000, rows=8, seq_len=128, precision="fp32"),
)


def micro_batches(config: RunConfig):
    """A step's batches of random captions and text, with the config's sizes."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(10, config.model.vocab_size, (6000,), generator=g).tolist()
    corpus = corpus_of([[words[i : i + 1]] for i in range(20)], [words], image_share=config.data.image_share)
    corpus = replace(corpus, fmt=Format(corpus.special, config.model.patch_size))
    train, twice = corpus.captions["train"], config.data.image_size // 8
    corpus.captions["train"] = replace(train, images=[i.repeat(twice, 0).repeat(twice, 1) for i in train.images])
    return Packer(corpus, corpus.fmt, 0, config.train.rows, config.train.seq_len, config.train.accumulate).batches(0)


@pytest.mark.parametrize("share, accumulate, refine_width", [(0.0, 1, 0), (0.5, 2, 0), (0.8, 1, 0), (0.8, 2, 32)])
def test_flops_are_those_that_torch_counts_in_a_step(share, accumulate, refine_width):
    config = replace(CONFIG, data=replace(CONFIG.data, image_share=share))
    config = replace(config, train=replace(config.train, accumulate=accumulate))
    config = replace(config, model=replace(config.model, refine_width=refine_width))
    model = build_model(config.model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no other of a CPU
        loop.gradients(model, micro_batches(config), config, 0)
    operations = counter.get_flop_counts()["Global"]
    attention = operations.pop(torch.ops.aten.bmm)
    planned = count_flops(config)
    assert attention == 2 * planned.pop("attention (at most)")  # the dense mask computes the hidden half of pairs too
    assert sum(planned.values()) == pytest.approx(sum(operations.values()), rel=0.05)


def test_weights_gradients_optimizer_and_average_are_exact():
    model = build_model(CONFIG.model)
    planned = estimate_memory(CONFIG)
    optimizers, ema = build_optimizers(model, CONFIG.optim), init_ema(model)
    loop.gradients(model, micro_batches(CONFIG), CONFIG, 0)
    for optimizer in optimizers:
        optimizer.step()
    own, grads = list(model.parameters()), [p.grad for p in model.parameters()]
    moments = [s[k] for o in optimizers for s in o.state.values() for k in ("exp_avg", "exp_avg_sq")]
    for name, tensors in (("weights", own), ("gradients", grads), ("optimizer", moments), ("average", ema)):
        assert planned[name] == sum(t.numel() * t.element_size() for t in tensors)
    assert estimate_memory(replace(CONFIG, optim=replace(CONFIG.optim, ema=0.0)))["average"] == 0


def kept_for_backward(config: RunConfig) -> int:
    """Bytes of the storages that autograd keeps of a forward under bf16, the weights themselves left out."""
    model = build_model(config.model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps the address from being used again
        return tensor

    (batch,) = micro_batches(config)
    noise = loop.draw_noise(batch, config.diffusion, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loop.losses(model, batch, noise, config.diffusion)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_layers": 8}, {"dim": 128, "ffn_dim": 512}, {"qk_norm": True, "n_kv_heads": 2}, {"refine_width": 128}],
)
def test_activations_are_about_what_autograd_keeps(sizes):
    model = replace(CONFIG.model, **{"n_layers": 6, **sizes}, vocab_size=256)
    config = replace(CONFIG, model=model, train=replace(CONFIG.train, rows=16))
    planned = estimate_memory(config)
    estimate = planned["activations (about)"] + planned["logits (at most)"]
    assert estimate / 1.25 < kept_for_backward(config) < estimate * 1.25


def test_micro_batches_divide_the_activations_and_nothing_else():
    whole = estimate_memory(CONFIG)
    parts = estimate_memory(replace(CONFIG, train=replace(CONFIG.train, accumulate=4)))
    for name, value in whole.items():
        assert parts[name] == (value / 4 if "activations" in name or "logits" in name else value)


def test_the_plan_is_a_table_with_totals_that_add_up():
    text = plan(CONFIG)
    for section in text.split("\n\n")[:3]:
        values = [float(line[28:40].replace(",", "")) for line in section.splitlines()[1:]]
        assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.006 * len(values))
    assert "1,000 steps of 1,024 positions = 1,024,000 positions" in text
