"""What a run will need, from its config alone: nothing is read but the config, nothing is run.

FLOPs of a step    6 * trunk * positions  +  12 * n_layers * dim * keys * positions  +  6 * head * text positions  +
                   6 * patch layers * patches  +  6 * convolutions * places                   (forward 2, backward 4;
                   keys seen by a position: at most L / 2 for text, exactly known only once the rows are packed)
                   4 instead of 6 for what is frozen: gradients go through it, it has none of its own
memory             weights, and of those that train gradients, two moments and the average, at 4 bytes; activations
                   kept for backward

A position goes through one path, so weights of their own for patches cost memory and no FLOPs.
"""

import math

from transfusion.codec import CODECS
from transfusion.model.refine import FACTOR
from transfusion.model.transformer import build_model, parameter_counts
from transfusion.optim import FREEZABLE, freeze, trained
from transfusion.run import RunConfig


def count_patches(config: RunConfig) -> float:
    """Patches of a step whose rows are filled to their last position; captions make it a little less."""
    n = math.prod(CODECS[config.data.codec].grid(config.data.image_size, config.model.patch_size))  # of an image
    return config.train.rows * config.train.seq_len * config.data.image_share * n / (n + 2)


def count_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of one step by part, forward and backward, for rows filled to their last position."""
    m, c, patches = config.model, config.train, count_patches(config)
    model = build_model(m, "meta")
    parts, positions = dict(parameter_counts(model)), c.rows * c.seq_len
    kernels = sum(p.numel() for p in model.refine.parameters() if p.ndim == 4) if model.refine is not None else 0
    of_text, of_image, of_patches = (4.0 if part in config.optim.freeze else 6.0 for part in FREEZABLE)
    own, texts = parts.get("image path", 0), positions - patches
    flops = {
        "trunk": of_text * (parts["trunk"] * positions - own * patches) + of_image * own * patches,
        "adapters": 6.0 * (parts.get("text adapters", 0) * texts + parts.get("image adapters", 0) * patches),
        "attention (at most)": 12.0 * m.n_layers * m.n_heads * m.head_dim * (c.seq_len / 2) * positions,
        "text head": of_text * m.dim * m.vocab_size * texts,
        "patch layers": of_patches * (2 * m.dim * m.patch_dim + kernels * (m.patch_size // FACTOR) ** 2) * patches,
    }
    return flops if m.lora.r else {name: value for name, value in flops.items() if name != "adapters"}


def estimate_memory(config: RunConfig) -> dict[str, float]:
    """Bytes on one device by part. Activations: what autograd keeps of each layer under bf16 autocast; the logits."""
    m, c = config.model, config.train
    model = build_model(m, "meta")
    freeze(model, config.optim.freeze)
    weights, train = (4.0 * sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model)))
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
        "gradients": train,
        "optimizer": 2 * train,
        "average": train if config.optim.ema else 0.0,
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
