"""The patch discriminator of Isola et al. 2017 (arXiv 1611.07004): one logit for each patch of an image, real or not.

    image   conv/2 leaky   [conv/2 norm leaky] x (layers - 1)   conv norm leaky   conv -> logits

Norms are over groups of channels, not over the batch: an image is judged the same, whatever stands beside it.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = 64  # channels of the first layer; they double up to eight times that
    layers: int = 3  # that halve the image; a logit sees 16, 34, 70, 142 pixels a side with 1, 2, 3, 4 of them

    def __post_init__(self):
        if self.width < 8 or self.width % 8 or self.layers < 1:
            raise ValueError(f"width = {self.width}, layers = {self.layers}: a multiple of 8, and at least 1")


class Discriminator(nn.Sequential):
    """[n, 1, h, w] logits of images [n, 3, H, W] in [-1, 1]: high for real ones."""

    def __init__(self, config: DiscriminatorConfig):
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        parts = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths), 1):
            stride = 2 if i < config.layers else 1
            parts += [nn.Conv2d(a, b, 4, stride, padding=1), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]
        super().__init__(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """[] what the discriminator minimises: real logits want to be above 1, fake ones below -1."""
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
