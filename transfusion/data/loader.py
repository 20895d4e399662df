"""Batches of training, each a pure function of (seed, step): no state to save, no order to lose.

step s takes image documents s*n .. s*n + n-1, packs as many of the first of them as fit into its rows (first-fit
decreasing), and fills every gap with text: row r gets window s*rows + r, cut to the room that is left.

| caption [image] | caption [image] | text |
| [image] caption | caption [image] | text |
| text                                     |
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transfusion.data.documents import Corpus
from transfusion.sequence import Batch, Format, collate, first_fit, lay_out

LEAST_TEXT = 8  # a smaller gap stays padding


@dataclass(frozen=True, eq=False)
class Packer:
    """Makes the batches of a run."""

    corpus: Corpus
    fmt: Format
    seed: int
    rows: int  # of the whole step
    seq_len: int
    accumulate: int = 1  # micro-batches that the rows of a step are split into
    rank: int = 0  # which of `ranks` equal parts of each micro-batch to make
    ranks: int = 1

    def __post_init__(self):
        parts = self.accumulate * self.ranks
        if self.rows % parts:
            raise ValueError(
                f"train.rows = {self.rows} do not part into train.accumulate = {self.accumulate} micro-batches for "
                f"each of {self.ranks} ranks: make train.rows a multiple of {parts}"
            )
        assert 0 <= self.rank < self.ranks, f"rank {self.rank} of {self.ranks}"

    @property
    def images_per_step(self) -> int:
        """Image documents that a step looks at: as many as fill their share of its positions."""
        share = self.corpus.config.image_share
        if not share:
            return 0
        return max(1, int(share * self.rows * self.seq_len / self.corpus.image_document_length))

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, with S = rows / accumulate: rows m S + r S / R ... of the m-th of all.

        The last of the step's documents, of any length, wait for an epoch if not all fit.
        """
        n = self.images_per_step
        images = [lay_out(self.corpus.image_document(self.seed, step * n + i), self.fmt) for i in range(n)]
        placed, left_over = first_fit(map(len, images), self.rows, self.seq_len)
        while left_over:  # first-fit leaves the shortest over, and would never train on them
            images = images[: -len(left_over)]
            placed, left_over = first_fit(map(len, images), self.rows, self.seq_len)
        rows = [[images[i] for i in row] for row in placed]
        if self.corpus.works and self.corpus.config.image_share < 1:
            for r, row in enumerate(rows):
                room = self.seq_len - sum(map(len, row))
                if room >= LEAST_TEXT:
                    k = step * self.rows + r
                    documents = self.corpus.text_documents(self.seed, k, room, self.seq_len - 1)
                    row.extend(lay_out(d, self.fmt) for d in documents)
        micro, own = self.rows // self.accumulate, self.rows // self.accumulate // self.ranks
        return [
            collate(rows[first : first + own], self.seq_len, self.fmt, first)
            for first in range(self.rank * own, self.rows, micro)
        ]


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


def outlive_signals(worker: int):
    """A Ctrl-C reaches the workers too, but the training process still wants their batches: they end when it does."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)


def load_batches(packer: Packer, start: int, stop: int, workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `start` to `stop`, prepared ahead by `workers` processes (0 = in line)."""
    if not workers:
        return (packer.batches(step) for step in range(start, stop))
    packer = replace(packer, corpus=packer.corpus.without_networks())
    options = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": outlive_signals}
    return iter(DataLoader(Steps(packer, start, stop), batch_size=None, **options))
