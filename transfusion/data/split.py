"""What is held out: the things whose hash falls into a share of its range, so that new things move no old one.

0 |#####|------------------------------------------| 2^64        # held out, - trained on
       share
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def hash_of(text: str) -> int:
    """64 bits that are the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def limit_of(blocks: Iterable[np.ndarray], share: float, fewest: int = 1) -> int:
    """The highest hash that is held out, of hashes, uint64 [n], that come some at a time: that share of the range, the
    lowest of them at least; -1 where there are fewer than `fewest`, of which none is."""
    n, least = 0, 2**64 - 1
    for hashes in blocks:
        n, least = n + len(hashes), min(least, int(hashes.min(initial=np.uint64(least))))
    return max(int(share * 2**64), least) if n >= fewest else -1


def within(hashes: np.ndarray, limit: int) -> np.ndarray:
    """bool [n]: which are held out."""
    return hashes <= np.uint64(limit) if limit >= 0 else np.zeros(len(hashes), bool)


def lowest(hashes: np.ndarray, share: float, fewest: int = 1) -> np.ndarray:
    """bool [n]: the same of hashes that are all there."""
    return within(hashes, limit_of([hashes], share, fewest))


def default_split(records: Iterable[Any]) -> str:
    """What a line of a file without a split has: train, where another line says its own; else "", drawn by its hash."""
    return "train" if any("split" in record for record in records if isinstance(record, dict)) else ""
