"""Positions of several sequences as one call of the model.

spans      lane 0: positions 5 ... 9      lane 1: positions 2 ... 4
chunk      | 5 6 7 8 9 |                  queries that only fill up write to the cache's bin and see its first slot
           | 2 3 4 . . |
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion.lanes import Branch, Lanes, Placed
from transfusion.model.cache import LayerCache
from transfusion.model.mask import allow
from transfusion.sequence import NONE


class Span(NamedTuple):
    """Positions start .. stop of a branch."""

    branch: Branch
    start: int
    stop: int

    @property
    def images(self) -> list[Placed]:
        """Those that stand in the span; no span holds a part of one."""
        return [image for image in self.branch.images if self.start <= image.start < self.stop]


@dataclass(frozen=True, eq=False)
class Chunk:
    """b spans side by side, each filled up to q positions, as the model takes them."""

    tokens: Tensor  # [b, q]
    place: Tensor  # [b, q, 4]
    mask: Tensor | None  # [b, 1, q, length], 0 where a key in the cache is seen, -inf where not; None: all are
    layers: list[LayerCache]
    patch_at: Tensor  # [N] flat positions of the patches
    patch_image: Tensor  # [N] which of the chunk's images each belongs to
    grids: tuple[tuple[int, int], ...]  # [I] rows and columns of each image
    patches: np.ndarray  # [N, P] the clean patches
    last: Tensor  # [b] flat position of each span's last

    @property
    def regular(self) -> bool:
        """Whether it is of the kinds that a compiled trunk is for: nearly all are. Others would take graphs of their
        own: lanes apart, which are gathered, and a single slot."""
        return isinstance(self.layers[0].lanes, slice) and self.layers[0].length > 1


def chunk_of(spans: Seq[Span], lanes: Lanes, full: bool, device: torch.device, masked: bool = False) -> Chunk:
    """The spans as tensors; `full`: patches see their whole image; `masked`: there is a mask where all is seen too. No
    position of a sequence of ours is hidden."""
    lane, start, stop = (np.array(x) for x in zip(*((s.branch.lane, s.start, s.stop) for s in spans)))
    b, q, length, row = len(spans), int((stop - start).max()), int(stop.max()), lane[:, None]
    index = start[:, None] + np.arange(q)
    real = index < stop[:, None]
    index, slots = np.where(real, index, 0), np.where(real, index, lanes.slots)
    tokens, place = lanes.tokens[row, slots], lanes.place[row, index]
    image_q, image_k = np.where(real, lanes.image[row, index], NONE), lanes.image[lane, :length]
    seen = allow(
        *(0, image_q[:, :, None], index[:, :, None]),
        *(0, image_k[:, None], np.arange(length), np.False_),
        full,
    )
    images = [image for span in spans for image in span.images]
    grids = tuple(image.grid for image in images)
    patches = np.concatenate([image.patches for image in images]) if images else np.zeros((0, 0), np.float32)
    patch_image = np.repeat(np.arange(len(grids)), [rows * columns for rows, columns in grids])
    last = np.arange(b) * q + stop - start - 1
    arrays = (tokens, place, seen[:, None], slots, np.flatnonzero(image_q != NONE), patch_image, last)
    tokens, place, seen_, slots, patch_at, patch_image, last = (torch.from_numpy(a).to(device) for a in arrays)
    mask = None
    if masked or not seen.all():
        mask = torch.zeros(seen_.shape, device=device, dtype=lanes.dtype).masked_fill_(~seen_, -torch.inf)
    layers = lanes.cache.at(lane.tolist(), slots, length)
    return Chunk(tokens, place, mask, layers, patch_at, patch_image, grids, patches, last)
