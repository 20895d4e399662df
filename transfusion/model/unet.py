"""U-Net patches: convolutions from the noisy image down to the transformer's grid, and up again to the prediction.

    x = W_0 * z                                                     z the images that the noisy patches form
    x = x + block(x, t), ...;   skip_s = x;   x = W_s * x, stride 2          s = 1 ... log2 k, width 2^(s-1) C
    h = W_in x                                                      one place a patch: what the transformer reads
    y = W_out h                                                     what it made of that
    y = [V_s * up(y), skip_s];   y = y + block(y, t), ...                    s = log2 k ... 1
    p = V_0 * y

    block(x, t) = V * silu(norm(W * silu(norm(x)) + T c))           c = silu(W_c sinusoid(1000 t))

where * is a 3 x 3 convolution. Zhou et al. 2024 (section 3) give the U-Net's 0.27B parameters and a plain layer norm in
place of the adaptive one; blocks, widths and skips they leave open. The blocks are ADM's (2105.05233), t added; a stage
has one skip, as each halves the image once. Every norm stands inside a block: between z and p there is a road without
any, so that amplitudes pass. A norm before the last convolution lost them (docs/log.md, 2026-11-23).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from transfusion.model.fold import Grids, each_size, fold, join, unfold
from transfusion.model.patches import N_FREQUENCIES, sinusoid, where

STAGES = {2: 1, 4: 2, 8: 3}  # by the patch's side: each stage halves it


class LayerNorm(nn.LayerNorm):
    """Of the channels at each place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels are last in memory: no copy


class Residual(nn.Module):
    """A block of two convolutions beside a road that carries x on."""

    def __init__(self, inp: int, out: int, time: int):
        super().__init__()
        self.norm1, self.conv1 = LayerNorm(inp), nn.Conv2d(inp, out, 3, padding=1)
        self.norm2, self.conv2 = LayerNorm(out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.carry = nn.Conv2d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.time(c)[:, :, None, None]
        return self.carry(x) + self.conv2(silu(self.norm2(h)))


class UNetPatches(nn.Module):
    """Patches of k x k latents embedded and read out by the two halves of a U-Net, `blocks` a stage in each."""

    def __init__(self, dim: int, channels: int, k: int, width: int, blocks: int, positions: bool = False):
        super().__init__()
        self.k, self.patch_dim, self.positions = k, channels * k**2, positions
        widths = [width * 2**s for s in range(STAGES[k])]
        self.time = nn.Linear(2 * N_FREQUENCIES, width)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks_down, self.down, self.up, self.blocks_up = (nn.ModuleList() for _ in range(4))
        for before, w in zip([width, *widths], widths):
            inputs = [before] + [w] * (blocks - 1)
            self.blocks_down.append(nn.ModuleList(Residual(i, w, width) for i in inputs))
            self.down.append(nn.Conv2d(w, w, 3, stride=2, padding=1))
        self.inp, self.out = nn.Linear(widths[-1], dim), nn.Linear(dim, widths[-1])
        for below, w in zip([*widths[1:], widths[-1]], widths):
            inputs = [2 * w] + [w] * (blocks - 1)
            self.up.append(nn.Conv2d(below, w, 3, padding=1))
            self.blocks_up.append(nn.ModuleList(Residual(i, w, width) for i in inputs))
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def embed(self, t: Tensor) -> Tensor:
        """[I, C] of noise levels t [I]."""
        return silu(self.time(sinusoid(1000 * t, N_FREQUENCIES).to(self.time.weight.dtype)))

    def encode(
        self, z: Tensor, t: Tensor, patch_image: Tensor, grid: Tensor, grids: Grids
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """([N, D] embeddings of noisy patches z [N, P], the skips of each size of image), from what linear ones get."""
        c, parts, skips = self.embed(t), [], []
        for size, at, part in each_size(z, grids):
            x, skips_of_size = self.contract(fold(part, size, self.k), c[at])
            parts.append(self.inp(unfold(x, size, 1)))
            skips.append(skips_of_size)
        h = join(parts, grids)
        if self.positions:
            h = h + where(grid, h.shape[-1]).to(h.dtype)
        return h, skips

    def decode(self, h: Tensor, skips: list[list[Tensor]] | None, t: Tensor, grids: Grids) -> Tensor:
        """[N, P] predictions of hidden states [N, D]; skips as `encode` gave them."""
        if not grids:
            return h.new_zeros(0, self.patch_dim)
        c, parts = self.embed(t), []
        for (size, at, part), skips_of_size in zip(each_size(h, grids), skips, strict=True):
            y = self.expand(fold(self.out(part), size, 1), skips_of_size, c[at])
            parts.append(unfold(y, size, self.k))
        return join(parts, grids)

    def contract(self, x: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(one place a patch, what each stage had before it halved the image) of images x [I, C, h, w]."""
        x, skips = self.conv_in(x), []
        for blocks, down in zip(self.blocks_down, self.down):
            for block in blocks:
                x = block(x, c)
            skips.append(x)
            x = down(x)
        return x, skips

    def expand(self, y: Tensor, skips: list[Tensor], c: Tensor) -> Tensor:
        """Predictions [I, C, h, w] of one place a patch."""
        for blocks, up, skip in zip(reversed(self.blocks_up), reversed(self.up), reversed(skips)):
            y = torch.cat([up(interpolate(y, scale_factor=2)), skip], 1)
            for block in blocks:
                y = block(y, c)
        return self.conv_out(y)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Residual):
                nn.init.zeros_(module.conv2.weight)  # each block starts as the road beside it
        nn.init.normal_(self.inp.weight, std=0.02)  # as all that enters the transformer
        nn.init.zeros_(self.conv_out.weight)  # starts as the mean of the data, as linear patches
