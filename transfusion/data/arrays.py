"""Images, or latents, by their numbers: in memory, on disk, several sources one after the other.

    len(images)              how many
    images.shape(i)          (height, width) in pixels, as it is trained on; known without decoding it
    images[i]                uint8 [h, w, 3]
    images.read(numbers)     many at once, each uint8 [h, w, 3], or a str that says why it cannot be had
    images.latents(codec, codes)     what `codec` made of them once, as such a sequence: float32 [C, h, w] each, not
                             standardised, or with `codes` int [h, w]; ValueError that says how to make them, if need be

This is all that the loader asks of images; `Held` is the simplest that answers. What a source on disk offers besides
(`latents`) is asked of it by data/corpus.py, which encodes by itself what is held in memory.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np


class Held(Sequence):
    """Images [h, w, 3], or latents [C, h, w] or codes [h, w], in memory."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.arrays[i]

    def shape(self, i: int) -> tuple[int, int]:
        """(height, width) of image i, in pixels."""
        return self.arrays[i].shape[:2]

    def read(self, numbers: Iterable[int]) -> list[np.ndarray | str]:
        return [self.arrays[i] for i in numbers]


class Joined(Sequence):
    """Sequences one after the other as one; nothing is copied, and an index finds its part by bisection."""

    def __init__(self, parts: Iterable[Sequence]):
        self.parts = list(parts)
        self.ends = [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int):
        part, i = self.place(i)
        return part[i]

    def place(self, i: int) -> tuple[Sequence, int]:
        """(the part, the number within it) of i; IndexError beyond the end."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        i %= len(self)
        p = bisect_right(self.ends, i)
        return self.parts[p], i - (self.ends[p] - len(self.parts[p]))

    def shape(self, i: int) -> tuple[int, int]:
        part, i = self.place(i)
        return part.shape(i)

    def read(self, numbers: Iterable[int]) -> list[np.ndarray | str]:
        """As `Held.read`, with one call of each part that holds some of them."""
        places = [self.place(i) for i in numbers]
        found: list[np.ndarray | str] = [""] * len(places)
        for part in self.parts:
            own = [at for at, (of, _) in enumerate(places) if of is part]
            for at, one in zip(own, part.read([places[at][1] for at in own]) if own else [], strict=True):
                found[at] = one
        return found
