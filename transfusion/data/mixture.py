"""Which source the k-th document comes from, and which of that source's it is: a pure function of k, for any shares.

    shares 2 : 1      A B A A B A A B A ...      after k documents, A has given round(2 k / 3) of them

Sources take turns as evenly as whole documents can, like the cells of a line drawn on a grid: every stretch of the run
is mixed as the whole is, to within a document or two of each source; nothing is drawn, and nothing is remembered. A
source goes through its documents in its own order, epoch by epoch, whatever the others do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNIT = 2**32  # what weights are counted in


def names_of(kind: str, paths: Sequence[str]) -> list[str]:
    """A name for each source of a kind: the end of its path, as much as tells it from the others.

    Orders and cursors go by it, so that data may lie elsewhere on another machine.
    """
    parts = [Path(path).parts for path in paths]
    tails = [[p[-n:] for p in parts] for n in range(1, 1 + max(map(len, parts), default=0))]
    own = [next(tail[i] for tail in tails if tail.count(tail[i]) == 1) for i in range(len(parts))]
    return [f"{kind} {Path(*tail).as_posix()}" for tail in own]


@dataclass(frozen=True)
class Mixture:
    """Sources by name, the documents (or windows) that each has, and the shares of all documents that come from it."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # an epoch of each
    shares: tuple[int, ...]  # to be divided by their sum

    def taken(self, k: int) -> list[int]:
        """How many of the first k documents come from each source."""
        counts, total = [], sum(self.shares)
        for share in self.shares:  # the source's share of what those before it leave
            counts.append((k * share + total // 2) // total if share else 0)
            k, total = k - counts[-1], total - share
        return counts

    def draw(self, k: int) -> tuple[int, int]:
        """(source, which of its documents, counted from the beginning of the run) of document k."""
        before, after = self.taken(k), self.taken(k + 1)
        source = next(s for s, (a, b) in enumerate(zip(before, after)) if b > a)
        return source, before[source]


def mixture(names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], lengths: Sequence[float]) -> Mixture:
    """The mixture in which positions are shared out by weight, documents of a source being `lengths` long on average.

    Without weights every document comes once an epoch of all. ValueError where a source with a weight has no documents.
    """
    if not weights:
        return Mixture(tuple(names), tuple(sizes), tuple(sizes))
    for name, size, weight in zip(names, sizes, weights, strict=True):
        if weight and not size:
            raise ValueError(f"{name} has nothing to train on, and a weight of {weight:g}: set that to 0")
    per_document = [weight / length if weight else 0.0 for weight, length in zip(weights, lengths, strict=True)]
    return Mixture(tuple(names), tuple(sizes), tuple(round(UNIT * w / sum(per_document)) for w in per_document))
