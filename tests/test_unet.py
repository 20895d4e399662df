"""U-Net patches: the convolutions that the file's head writes down, no image mixed with another, 0.27B parameters."""

import pytest
import torch
import torch.nn.functional as F
from random_rows import CHANNELS
from test_transformer import random_model

from transfusion.model.patches import N_FREQUENCIES, sinusoid, where
from transfusion.model.unet import STAGES, UNetPatches
from transfusion.sequence import patchify, unpatchify

DIM = 8
GRIDS = ((2, 3), (1, 2), (2, 3))
SIZES = [rows * columns for rows, columns in GRIDS]
sides = pytest.mark.parametrize("k", STAGES)


def unet(k, blocks=2, **options):
    torch.manual_seed(0)
    net = UNetPatches(DIM, CHANNELS, k, 4, blocks, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return net


def inputs(k, grids=GRIDS):
    """(z [N, P], t [I], hidden states [N, D])."""
    n, g = sum(r * c for r, c in grids), torch.Generator().manual_seed(1)
    z, h = (torch.randn(n, d, generator=g) for d in (CHANNELS * k**2, DIM))
    return z, torch.rand(len(grids), generator=g), h


@torch.no_grad()
def through(net, z, t, h, grids=GRIDS):
    """(embeddings, predictions), the hidden states `h` in the place of what a transformer makes of the embeddings."""
    image = torch.repeat_interleave(torch.arange(len(grids)), torch.tensor([r * c for r, c in grids]))
    grid = torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids])
    embeddings, skips = net.encode(z, t, image, grid, grids)
    return embeddings, net.decode(h, skips, t, grids)


def slow_block(x, c, block):
    """A block on one image [C, h, w], the norm place by place."""

    def norm_silu(x, norm):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        return x * x.sigmoid()

    y = conv(norm_silu(x, block.norm1), block.conv1) + (block.time.weight @ c + block.time.bias)[:, None, None]
    y = conv(norm_silu(y, block.norm2), block.conv2)
    carried = x if x.shape == y.shape else conv(x, block.carry)
    return carried + y


def conv(x, layer, stride=1):
    return F.conv2d(x[None], layer.weight, layer.bias, stride, padding=layer.weight.shape[-1] // 2)[0]


@sides
@torch.no_grad()
def test_it_is_the_convolutions_that_its_head_writes_down(k):
    net, (z, t, h) = unet(k, positions=True), inputs(k, ((2, 3),))
    embeddings, p = through(net, z, t, h, ((2, 3),))
    c = F.silu(net.time(sinusoid(1000 * t, N_FREQUENCIES)))[0]
    x, skips = conv(torch.from_numpy(unpatchify(z.numpy(), k, 2 * k, 3 * k)), net.conv_in), []
    for s in range(STAGES[k]):
        for block in net.blocks_down[s]:
            x = slow_block(x, c, block)
        assert x.shape == (4 * 2**s, 2 * k // 2**s, 3 * k // 2**s)
        skips.append(x)
        x = conv(x, net.down[s], stride=2)
    place = where(torch.tensor([[r, c] for r in range(2) for c in range(3)]), DIM)
    torch.testing.assert_close(embeddings, net.inp(x.flatten(1).T) + place, rtol=1e-4, atol=1e-5)
    y = net.out(h).T.reshape(-1, 2, 3)
    for s in reversed(range(STAGES[k])):
        y = conv(y.repeat_interleave(2, 1).repeat_interleave(2, 2), net.up[s])
        y = torch.cat([y, skips[s]])
        for block in net.blocks_up[s]:
            y = slow_block(y, c, block)
    wanted = torch.from_numpy(patchify(conv(y, net.conv_out).numpy(), k))
    torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-4)


@sides
@pytest.mark.parametrize("changed", range(3))
def test_images_of_any_sizes_go_through_together_as_alone_and_never_mix(k, changed):
    net, (z, t, h) = unet(k), inputs(k)
    together = [x.split(SIZES) for x in through(net, z, t, h)]
    for i, grid in enumerate(GRIDS):
        alone = through(net, z.split(SIZES)[i], t[i : i + 1], h.split(SIZES)[i], (grid,))
        for found, wanted in zip(together, alone):
            torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-5)
    for what in range(3):  # patches, noise level, hidden states
        other = [z, t, h]
        sizes = [1, 1, 1] if what == 1 else SIZES
        other[what] = torch.cat([x + 0.1 * (i == changed) for i, x in enumerate(other[what].split(sizes))])
        for place, (before, after) in enumerate(zip(together, through(net, *other))):
            for i, (a, b) in enumerate(zip(before, after.split(SIZES))):
                assert torch.equal(a, b) == (i != changed or (place == 0 and what == 2))


@sides
def test_bf16_autocast_takes_images_of_any_sizes(k):
    net, (z, t, h) = unet(k), inputs(k)
    wanted = through(net, z, t, h)
    with torch.autocast("cpu", torch.bfloat16):
        found = through(net, z, t, h)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05 * b.abs().max().item())


@sides
def test_amplitudes_pass_from_the_noisy_image_to_the_prediction(k):
    net, (z, t, h) = unet(k), inputs(k)
    net.init_weights()
    _, nothing = through(net, z, t, h)
    assert not nothing.any()
    torch.nn.init.normal_(net.conv_out.weight)
    _, once = through(net, z, t, 0 * h)
    _, thrice = through(net, 3 * z, t, 0 * h)
    assert once.abs().max() > 0.1
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-4, atol=1e-4)  # a norm on the road would give once again


def test_a_batch_without_images_has_no_predictions():
    model = random_model(patches="unet", unet_width=4)
    none = torch.zeros(0, dtype=torch.long)
    tokens = torch.tensor([[1, 7, 8, 9]])
    place, mask = torch.arange(4)[None, :, None].expand(1, 4, 4), torch.ones(4, 4, dtype=torch.bool).tril()
    logits, p = model(tokens, place, mask, torch.zeros(0, 0), torch.zeros(0), none, (), none, torch.arange(4))
    assert p.shape == (0, model.config.patch_dim) and logits.isfinite().all()


# Widths that make the paper's 0.27B (section 3) of 8 latent channels and 4 blocks a stage, whatever the trunk's width.
WIDTHS = {2: 1216, 4: 544, 8: 272}


@sides
@pytest.mark.parametrize("dim", [768, 1024, 1536, 2048, 4096])
def test_the_papers_unet_has_the_papers_size(k, dim):
    with torch.device("meta"):
        net = UNetPatches(dim, 8, k, WIDTHS[k], 4)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.27e9, rel=0.05)
