"""Keys and values of what has been computed: one lane a sequence, one slot a position.

lane 0   <bos> a red apple <boi> [# # # #] . . . | bin      a drawn image's slots are overwritten at each step
lane 1   <bos>             <boi> [# # # #] . . . | bin      queries that only fill up a batch write to the bin
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Where one layer's keys and values of a chunk go, and what the chunk sees of the lanes."""

    k: Tensor  # [lanes, H, slots, K]
    v: Tensor
    lanes: Tensor  # [b] the lanes of this chunk
    slots: Tensor  # [b, q] where its positions go
    length: int  # slots to attend to

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, H, length, K] of the lanes, after writing those of the chunk [b, H, q, K]."""
        at = (self.lanes[:, None], slice(None), self.slots)
        self.k[at], self.v[at] = k.transpose(1, 2).to(self.k.dtype), v.transpose(1, 2).to(self.v.dtype)
        return self.k[self.lanes, :, : self.length], self.v[self.lanes, :, : self.length]


class Cache:
    """Keys and values of all layers: 2 * n_layers tensors [lanes, n_kv_heads, slots + 1, head_dim]."""

    def __init__(self, n_layers: int, lanes: int, n_kv_heads: int, slots: int, head_dim: int, *, device, dtype):
        shape = (lanes, n_kv_heads, slots + 1, head_dim)
        self.bin = slots
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]

    def at(self, lanes: Tensor, slots: Tensor, length: int) -> list[LayerCache]:
        """The view of each layer for a chunk of positions `slots` [b, q] of `lanes` [b]."""
        return [LayerCache(k, v, lanes, slots, length) for k, v in zip(self.k, self.v)]
