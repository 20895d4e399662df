"""Rotary positions with two coordinates (Su et al. 2104.09864; axial for images).

Pair f of a head's K/2 pairs turns by the angle coordinate(f) * base^(-2f/K); even pairs read the first coordinate of
`place`, odd pairs the second. Text has both coordinates equal, so for text this is plain RoPE in the half-split layout.
"""

import torch
from torch import Tensor


def angles(place: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B, 1, L, K/2] float32, of the rotary coordinates place[..., :2]."""
    pair = torch.arange(head_dim // 2, device=place.device)
    frequency = base ** (-2.0 * pair.float() / head_dim)
    angle = place[..., pair % 2].float() * frequency  # [B, L, K/2]
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, L, K] turned by their positions."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
