"""Confidence intervals of 95 %."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z = 1.959964  # the normal's 97.5 % quantile


def wilson(hits: int, n: int) -> tuple[float, float]:
    """(low, high) of a share, Wilson's score interval: in [0, 1] and sensible at 0 and n hits."""
    p, spread = hits / n, Z**2 / n
    middle, half = p + spread / 2, Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def normal(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of a mean, by the standard error of at least two values."""
    half = Z * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half
