"""Keys and values of what has been computed: one lane a sequence, one slot a position.

lane 0   <bos> a red apple <boi> [# # # #] . . . | bin      a drawn image's slots are overwritten at each step
lane 1   <bos>             <boi> [# # # #] . . . | bin      queries that only fill up a batch write to the bin
lane 2   . . .

Attention reads lanes that stand side by side where they are; of any others it gets a copy.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Where one layer's keys and values of a chunk go, and what the chunk sees of the lanes."""

    k: Tensor  # [lanes, H, slots, K]
    v: Tensor
    lanes: slice | Tensor  # the b lanes of this chunk; a slice copies nothing
    rows: Tensor  # [b * H * q] where its keys and values go, of lanes * H * slots
    length: int  # slots to attend to

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, H, length, K] of the lanes, after writing those of the chunk [b, H, q, K]."""
        for all_lanes, new in ((self.k, k), (self.v, v)):
            K = new.shape[-1]
            all_lanes.view(-1, K).index_copy_(0, self.rows, new.to(all_lanes.dtype).reshape(-1, K))
        return self.k[self.lanes, :, : self.length], self.v[self.lanes, :, : self.length]


class Cache:
    """Keys and values of all layers: 2 * n_layers tensors [lanes, n_kv_heads, slots + 1, head_dim]."""

    def __init__(self, n_layers: int, lanes: int, n_kv_heads: int, slots: int, head_dim: int, *, device, dtype):
        self.shape, self.bin = (lanes, n_kv_heads, slots + 1, head_dim), slots
        # zeros: what no query may see still has to be a number
        self.k = [torch.zeros(self.shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.v = [torch.zeros(self.shape, device=device, dtype=dtype) for _ in range(n_layers)]

    def at(self, lanes: Seq[int], slots: Tensor, length: int) -> list[LayerCache]:
        """The view of each layer for a chunk of positions `slots` [b, q] of `lanes` [b]."""
        _, H, n, _ = self.shape
        lane, heads = torch.tensor(lanes, device=slots.device), torch.arange(H, device=slots.device)
        rows = (((lane[:, None] * H + heads) * n)[:, :, None] + slots[:, None]).flatten()
        neighbours = list(lanes) == list(range(lanes[0], lanes[0] + len(lanes)))
        read = slice(lanes[0], lanes[0] + len(lanes)) if neighbours else lane
        return [LayerCache(k, v, read, rows, length) for k, v in zip(self.k, self.v)]

    def move(self, source: Seq[int], target: Seq[int], length: int):
        """Puts what stands in the first `length` slots of the lanes `source` into the lanes `target`."""
        for x in (*self.k, *self.v):
            x[target, :, :length] = x[source, :, :length]

    def copy_from(self, other: "Cache"):
        """Takes over a smaller cache."""
        lanes, _, n, _ = other.shape
        for mine, its in zip((*self.k, *self.v), (*other.k, *other.v)):
            mine[:lanes, :, : n - 1] = its[:, :, :-1]
