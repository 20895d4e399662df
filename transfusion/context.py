"""Rows too long for one rank: several compute the positions of the same rows, and let each other see keys and values.

    parallel.context = 2        <bos> a  story  <boi>  #  #  #  #  <eoi>  goes on <eos>
    rank 0 computes             [ queries                ]
    rank 1 computes                                     [ queries                      ]
    both see                    [ keys and values, gathered in each layer              ]

The trunk is parted by position: its memory is. Patches go in and out, and text into the vocabulary, as they are asked
for: every rank has all states again behind the trunk, takes each n-th text target and each n-th image, and the losses
add up as those of different rows do. The mask is the rows' own, of fewer queries (`mask.py`): ring attention's order
of keys (Liu et al. 2023, arXiv 2310.01889) is not needed where they fit, as here; Llama 3 is trained so (2407.21783,
section 3.3.2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.model.transformer import Mask, Transfusion


class AllGather(torch.autograd.Function):
    """The parts of all ranks one after the other along a dimension; backward adds up what each gives back."""

    @staticmethod
    def forward(ctx, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, size = dim, group, dist.get_world_size(group)
        whole = part.new_empty(size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group)
        return whole.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        size = dist.get_world_size(ctx.group)
        parts = grad.unflatten(ctx.dim, (size, -1)).movedim(ctx.dim, 0).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=ctx.group)
        return own, None, None


@dataclass(frozen=True)
class Context:
    """This rank among those that share rows."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def mine(self, n: int) -> slice:
        """The positions, of n in a row, that this rank computes."""
        assert n % self.size == 0, f"{n} positions do not part among {self.size} ranks"
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    @torch.compiler.disable
    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, K] of whole rows, of those of this rank's positions: what a cache is asked for."""
        return AllGather.apply(k.to(v.dtype), 2, self.group), AllGather.apply(v, 2, self.group)

    def trunk(self, model: Transfusion) -> Callable[..., Tensor]:
        """In place of `model.trunk`: the states of all positions, of which each rank computes its own."""

        def call(h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, patch_at: Tensor, cache: None) -> Tensor:
            L = h.shape[1]
            mine = self.mine(L)
            row, at = patch_at // L, patch_at % L
            inside = (at >= mine.start) & (at < mine.stop)
            patch_at = (row * (L // self.size) + at - mine.start)[inside] if model.config.sorts else patch_at
            layers = [self] * model.config.n_layers
            h = model.trunk(h[:, mine], cos[..., mine, :], sin[..., mine, :], mask, patch_at, layers)
            return AllGather.apply(h, 1, self.group)

        return call
