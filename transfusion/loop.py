"""The loop of every training, read from the top: compute -> step -> average -> log -> save -> draw.

What is trained, and on what, comes in as two functions: `compute` leaves a step's gradients in the model, `sample`
draws a sheet. Both are functions of (config, step) alone, so that a resumed run is bitwise the run that was never
interrupted (on a CPU), with no random state to save.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfusion import checkpoint
from transfusion import config as configs
from transfusion.cluster import peak_flops
from transfusion.metrics import Run, open_metrics
from transfusion.optim import init_ema, set_lr, update_ema
from transfusion.parallel import ALONE, Ranks

NO_SHEETS = "train.sample_every=0 asks for none"
NO_ROOM = f"no sheet is drawn, as memory does not suffice beside the training ({{}}): {NO_SHEETS}"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Step(NamedTuple):
    """What a step computed, before the weights move."""

    finite: Tensor  # [] any finite number, or the step is skipped: the gradients' norm does, plus the losses
    counts: dict[str, float]  # what it trained on, by unit, over all ranks; logged as UNIT_per_second
    numbers: Callable[[], dict[str, float]]  # called where the step is logged, as it waits for the device


@dataclass
class Training:
    """What a run has learned, and how far it is."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: list[Tensor] | None
    step: int = 0  # steps behind it
    skipped: int = 0
    saved: Path | None = None  # the newest checkpoint
    saving: Future[Path] | None = None  # the one that is being written


def find_checkpoint(run: Path, resume: bool) -> Path | None:
    """The run's newest complete checkpoint, and says which newer ones are damaged.

    ValueError where there is one and the run is not to be resumed, or where there are damaged ones alone.
    """
    faults = checkpoint.faults(run / "checkpoints")
    found = next((path for path in reversed(faults) if faults[path] is None), None)
    damaged = [f"{path} is damaged ({fault})" for path, fault in faults.items() if fault]
    if damaged and not found:
        raise ValueError(
            f"{'; '.join(damaged)}, and no other checkpoint is there: restore it, or move it away to begin anew"
        )
    for path, fault in faults.items():
        if resume and fault and checkpoint.step_of(path) > checkpoint.step_of(found):
            print(f"{path} is damaged ({fault}): going on from {found.name}, which is the newest complete checkpoint")
    if found and not resume:
        raise ValueError(f"{run} holds a run already: go on with it by --resume, or give another folder by out=FOLDER")
    return found


def start(model: nn.Module, optimizers: list[torch.optim.Optimizer], config: Any) -> Training:
    """A training at step 0, with the weights that the model has."""
    return Training(model, optimizers, init_ema(model) if config.optim.ema else None)


def restore(found: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: Any) -> Training:
    """The training that the checkpoint holds; says in what its config differs from the present one."""
    training, now = start(model, optimizers, config), configs.to_dict(config)
    state = checkpoint.load_checkpoint(found, model=model, ema=training.ema, optimizers=optimizers, config=now)
    for line in checkpoint.differences(state["config"], now):
        print(f"config: {line}")
    training.step, training.skipped, training.saved = state["step"], state["skipped"], found
    return training


