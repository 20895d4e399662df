"""Attention alone, two ways to the same mask: dense (SDPA reads a boolean tensor), by documents (varlen.py).

q, k, v [rows, heads, L, K] of the case's layout -> forward, backward; the mask serves all layers, and is made before
"""

import torch
import torch.nn.functional as F
from answer import Repeat
from clock import Clock, peak_flops
from content import Case, content
from ours import batch_of

from transfusion.model.mask import dense_mask
from transfusion.model.varlen import varlen_attention, varlen_mask

WAYS = {  # name -> (mask of a layout, attention under it)
    "dense": (dense_mask, F.scaled_dot_product_attention),
    "documents": (varlen_mask, varlen_attention),
}


def attention(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """Forward and backward of one layer's attention."""
    build, attend = WAYS[case.way]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    batch = batch_of(case, content(case, 0)).to(case.device)
    (B, L), layout = batch.tokens.shape, (batch.document, batch.image, batch.hidden)
    random = torch.Generator().manual_seed(0)
    shape = (B, L, case.heads, case.dim // case.heads)
    *qkv, g = (torch.randn(shape, generator=random).to(case.device, dtype).transpose(1, 2) for _ in range(4))
    qkv, mask = [x.detach().requires_grad_() for x in qkv], build(*layout)

    def repeat(i: int):
        with clock("forward"):
            out = attend(*qkv, mask)
        with clock("backward"):
            torch.autograd.grad(out, qkv, g)

    def flops() -> int:
        """Of the pairs that the mask allows; asserts that the way comes to what the dense one does."""
        seen, real = dense_mask(*layout), (batch.document >= 0)[:, None, :, None]
        outs = (attend(*qkv, mask), F.scaled_dot_product_attention(*qkv, seen))
        close = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(*(out * real for out in outs), rtol=close, atol=close)
        return 12 * case.dim * (seen & real).sum().item()

    return repeat, {
        "units": {"positions": case.rows * case.positions},
        "flops": flops,
        "peak": lambda: peak_flops(case.peak, case.precision, case.device),
    }
