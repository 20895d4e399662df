"""An answer: a function (case, clock) -> (repeat, facts), by which an implementation does what is asked.

repeat(i)   computes repetition i inside of the clock's parts, asserts what it got, may return numbers of its own
facts       how much that is ("units"), and whatever does not change; one that is a function is called at the end, when
            memory has been read that finding it would add to
"""

from collections.abc import Callable
from typing import Any

import torch
from clock import Clock
from content import Case, Document, content
from torch import Tensor, nn

Repeat = Callable[[int], dict[str, float] | None]


def facts_of(model: nn.Module, **units: int) -> dict[str, Any]:
    """The facts that every model has."""
    return {"units": units, "parameters": sum(p.numel() for p in model.parameters())}


def plain_training(
    case: Case,
    clock: Clock,
    model: nn.Module,
    batch_of: Callable[[list[list[Document]]], Any],
    loss_of: Callable[[Any], Tensor],
) -> tuple[Repeat, dict]:
    """A peer's training step as torch's documentation writes it: autocast, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def repeat(i: int):
        parts = in_parts(case, content(case, i))
        for rows in parts:
            with clock("data"):
                batch = batch_of(rows)
            with clock("forward"), autocast(case):
                loss = loss_of(batch) / len(parts)  # rows have as many targets each
            with clock("backward"):
                loss.backward()
            assert loss.isfinite()
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return repeat, facts_of(model, **case.units)


def in_parts(case: Case, rows: list[list[Document]]) -> list[list[list[Document]]]:
    """The rows that go through the model together, of a step."""
    return [[row] for row in rows] if case.row_by_row else [rows]


def autocast(case: Case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")
