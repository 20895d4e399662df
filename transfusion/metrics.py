"""Where a run's numbers go: metrics.jsonl, a progress line, TensorBoard, W&B, and a plot of the losses.

    with open_metrics(config, Run(folder, done, steps)) as log:
        log(step, {"lm_loss": 2.3, "image_loss": 0.21, "images_per_second": 90.0, "held_out/lm_loss": 2.5})

One call a step, steps counted as done (the first is 1), so that a run resumed from the checkpoint of step 500 goes on
with 501. Log a step before its checkpoint is saved: a resumed file then has every step once and none is missing.
"""

import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Write = Callable[[int, dict[str, float]], None]
FILE = "metrics.jsonl"
LM, IMAGE = "lm_loss", "image_loss"
SHOWN = {"lm": LM, "image": IMAGE, "l1": "l1"}  # on the progress line, by its labels


@dataclass(frozen=True)
class MetricsConfig:
    sinks: tuple[str, ...] = ("jsonl", "terminal")  # of jsonl, terminal, tensorboard, wandb
    wandb_project: str = "transfusion"

    def __post_init__(self):
        for name in self.sinks:
            if name not in SINKS:
                raise ValueError(f"sinks are {', '.join(SINKS)}, got {name!r}")


@dataclass(frozen=True)
class Run:
    """What a sink may want to know of the run."""

    folder: Path
    done: int  # steps that the checkpoint has behind it, 0 for a new run
    steps: int  # at which the run ends
    config: dict[str, Any] = field(default_factory=dict)  # the resolved one, as a dict
    wandb_project: str = "transfusion"


@contextmanager
def open_metrics(config: MetricsConfig, run: Run) -> Iterator[Write]:
    """log(step, record), which writes to every sink; all are closed when the block ends, however it ends."""
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writes = [stack.enter_context(SINKS[name](run)) for name in config.sinks]

        def log(step: int, record: dict[str, float]) -> None:
            values = {name: float(value) for name, value in record.items()}
            for write in writes:
                write(step, values)

        yield log


# ---- metrics.jsonl ----


@contextmanager
def jsonl(run: Run) -> Iterator[Write]:
    """Appends one line a step; lines beyond the resumed step and half-written ones are dropped first."""
    path = Path(run.folder) / FILE
    kept = [record for record in read_records(path) if 0 < record["step"] <= run.done] if path.exists() else []
    new = path.with_name(f".tmp-{FILE}")
    new.write_text("".join(f"{line_of(record)}\n" for record in kept))
    os.replace(new, path)
    last = kept[-1]["step"] if kept else 0
    with path.open("a") as file:

        def write(step: int, record: dict[str, float]) -> None:
            nonlocal last
            assert step > last, f"step {step} is logged after step {last}"
            last = step
            file.write(f"{line_of({'step': step, **record})}\n")
            file.flush()

        yield write


def line_of(record: dict[str, float]) -> str:
    """The record as JSON, which has no nan or infinity: null stands for them."""
    return json.dumps({key: value if math.isfinite(value) else None for key, value in record.items()})


