"""How patches enter and leave the transformer: one linear layer each way, the noise level added on the way in.

    h = W_in z [* (1 + W3 c)] + W2 c [+ where(row, column)]        p = W_out h        c = silu(W1 sinusoid(1000 t))

The timestep embedding W2 c is section 3's (in DiT's form, 2212.09748). Two options are ours. `where`: fixed sinusoids
of the patch's row and column, as in ViTs; without it a patch learns its own place only from rotary attention to the
others. `scale`: t also scales the patch (FiLM, 1709.07871), so that noise can be kept out where it says nothing.
"""

import math

import torch
from torch import Tensor, nn

from transfusion.model.fold import Grids

N_FREQUENCIES = 128


def sinusoid(x: Tensor, n: int) -> Tensor:
    """[..., 2 n] cosines and sines of x at n periods from 2 pi to nearly 20000 pi."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(n, device=x.device) / n)
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def where(grid: Tensor, dim: int) -> Tensor:
    """[N, dim] sinusoids of row and column, grid [N, 2]."""
    return sinusoid(grid, dim // 4).flatten(-2)


class LinearPatches(nn.Module):
    """Linear patch embedding with timestep embedding, and linear read-out."""

    def __init__(self, dim: int, patch_dim: int, positions: bool = False, time_scale: bool = False):
        super().__init__()
        self.positions = positions
        self.inp = nn.Linear(patch_dim, dim)
        self.time1 = nn.Linear(2 * N_FREQUENCIES, dim)
        self.time2 = nn.Linear(dim, dim)
        self.scale = nn.Linear(dim, dim) if time_scale else None
        self.out = nn.Linear(dim, patch_dim)

    def encode(self, z: Tensor, t: Tensor, patch_image: Tensor, grid: Tensor, grids: Grids) -> tuple[Tensor, None]:
        """([N, D] embeddings of noisy patches z [N, P], no skips); t [I] in [0, 1] and grids [I] (rows, columns) of
        each image, patch_image [N] and grid [N, 2] the image, row and column of each patch."""
        c = nn.functional.silu(self.time1(sinusoid(1000 * t, N_FREQUENCIES).to(self.time1.weight.dtype)))  # [I, D]
        h = self.inp(z)
        if self.scale is not None:
            h = h * (1 + self.scale(c)[patch_image])
        h = h + self.time2(c)[patch_image]
        if self.positions:
            h = h + where(grid, h.shape[-1]).to(h.dtype)
        return h, None

    def decode(self, h: Tensor, skips: None, t: Tensor, grids: Grids) -> Tensor:
        """[N, P] predictions of hidden states [N, D]."""
        return self.out(h)

    def init_weights(self):
        for layer in (self.inp, self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if self.scale is not None:
            nn.init.zeros_(self.scale.weight)
            nn.init.zeros_(self.scale.bias)
        nn.init.zeros_(self.out.weight)  # starts as the mean of the data, as in DiT
        nn.init.zeros_(self.out.bias)
