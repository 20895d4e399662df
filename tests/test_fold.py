"""Patches and the images that they form: every number where the sequence's own patchify has it, nothing lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rows import CHANNELS
from random_rows import grids as any_grid

from transfusion.model.fold import each_size, fold, join, unfold
from transfusion.sequence import patchify, unpatchify


@pytest.mark.parametrize("k, factor", [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (8, 4)])
def test_cells_of_factor_by_factor_are_places_of_the_image_and_come_back(k, factor):
    h, w = 2 * k, 3 * k
    images = torch.arange(2 * CHANNELS * h * w).reshape(2, CHANNELS, h, w)
    patches = torch.cat([torch.from_numpy(patchify(image, k)) for image in images.numpy()]).contiguous()
    folded = fold(patches, (2, 3), k, factor)
    assert folded.shape == (2, factor**2 * CHANNELS, h // factor, w // factor)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    for y in range(h // factor):
        for x in range(w // factor):
            here = images[:, :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            assert torch.equal(folded[:, :, y, x], here.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unfold(folded, (2, 3), k, factor), patches)
    back = unfold(folded, (2, 3), k, factor).split(6)
    assert all(torch.equal(torch.from_numpy(unpatchify(p.numpy(), k, h, w)), i) for p, i in zip(back, images))


@given(st.lists(any_grid, min_size=1, max_size=6))
def test_images_of_a_size_come_together_and_return_to_their_places(grids):
    grids = tuple(grids)
    owner = torch.repeat_interleave(torch.arange(len(grids)), torch.tensor([r * c for r, c in grids]))
    patches = torch.stack([owner, torch.arange(len(owner))], 1)
    parts = list(each_size(patches, grids))
    assert sorted(grid for grid, _, _ in parts) == sorted(set(grids))
    for grid, at, part in parts:
        members = torch.arange(len(grids))[at]
        assert [grids[i] for i in members] == [grid] * len(members)
        assert torch.equal(part[:, 0], members.repeat_interleave(grid[0] * grid[1]))
    assert torch.equal(join([part for _, _, part in parts], grids), patches)
