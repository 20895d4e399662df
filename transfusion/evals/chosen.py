"""What evaluations look at, drawn once by seed and held in memory: of data of any size so much and no more.

captions of a split  ->  chosen       some of its images with their captions, each read once
of all splits        ->  candidates   the real images that what is drawn is compared with

An image that cannot be read is passed over, and counted.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transfusion.data.arrays import Held
from transfusion.data.documents import Captions, Corpus, Interleaved
from transfusion.data.images import SPLITS
from transfusion.data.order import shuffled
from transfusion.evals.config import EvalConfig

PERMUTED = 1 << 20  # things of which a permutation is written down
AT_ONCE = 64  # images that are read together


def some(n: int, most: int, seed: int) -> list[int]:
    """At most so many of the numbers below n, drawn once by seed, rising."""
    if n <= PERMUTED:
        return sorted(np.random.default_rng(seed).permutation(n)[:most].tolist())
    return sorted(shuffled(i, n, seed) for i in range(min(n, most)))


class Readable(NamedTuple):
    """Those of some images that can be read, in memory."""

    numbers: list[int]
    images: Held
    latents: Held | None  # where they are kept
    why: str  # the first of the others cannot be


def read(of: Captions | Interleaved, numbers: Sequence[int]) -> Readable:
    """The images of these numbers, each read once: what can be read now may not be later."""
    columns = [of.images.read(numbers), *([] if of.latents is None else [of.latents.read(numbers)])]
    good, why = [], ""
    for number, *found in zip(numbers, *columns, strict=True):
        lacking = [one for one in found if isinstance(one, str)]
        why = why or next(iter(lacking), "")
        if not lacking:
            good.append((number, *found))
    kept, images, *latents = zip(*good) if good else [()] * (1 + len(columns))
    return Readable(list(kept), Held(images), Held(latents[0]) if latents else None, why)


def pass_over(n: int, of_all: int, what: str, why: str):
    """Says how many could not be read."""
    if n:
        print(f"{n} of {of_all} {what} are passed over: {why}", file=sys.stderr, flush=True)


class LookedAt(NamedTuple):
    """Captioned images of a split, read once."""

    split: str
    numbers: list[int]  # among all of the split
    captions: Captions  # of these alone


def chosen(corpus: Corpus, n: int, seed: int) -> Iterator[LookedAt]:
    """At most n images of each split that has any, drawn once by seed; those that cannot be read are passed over."""
    for split in SPLITS:
        captions = corpus.captions[split]
        drawn = some(len(captions), n, seed)
        found = read(captions, drawn)
        pass_over(len(drawn) - len(found.numbers), len(drawn), f"images of {split}", found.why)
        if found.numbers:
            of_captions = (captions.texts, captions.ids, captions.names)
            texts, ids, names = ([of[i] for i in found.numbers] for of in of_captions)
            yield LookedAt(split, found.numbers, Captions(found.images, texts, ids, names, found.latents))


class Candidate(NamedTuple):
    """A real image that one that was drawn may be nearest to."""

    image: np.ndarray  # [h, w, 3] uint8
    texts: list[str]


def candidates(corpus: Corpus, config: EvalConfig, looked_at: Sequence[LookedAt]) -> Iterator[Candidate]:
    """All images of all splits that can be read; of more than n_candidates so many drawn by seed, and those that are
    looked at."""
    sizes = [len(corpus.captions[split]) for split in SPLITS]
    drawn, first = np.array(some(sum(sizes), config.n_candidates, config.seed), np.int64), 0
    read_before = {of.split: dict(zip(of.numbers, of.captions.images)) for of in looked_at}
    for split, size in zip(SPLITS, sizes):
        captions, own = corpus.captions[split], drawn[(drawn >= first) & (drawn < first + size)] - first
        held, first = read_before.get(split, {}), first + size
        numbers = sorted({*own.tolist(), *held})
        for at in range(0, len(numbers), AT_ONCE):
            part = numbers[at : at + AT_ONCE]
            rest = [i for i in part if i not in held]
            found = held | dict(zip(rest, captions.images.read(rest)))
            yield from (Candidate(found[i], captions.texts[i]) for i in part if not isinstance(found[i], str))


def look(image: np.ndarray) -> bytes:
    """The same for images of the same pixels."""
    return hashlib.sha256(image.tobytes()).digest()
