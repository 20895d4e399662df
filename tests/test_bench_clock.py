"""Seconds go to the innermost part, and to none outside of all."""

import pytest
import torch
from clock import Clock, bandwidth, calibrate, memory, now, peak_flops


class Ticks:
    """A time that stands still but for what is added."""

    def __init__(self):
        self.at = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.at, 10 * self.at


def test_a_part_has_what_no_part_inside_it_has():
    ticks = Ticks()
    clock = Clock(now=ticks)
    ticks.at += 100  # outside
    with clock("backward"):
        ticks.at += 1
        with clock("forward"):
            ticks.at += 2
        ticks.at += 4
    ticks.at += 100
    with clock("forward"):
        ticks.at += 8
    assert clock.take() == {"backward": (5.0, 50.0), "forward": (10.0, 100.0)}
    assert clock.take() == {}, "a repetition begins with nothing"


def test_a_part_ends_where_an_error_leaves_it():
    ticks = Ticks()
    clock = Clock(now=ticks)
    with pytest.raises(ValueError), clock("a"):
        ticks.at += 1
        raise ValueError
    ticks.at += 100
    assert clock.take() == {"a": (1.0, 10.0)} and not clock.open


def test_memory_is_the_most_that_was_held():
    before = memory("cpu")
    held = torch.ones(2**26)  # 256 MiB
    assert memory("cpu") >= max(before, held.numel() * 4)
    peak = memory("cpu")
    del held
    assert memory("cpu") > 0.9 * peak


def test_what_the_machine_gives_is_positive_and_finite():
    for value in (calibrate(), peak_flops((32, 64), "bf16", "cpu"), bandwidth("cpu"), *now()):
        assert 0 < value < 1e18
