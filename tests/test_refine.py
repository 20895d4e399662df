"""The convolutional read-out: pixels stay in place, it crosses patches, not images; fresh, it is nothing."""

import pytest
import torch
import torch.nn.functional as F
from random_rows import CHANNELS

from transfusion.model.refine import Refine
from transfusion.sequence import unpatchify

K = 4
GRIDS = ((2, 3), (1, 2), (2, 3))


def refiner(width=5):
    torch.manual_seed(0)
    refine = Refine(CHANNELS * K**2, K, width)
    for p in refine.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return refine


def predictions(grids, seed=0):
    n = sum(r * c for r, c in grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, CHANNELS * K**2, generator=generator), torch.rand(len(grids), generator=generator)


def test_it_is_what_plain_convolutions_of_the_image_give():
    refine, (p, t) = refiner(), predictions([(2, 3)])
    image = torch.from_numpy(unpatchify(p.numpy(), K, 8, 12))[None]
    x = F.pixel_unshuffle(image, 2)  # channels (c, y, x), ours are (y, x, c)
    order = torch.arange(4 * CHANNELS).view(CHANNELS, 2, 2).permute(1, 2, 0).flatten()
    with torch.no_grad():
        found = refine(p, t, ((2, 3),))
        angle = 1000 * t[0] * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
        time = refine.time(torch.cat([angle.cos(), angle.sin()]))
        x = F.silu(
            F.conv2d(x[:, order], refine.conv_in.weight, refine.conv_in.bias, padding=1) + time[None, :, None, None]
        )
        for conv in refine.convs:
            x = x + F.silu(F.conv2d(x, conv.weight, conv.bias, padding=1))
        x = F.conv2d(x, refine.conv_out.weight, refine.conv_out.bias, padding=1)
        wanted = F.pixel_shuffle(x[:, order.argsort()], 2)[0]
    torch.testing.assert_close(torch.from_numpy(unpatchify(found.numpy(), K, 8, 12)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", range(3))
def test_images_of_any_sizes_go_through_together_as_alone_and_never_mix(changed):
    refine, (p, t) = refiner(), predictions(GRIDS)
    sizes = [r * c for r, c in GRIDS]
    with torch.no_grad():
        together = refine(p, t, GRIDS).split(sizes)
        for grid, alone, level, found in zip(GRIDS, p.split(sizes), t, together):
            torch.testing.assert_close(found, refine(alone, level[None], (grid,)), rtol=1e-4, atol=1e-5)
        other = torch.cat([part + (i == changed) for i, part in enumerate(p.split(sizes))])
        for i, (before, after) in enumerate(zip(together, refine(other, t, GRIDS).split(sizes))):
            assert torch.equal(before, after) == (i != changed)


def test_bf16_autocast_takes_images_of_any_sizes():
    refine, (p, t) = refiner(), predictions(GRIDS)
    wanted = refine(p, t, GRIDS)
    with torch.autocast("cpu", torch.bfloat16):
        found = refine(p.bfloat16(), t, GRIDS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item())


def test_a_patch_hears_of_its_neighbours_and_of_the_noise_level():
    refine, (p, t), grids = refiner(), predictions([(1, 6)]), ((1, 6),)
    with torch.no_grad():
        before = refine(p, t, grids)
        p[5] += 1
        after = refine(p, t, grids)
        assert (before != after).any(1).tolist() == [False] * 3 + [True] * 3  # 4 places far, 2 a patch
        assert (refine(p, t / 2, grids) != after).any()


def test_fresh_it_adds_nothing():
    refine, (p, t) = refiner(), predictions(GRIDS)
    refine.init_weights()
    assert not refine(p, t, GRIDS).any()
