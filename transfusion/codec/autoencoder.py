"""The convolutional autoencoder of Esser et al. 2021 (arXiv 2012.09841): images to a grid of latents and back.

    image   conv_in   [ResBlock x blocks, Down] a level   mid   norm conv_out   quant_conv         bottleneck
    image   conv_out norm   [Up, ResBlock x (blocks + 1)] a level   mid   conv_in   post_quant_conv    |

Modules bear the names of the latent diffusion release (Rombach et al. 2022), so that its weights fit by name.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from transfusion.codec.bottleneck import BOTTLENECKS, Codebook, Gaussian, Latent


@dataclass(frozen=True)
class CodecConfig:
    """Sizes; the defaults are the paper's 86M parameters with 8 latent channels on an eighth of the image's side."""

    bottleneck: str = "kl"  # kl | vq
    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of width, one a level; each but the last halves the image
    blocks: int = 2  # residual blocks of a level; the decoder has one more
    attention: bool = True  # in the middle, on the latents' grid
    groups: int = 32  # of the norms
    latent_channels: int = 8  # that leave the encoder
    codes: int = 16384  # vq only, as the next
    code_dim: int = 8  # what the latent channels are projected to before the nearest code is looked for

    def __post_init__(self):
        if self.bottleneck not in BOTTLENECKS:
            raise ValueError(f"bottleneck = {self.bottleneck!r}: choose one of {', '.join(BOTTLENECKS)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers = {self.multipliers}: give one for each level, such as 1,2,4")
        for name in ("width", "blocks", "groups", "latent_channels", "codes", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 1")
        if self.width % self.groups:
            raise ValueError(f"width = {self.width} is not a multiple of groups = {self.groups}: set groups")

    @property
    def factor(self) -> int:
        """Pixels a side of a cell of the latents."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def channels(self) -> int:
        """Numbers in a cell of the latents."""
        return self.code_dim if self.bottleneck == "vq" else self.latent_channels


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(silu(self.norm2(h)))


class Attention(nn.Module):
    """Every place sees every place; one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [n, 1, h w, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Mid(nn.Module):
    def __init__(self, channels: int, config: CodecConfig):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config.groups)
        self.attn_1 = Attention(channels, config.groups) if config.attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, config.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below alone: the grid stays where it was


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution; `downsample` or `upsample` leads to the next, if there is one."""

    def __init__(self, channels: int, out: int, blocks: int, groups: int):
        super().__init__()
        sizes = [channels] + [out] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(sizes))
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config: CodecConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        ends = zip([config.width, *widths], widths)
        self.down = nn.ModuleList(Level(a, b, config.blocks, config.groups) for a, b in ends)
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width)
        self.mid = Mid(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        out = config.latent_channels * (2 if config.bottleneck == "kl" else 1)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: CodecConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], config)
        ends = zip([*widths[1:], widths[-1]], widths)
        self.up = nn.ModuleList(Level(a, b, config.blocks + 1, config.groups) for a, b in ends)  # finest first
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample = Upsample(width)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Images [n, 3, H, W] in [-1, 1] to latents [n, C, H / factor, W / factor] and back."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.bottleneck == "kl":
            moments = 2 * config.latent_channels
            self.quant_conv, self.quantize = nn.Conv2d(moments, moments, 1), Gaussian()
        else:
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.quantize = Codebook(config.codes, config.code_dim)
        self.post_quant_conv = nn.Conv2d(config.channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """[n, 2 C or code_dim, h, w] what the bottleneck reads."""
        return self.quant_conv(self.encoder(images))

    def latents(self, images: Tensor) -> Latent:
        """The latents of use: the mean, or the nearest codes."""
        return self.quantize(self.encode(images))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def build_autoencoder(config: CodecConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """An autoencoder with fresh weights, drawn from torch's global state ("meta": none, only its sizes)."""
    with torch.device(device):
        model = Autoencoder(config)
    for m in model.modules():  # residual branches start by adding nothing: the first steps learn sooner
        if isinstance(m, ResBlock | Attention):
            last = m.conv2 if isinstance(m, ResBlock) else m.proj_out
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return model
