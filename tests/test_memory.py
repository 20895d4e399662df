"""A rehearsed step against real ones: what lasts to the byte, what autograd keeps by hooks on a step of numbers."""

from dataclasses import replace

import pytest
import torch
from random_rows import SPECIAL
from test_flops import CLEAN, CODES, CONFIG, LORA, UNET, micro_batches, with_model

from transfusion import train as loop
from transfusion.cluster import Cluster
from transfusion.flops import count_images
from transfusion.memory import estimate_memory, presumed, rehearse
from transfusion.model.mask import dense_mask
from transfusion.model.recompute import MODES, recompute
from transfusion.model.transformer import SEPARABLE, build_model, row_mask
from transfusion.optim import build_optimizers, freeze, init_ema

BF16 = replace(CONFIG, train=replace(CONFIG.train, precision="bf16"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"separate": SEPARABLE},
        {"separate": SEPARABLE, "freeze": ("text",)},
        {"lora": LORA, "freeze": ("text", "image", "patches")},
        {"optimizer": "muon", "separate": SEPARABLE, "freeze": ("text",)},
    ],
    ids=str,
)
def test_weights_gradients_optimizer_and_average_are_exact(fields):
    fields = dict(fields)
    config = replace(CONFIG, optim=replace(CONFIG.optim, name=fields.pop("optimizer", "adamw")))
    config = with_model(config, **fields)
    model = build_model(config.model)
    freeze(model, config.optim.freeze)
    planned = estimate_memory(config)
    optimizers, ema = build_optimizers(model, config.optim), init_ema(model)
    loop.gradients(model, micro_batches(config), config, 0)
    for optimizer in optimizers:
        optimizer.step()
    own, grads = list(model.parameters()), [p.grad for p in model.parameters() if p.grad is not None]
    moments = [x for o in optimizers for s in o.state.values() for x in s.values() if x.ndim]  # all but the steps
    for name, tensors in (("weights", own), ("gradients", grads), ("optimizer", moments), ("average", ema)):
        assert planned[name] == sum(t.numel() * t.element_size() for t in tensors)
    assert estimate_memory(replace(CONFIG, optim=replace(CONFIG.optim, ema=0.0)))["average"] == 0


def with_checkpointing(config, mode: str):
    return replace(config, train=replace(config.train, checkpointing=mode))


def dense(batch, model):
    return dense_mask(batch.document, batch.image, batch.hidden)


