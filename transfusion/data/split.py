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


def lowest(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: the hashes, uint64 [n], within that share of the range; the lowest of them at least."""
    return hashes <= np.uint64(max(int(share * 2**64), int(hashes.min())))


def default_split(records: Iterable[Any]) -> str:
    """What a line of a file without a split has: train, where another line says its own; else "", drawn by its hash."""
    return "train" if any("split" in record for record in records if isinstance(record, dict)) else ""
