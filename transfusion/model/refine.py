"""A convolutional read-out behind the linear one: it looks across the borders of patches, and closer than they do.

    p' = p + W_out * x_2,    x_0 = silu(W_in * p + W_t sinusoid(1000 t)),    x_i = x_(i-1) + silu(W_i * x_(i-1))

where * is a 3 x 3 convolution over cells of 2 x 2 latents, so that few channels do and a cell sees 9 x 9 of them. A
linear read-out makes P numbers of D: where P is the larger it leaves speckle on what should be flat, as D patterns as
wide as a patch never quite cancel. It does not see the noisy image, unlike DiP's patch detailer head (arXiv
2511.18822): where it did, the transformer looked less closely at images, and captioned them worse (docs/log.md).
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transfusion.model.patches import N_FREQUENCIES, sinusoid

CELL = 2  # latents on a cell's side


class Conv(nn.Conv2d):
    """A 3 x 3 convolution of images [I, h, w, C], channel last."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Refine(nn.Module):
    """What to add to the predictions of patches of `patch_size` x `patch_size` latents."""

    def __init__(self, patch_dim: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        channels = patch_dim * CELL**2 // patch_size**2
        self.conv_in, self.conv_out = Conv(channels, width), Conv(width, channels)
        self.convs = nn.ModuleList(Conv(width, width) for _ in range(2))
        self.time = nn.Linear(2 * N_FREQUENCIES, width)

    def forward(self, p: Tensor, t: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """[N, P] from predictions p [N, P] of patches in raster order; t [I], grids [I]: (rows, columns) of images."""
        if len(set(grids)) == 1:
            return self.of_one_size(p, t, grids[0])
        result, of_image = torch.zeros_like(p), np.repeat(np.arange(len(grids)), [r * c for r, c in grids])
        for grid in dict.fromkeys(grids):
            images = [i for i, g in enumerate(grids) if g == grid]
            at = torch.from_numpy(np.flatnonzero(np.isin(of_image, images))).to(p.device)
            result = result.index_copy(0, at, self.of_one_size(p[at], t[images], grid).to(p.dtype))
        return result

    def of_one_size(self, p: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        time = self.time(sinusoid(1000 * t, N_FREQUENCIES))  # [I, width]
        x = silu(self.conv_in(to_cells(p, grid, self.patch_size)) + time[:, None, None])
        for conv in self.convs:
            x = x + silu(conv(x))
        return from_cells(self.conv_out(x), grid, self.patch_size)

    def init_weights(self):
        for layer in (self.conv_in, *self.convs, self.time):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv_out.weight)  # starts by adding nothing
        nn.init.zeros_(self.conv_out.bias)


def to_cells(patches: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """[I, h, w, CELL^2 C] images of cells from their patches [N, k k C], all of (rows, columns) = grid."""
    (rows, columns), n = grid, k // CELL
    x = patches.view(-1, rows, columns, n, CELL, n, CELL, patches.shape[-1] // k**2)
    return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, rows * n, columns * n, x.shape[-1] * CELL**2)


def from_cells(cells: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """The inverse of `to_cells`."""
    (rows, columns), n = grid, k // CELL
    x = cells.reshape(-1, rows, n, columns, n, CELL, CELL, cells.shape[-1] // CELL**2)
    return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, x.shape[-1] * k**2)
