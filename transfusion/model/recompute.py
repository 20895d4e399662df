"""What a layer keeps for the way back, and what it computes there again.

    none        all that its gradients need
    selective   the results of matrix products and of attention; norms, rotations, silu are computed again
    full        what goes into it; all of it is computed again, a third more work

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); selective: Korthikanti et al. 2022
(arXiv 2205.05198).
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
]


def recompute(layers: Iterable[nn.Module], mode: str):
    """Lets each of the layers keep what the mode says."""
    if mode == "none":
        return
    how = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in them is drawn at random
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, **how)
