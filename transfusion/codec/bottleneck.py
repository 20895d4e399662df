"""What stands between encoder and decoder, a Gaussian near the normal or a codebook: both give latents and a cost.

    kl    z = mean + sigma * eps             cost = KL(N(mean, sigma^2) || N(0, 1)), summed over a latent
    vq    z = the code nearest to the unit vector e      cost = |sg(e) - z|^2 + 0.25 |e - sg(z)|^2, mean of the vectors

Codes and vectors are compared on the unit sphere (Yu et al. 2022, arXiv 2110.04627): there the nearest code is the one
of the largest dot product, and no code is out of reach because it is short or long.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT = 0.25
MEMORY = 0.99  # of a code's use, a step
UNUSED = 0.05  # of the use that all codes have where all are used alike


class Latent(NamedTuple):
    z: Tensor  # [n, C, h, w]
    cost: Tensor  # [] mean over the images (kl) or the vectors (vq)
    codes: Tensor | None = None  # [n, h, w] long, vq only


class Gaussian(nn.Module):
    """Moments [n, 2 C, h, w] to latents; the mean where no noise is given."""

    def forward(self, moments: Tensor, eps: Tensor | None = None) -> Latent:
        mean, logvar = moments.float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        cost = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return Latent(mean if eps is None else mean + (0.5 * logvar).exp() * eps, cost)


class Codebook(nn.Module):
    """Vectors [n, code_dim, h, w] to codes of length 1; gradients pass straight through."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        # 1 where a code is met as often as the mean one. All begin unused, so that the first batches' vectors become
        # the codes: to random ones, far away, all vectors would be drawn together until nothing tells them apart.
        self.register_buffer("use", torch.zeros(codes))

    def forward(self, vectors: Tensor, eps: Tensor | None = None) -> Latent:
        e = F.normalize(vectors.float(), dim=1)
        # bf16 has not the digits to tell close codes apart; image by image, as [n, h, w, codes] is large
        with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
            codes = torch.stack([(one.movedim(0, -1) @ self.vectors().T).argmax(-1) for one in e])
        z = self.lookup(codes)
        cost = (e.detach() - z).square().sum(1).mean() + COMMITMENT * (e - z.detach()).square().sum(1).mean()
        return Latent(e + (z - e).detach(), cost, codes)

    def vectors(self) -> Tensor:
        """[codes, code_dim] of length 1."""
        return F.normalize(self.embedding.weight.float(), dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """[n, code_dim, h, w] of codes [n, h, w]."""
        return self.vectors()[codes].movedim(-1, 1)

    @torch.no_grad()
    def revive(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """How many codes were hardly used and now are vectors of the batch, drawn by the generator."""
        n = len(self.use)
        met = torch.bincount(codes.flatten(), minlength=n) * (n / codes.numel())
        self.use.lerp_(met, 1 - MEMORY)
        dead = (self.use < UNUSED).nonzero()[:, 0]
        flat = F.normalize(vectors.float(), dim=1).movedim(1, -1).reshape(-1, vectors.shape[1])
        drawn = torch.randperm(len(flat), generator=generator)[: len(dead)].to(flat.device)
        dead = dead[: len(drawn)]  # a batch of fewer vectors than dead codes revives as many as it has
        self.embedding.weight[dead] = flat[drawn].to(self.embedding.weight)
        self.use[dead] = 1.0
        return len(dead)


BOTTLENECKS = ("kl", "vq")
