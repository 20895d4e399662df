"""Batches of training, each a pure function of (seed, step): the same from any number of ranks and workers.

A step's rows are packed by the pack, 32 rows or fewer, and packs are numbered through the run. Pack p takes image
documents p n .. p n + n - 1, lays as many of the first of them as fit into its rows (first-fit decreasing), and fills
every gap with text. All of this is planned from lengths, so that a rank plans the packs of its rows and reads no more
than what stands in these rows.

| caption [image] | caption [image] | text |
| [image] caption | caption [image] | text |
| text                                     |
"""

import ctypes
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transfusion.data.documents import Corpus, Plan
from transfusion.data.windows import LEAST_TEXT, Part, Windows, cut_to_gaps, text_documents
from transfusion.sequence import Batch, Format, Sequence, collate, first_fit, lay_out

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PACK = 32  # rows that are packed together, at most
MEASURED = 8  # packs whose gaps say how much text a pack has room for


def micro_batches(rows: int, most: int, ranks: int = 1) -> tuple[int, int]:
    """(how many micro-batches each of these ranks computes in a step of so many rows, the rows of each): as few as
    divide its rows evenly with `most` at once, 0 = all. ValueError where the rows do not part among the ranks.

    Ranks that share rows (parallel.context) count as one."""
    if rows % ranks:
        raise ValueError(
            f"train.rows = {rows} do not part among {ranks} ranks: start a number that divides them, or, in a new run, "
            f"make train.rows a multiple of {ranks}"
        )
    own = rows // ranks
    size = next(n for n in range(min(most or own, own), 0, -1) if own % n == 0)
    return own // size, size


