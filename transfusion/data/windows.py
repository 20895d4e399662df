"""The text of a run, cut into windows, and the windows into the gaps that images leave: by lengths alone.

    stream     w w w w w w <eos> w w w <eos> w w ...      a source: its texts, one after the other
    windows      |--------|--------|--------|-- ...       of its stream, on a grid that is shifted anew each epoch
    text       window 17 | window 4 | window 92 | ...     of the run: windows in the epoch's order, sources in turns
    pack p           [pE ....... (p + 1)E)                what it reads of that, E = the tokens that a pack has room for

Whole windows go into the widest gaps, so that an empty row is one window; what is left of the others is cut to the
narrow ones, each part a document of its own. So an epoch reads nearly all of the text nearly once. Not quite: a pack
with less room than E leaves the end of its text unread, and one with more reads on behind it what is read again in its
own turn (1 % each where half of the positions are text, 5 % where a tenth are); each <eos> within a part costs that
part its last token, as what follows it wants a <bos>; and a stream's last tokens, fewer than a window, wait for an
epoch, as the grid is shifted anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from transfusion.data.mixture import Mixture, mixture
from transfusion.data.order import key_of, shuffled
from transfusion.sequence import Special, Text

LEAST_TEXT = 8  # positions; a smaller gap stays padding


@dataclass(frozen=True, eq=False)
class Stream:
    """The text of a source as token ids."""

    name: str  # "text " and the end of its path
    ids: np.ndarray  # [n] int, any that can be cut, in memory or mapped; each text is closed by <eos>
    texts: int  # how many

    def cut(self, start: int, n: int) -> np.ndarray:
        """[n] int64 ids from `start` on; behind the end it begins again."""
        parts, start = [], start % len(self.ids)
        while n:
            parts.append(np.asarray(self.ids[start : start + n], np.int64))
            start, n = 0, n - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class Part(NamedTuple):
    """`n` tokens of the text, from the one at place `at` of window `window` on; they may end behind that window."""

    window: int
    at: int
    n: int


def cut_to_gaps(rooms: Sequence[int], start: int, n: int, window: int) -> list[list[Part]]:
    """For each gap of so many positions the parts that go into it, of tokens `start` ... `start + n` of the text."""
    ends = [*range(start - start % window + window, start + n, window), start + n]
    stretches = [(a, b - a) for a, b in zip([start, *ends], ends) if b > a]
    stretches.sort(key=lambda s: -s[1])
    filled: list[list[Part]] = [[] for _ in rooms]
    left = [Part(*divmod(a, window), length) for a, length in reversed(stretches)]
    for gap in sorted(range(len(rooms)), key=lambda g: -rooms[g]):
        room = rooms[gap]
        while room >= LEAST_TEXT:
            of = left.pop()
            size = min(room - 1, of.n) if left else room - 1  # the last of all is read on
            filled[gap].append(of._replace(n=size))
            room -= size + 1
            if of.n - size >= 2 or not left:
                left.append(Part(of.window, of.at + size, of.n - size))
    return filled


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of all sources, `size` tokens each, mixed by weights of their tokens; () = as long as they are."""

    streams: Sequence[Stream]
    size: int
    weights: tuple[float, ...] = ()

    def of(self, stream: Stream) -> int:
        """Windows of an epoch."""
        return max(1, len(stream.ids) // self.size) if len(stream.ids) else 0

    @cached_property
    def mixture(self) -> Mixture:
        names, sizes = [s.name for s in self.streams], [self.of(s) for s in self.streams]
        return mixture(names, sizes, self.weights, [1.0] * len(sizes))

    def read(self, seed: int, source: int, k: int, at: int, n: int) -> np.ndarray:
        """[n] ids of the source's k-th window, from place `at` on."""
        stream = self.streams[source]
        epoch, i = divmod(k, self.of(stream))
        offset = key_of(seed, 3, stream.name, epoch) % self.size
        first = shuffled(i, self.of(stream), seed, 4, stream.name, epoch) * self.size + offset
        return stream.cut(first + at, n)


def text_documents(ids: np.ndarray, special: Special) -> list[list[Text]]:
    """A part of the text as documents <bos> ... <eos>, in len(ids) + 1 positions at most."""
    documents, room = [], len(ids) + 1
    for part in np.split(ids, np.flatnonzero(ids == special.eos) + 1):
        part = part[: max(room - 1, 0)]
        if len(part) > 1:
            documents.append([Text(np.concatenate([[special.bos], part]))])
            room -= len(part) + 1
    return documents
