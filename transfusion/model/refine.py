"""A convolutional read-out behind the linear one: it looks across the borders of patches, and closer than they do.

    p' = p + W_out * x_2,    x_0 = silu(W_in * p + W_t sinusoid(1000 t)),    x_i = x_(i-1) + silu(W_i * x_(i-1))

where * is a 3 x 3 convolution of the images that the patches form, at half their resolution and with four times their
channels (space to depth), so that few channels do. A linear read-out makes P numbers of D: where P is the larger it
leaves speckle on what should be flat, as D patterns as wide as a patch never quite cancel. It does not see the noisy
image, unlike DiP's patch detailer head (arXiv 2511.18822): where it did, the transformer looked less closely at images,
and captioned them worse (docs/log.md, 2026-11-23).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transfusion.model.patches import N_FREQUENCIES, sinusoid

FACTOR = 2  # of space to depth: FACTOR x FACTOR latents become one place with FACTOR^2 times the channels


class Refine(nn.Module):
    """What to add to the predictions of patches of `patch_size` x `patch_size` latents."""

    def __init__(self, patch_dim: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        channels = patch_dim * FACTOR**2 // patch_size**2
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(2 * N_FREQUENCIES, width)

    def forward(self, p: Tensor, t: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """[N, P] from predictions p [N, P] of patches in raster order; t [I], grids [I]: (rows, columns) of images."""
        if len(set(grids)) == 1:
            return self.of_one_size(p, t, grids[0])
        images = list(p.split([rows * columns for rows, columns in grids]))
        for grid in set(grids):  # all images of a size at once
            at = [i for i, g in enumerate(grids) if g == grid]
            refined = self.of_one_size(torch.cat([images[i] for i in at]), t[at], grid)
            for i, image in zip(at, refined.chunk(len(at))):
                images[i] = image
        return torch.cat(images)

    def of_one_size(self, p: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        time = self.time(sinusoid(1000 * t, N_FREQUENCIES))  # [I, width]
        x = silu(self.conv_in(space_to_depth(p, grid, self.patch_size)) + time[:, :, None, None])
        for conv in self.convs:
            x = x + silu(conv(x))
        return depth_to_space(self.conv_out(x), grid, self.patch_size)

    def init_weights(self):
        for layer in (self.conv_in, *self.convs, self.time):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv_out.weight)  # starts by adding nothing
        nn.init.zeros_(self.conv_out.bias)


def space_to_depth(patches: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """[I, FACTOR^2 C, h / FACTOR, w / FACTOR] images of the patches [N, k k C]; (rows, columns) = grid of each."""
    (rows, columns), n = grid, k // FACTOR
    x = patches.view(-1, rows, columns, n, FACTOR, n, FACTOR, patches.shape[-1] // k**2)
    x = x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, rows * n, columns * n, x.shape[-1] * FACTOR**2)
    return x.permute(0, 3, 1, 2)


def depth_to_space(images: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """[N, k k C] patches: the inverse of `space_to_depth`."""
    (rows, columns), n = grid, k // FACTOR
    x = images.permute(0, 2, 3, 1).reshape(-1, rows, n, columns, n, FACTOR, FACTOR, images.shape[1] // FACTOR**2)
    return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, x.shape[-1] * k**2)
