"""The trunk's products in float8, to train with: an H100 or an Ada GPU multiplies it at twice the rate of bfloat16.

    q(x) = round(x / s_x),   s_x = max |x| / M                    one scale a tensor, of the numbers that it has now
    y = s_x s_W q(x) q(W)^T                                       x and W in e4m3: 3 bits of mantissa, M = 448
    dL/dx = s_g s_W q(g) q(W),   dL/dW = s_g s_x q(g)^T q(x)      g = dL/dy in e5m2: 2 bits, M = 57344, a wider range

The formats, and where which stands, are those of FP8 Formats for Deep Learning (arXiv 2209.05433). Sums are float32; y
and dL/dx come out in the type of x, dL/dW in that of W. What is kept for the way back takes a byte a number. A scale a
row would be finer, but y adds up over columns and dL/dW over rows: x would be converted twice, and kept in bfloat16.
"""

from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from transfusion.model.paths import multiply_by

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of what a GPU adds up over, and of the columns of its result
Scaled = tuple[Tensor, Tensor]  # in float8, and the scale [] to multiply it by


def quantise(x: Tensor, dtype: torch.dtype) -> Scaled:
    """x in `dtype`, max |x| being its largest number."""
    s = x.abs().amax().float() / torch.finfo(dtype).max
    s = s.clamp(min=torch.finfo(s.dtype).tiny)  # zeros stay zeros; nan and inf give nan, and the step is skipped
    return (x.float() / s).to(dtype), s


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T [m, n] of a [m, k] and b [n, k], in `dtype`."""
    (a8, s), (b8, t), each = a, b, ScalingType.TensorWise
    with torch.autocast(a8.device.type, enabled=False):  # a CPU makes it of other products, not to be rounded
        # both laid out along k, the one order that a GPU takes
        return F.scaled_mm(a8.contiguous(), b8.contiguous().t(), s, each, t, each, output_dtype=dtype)


def turned(x: Scaled) -> Scaled:
    return x[0].t(), x[1]


class Float8Products(torch.autograd.Function):
    """See `products`; x [m, n_in], m a multiple of 16."""

    @staticmethod
    def forward(*given) -> tuple[Tensor, ...]:
        ctx, x, *weights = given  # named there, torch's compiler would count them, and take two weights for no ctx
        x8, w8 = quantise(x, FORWARD), [quantise(w, FORWARD) for w in weights]
        of_x, *of_w = ctx.needs_input_grad
        ctx.dtype = weights[0].dtype
        ctx.save_for_backward(*(x8 if any(of_w) else (None, None)), *(part for w in w8 if of_x for part in w))
        return tuple(multiply(x8, w, x.dtype) for w in w8)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, s, *w), (of_x, *of_w) = ctx.saved_tensors, ctx.needs_input_grad
        g8, w8 = [quantise(g, BACKWARD) for g in grads], zip(w[::2], w[1::2])
        grad_x = sum(multiply(g, turned(w), grads[0].dtype) for g, w in zip(g8, w8)) if of_x else None
        of_weights = (multiply(turned(g), turned((x, s)), ctx.dtype) if of else None for g, of in zip(g8, of_w))
        return grad_x, *of_weights


def products(x: Tensor, weights: Seq[Tensor]) -> list[Tensor]:
    """x W^T [..., n_out] of x [..., n_in], converted once, by each of the weights [n_out, n_in]."""
    rows = x.flatten(0, -2)
    n = len(rows)  # a stream has any number of patches, none too
    rows = F.pad(rows, (0, 0, 0, max(MULTIPLE, -(-n // MULTIPLE) * MULTIPLE) - n))
    return [y[:n].unflatten(0, x.shape[:-1]) for y in Float8Products.apply(rows, *weights)]


def use_float8(layers: nn.Module):
    """Lets the matrices of the layers multiply in float8; adapters beside them do not."""
    multiply_by(layers, products)
