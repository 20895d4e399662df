"""Cross-entropy of a linear head, some rows at a time, so that a large vocabulary's logits are never held at once.

    logits = W h        L = sum of -log softmax(logits)[target] + z_loss (log Z)^2,   Z = sum of exp(logits)
    dL/dlogits = (1 + 2 z_loss log Z) softmax(logits) - onehot(target)

The gradients are found beside the loss, while a chunk's logits are there, and only scaled on the way back: nothing is
computed twice. torch's own `F.linear_cross_entropy` does likewise, from 2.13 on and without the z-loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 24  # held at once


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, target: Tensor, z_loss: float) -> Tensor:
        of_h, of_weight = ctx.needs_input_grad[:2]
        autocast = torch.is_autocast_enabled(h.device.type)
        dtype = torch.get_autocast_dtype(h.device.type) if autocast else h.dtype
        h_, w = h.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=h.device)
        grad_h = torch.empty_like(h_) if of_h else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None  # a sum over chunks
        n = max(1, LOGITS // len(w))
        with torch.autocast(h.device.type, enabled=False):
            for at in range(0, len(h), n):
                rows = slice(at, at + n)
                logits, wanted = h_[rows] @ w.T, target[rows, None]  # [n, V], [n, 1]
                logp = F.log_softmax(logits, -1, dtype=torch.float32)
                of_target = logp.gather(1, wanted)
                log_z = logits.gather(1, wanted).float() - of_target  # [n, 1]
                loss += (z_loss * log_z.square() - of_target).sum()
                if of_h or of_weight:
                    grad = logp.exp_().mul_(1 + 2 * z_loss * log_z)
                    grad = grad.scatter_add_(1, wanted, -torch.ones_like(of_target)).to(dtype)
                if of_h:
                    grad_h[rows] = grad @ w
                if of_weight:
                    grad_w += grad.T @ h_[rows]
        ctx.dtype, ctx.found = h.dtype, (grad_h, None if grad_w is None else grad_w.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        assert ctx.found, "a second way back: the first has scaled the gradients in place"
        (grad_h, grad_w), ctx.found = ctx.found, None
        if grad_h is not None:
            grad_h = grad_h.to(ctx.dtype) * grad
        return grad_h, None if grad_w is None else grad_w.mul_(grad), None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, z_loss: float = 0.0) -> Tensor:
    """[] the sum over M targets of their cross-entropy, in nats, by logits h W^T, and of z_loss log^2 Z.

    h [M, D], weight [V, D], target [M] of ids. `z_loss` keeps the logits from drifting (PaLM, 2204.02311, section 5).
    """
    return LinearCrossEntropy.apply(h, weight, target, z_loss)
