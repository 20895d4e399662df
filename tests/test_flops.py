"""FLOPs of the plan against those that torch counts in a real step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_rows import SPECIAL
from test_documents import corpus_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion import train as loop
from transfusion.data.arrays import Held
from transfusion.data.documents import DataConfig
from transfusion.data.loader import Packer
from transfusion.flops import copies, count_6nd, count_flops, count_images, count_packed, patch_layers
from transfusion.model.lora import TARGETS, LoraConfig
from transfusion.model.mask import dense_mask
from transfusion.model.transformer import SEPARABLE, ModelConfig, build_model, row_mask
from transfusion.optim import freeze
from transfusion.run import RunConfig, TrainConfig
from transfusion.sequence import Format, Image, Text, collate, lay_out

CONFIG = RunConfig(
    model=ModelConfig(dim=64, n_layers=3, n_heads=4, ffn_dim=176, vocab_size=512, patch_size=4, channels=3),
    data=DataConfig(image_size=16, factor=1),
    train=TrainConfig(steps=1000, rows=8, seq_len=128, precision="fp32"),
)


def micro_batches(config: RunConfig):
    """A step's batches of random captions and text, with the config's sizes."""
    m, g, codes = config.model, torch.Generator().manual_seed(0), N_CODES * (config.model.patches == "codes")
    fmt = Format(SPECIAL, m.patch_size, m.image_positions, m.vocab_size - m.sides - codes, m.sides, codes)
    words = torch.randint(10, fmt.text_tokens, (6000,), generator=g).tolist()
    shares = {name: getattr(config.data, name) for name in ("image_share", "caption_first", "conditioning")}
    corpus = replace(corpus_of([[words[i : i + 1]] for i in range(20)], [words], **shares), fmt=fmt)
    train, twice = corpus.captions["train"], config.data.image_size // 8
    images = [i.repeat(twice, 0).repeat(twice, 1) for i in train.images]
    latents = Held([i[..., 0].astype(int) % N_CODES for i in images]) if codes else None
    corpus.captions["train"] = replace(train, images=Held(images), latents=latents)
    return Packer(corpus, corpus.fmt, 1, config.train.rows, config.train.seq_len, config.train.micro_batch).batches(0)


N_CODES = 7
CODES = {"patches": "codes", "patch_size": 1, "data": {"image_size": 8}}
CLEAN = {"data": {"conditioning": "clean", "caption_first": 0.4}}
UNET = {"patches": "unet", "unet_width": 8, "unet_blocks": 2}
LORA = LoraConfig(8, target_modules=TARGETS)


def with_model(config: RunConfig, freeze: tuple[str, ...] = (), data: dict | None = None, **fields) -> RunConfig:
    model, optim = replace(config.model, **fields), replace(config.optim, freeze=freeze)
    return replace(config, model=model, optim=optim, data=replace(config.data, **data or {}))


@pytest.mark.parametrize(
    "share, micro_batch, fields",
    [
        (0.0, 0, {}),
        (0.5, 2, {}),
        (0.8, 0, {}),
        (0.8, 0, {"head_width": 48}),
        (0.8, 2, {"refine_width": 32}),
        (0.8, 2, UNET),
        (0.8, 0, CLEAN),
        (0.8, 2, CLEAN | UNET | {"sides": 4}),
        (0.0, 0, UNET),
        (0.8, 0, UNET | {"freeze": ("patches",)}),
        (0.8, 0, {"refine_width": 32, "freeze": ("patches",)}),
        (0.0, 0, {"separate": SEPARABLE}),
        (0.5, 0, {"separate": SEPARABLE}),
        (0.8, 0, UNET | {"separate": SEPARABLE, "freeze": ("text",)}),
        (0.8, 0, {"separate": ("ffn",), "freeze": ("text",)}),
        (0.5, 0, {"separate": SEPARABLE, "freeze": ("text",)}),
        (0.5, 0, {"lora": LORA, "freeze": ("text", "image")}),
        (0.5, 0, {"lora": LoraConfig(8, paths=("image",)), "separate": SEPARABLE, "freeze": ("text", "image")}),
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts_in_a_step(share, micro_batch, fields, monkeypatch):
    config = replace(CONFIG, data=replace(CONFIG.data, image_share=share))
    config = with_model(replace(config, train=replace(config.train, micro_batch=micro_batch)), **fields)
    model, batches = build_model(config.model), micro_batches(config)
    freeze(model, config.optim.freeze)
    images = sum(batch.n_images for batch in batches)
    assert images <= count_images(config) <= 1.2 * images  # captions take positions that the plan knows nothing of
    copied = sum(len(batch.grids) for batch in batches) / images - 1 if images else 0
    assert copied == pytest.approx(copies(config), abs=0.15) and bool(copied) == bool(copies(config) * share)
    monkeypatch.setattr("transfusion.flops.count_images", lambda config: images)
    monkeypatch.setattr("transfusion.flops.copies", lambda config: copied)
    monkeypatch.setattr(
        "transfusion.loss.row_mask", lambda b, model, *queries: dense_mask(b.document, b.image, b.hidden)
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no other of a CPU
        loop.gradients(model, batches, config, 0)
    operations = counter.get_flop_counts()["Global"]
    attention = operations.pop(torch.ops.aten.bmm)
    planned = count_flops(config)
    assert attention == 2 * planned.pop("attention (about)")  # the dense mask computes the hidden half of pairs too
    assert sum(planned.values()) == pytest.approx(sum(operations.values()), rel=0.04)


PATCHES = {
    "linear": {},
    "linear, single cells": {"patch_size": 1},
    "time scale": {"time_scale": True, "patch_positions": True},
    "refine": {"refine_width": 5},
    "unet": {"patches": "unet", "patch_size": 2, "unet_width": 6, "unet_blocks": 3},
    "unet of three stages": {"patches": "unet", "patch_size": 8, "unet_width": 5, "unet_blocks": 2},
}


@pytest.mark.parametrize("patches", PATCHES.values(), ids=PATCHES)
def test_flops_of_the_patch_layers_are_those_of_the_layers_one_by_one(patches):
    grids = ((2, 3), (1, 4), (2, 3))
    m = replace(CONFIG.model, **patches)
    n, images, k, dim = sum(r * c for r, c in grids), len(grids), m.patch_size, m.dim
    wanted = {"in": 2 * n * dim * m.patch_dim, "out": 2 * n * dim * m.patch_dim, "refine": 0}
    wanted["in"] += 2 * images * (256 * dim + dim * dim * (1 + m.time_scale))
    if m.refine_width:
        w, folded = m.refine_width, 4 * m.channels
        wanted["refine"] = 2 * (n * (k // 2) ** 2 * 9 * (2 * folded * w + 2 * w * w) + images * 256 * w)
    if m.patches == "unet":
        w = m.unet_width
        sums = {"in": k * k * 9 * m.channels * w, "out": k * k * 9 * m.channels * w}  # products a patch
        once = {"in": 256 * w, "out": 256 * w}  # products an image
        before = w
        for s in range({2: 1, 8: 3}[k]):
            c, places = w * 2**s, (k // 2**s) ** 2
            below = 2 * c if s < {2: 0, 8: 2}[k] else c
            for half, first in (("in", before), ("out", 2 * c)):
                sums[half] += places * (9 * (first * c + (2 * m.unet_blocks - 1) * c * c) + first * c * (first != c))
                once[half] += m.unet_blocks * w * c
            sums["in"] += places // 4 * 9 * c * c
            sums["out"] += places * 9 * below * c
            before = c
        wanted = {half: 2 * (n * (sums[half] + before * dim) + images * once[half]) for half in sums} | {"refine": 0}
    assert patch_layers(m, grids) == wanted


@pytest.mark.parametrize("patches", PATCHES.values(), ids=PATCHES)
def test_flops_of_a_forward_pass_are_exactly_those_that_torch_counts(patches):
    config = replace(CONFIG, model=replace(CONFIG.model, **patches))
    grid, m = (16 // config.model.patch_size,) * 2, config.model
    fmt = Format(SPECIAL, m.patch_size)
    images = [Image(np.zeros((3, 16, 16), np.float32)) for _ in range(2)]
    b = collate([[lay_out([Text(np.arange(9, 15)), image], fmt)] for image in images], grid[0] ** 2 + 9, fmt)
    model = build_model(m)
    arguments = (b.place, row_mask(b, model), b.patches, b.t_max, b.patch_image, b.grids, b.patch_at, b.text_at)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(b.tokens, *arguments)
    operations = counter.get_flop_counts()["Global"]
    operations.pop(torch.ops.aten.bmm)
    trunk = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2) * b.tokens.numel()
    flops = patch_layers(m, b.grids)
    assert sum(operations.values()) == 2 * (trunk + m.dim * m.vocab_size * b.n_targets) + sum(flops.values())


def test_weights_of_their_own_for_patches_cost_no_flops():
    assert count_flops(with_model(CONFIG, separate=SEPARABLE)) == count_flops(CONFIG)


def test_padding_may_count_for_nothing_and_then_no_more_of_it_changes_anything():
    def flops(seq_len: int, padding: bool) -> float:
        fmt = Format(SPECIAL, 4)
        image = Image(np.zeros((3, 16, 16), np.float32))
        row = [lay_out([Text(np.arange(9, 15)), image, Text(np.arange(9, 12))], fmt)]
        return count_packed(CONFIG, [collate([row], seq_len, fmt)], padding=padding)

    assert flops(27, False) == flops(27, True) == flops(128, False)
    model = build_model(CONFIG.model)
    trunk = sum(p.numel() for p in [*model.layers.parameters(), *model.norm.parameters()])
    assert flops(128, True) - flops(27, True) == 6 * trunk * (128 - 27)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"separate": SEPARABLE, "freeze": ("text",)},
        UNET,
        {"lora": LORA, "freeze": ("text", "image")},
        CODES,
        CLEAN,
        CLEAN | UNET | {"separate": SEPARABLE, "sides": 4},
        {"causal_images": True},
        CLEAN | {"causal_images": True},
    ],
    ids=str,
)
def test_flops_of_packed_rows_are_those_that_torch_counts_of_them_but_for_pairs_that_the_mask_forbids(fields):
    config = with_model(CONFIG, **fields)
    model, batches = build_model(config.model), micro_batches(config)
    freeze(model, config.optim.freeze)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loop.gradients(model, batches, config, 0)
    operations = counter.get_flop_counts()["Global"]
    operations.pop(torch.ops.aten.bmm)
    assert any(b.hidden.any() for b in batches) == (config.data.conditioning == "clean")
    m, pairs = config.model, 0
    for b in batches:
        for d, im, hidden in zip(b.document.tolist(), b.image.tolist(), b.hidden.tolist()):
            for q, k in np.ndindex(len(d), len(d)):
                mates = im[q] == im[k] >= 0
                before = k <= q or (mates and not m.causal_images)
                pairs += d[q] == d[k] >= 0 and before and (mates or not hidden[k])
    attention = 12.0 * m.n_layers * m.n_heads * m.head_dim * pairs
    assert count_packed(config, batches) - attention == pytest.approx(sum(operations.values()), rel=0.01)


def test_6nd_is_six_times_what_a_position_goes_through():
    dense = sum(p.numel() for p in build_model(CONFIG.model).parameters())
    positions = CONFIG.train.rows * CONFIG.train.seq_len
    assert count_6nd(CONFIG) == 6 * dense * positions
    assert count_6nd(with_model(CONFIG, separate=SEPARABLE)) == count_6nd(CONFIG)
