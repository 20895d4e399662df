"""What a run will need, from its config alone: nothing is read but the config, nothing is run.

FLOPs of a step    6 * trunk * positions  +  12 * n_layers * dim * keys * positions  +  6 * head * text positions  +
                   6 * patch layers * patches  +  6 * convolutions * places                   (forward 2, backward 4;
                   keys seen by a position: at most L / 2 for text, exactly known only once the rows are packed)
memory             weights, gradients, two moments and the average at 4 bytes; activations kept for backward
"""

import math

from transfusion.codec.codec import patch_grid
from transfusion.model.refine import FACTOR
from transfusion.model.transformer import build_model, parameter_counts
from transfusion.run import RunConfig


def count_patches(config: RunConfig) -> float:
    """Patches of a step whose rows are filled to their last position; captions make it a little less."""
    side = config.data.image_size
    n = math.prod(patch_grid((side, side), config.data.factor, config.model.patch_size))  # of an image
    return config.train.rows * config.train.seq_len * config.data.image_share * n / (n + 2)


def count_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of one step by part, forward and backward, for rows filled to their last position."""
    m, c, patches = config.model, config.train, count_patches(config)
    model = build_model(m, "meta")
    parts, positions = dict(parameter_counts(model)), c.rows * c.seq_len
    kernels = sum(p.numel() for p in model.refine.parameters() if p.ndim == 4) if model.refine is not None else 0
    return {
        "trunk": 6.0 * parts["trunk"] * positions,
        "attention (at most)": 12.0 * m.n_layers * m.n_heads * m.head_dim * (c.seq_len / 2) * positions,
        "text head": 6.0 * m.dim * m.vocab_size * (positions - patches),
        "patch layers": 6.0 * (2 * m.dim * m.patch_dim + kernels * (m.patch_size // FACTOR) ** 2) * patches,
    }


def estimate_memory(config: RunConfig) -> dict[str, float]:
    """Bytes on one device by part. Activations: what autograd keeps of each layer under bf16 autocast; the logits."""
    m, c = config.model, config.train
    weights = 4.0 * sum(n for _, n in parameter_counts(build_model(m, "meta")))
    positions = c.rows * c.seq_len / c.accumulate
    # Bytes a position. float32: the residual stream and its norm, twice; bf16: each matrix's input, q, k, v, the heads'
    # result, and w1 x, its silu, w3 x and their product.
    kv_dim = m.kv_heads * m.head_dim
    layer = 32 * m.dim + 4 * kv_dim + 8 * m.hidden_dim + (8 * (m.dim + kv_dim) if m.qk_norm else 0)
    # Bytes a place of the convolutions, bf16: their inputs, and those of each silu.
    refine = 8 * m.channels + 12 * m.refine_width if m.refine_width else 0
    places = count_patches(config) / c.accumulate * (m.patch_size // FACTOR) ** 2
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "average": weights if config.optim.ema else 0.0,
        "activations (about)": positions * m.n_layers * layer + places * refine,
        "logits (at most)": positions * m.vocab_size * 10.0,
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
        ]
    )
