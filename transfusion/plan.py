"""What a run will need, from its config alone: nothing is read but the config, nothing is run.

FLOPs of a step    6 * trunk * positions  +  12 * n_layers * n_heads * K * keys * positions  +
                   6 * head * text positions  +  3 * patch layers of an image, forward * images
                   (forward 2, backward 4; keys seen by a position: at most L / 2 for text, exactly known only once the
                   rows are packed)
                   4 instead of 6 for what is frozen: gradients go through it, it has none of its own
memory             weights, and of those that train gradients, two moments and the average, at 4 bytes; activations
                   kept for backward

A position goes through one path, so weights of their own for patches cost memory and no FLOPs.

Patch layers are counted by torch itself, in a pass on the meta device, where tensors have shapes and no numbers: so the
count is right for whatever stands in PATCHES, convolutions and all.
"""

import math

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from transfusion.codec.codec import patch_grid
from transfusion.data.documents import has_copies
from transfusion.model.fold import Grids
from transfusion.model.head import LOGITS
from transfusion.model.mask import dense_mask
from transfusion.model.transformer import ModelConfig, build_model, parameter_counts
from transfusion.optim import freeze, trained
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


def patch_layers(config: ModelConfig, grids: Grids) -> tuple[dict[str, int], int]:
    """(FLOPs of a forward pass of images through the patch layers, by part; numbers that autograd keeps of it)."""
    model, n = build_model(config, "meta"), sum(rows * columns for rows, columns in grids)
    own = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    kept: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    with torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor):
        z, h, t = torch.empty(n, config.patch_dim), torch.empty(n, config.dim), torch.empty(len(grids))
        image, grid = torch.empty(n, dtype=torch.long), torch.empty(n, 2)
        with FlopCounterMode(display=False) as inp:
            _, skips = model.patches.encode(z, t, image, grid, grids)
        with FlopCounterMode(display=False) as out:
            p = model.patches.decode(h, skips, t, grids)
        with FlopCounterMode(display=False) as refine:
            if model.refine is not None:
                model.refine(p, t, grids)
    parts = {"in": inp, "out": out, "refine": refine}
    flops = {name: counter.get_total_flops() for name, counter in parts.items()}
    return flops, sum(tensor.untyped_storage().nbytes() // 4 for ref, tensor in kept.items() if ref not in own)


def flops_by_part(
    config: RunConfig, positions: float, patches: float, targets: float, pairs: float, of_layers: dict[str, float]
) -> dict[str, float]:
    """FLOPs forward and backward, of so many positions of which some are patches, targets of the text head, pairs that
    attention looks at, and patch layers whose forward passes take `of_layers`."""
    m, frozen = config.model, config.optim.freeze
    parts = dict(parameter_counts(build_model(m, "meta")))
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
    of_layers, _ = patch_layers(m, (grid,)) if m.patches != "codes" else ({}, 0)
    patches = math.prod(grid) * images  # codes are targets of the text head
    of_layers = {name: n * images for name, n in of_layers.items()}
    return flops_by_part(config, positions, patches, positions - patches, c.seq_len / 2 * positions, of_layers)


def count_packed(config: RunConfig, micro: list[Batch]) -> float:
    """FLOPs of one step as it is packed: attention where the mask allows it, heads where something is predicted."""
    total = 0.0
    for batch in micro:
        seen = dense_mask(batch.document, batch.image, batch.hidden, not config.model.causal_images)[:, 0]
        pairs = (seen & (batch.document >= 0)[:, None]).sum().item()  # what padding sees counts for nothing
        of_layers, _ = patch_layers(config.model, batch.grids) if batch.grids else ({}, 0)
        counts = (batch.tokens.numel(), len(batch.patch_at), batch.n_targets, pairs)
        total += sum(flops_by_part(config, *counts, of_layers).values())
    return total


def count_6nd(config: RunConfig) -> float:
    """FLOPs of one step as the paper counts them, 6 x parameters x positions; of two paths a position takes one."""
    parts = dict(parameter_counts(build_model(config.model, "meta")))
    return 6.0 * (sum(parts.values()) - parts.get("image path", 0)) * config.train.rows * config.train.seq_len


def estimate_memory(config: RunConfig) -> dict[str, float]:
    """Bytes on one device by part. Activations: what autograd keeps of each layer under bf16 autocast. Logits: those
    held at once, and what they give the head's matrix.

    On a CPU in bf16 attention's scores come on top, of documents of up to 1,024 positions: 2 bytes for each pair that
    a strip of model/varlen.py holds, head and layer.
    """
    m, c = config.model, config.train
    model = build_model(m, "meta")
    freeze(model, config.optim.freeze)
    weights, train = (4.0 * sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model)))
    positions = c.rows * c.seq_len / c.accumulate
    # Bytes a position. float32: the residual stream and its norm, twice; bf16: that norm's, q, k, v, the heads'
    # result, and w1 x, its silu, w3 x and their product.
    q_dim, kv_dim = m.n_heads * m.head_dim, m.kv_heads * m.head_dim
    layer = 22 * m.dim + 4 * (q_dim + kv_dim) + 8 * m.hidden_dim + (8 * (q_dim + kv_dim) if m.qk_norm else 0)
    _, kept = patch_layers(m, (grid_of(config),)) if m.patches != "codes" else ({}, 0)  # of an image, here in bf16
    return {
        "weights": weights,
        "gradients": train,
        "optimizer": 2 * train,
        "average": train if config.optim.ema else 0.0,
        "activations (about)": positions * m.n_layers * layer + 2.0 * kept * count_encoded(config) / c.accumulate,
        "logits (at most)": 10.0 * min(positions * m.vocab_size, LOGITS) + 4.0 * m.vocab_size * m.dim,
    }


def plan(config: RunConfig) -> str:
    """The plan as a table."""
    parts = dict(parameter_counts(build_model(config.model, "meta")))
    flops, memory = count_flops(config), estimate_memory(config)
    positions = config.train.rows * config.train.seq_len

    length = (
        f"the run: {config.train.steps:,} steps of {positions:,} positions = {config.train.steps * positions:,} "
        f"positions, {config.train.steps * sum(flops.values()):.3g} FLOP"
    )
    if not config.train.steps:
        length = f"the run: as many steps of {positions:,} positions as fit into {config.train.minutes:g} minutes"

    def rows(title: str, values: dict[str, float], scale: float, unit: str) -> list[str]:
        total = sum(values.values())
        lines = [f"  {name:26}{value / scale:12,.2f} {unit}" for name, value in values.items()]
        return [title, *lines, f"  {'total':26}{total / scale:12,.2f} {unit}", ""]

    return "\n".join(
        [
            *rows("parameters", parts, 1e6, "M"),
            *rows("a step, forward and backward", flops, 1e9, "GFLOP"),
            *rows("memory of one device", memory, 2**20, "MiB"),
            length,
            f"a step counted as the paper counts, 6 N D: {count_6nd(config) / 1e9:,.2f} GFLOP",
        ]
    )