def kept_for_backward(config, batch, mask_of) -> int:
    """Bytes of the storages that autograd keeps of a real forward, the weights themselves left out.

    What checkpointing keeps, torch keeps apart from autograd: inputs of blocks, products, attention are added by hand.
    """
    model = build_model(config.model)
    freeze(model, config.optim.freeze)
    recompute(model.layers, config.train.checkpointing)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps the address from being used again
        return tensor

    noise = loop.draw_noise(batch, config.diffusion, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loop.losses(model, batch, noise, config.diffusion, 0.0, mask_of=mask_of)
    total = sum(size for size, _ in kept.values())
    m, of_position = config.model, 0
    if config.train.checkpointing != "none":
        of_position += 4 * m.dim
    if config.train.checkpointing == "selective":
        q, kv = m.n_heads * m.head_dim, m.kv_heads * m.head_dim
        of_position += 2 * (2 * q + 2 * kv + 2 * m.dim + 2 * m.hidden_dim) + 4 * m.n_heads  # attention's in float32
    return total + m.n_layers * batch.tokens.numel() * of_position


@pytest.mark.parametrize("on", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_layers": 8},
        {"dim": 128, "ffn_dim": 512},
        {"head_width": 64, "qk_norm": True, "n_kv_heads": 2},
        {"refine_width": 128},
        UNET | {"unet_width": 32},
        {"separate": SEPARABLE},
        {"lora": LORA, "freeze": ("text", "image")},
        {"norm": "post"},
        CLEAN,
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps_of_a_real_step(fields, on):
    config = with_model(BF16, **({"n_layers": 6} | fields))
    (batch,) = micro_batches(config)
    found = rehearse(config, batch, on=on)
    real = kept_for_backward(config, batch, dense if on == "cuda" else row_mask)
    assert found.activations + found.casts == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointed_blocks_keep_their_input_or_products_too(checkpointing):
    config = with_checkpointing(with_model(BF16, n_layers=6), checkpointing)
    (batch,) = micro_batches(config)
    found, real = rehearse(config, batch), kept_for_backward(config, batch, dense)
    assert found.activations + found.casts == pytest.approx(real, rel=0.05)


def test_each_checkpointing_keeps_less_than_the_one_before_it():
    kept = [estimate_memory(with_checkpointing(BF16, mode))["activations (about)"] for mode in MODES]
    assert kept == sorted(kept, reverse=True) and kept[0] > 2 * kept[2]


def test_the_parts_add_up_to_what_lasts_and_the_rehearsed_peak():
    memory = estimate_memory(BF16)
    found = rehearse(BF16, presumed(BF16, BF16.train.rows))
    lasting = sum(memory[name] for name in ("weights", "optimizer", "average"))  # gradients are in the peak
    assert sum(memory.values()) == pytest.approx(lasting + found.peak)


def test_gradients_are_there_beside_the_activations_only_of_several_micro_batches():
    wide = with_model(BF16, dim=256, ffn_dim=1024)
    one = estimate_memory(replace(wide, train=replace(wide.train, rows=4)))
    two = estimate_memory(replace(wide, train=replace(wide.train, rows=8, micro_batch=4)))
    assert one["activations (about)"] == pytest.approx(two["activations (about)"], rel=0.02)
    assert sum(two.values()) - sum(one.values()) > 0.5 * one["gradients"]


def test_weights_of_their_own_for_patches_cost_memory():
    assert estimate_memory(with_model(CONFIG, separate=SEPARABLE))["weights"] > 1.5 * estimate_memory(CONFIG)["weights"]


def test_shards_part_what_lasts_and_replicas_do_not():
    whole = estimate_memory(BF16)
    for cluster, parts in ((Cluster(8), 8), (Cluster(8, shards=4), 4)):
        of_rank = estimate_memory(BF16, cluster)
        for name in ("weights", "gradients", "optimizer", "average"):
            assert of_rank[name] == whole[name] / parts
        assert of_rank["activations (about)"] == pytest.approx(whole["activations (about)"] / 8, rel=0.1)
        assert "weights in bf16" not in of_rank and of_rank["blocks in flight (at most)"] > 0


def test_ranks_that_share_rows_keep_their_positions_and_the_keys_of_all():
    compiled = replace(BF16, train=replace(BF16.train, compile=True))  # holds no mask, whose size is no longer the same
    alone, shared = (estimate_memory(compiled, Cluster(8, context=c))["activations (about)"] for c in (1, 2))
    m, rows = BF16.model, BF16.train.rows // 4
    keys = 2 * 2 * m.kv_heads * m.head_dim * m.n_layers * rows * BF16.train.seq_len // 2
    assert shared - keys == pytest.approx(alone, rel=0.1)  # twice the rows, of half the positions


@pytest.mark.parametrize("fields", [{}, CODES, CLEAN, {"sides": 4}], ids=str)
def test_presumed_rows_are_full_and_have_the_images_of_the_config(fields):
    config = with_model(CONFIG, **fields)
    config = replace(config, data=replace(config.data, image_share=0.2), train=replace(config.train, seq_len=512))
    batch = presumed(config, config.train.rows)
    assert (batch.document >= 0).all()
    images = (batch.tokens == SPECIAL.boi).sum().item()
    assert images == pytest.approx(count_images(config), rel=0.15)


def test_what_is_in_float8_or_frozen_is_kept_in_less():
    def kept(config) -> int:
        return rehearse(config, presumed(config, 8)).activations

    whole = with_model(BF16, separate=SEPARABLE)
    assert kept(replace(whole, train=replace(whole.train, float8=True))) < kept(whole)
    assert kept(with_model(whole, freeze=("text",))) < kept(whole)
