"""Classifier-free guidance, arXiv 2207.12598, with two scales where an image is among the conditions (2211.09800):

    g = u + image (i - u) + text (c - i)        c: all conditions, i: without the text, u: without any
      = text c + (image - text) i + (1 - image) u

Without images before, i is u, so g = u + text (c - u): scale 0 is unconditional, 1 no guidance, above 1 guided. It is
linear and blind to what c, i and u are: x, eps, v, flow (all affine at fixed z) or logits give the same sample.
"""

import torch
from torch import Tensor


def branch_weights(text: float, image: float = 1.0) -> tuple[float, float, float]:
    """The weights of (c, i, u) in g; they add up to 1."""
    return text, image - text, 1.0 - image


def renormalised(guided: Tensor, cond: Tensor, image_of: Tensor, n: int) -> Tensor:
    """guided [N, P], each image's patches scaled down to the norm of its cond (BAGEL, 2505.14683, global renorm).

    `image_of` [N] says which of the n images each patch is of. Large scales overdrive contrast; this takes it back.
    """
    energies = [guided.new_zeros(n).index_add(0, image_of, p.square().sum(1)) for p in (cond, guided)]
    scale = (energies[0] / energies[1].clamp(min=1e-12)).sqrt().clamp(max=1.0)
    return guided * scale[image_of, None]


def guide(branches: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The weighted sum over the first dimension of branches [J, ...]."""
    return torch.einsum("j...,j->...", branches, branches.new_tensor(weights))
