"""Patches put together to the images that they form, and back; images of any sizes, all of one size at once.

[N, k k C] of images of 1 x 2, 2 x 2 and 1 x 2 patches
    each_size   the 1 x 2: [4, k k C]                    the 2 x 2: [4, k k C]
    fold            [2, C, k, 2 k]                           [1, C, 2 k, 2 k]
    unfold          [4, k k C]                               [4, k k C]
    join        [N, k k C] in the order of the images again
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]  # [I] rows and columns of each image's patches


def by_size(grids: Grids) -> dict[tuple[int, int], list[int]]:
    """{(rows, columns): which images have them}."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, grid in enumerate(grids):
        sizes.setdefault(grid, []).append(i)
    return sizes


def each_size(patches: Tensor, grids: Grids) -> Iterator[tuple[tuple[int, int], slice | list[int], Tensor]]:
    """(rows and columns, which images have them, their patches) for each size among the images of patches [N, ...]."""
    sizes = by_size(grids)
    if len(sizes) == 1:
        yield grids[0], slice(None), patches  # nothing to copy
        return
    images = patches.split([rows * columns for rows, columns in grids])
    for grid, at in sizes.items():
        yield grid, at, torch.cat([images[i] for i in at])


def join(parts: list[Tensor], grids: Grids) -> Tensor:
    """[N, ...] the patches of all images in their order again: the inverse of `each_size`."""
    if len(parts) == 1:
        return parts[0]
    images: dict[int, Tensor] = {}
    for at, part in zip(by_size(grids).values(), parts, strict=True):
        images |= zip(at, part.chunk(len(at)))
    return torch.cat([images[i] for i in range(len(grids))])


def fold(patches: Tensor, grid: tuple[int, int], k: int, factor: int = 1) -> Tensor:
    """[I, factor^2 C, h / factor, w / factor] images of patches [N, k k C] of (rows, columns) = grid each.

    `factor` x `factor` cells become one place (space to depth). Memory is laid out channels last.
    """
    (rows, columns), n = grid, k // factor
    x = patches.reshape(-1, rows, columns, n, factor, n, factor, patches.shape[-1] // k**2)
    x = x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, rows * n, columns * n, x.shape[-1] * factor**2)
    return x.permute(0, 3, 1, 2)


def unfold(images: Tensor, grid: tuple[int, int], k: int, factor: int = 1) -> Tensor:
    """[N, k k C] patches: the inverse of `fold`."""
    (rows, columns), n = grid, k // factor
    x = images.permute(0, 2, 3, 1).reshape(-1, rows, n, columns, n, factor, factor, images.shape[1] // factor**2)
    return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, x.shape[-1] * k**2)