class Row(NamedTuple):
    """What a row is to hold, and the documents that are too long for any."""

    images: list[Plan]
    text: list[Part]
    too_long: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Packer:
    """Makes the batches of a run.

    One that goes on from a checkpoint is given `since`, the step and what `cursors` gave for it when it was saved: then
    every source goes on where it was, also where sources, weights, or sizes have changed since.
    """

    corpus: Corpus
    fmt: Format
    seed: int
    rows: int  # of the whole step
    seq_len: int
    micro_batch: int = 0  # rows of a batch at most; 0 = all that the rank has
    rank: int = 0  # which of `ranks` equal parts of the rows to make
    ranks: int = 1
    since: tuple[int, dict[str, int]] | None = None

    def __post_init__(self):
        micro_batches(self.rows, self.micro_batch, self.ranks)  # or they are refused
        assert 0 <= self.rank < self.ranks, f"rank {self.rank} of {self.ranks}"

    @cached_property
    def pack_rows(self) -> int:
        """Rows of a pack: the most that the rows of a step divide into."""
        return next(n for n in range(min(PACK, self.rows), 0, -1) if self.rows % n == 0)

    @property
    def packs(self) -> int:
        """Packs of a step."""
        return self.rows // self.pack_rows

    @cached_property
    def images_per_pack(self) -> int:
        """Image documents that a pack looks at: as many as fill their share of its positions."""
        share = self.corpus.config.image_share
        if not share:
            return 0
        return max(1, int(share * self.pack_rows * self.seq_len / self.corpus.image_document_length))

    @property
    def images_per_step(self) -> int:
        return self.packs * self.images_per_pack

    @cached_property
    def windows(self) -> Windows:
        """The text, in windows that fill a row."""
        return Windows(self.corpus.text, max(1, self.seq_len - 1), self.corpus.config.text_weights)

    @cached_property
    def text_per_pack(self) -> int:
        """Tokens of text that a pack has room for, on average over the first packs; 0 = the run has no text."""
        if not any(len(s.ids) for s in self.corpus.text) or self.corpus.config.image_share == 1:
            return 0
        n = MEASURED if self.images_per_pack else 1
        rooms = [room for pack in range(n) for room in self.rooms(self.packed(pack, {})[0])]
        return max(1, sum(room - 1 for room in rooms if room >= LEAST_TEXT) // n)

    def rooms(self, rows: list[list[Plan]]) -> list[int]:
        """Positions that these rows have left."""
        return [self.seq_len - sum(plan.length for plan in row) for row in rows]

    def counted(self, step: int) -> dict[str, int]:
        """Documents and windows before a step by source, in a run without `since`."""
        images, text = step * self.images_per_step, step * self.packs * self.text_per_pack
        found = {}
        for k, mix in ((images, self.corpus.image_mixture), (text // self.windows.size, self.windows.mixture)):
            if any(mix.sizes):
                found |= zip(mix.names, mix.taken(k))
        return found

    @cached_property
    def moved(self) -> dict[str, int]:
        """How many more documents than `counted` says have been taken of each source."""
        if self.since is None:
            return {}
        step, cursors = self.since
        return {name: cursors.get(name, 0) - k for name, k in self.counted(step).items()}

    def cursors(self, step: int) -> dict[str, int]:
        """How many documents of each source of images, and windows of each text, come before a step."""
        return {name: k + self.moved.get(name, 0) for name, k in self.counted(step).items()}

    def packed(self, pack: int, moved: dict[str, int]) -> tuple[list[list[Plan]], list[str]]:
        """(image documents of each row of a pack, those too long for any row).

        The last of the pack's documents, of any length, wait for an epoch if not all fit.
        """
        mix, plans = self.corpus.image_mixture, []
        for k in range(pack * self.images_per_pack, (pack + 1) * self.images_per_pack):
            source, number = mix.draw(k)
            plans.append(self.corpus.plan(self.seed, source, number + moved.get(mix.names[source], 0)))
        too_long = [
            f"{p.name}: {p.length} positions, a row has {self.seq_len}" for p in plans if p.length > self.seq_len
        ]
        plans = [plan for plan in plans if plan.length <= self.seq_len]
        while True:
            placed, left_over = first_fit([plan.length for plan in plans], self.pack_rows, self.seq_len)
            if not left_over:
                return [[plans[i] for i in row] for row in placed], too_long
            plans = plans[: -len(left_over)]  # first-fit leaves the shortest over, and would never train on them

    def planned(self, pack: int) -> list[Row]:
        """The rows of a pack, from lengths alone, in an order in which ranks have alike much of everything."""
        rows, too_long = self.packed(pack, self.moved)
        text, n = [[] for _ in rows], self.text_per_pack
        if n:
            text = cut_to_gaps(self.rooms(rows), pack * n, n, self.windows.size)
        first, *rest = spread_out(len(rows))  # first-fit leaves images in the first rows, and text in the last
        return [Row(rows[first], text[first], tuple(too_long)), *(Row(rows[r], text[r]) for r in rest)]

    def text(self, part: Part) -> list[Sequence]:
        """The documents of a part of the text."""
        mix = self.windows.mixture
        source, k = mix.draw(part.window)
        ids = self.windows.read(self.seed, source, k + self.moved.get(mix.names[source], 0), part.at, part.n)
        return [lay_out(document, self.fmt) for document in text_documents(ids, self.fmt.special)]

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: of R ranks the r-th has the r-th R-th of the rows.

        A document of which an image cannot be read is padding, and stands in the batch's `lost`.
        """
        n, size = micro_batches(self.rows, self.micro_batch, self.ranks)
        numbers = range(self.rank * n * size, (self.rank + 1) * n * size)
        firsts = numbers[::size]
        packs = {p: self.planned(step * self.packs + p) for p in {row // self.pack_rows for row in numbers}}
        rows = {row: packs[row // self.pack_rows][row % self.pack_rows] for row in numbers}
        plans = [plan for row in rows.values() for plan in row.images]
        filled = iter(self.corpus.fill(plans))
        laid: dict[int, list[Sequence]] = {}
        lost: dict[int, list[str]] = {}
        for number, row in rows.items():
            laid[number], lost[number] = [], [*row.too_long]
            for plan, document in zip(row.images, filled):
                if isinstance(document, str):
                    lost[number].append(document)
                    continue
                laid[number].append(lay_out(document, self.fmt))
                assert len(laid[number][-1]) == plan.length, f"{plan.name} has not the size that is on record"
            laid[number] += [sequence for part in row.text for sequence in self.text(part)]
        return [
            collate(
                [laid[row] for row in range(first, first + size)],
                self.seq_len,
                self.fmt,
                first,
                tuple(name for row in range(first, first + size) for name in lost[row]),
            )
            for first in firsts
        ]


def spread_out(n: int) -> list[int]:
    """0 ... n - 1 so that every stretch has some of all: by their bits in reverse order (van der Corput)."""
    return sorted(range(n), key=lambda i: f"{i:032b}"[::-1])


class Steps(IterableDataset):
    """The steps from `start` to `stop`; worker w of n takes every n-th."""

    def __init__(self, packer: Packer, start: int, stop: int):
        self.packer, self.start, self.stop = packer, start, stop

    def __iter__(self) -> Iterator[list[Batch]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.start + first, self.stop, stride):
            yield self.packer.batches(step)


def begin_worker(worker: int):
    """Makes a process a worker, which keeps its memory, and which no signal ends: a Ctrl-C reaches the workers too,
    but the training process still wants their batches; they end when it does."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)
    keep_memory()


def keep_memory():
    """Where there is glibc, has it keep what a batch leaves behind for the next one: to give it back to the system, and
    have it filled with zeros anew, takes a third of the time that a batch of photos does (bench/feeding.py)."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # bytes; glibc takes no more
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def load_batches(packer: Packer, start: int, stop: int, workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `start` to `stop`, prepared ahead by `workers` processes (0 = in line)."""
    if not workers:
        return (packer.batches(step) for step in range(start, stop))
    packer = replace(packer, corpus=packer.corpus.without_networks())
    options = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": begin_worker}
    return iter(DataLoader(Steps(packer, start, stop), batch_size=None, **options))
