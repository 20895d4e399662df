"""Positions of several sequences as one call of the model, their keys and values in a cache.

spans      lane 0: positions 5 ... 9      lane 3: positions 2 ... 4
chunk      | 5 6 7 8 9 |                  queries that only fill up write to the cache's bin and see its first slot
           | 2 3 4 . . |
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion.model.cache import Cache
from transfusion.model.mask import allow
from transfusion.sequence import NONE, Format, Sequence


@dataclass(eq=False)
class Branch:
    """A sequence in a lane of the cache; its first `settled` positions have their final keys and values there."""

    lane: int
    sequence: Sequence | None = None
    settled: int = 0


class Span(NamedTuple):
    """Positions start .. stop of a branch."""

    branch: Branch
    start: int
    stop: int

    @property
    def patches(self) -> np.ndarray:
        """[n, P] the clean patches that stand in the span."""
        s = self.branch.sequence
        start, stop = ((s.image[:i] != NONE).sum() for i in (self.start, self.stop))
        return s.patches[start:stop]


@dataclass(frozen=True, eq=False)
class Chunk:
    """b spans side by side, each filled up to q positions, as the model takes them."""

    tokens: Tensor  # [b, q]
    place: Tensor  # [b, q, 4]
    mask: Tensor  # [b, 1, q, length], of the keys in the cache
    lanes: Tensor  # [b]
    slots: Tensor  # [b, q]
    length: int
    patch_at: Tensor  # [N] flat positions of the patches
    patch_image: Tensor  # [N] which of the chunk's images each belongs to
    grids: tuple[tuple[int, int], ...]  # [I] rows and columns of each image
    last: Tensor  # [b] flat position of each span's last


def chunk_of(spans: Seq[Span], cache: Cache, fmt: Format, full: bool, device: torch.device) -> Chunk:
    """The spans as tensors; `full`: patches see their whole image. No position of a sequence of ours is hidden."""
    b, q, length = len(spans), max(s.stop - s.start for s in spans), max(s.stop for s in spans)
    tokens, place = np.full((b, q), fmt.special.pad), np.zeros((b, q, 4), np.int64)
    slots, index = np.full((b, q), cache.bin), np.zeros((b, q), np.int64)
    image_q, image_k = np.full((b, q), NONE), np.full((b, length), NONE)
    grids: list[tuple[int, int]] = []
    for i, (branch, start, stop) in enumerate(spans):
        s, n = branch.sequence, stop - start
        tokens[i, :n], place[i, :n], image_q[i, :n] = s.tokens[start:stop], s.place[start:stop], s.image[start:stop]
        slots[i, :n] = index[i, :n] = np.arange(start, stop)
        image_k[i, :stop] = s.image[:stop]
        grids += [s.grids[j] for j in np.unique(image_q[i, :n]) if j != NONE]
    keys = (0, image_k[:, None], np.arange(length), np.False_)
    mask = allow(0, image_q[:, :, None], index[:, :, None], *keys, full)
    last = np.array([i * q + s.stop - s.start - 1 for i, s in enumerate(spans)])
    patch_at = np.flatnonzero(image_q != NONE)
    patch_image = np.repeat(np.arange(len(grids)), [rows * columns for rows, columns in grids])
    lanes = np.array([s.branch.lane for s in spans])
    arrays = (tokens, place, mask[:, None], lanes, slots, patch_at, patch_image, last)
    tokens, place, mask, lanes, slots, patch_at, patch_image, last = (torch.from_numpy(a).to(device) for a in arrays)
    return Chunk(tokens, place, mask, lanes, slots, length, patch_at, patch_image, tuple(grids), last)
