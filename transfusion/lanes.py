"""Several sequences that grow, each in a lane: what stands at its positions, and their keys and values in the cache.

lane 0   <bos> a red apple <boi> # # # # <eoi>            a request that draws ...
lane 1   <bos> <boi> # # # # <eoi>                        ... and guidance's other prefix
lane 2   <bos> a dog on                                   one that writes
lane 3   <bos> a  b  c  d                                 another

What is added to a sequence is laid out by itself (`lay_out`), not the whole anew. Branches that go through the model
together stand side by side (`arrange`), so that attention reads the cache in place.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from transfusion.model.transformer import Transfusion
from transfusion.sequence import NONE, Format, Segment, lay_out


class Placed(NamedTuple):
    """An image of patches in a lane."""

    start: int  # its first patch's slot
    grid: tuple[int, int]
    patches: np.ndarray  # [N, P] float32, clean


@dataclass(eq=False)
class Branch:
    """A sequence in a lane; its first `settled` positions have their final keys and values in the cache."""

    lane: int = NONE
    length: int = 0
    settled: int = 0
    images: list[Placed] = field(default_factory=list)


class Lanes:
    """Room for `n` sequences of at most `slots` positions."""

    def __init__(self, model: Transfusion, fmt: Format, dtype: torch.dtype, n: int, slots: int):
        self.model, self.fmt, self.dtype, self.n, self.slots = model, fmt, dtype, n, slots
        self.cache = model.new_cache(n, slots, dtype)
        self.tokens = np.full((n, slots + 1), fmt.special.pad, np.int64)  # the last slot is the cache's bin
        self.image = np.full((n, slots + 1), NONE)  # number of the image within the sequence, or NONE
        self.place = np.zeros((n, slots + 1, 4), np.int64)
        self.held: set[int] = set()

    def grown(self, n: int, slots: int) -> "Lanes":
        """These lanes with room for so many and so long sequences, at least as before."""
        # twice as many as before: sequences that come one by one shall not each have all of the memory copied
        n, slots = max(n, 2 * self.n) if n > self.n else self.n, max(slots, self.slots)
        if (n, slots) == (self.n, self.slots):
            return self
        new = Lanes(self.model, self.fmt, self.dtype, n, slots)
        new.cache.copy_from(self.cache)
        for mine, its in ((new.tokens, self.tokens), (new.image, self.image), (new.place, self.place)):
            mine[: self.n, : self.slots] = its[:, :-1]
        new.held = self.held
        return new

    def take(self, document: Seq[Segment]) -> Branch:
        """A new branch in a lane of its own, with a document laid out."""
        lane = next(lane for lane in range(self.n) if lane not in self.held)
        self.held.add(lane)
        self.image[lane] = NONE
        for x in (*self.cache.k, *self.cache.v):
            x[lane].zero_()  # a number that is not one would come through any mask
        branch = Branch(lane)
        self.append(branch, document)
        return branch

    def release(self, branches: Seq[Branch]):
        self.held -= {branch.lane for branch in branches}

    def append(self, branch: Branch, segments: Seq[Segment]):
        """Lays segments out behind what stands in the branch."""
        lane, start = branch.lane, branch.length
        # a document goes on behind text or <eoi>, whose place is one less
        s = lay_out(segments, self.fmt, int(self.place[lane, start - 1, 0]) + 1 if start else 0)
        assert not s.hidden.any(), "what is given is clean as it stands: a noised copy before it is for training alone"
        stop = start + len(s)
        self.tokens[lane, start:stop], self.place[lane, start:stop] = s.tokens, s.place
        self.image[lane, start:stop] = s.image
        if s.grids:
            self.image[lane, start:stop] += len(branch.images) * (s.image != NONE)
            firsts = [start + int((s.image == i).argmax()) for i in range(len(s.grids))]
            ends = np.cumsum([rows * columns for rows, columns in s.grids])
            branch.images += map(Placed, firsts, s.grids, np.split(s.patches, ends[:-1]))
        branch.length = stop

    def cut(self, branch: Branch, length: int):
        """Takes the branch's positions from `length` on back."""
        self.image[branch.lane, length:] = NONE
        branch.images = [image for image in branch.images if image.start < length]
        branch.length, branch.settled = length, min(length, branch.settled)

    def arrange(self, groups: Seq[Seq[Branch]]):
        """Moves branches, all that there are, so that those of a group stand side by side; few move."""
        first, moves = 0, []
        for group in groups:
            home = range(first, first + len(group))
            staying = {branch.lane for branch in group} & set(home)
            free = [lane for lane in home if lane not in staying]
            moves += zip([branch for branch in group if branch.lane not in home], free, strict=True)
            first += len(group)
        if moves:
            source, target = [branch.lane for branch, _ in moves], [lane for _, lane in moves]
            self.cache.move(source, target, max(branch.settled for branch, _ in moves))
            for table in (self.tokens, self.image, self.place):
                table[target] = table[source]
            for branch, lane in moves:
                branch.lane = lane
        self.held = set(range(first))
