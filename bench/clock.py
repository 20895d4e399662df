"""Seconds by part, of the wall and of the processor; what the machine gives just now; peak memory.

    with clock("backward"):         2.0 s in all ...
        with clock("forward"): ...  0.5 s, so "backward" gets 1.5: a part has what no part inside it has

Time outside of every part counts for nothing: there a repetition makes its data.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMALL = 512  # side of the calibration's matrices
COPIED = 1 << 28  # bytes


def now() -> tuple[float, float]:
    """(wall, processor) seconds; the processor's of this process and of the children that it waited for."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usage)


def synchronize(device: str) -> None:
    """Waits until the device has done what it was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Collects the parts of one repetition after the other."""

    def __init__(self, device: str = "cpu", now: Callable[[], tuple[float, float]] = now):
        self.device, self.now = device, now
        self.parts: dict[str, tuple[float, float]] = {}
        self.open: list[str] = []
        self.since = (0.0, 0.0)

    def lap(self) -> None:
        """Gives the time since the last lap to the innermost part."""
        synchronize(self.device)
        at = self.now()
        if self.open:
            wall, cpu = self.parts.get(self.open[-1], (0.0, 0.0))
            self.parts[self.open[-1]] = (wall + at[0] - self.since[0], cpu + at[1] - self.since[1])
        self.since = at

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.lap()
        self.open.append(part)
        try:
            yield
        finally:
            self.lap()
            self.open.pop()

    def take(self) -> dict[str, tuple[float, float]]:
        """part -> (wall, processor) seconds of the repetition that has ended."""
        parts, self.parts = self.parts, {}
        return parts


def product(n: int, dtype: torch.dtype, device: str, repetitions: int) -> float:
    """FLOP a second of the fastest of some products of n x n matrices."""
    a, seconds = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(repetitions + 1):  # the first is warm-up
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def calibrate() -> float:
    """FLOP a second of a small product on the processor: how much of the machine is ours at this moment."""
    a, seconds = torch.ones(SMALL, SMALL), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * SMALL**3 / statistics.median(seconds)


def peak_flops(sizes: tuple[int, ...], precision: str, device: str) -> float:
    """FLOP a second of the best product: what a step is measured against."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return max(product(n, dtype, device, 20 if device == "cuda" else 3) for n in sizes)


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the fastest of some copies that fit into no cache."""
    a, seconds = torch.zeros(COPIED // 4, device=device), []
    b = torch.empty_like(a)
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        b.copy_(a)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / min(seconds[1:])  # the first is warm-up


def memory(device: str) -> int:
    """Most bytes that this process has held so far, on the device that it computes on."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss begins with what the parent held when it started us
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
