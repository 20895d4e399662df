"""An answer: a function (case, clock) -> (repeat, facts), by which an implementation does what is asked.

repeat(i)   computes repetition i inside of the clock's parts, asserts what it got, may return numbers of its own
facts       how much that is ("units"), and whatever does not change; one that is a function is called at the end, when
            memory has been read that finding it would add to
"""

from collections.abc import Callable
from typing import Any

from torch import nn

Repeat = Callable[[int], dict[str, float] | None]


def facts_of(model: nn.Module, **units: int) -> dict[str, Any]:
    """The facts that every model has."""
    return {"units": units, "parameters": sum(p.numel() for p in model.parameters())}
