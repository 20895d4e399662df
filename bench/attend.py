"""Attention alone, three ways to the same mask: dense (SDPA reads a boolean tensor), documents (varlen.py), flex.

q, k, v [rows, heads, L, K] of the case's layout -> mask, forward, backward     (Flex has no backward on a CPU)
"""

import torch
import torch.nn.functional as F
from clock import Clock
from content import Case, content
from ours import Repeat, batch_of
from torch.nn.attention.flex_attention import flex_attention

from transfusion.model.mask import block_mask, dense_mask
from transfusion.model.varlen import varlen_attention, varlen_mask

WAYS = {  # name -> (mask of a layout, attention under it)
    "dense": (dense_mask, F.scaled_dot_product_attention),
    "documents": (varlen_mask, varlen_attention),
    "flex": (block_mask, lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask)),
}
WAYS["flex, compiled"] = WAYS["flex"]


def attention(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """Mask, forward and backward of one layer's attention."""
    build, attend = WAYS[case.way]
    if case.way == "flex, compiled":
        attend = torch.compile(attend)
    backward = case.device == "cuda" or not case.way.startswith("flex")
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    batch = batch_of(case, content(case, 0)).to(case.device)
    (B, L), layout = batch.tokens.shape, (batch.document, batch.image, batch.hidden)
    random = torch.Generator().manual_seed(0)
    shape = (B, L, case.heads, case.dim // case.heads)
    *qkv, g = (torch.randn(shape, generator=random).to(case.device, dtype).transpose(1, 2) for _ in range(4))
    qkv = [x.detach().requires_grad_(backward) for x in qkv]

    def repeat(i: int):
        with clock("mask"):
            mask = build(*layout)
        with clock("forward"):
            out = attend(*qkv, mask)
        if backward:
            with clock("backward"):
                torch.autograd.grad(out, qkv, g)

    def pairs() -> int:
        return (dense_mask(*layout)[:, 0] & (batch.document >= 0)[:, None]).sum().item()

    return repeat, {"units": {"positions": case.rows * case.positions}, "pairs": pairs}