def run_steps(
    run: Path,
    config: Any,
    training: Training,
    batches: Iterable,
    compute: Callable[[int, Any], Step],
    sample: Callable[[Path], None],
    beside: Callable[[int], dict[str, Any]] = lambda step: {},
    ranks: Ranks = ALONE,
) -> Path:
    """Trains to the last step, or to a signal, and returns the newest checkpoint.

    Of the config it reads `train` (steps and intervals), `optim` and `metrics`; `batches` begin with the next step's.
    What `beside` says of a step is kept in its checkpoint's state.
    All ranks come along: the same steps for all, logged by the one that leads; a signal to one of them stops all.
    """
    c, t = config.train, training
    resolved, since = configs.to_dict(config), time.perf_counter()
    bad_in_a_row, done, counts, waited = 0, t.step, Counter(), 0.0
    if done >= c.steps:
        print(f"nothing is left to do: {done} steps are done of {c.steps}; to go on raise train.steps")
        return t.saved
    folder = Run(run, t.step, c.steps, resolved, config.metrics.wandb_project)
    metrics = config.metrics if ranks.leads else replace(config.metrics, sinks=())
    with stop_signals(ranks.mesh is not None) as stopped, open_metrics(metrics, folder) as log, settled(t):
        asked = time.perf_counter()
        for step, batch in enumerate(batches, t.step):
            waited += time.perf_counter() - asked
            ranks.alive()
            lr = set_lr(t.optimizers, step, c.steps, config.optim)
            finite, n, numbers = compute(step, batch)
            if torch.isfinite(finite):
                for optimizer in t.optimizers:
                    optimizer.step()
                if t.ema is not None:
                    update_ema(t.ema, t.model, step, config.optim.ema)
                bad_in_a_row = 0
            else:
                t.skipped, bad_in_a_row = t.skipped + 1, bad_in_a_row + 1
            done = t.step = step + 1
            counts.update(n)
            stop, writing = ranks.most(bool(stopped), bool(t.saving and not t.saving.done()))
            last = done == c.steps or bool(stop)
            if not writing:  # on all ranks at once, so that all say what kept it from being written
                settle(t)
            if every(c.log_every, done) or last or bad_in_a_row:
                seconds = time.perf_counter() - since
                speeds = {f"{unit}_per_second": number / seconds for unit, number in counts.items()}
                state = {"lr": lr, **speeds, "skipped": t.skipped, **ranks.strain(waited, seconds)}
                peak = ranks.size * peak_flops(ranks.device)
                if "flops" in counts and peak:
                    state["mfu"] = counts["flops"] / seconds / peak
                log(done, numbers() | state)
                counts.clear()
                since, waited = time.perf_counter(), 0.0
            if bad_in_a_row >= c.max_bad_steps:
                raise ValueError(
                    f"{bad_in_a_row} steps in a row without a finite gradient, the last of them step {step}: lower "
                    f"optim.lr (now {config.optim.lr:g}) or set train.precision=fp32; saved is {t.saved or 'nothing'}"
                )
            paused = time.perf_counter()
            if every(c.save_every, done) or last:
                save(run, t, {**beside(done), "config": resolved}, c, ranks)
            if every(c.sample_every, done) and not stop:  # who sent the signal waits for the checkpoint alone
                sample(run / "samples" / f"step_{done:08d}.png")
            if last:
                settle(t)
            since += time.perf_counter() - paused  # sheets and checkpoints are no training
            if last:
                break
            asked = time.perf_counter()
    if done < c.steps:
        by = stopped[0] if stopped else "another rank's signal"
        print(f"stopped by {by} at step {done} of {c.steps}; --resume goes on from {t.saved}")
    return t.saved


@contextmanager
def optional_sheet() -> Iterator[None]:
    """Where there is no room for the sheet that is drawn inside, or no writing it, that is said, and no more."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        print(NO_ROOM.format(error))
    except OSError as error:
        print(f"no sheet is drawn, as it cannot be written ({error}): mend that, or {NO_SHEETS}")


def save(run: Path, training: Training, state: dict, c: Any, ranks: Ranks):
    """Writes a checkpoint, or begins to: one after the other."""
    t, state = training, {"skipped": training.skipped, **state}
    settle(t)
    parts = {"model": t.model, "ema": t.ema, "optimizers": t.optimizers}
    how = {"keep": c.keep, "every": c.keep_every, "group": ranks.saving, "wait": not c.save_async}
    t.saving = checkpoint.save_checkpoint(run / "checkpoints", t.step, **parts, state=state, **how)


def settle(training: Training):
    """Waits for the checkpoint that is being written, and raises what kept it from being."""
    if training.saving:
        training.saved, training.saving = training.saving.result(), None


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextmanager
def settled(training: Training) -> Iterator[None]:
    """Where all ranks end with the same error, the checkpoint that is being written is not abandoned."""
    try:
        yield
    except ValueError:
        settle(training)
        raise


class stop_signals(AbstractContextManager):
    """Inside: SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) fill the list instead of killing; a second one kills.

    Not so with `patience`: a scheduler may tell the ranks, and torchrun tells them again, and has a limit of its own.
    """

    def __init__(self, patience: bool = False):
        self.patience = patience

    def __enter__(self) -> list[str]:
        received: list[str] = []

        def receive(number, frame):
            received.append(signal.Signals(number).name)
            if not self.patience:
                signal.signal(number, self.before[number])

        self.before = {s: signal.signal(s, receive) for s in STOPS}
        return received

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)
