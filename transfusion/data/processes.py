"""Work on shards side by side, by processes that begin afresh: a fork would share the tokenizer's threads, and break.

What comes back comes in the order of the shards. Where one raises, those that were not begun are let be.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def side_by_side(work: Callable[[S], T], shards: Sequence[S], workers: int) -> Iterator[T]:
    """`work` of each shard by so many processes, 0 or 1 = this one; ValueError where one of them was killed."""
    if workers < 2 or len(shards) < 2:
        yield from map(work, shards)
        return
    pool = ProcessPoolExecutor(min(workers, len(shards)), get_context("spawn"), one_core)
    try:
        yield from pool.map(work, shards)
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, most likely for want of memory: call it again with fewer --workers; what is done "
            "is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def one_core():
    """Of a worker: the others have the other cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
