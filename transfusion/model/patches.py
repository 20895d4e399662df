"""How patches enter and leave the transformer: one linear layer each way, the noise level added on the way in.

h = W_in z + time(t)        p = W_out h        time(t) = W2 silu(W1 sinusoid(t))       (section 3; DiT 2212.09748)
"""

import math

import torch
from torch import Tensor, nn

N_FREQUENCIES = 128


def sinusoid(t: Tensor) -> Tensor:
    """[..., 256] cosines and sines of 1000 t at periods from 2 pi to 20000 pi; t in [0, 1]."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(N_FREQUENCIES, device=t.device) / N_FREQUENCIES)
    angle = 1000.0 * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class LinearPatches(nn.Module):
    """Linear patch embedding with timestep embedding, and linear read-out."""

    def __init__(self, dim: int, patch_dim: int):
        super().__init__()
        self.inp = nn.Linear(patch_dim, dim)
        self.time1 = nn.Linear(2 * N_FREQUENCIES, dim)
        self.time2 = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, patch_dim)

    def encode(self, z: Tensor, t: Tensor, patch_image: Tensor) -> Tensor:
        """[N, D] embeddings of noisy patches z [N, P]; t [I] is the noise level of each image."""
        time = self.time2(nn.functional.silu(self.time1(sinusoid(t))))  # [I, D]
        return self.inp(z) + time[patch_image]

    def decode(self, h: Tensor) -> Tensor:
        """[N, P] predictions of hidden states [N, D]."""
        return self.out(h)

    def init_weights(self):
        for layer in (self.inp, self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)  # starts as the mean of the data, as in DiT
        nn.init.zeros_(self.out.bias)
