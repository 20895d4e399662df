"""The Frechet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017).

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)

In EfficientNet-Lite0 features it is FD-EffNet. It is no FID, which wants an Inception network, and it has no scale of
its own: compare it between sets of the same size only.
"""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance between features [n, k] and [m, k], n and m at least 2."""
    means = [x.double().mean(0) for x in (a, b)]
    # With C = X^T X / (n - 1), tr (C_a C_b)^(1/2) is the sum of the singular values of X_a X_b^T, scaled alike.
    xa, xb = ((x.double() - m) / (len(x) - 1) ** 0.5 for x, m in zip((a, b), means))
    xa, xb = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (xa, xb))  # X^T X stays, X shrinks
    together = torch.linalg.svdvals(xa @ xb.T).sum()
    value = (means[0] - means[1]).square().sum() + xa.square().sum() + xb.square().sum() - 2 * together
    return max(0.0, value.item())
