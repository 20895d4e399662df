"""How patches enter and leave the transformer: one linear layer each way, the noise level added on the way in.

    h = W_in z + time(t) [+ where(row, column)]        p = W_out h        time(t) = W2 silu(W1 sinusoid(1000 t))

The timestep embedding is section 3's (in DiT's form, 2212.09748). `where` is an option of ours: fixed sinusoids of the
patch's row and column, as in ViTs. Without it a patch learns its own place only from rotary attention to the others.
"""

import math

import torch
from torch import Tensor, nn

N_FREQUENCIES = 128


def sinusoid(x: Tensor, n: int) -> Tensor:
    """[..., 2 n] cosines and sines of x at n periods from 2 pi to nearly 20000 pi."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(n, device=x.device) / n)
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class LinearPatches(nn.Module):
    """Linear patch embedding with timestep embedding, and linear read-out."""

    def __init__(self, dim: int, patch_dim: int, positions: bool = False):
        super().__init__()
        self.positions = positions
        self.inp = nn.Linear(patch_dim, dim)
        self.time1 = nn.Linear(2 * N_FREQUENCIES, dim)
        self.time2 = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, patch_dim)

    def encode(self, z: Tensor, t: Tensor, patch_image: Tensor, grid: Tensor) -> Tensor:
        """[N, D] embeddings of noisy patches z [N, P]; t [I] in [0, 1] of each image, grid [N, 2] of row and column."""
        time = self.time2(nn.functional.silu(self.time1(sinusoid(1000 * t, N_FREQUENCIES))))  # [I, D]
        h = self.inp(z) + time[patch_image]
        if self.positions:
            h = h + sinusoid(grid, h.shape[-1] // 4).flatten(-2).to(h.dtype)
        return h

    def decode(self, h: Tensor) -> Tensor:
        """[N, P] predictions of hidden states [N, D]."""
        return self.out(h)

    def init_weights(self):
        for layer in (self.inp, self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)  # starts as the mean of the data, as in DiT
        nn.init.zeros_(self.out.bias)
