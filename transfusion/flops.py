"""FLOPs of a training step: of a config, before anything is read, and of rows as they are packed.

6 * trunk * positions  +  12 * n_layers * n_heads * K * pairs  +  6 * head * text positions  +
                   3 * patch layers of an image, forward * images
                   (forward 2, backward 4; pairs of a position and a key that it sees: at most L / 2 keys a position of
                   text, exactly known only once the rows are packed)
                   4 instead of 6 for what is frozen: gradients go through it, it has none of its own

A position goes through one path, so weights of their own for patches cost memory and no FLOPs.

Patch layers are counted by torch itself, in a pass on the meta device, where tensors have shapes and no numbers: so the
count is right for whatever stands in PATCHES, convolutions and all. They add up over images, so each size is counted
once.
"""

import math
from collections import Counter
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from transfusion.codec.codec import patch_grid
from transfusion.data.documents import has_copies
from transfusion.model.fold import Grids
from transfusion.model.mask import pairs_seen
from transfusion.model.transformer import ModelConfig, build_model, parameter_counts
from transfusion.run import RunConfig
from transfusion.sequence import Batch


def grid_of(config: RunConfig) -> tuple[int, int]:
    """(rows, columns) of the patches of an image; of several sizes the first stands for all."""
    return patch_grid(config.data.sizes[0], config.data.factor, config.model.patch_size)


def copies(config: RunConfig) -> float:
    """Clean copies an image: of captioned ones; what documents with images anywhere have is only known once read."""
    return (1 - config.data.caption_first) * has_copies(config.data, config.model.patches == "codes")


def count_images(config: RunConfig) -> float:
    """Images of a step whose rows are filled to their last position; captions make it a little less."""
    positions = math.prod(grid_of(config)) * (1 + copies(config))
    positions += 4 if config.model.sides else 2  # <boi> [sides] patches <eoi>
    return config.train.rows * config.train.seq_len * config.data.image_share / positions


def count_encoded(config: RunConfig) -> float:
    """Images of a step that go through the patch layers, clean copies counted too; codes do not."""
    return count_images(config) * (1 + copies(config)) * (config.model.patches != "codes")


@lru_cache
def parameters_of(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, as `parameter_counts` has them."""
    return dict(parameter_counts(build_model(config, "meta")))


def patch_layers(config: ModelConfig, grids: Grids) -> dict[str, int]:
    """FLOPs of a forward pass of images through the patch layers, by part."""
    flops = {"in": 0, "out": 0, "refine": 0}
    for grid, images in Counter(grids).items():
        for name, n in of_an_image(config, grid).items():
            flops[name] += images * n
    return flops


@lru_cache
def of_an_image(config: ModelConfig, grid: tuple[int, int]) -> dict[str, int]:
    """`patch_layers` of one image of so many rows and columns of patches."""
    model, n, grids = build_model(config, "meta"), math.prod(grid), (grid,)
    with torch.device("meta"), torch.no_grad():
        z, h, t = torch.empty(n, config.patch_dim), torch.empty(n, config.dim), torch.empty(1)
        image, place = torch.empty(n, dtype=torch.long), torch.empty(n, 2)
        with FlopCounterMode(display=False) as inp:
            _, skips = model.patches.encode(z, t, image, place, grids)
        with FlopCounterMode(display=False) as out:
            p = model.patches.decode(h, skips, t, grids)
        with FlopCounterMode(display=False) as refine:
            if model.refine is not None:
                model.refine(p, t, grids)
    parts = {"in": inp, "out": out, "refine": refine}
    return {name: counter.get_total_flops() for name, counter in parts.items()}


def flops_by_part(
    config: RunConfig, positions: float, patches: float, targets: float, pairs: float, of_layers: dict[str, float]
) -> dict[str, float]:
    """FLOPs forward and backward, of so many positions of which some are patches, targets of the text head, pairs that
    attention looks at, and patch layers whose forward passes take `of_layers`."""
    m, frozen = config.model, config.optim.freeze
    parts = parameters_of(m)
    own, texts = parts.get("image path", 0), positions - patches
    of_text, of_image = (4.0 if path in frozen else 6.0 for path in ("text", "image"))
    # nothing before `in` wants a gradient: where it is frozen, it has no backward pass at all
    of_patches = {"in": 1.0, "out": 2.0, "refine": 2.0} if "patches" in frozen else dict.fromkeys(of_layers, 3.0)
    flops = {
        "trunk": of_text * (parts["trunk"] * positions - own * patches) + of_image * own * patches,
        "adapters": 6.0 * (parts.get("text adapters", 0) * texts + parts.get("image adapters", 0) * patches),
        "attention (about)": 12.0 * m.n_layers * m.n_heads * m.head_dim * pairs,
        "text head": of_text * m.dim * m.vocab_size * targets,
        "patch layers": sum(of_patches[name] * n for name, n in of_layers.items()),
    }
    return flops if m.lora.r else {name: value for name, value in flops.items() if name != "adapters"}


def count_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of one step by part, forward and backward, for rows filled to their last position."""
    m, c, images, grid = config.model, config.train, count_encoded(config), grid_of(config)
    positions = c.rows * c.seq_len
    of_layers = patch_layers(m, (grid,)) if m.patches != "codes" else {}
    patches = math.prod(grid) * images  # codes are targets of the text head
    of_layers = {name: n * images for name, n in of_layers.items()}
    return flops_by_part(config, positions, patches, positions - patches, c.seq_len / 2 * positions, of_layers)


def count_packed(config: RunConfig, micro: list[Batch], padding: bool = True) -> float:
    """FLOPs of one step as it is packed: attention where the mask allows it, heads where something is predicted.

    The trunk computes padding too, of which nothing is learned: without `padding` it counts for nothing.
    """
    total = 0.0
    for batch in micro:
        real = batch.document >= 0
        pairs = pairs_seen(batch.document, batch.image, batch.hidden, not config.model.causal_images)
        pairs = (pairs * real).sum().item()  # what padding sees counts for nothing
        of_layers = patch_layers(config.model, batch.grids) if batch.grids else {}
        positions = real.numel() if padding else int(real.sum())
        counts = (positions, len(batch.patch_at), batch.n_targets, pairs)
        total += sum(flops_by_part(config, *counts, of_layers).values())
    return total


def count_6nd(config: RunConfig) -> float:
    """FLOPs of one step as the paper counts them, 6 x parameters x positions; of two paths a position takes one."""
    parts = parameters_of(config.model)
    return 6.0 * (sum(parts.values()) - parts.get("image path", 0)) * config.train.rows * config.train.seq_len
