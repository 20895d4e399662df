"""Rotary positions with two coordinates (Su et al. 2104.09864; axial for images), scaled as in Llama 3.1.

Pair f of a head's K/2 pairs turns by the angle coordinate(f) * frequency(f), frequency(f) = base^(-2f/K); even pairs
read the first coordinate of `place`, odd pairs the second. Text has both coordinates equal, so for text this is plain
RoPE in the half-split layout.

A model that was taught longer contexts after its first ones, of L positions, has slow pairs slowed further:

    turns = L frequency / 2 pi                                      of a pair, within the first contexts
    keep = (turns - low) / (high - low), clipped to [0, 1]          L = 0: 0 for all, which is linear scaling
    frequency <- frequency (keep + (1 - keep) / factor)

A pair is scaled whichever coordinate it reads, so rows and columns of axial images are as far apart as as many words.
With the numbers of Llama 3.1 what is slowed hardly turns within an image; linear scaling draws its patches together.
"""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Which pairs are slowed and by how much, by the names in a Llama's config."""

    factor: float = 1.0  # 1 = none
    low_freq_factor: float = 1.0  # pairs of at most so many turns are slowed by the whole factor
    high_freq_factor: float = 4.0  # pairs of at least so many are not slowed
    original_max_position_embeddings: int = 0  # L

    def __post_init__(self):
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if not self.factor >= 1 or not 0 <= low < high or length < 0:
            raise ValueError(
                f"factor = {self.factor}, low_freq_factor = {low}, high_freq_factor = {high}, "
                f"original_max_position_embeddings = {length}: factor is 1 for none or above, 0 <= low < high, and "
                "the positions are 0 for linear scaling or above"
            )


def angles(place: Tensor, head_dim: int, base: float, scaling: RopeScaling) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B, 1, L, K] float32, of the rotary coordinates place[..., :2]; sin begins with -sin."""
    pair = torch.arange(head_dim // 2, device=place.device)
    frequency = base ** (-2.0 * pair.float() / head_dim)
    if scaling.factor != 1:
        turns = scaling.original_max_position_embeddings * frequency / (2 * pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    angle = place[..., pair % 2].float() * frequency  # [B, L, K/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, L, K] turned by their positions: (a cos - b sin, b cos + a sin) of their halves a, b."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)  # a compiled roll gathers number by number
