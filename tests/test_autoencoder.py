"""The autoencoder: diffusers' own with the same weights, the paper's size, the latents' grid."""

import warnings

import pytest
import torch

from transfusion.codec.autoencoder import CodecConfig, build_autoencoder

TINY = CodecConfig(width=8, multipliers=(1, 2, 2), blocks=1, groups=4, latent_channels=3)


def images(n=2, height=16, width=24) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def foreign(model):
    """diffusers' AutoencoderKL with the model's weights, renamed by diffusers' converter of latent diffusion files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    c = model.config
    levels = len(c.multipliers)
    other = AutoencoderKL(
        block_out_channels=tuple(c.width * m for m in c.multipliers),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=c.blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        mid_block_add_attention=c.attention,
    )
    other.load_state_dict(convert_ldm_vae_checkpoint(model.state_dict(), dict(other.config)))
    return other


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        CodecConfig(width=16, multipliers=(1, 3, 2, 4), blocks=2, groups=8, latent_channels=8),
        CodecConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, latent_channels=2, attention=False),
    ],
)
@torch.no_grad()
def test_the_same_weights_in_diffusers_give_the_same_latents_and_images(config):
    torch.manual_seed(0)
    model = build_autoencoder(config)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))  # norms and biases too
    other, x = foreign(model), images()
    posterior = other.encode(x).latent_dist
    mean, logvar = model.encode(x).chunk(2, 1)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-4)
    latent = model.latents(x)
    torch.testing.assert_close(latent.z, posterior.mode(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latent.cost, posterior.kl().mean(), rtol=1e-4, atol=1e-4)
    eps = torch.randn_like(latent.z)
    torch.testing.assert_close(model.quantize(model.encode(x), eps).z, posterior.mean + posterior.std * eps)
    torch.testing.assert_close(model.decode(latent.z), other.decode(latent.z).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [CodecConfig(), CodecConfig(bottleneck="vq", latent_channels=256)])
def test_the_defaults_have_the_papers_86_million_parameters(config):
    n = sum(p.numel() for p in build_autoencoder(config, "meta").parameters())
    assert n == pytest.approx(86e6, rel=0.03)
    assert (config.factor, config.channels) == (8, 8)


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 1), (1, 1, 1, 1)])
def test_latents_lie_on_the_grid_that_the_config_promises(bottleneck, multipliers):
    config = CodecConfig(bottleneck, 4, multipliers, 1, groups=2, latent_channels=5, codes=7, code_dim=2)
    model, x = build_autoencoder(config), images()
    z = model.latents(x).z
    assert z.shape == (2, config.channels, 16 // config.factor, 24 // config.factor)
    assert model.decode(z).shape == x.shape


def test_an_image_has_the_latents_that_it_has_alone():
    torch.manual_seed(0)
    model, x = build_autoencoder(TINY), images(3)
    together = model.latents(x).z
    torch.testing.assert_close(together[1:2], model.latents(x[1:2]).z, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"bottleneck": "vae"}, "choose one of kl, vq"),
        ({"multipliers": ()}, "one for each level"),
        ({"width": 100}, "not a multiple of groups = 32"),
        ({"codes": 0}, "at least 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused_with_the_remedy(fields, remedy):
    with pytest.raises(ValueError, match=remedy):
        CodecConfig(**fields)