def read_records(path: str | Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, null as nan; a line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            continue
        values = {key: math.nan if value is None else value for key, value in record.items()}
        records.append({**values, "step": step})
    return records


# ---- progress line ----


@contextmanager
def terminal(run: Run, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Write]:
    """On a terminal one line, redrawn in place; elsewhere (a log file) a plain line every 10 seconds."""
    stream = stream or sys.stderr
    live = stream.isatty()
    drawn = begun = -math.inf  # times of the last line and of the last step
    at, pace, line = run.done, math.nan, ""  # step, seconds a step, what is not drawn yet
    seen: dict[str, float] = {}  # the last value of each, as not every step has images

    def draw(text: str) -> None:
        stream.write(f"\r{text}\x1b[K" if live else f"{text}\n")
        stream.flush()

    def write(step: int, record: dict[str, float]) -> None:
        nonlocal drawn, begun, at, pace, line
        now = clock()
        if math.isfinite(begun):  # the first step, slow for what it compiles, only starts the clock
            took = (now - begun) / max(1, step - at)
            pace = took if math.isnan(pace) else 0.95 * pace + 0.05 * took
        begun, at = now, step
        seen.update({key: value for key, value in record.items() if not math.isnan(value)} | lost(record))
        line = progress_line(step, run.steps, seen, pace * (run.steps - step), columns(stream) if live else None)
        if now - drawn >= (0.1 if live else 10):
            draw(line)
            drawn, line = now, ""

    try:
        yield write
    finally:
        if line:
            draw(line)
        if live and at > run.done:
            stream.write("\n")


def lost(record: dict[str, float]) -> dict[str, float]:
    """The LM loss where it is nan: an image loss may be nan for want of images, this one only by divergence."""
    return {LM: record[LM]} if math.isnan(record.get(LM, 0.0)) else {}


def progress_line(step: int, steps: int, record: dict[str, float], left: float, width: int | None) -> str:
    """Step, bar, losses, speed and time left in fewer than `width` columns (None: any number, and no bar)."""
    parts = [f"step {step}/{steps}"]
    if width is not None:
        full = round(20 * min(1.0, step / max(1, steps)))
        parts.append(f"[{'#' * full}{'-' * (20 - full)}]")
    parts += [f"{label} {record[key]:.4g}" for label, key in SHOWN.items() if key in record]
    parts += [f"{short(record[f'{unit}_per_second'])} {unit}/s" for unit in ("images", "tokens")
              if f"{unit}_per_second" in record]  # fmt: skip
    if math.isfinite(left):
        parts.append(f"{duration(left)} left, {clock_time(left)}")
    if width is None:
        return "  ".join(parts)
    order = [0, len(parts) - 1, *range(2, len(parts) - 1), 1]  # who comes first where the window is narrow
    chosen: list[int] = []
    for i in dict.fromkeys(order):
        if len("  ".join(parts[j] for j in [*chosen, i])) < width:
            chosen.append(i)
    return "  ".join(parts[i] for i in sorted(chosen))


def columns(stream: TextIO) -> int:
    """The width of the terminal behind the stream."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def short(number: float) -> str:
    """Three digits: 7.25, 34.1k, 2.1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """12s, 4m10s, 3h05m, 2d03h."""
    s = round(seconds)
    for big, small, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if s >= big:
            return f"{s // big}{units[0]}{s % big // small:02d}{units[1]}"
    return f"{s}s"


def clock_time(seconds: float) -> str:
    """The time of day, so many seconds from now, with the day if it is a later one."""
    now = time.time()
    then = time.localtime(now + seconds)
    return time.strftime("%H:%M" if then.tm_yday == time.localtime(now).tm_yday else "%d %b %H:%M", then)


# ---- TensorBoard and W&B ----


@contextmanager
def tensorboard(run: Run) -> Iterator[Write]:
    """Scalars in the folder's tensorboard/."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("the sink tensorboard needs it installed: pip install tensorboard") from None
    with SummaryWriter(str(Path(run.folder) / "tensorboard"), purge_step=run.done + 1) as writer:

        def write(step: int, record: dict[str, float]) -> None:
            for name, value in record.items():
                writer.add_scalar(name, value, step)

        yield write


@contextmanager
def wandb(run: Run) -> Iterator[Write]:
    """A W&B run, whose id is kept in the folder, so that a resumed run goes on in the same one."""
    try:
        import wandb as client
    except ImportError:
        raise ValueError("the sink wandb needs it installed: pip install wandb") from None
    kept = Path(run.folder) / "wandb_id"
    if not (run.done and kept.exists()):
        kept.write_text(secrets.token_hex(4))
    session = client.init(
        project=run.wandb_project,
        id=kept.read_text(),
        name=Path(run.folder).name,
        dir=str(run.folder),
        config=run.config,
        resume="allow",
    )
    try:
        yield lambda step, record: session.log(record, step=step)
    except BaseException:
        session.finish(exit_code=1)
        raise
    session.finish()


SINKS: dict[str, Callable[[Run], AbstractContextManager[Write]]] = {
    "jsonl": jsonl,
    "terminal": terminal,
    "tensorboard": tensorboard,
    "wandb": wandb,
}


# ---- plot ----


def loss_plot(metrics_path: str | Path, png_path: str | Path) -> Path:
    """The PNG of both losses over the steps: each step faint, a running mean, held-out values (x/lm_loss) as points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None
    records = read_records(metrics_path)
    names = {name for record in records for name in record}
    panels = [(name, label) for name, label in ((LM, "LM loss, nats a token"), (IMAGE, "image loss")) if name in names]
    if not panels:
        raise ValueError(f"{metrics_path} has no {LM} and no {IMAGE} to plot: has the run logged a step yet?")
    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        x, y = series(records, name)
        axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(x, running_mean(y), color="tab:blue", linewidth=1.6, label="training, running mean")
        for i, key in enumerate(sorted(n for n in names if n.endswith(f"/{name}"))):
            axes.plot(*series(records, key), "os^D"[i % 4], color=f"C{i + 1}", markersize=4, label=key.split("/")[0])
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(png_path, dpi=130)
    return Path(png_path)


def series(records: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have a finite value of that name, and the values."""
    points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def running_mean(y: np.ndarray) -> np.ndarray:
    """The mean over the 2 % of the points around each one, over fewer at both ends."""
    i, half = np.arange(len(y)), len(y) // 100
    start = i - np.minimum(half, i)
    end = np.minimum(i + (i - start), len(y) - 1)  # at the steep start the same on both sides, or the curve shifts
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[end + 1] - total[start]) / (end + 1 - start)
