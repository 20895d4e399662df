"""Classifier-free guidance, arXiv 2207.12598: away from what the model says without the condition.

    g = u + w (c - u)        w = 0 unconditional, w = 1 no guidance, w > 1 guided

It is linear and blind to what c and u are: in x, eps, v or flow it gives the same sample, as all are affine at fixed z.
"""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """The guided prediction, shaped like cond; a tensor scale (broadcastable) gives every image its own."""
    return uncond + scale * (cond - uncond)
