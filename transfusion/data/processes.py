"""Work on shards side by side, by processes that begin afresh: a fork would share the tokenizer's threads, and break.

What comes back comes in the order of the shards. Where one raises, those that were not begun are let be.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def cores() -> int:
    """How many cores this process may use: of a machine's, those that its container or its scheduler gives it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(work: Callable[[S], T], shards: Sequence[S], workers: int) -> Iterator[T]:
    """`work` of each shard by so many processes, 0 or 1 = this one; ValueError where one of them was killed."""
    if workers < 2 or len(shards) < 2:
        yield from map(work, shards)
        return
    pool = ProcessPoolExecutor(min(workers, len(shards)), get_context("spawn"), begin)
    try:
        yield from pool.map(work, shards)
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, most likely for want of memory: call it again with fewer --workers; what is done "
            "is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def begin():
    """Of a worker: the others have the other cores, and it ends with the process that began it, however that ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    parent_process().join()  # else a worker of a killed process would wait for work for ever
    os._exit(1)
