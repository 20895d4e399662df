"""Training checkpoints: a folder a step, which either is there and whole or is not there.

    step_00001200/  model.safetensors   the weights
                    ema.safetensors     their average, if one is kept (same names, so it loads as a model too)
                    optimizer.pt        the optimizers' state dicts
                    state.json          step, config, counters, versions, size of each file

Written under a .tmp- name, synced, then renamed: a crash at any moment leaves the old ones, and what it left half done
is cleared by the next save. Resuming is bitwise: same weights, same optimizer state, and no random state to save.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    ema: list[Tensor] | None = None,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 0,
) -> Path:
    """The new checkpoint's path, once it is on disk and older ones beyond `keep` (0: all stay) are gone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*step_*"):
        shutil.rmtree(stale)
    final = folder / f"step_{step:08d}"
    with atomic_folder(final) as tmp:
        own = weights(model)
        save_weights(own, tmp / MODEL)
        if ema is not None:
            names = [name for name, p in model.named_parameters() if p.requires_grad]  # frozen ones are their average
            save_weights({**own, **dict(zip(names, ema, strict=True))}, tmp / EMA)
        torch.save([{"type": type(o).__name__, "state": o.state_dict()} for o in optimizers], tmp / OPTIMIZER)
        sizes = {path.name: path.stat().st_size for path in sorted(tmp.iterdir())}
        record = {**state, "step": step, "versions": versions(), "files": sizes}
        (tmp / STATE).write_text(json.dumps(record, indent=1) + "\n")
    older = [path for path in checkpoints(folder) if step_of(path) < step]
    for path in older[: max(0, len(older) - keep + 1)] if keep else []:
        shutil.rmtree(hide(path))
    return final


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    ema: list[Tensor] | None = None,
    optimizers: list[torch.optim.Optimizer] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The saved state, after model, ema and optimizers took theirs, in place; ValueError if anything does not fit.

    The optimizers' options (lr, weight decay) stay those of the present config. With config, an error also names
    the fields in which the saved one differs.
    """
    state = read_state(path)
    path = Path(path)
    hint = "".join(f"\n  config: {line}" for line in differences(state.get("config", {}), config or {})[:8] if config)
    try:
        own = weights(model)
        loaded = matching(own, path / MODEL)
        averages = ema_of(model, ema, own, path) if ema is not None else []
        states = matching_optimizers(optimizers, path) if optimizers is not None else []
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])
        for tensor, value in zip(ema or [], averages):
            tensor.copy_(value)
    for optimizer, saved in zip(optimizers or [], states):
        # The groups are the live ones: a weight decay changed for the rest of the run must hold, not the saved one.
        optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def load_weights(model: nn.Module, file: str | Path, partly: bool = False, prefix: str = "") -> list[str]:
    """Copies a .safetensors file (a checkpoint's model or ema, or an exported one) into the model, all or nothing.

    `partly` lets the file lack weights, which keep their values; returns their names. With `prefix`, the model is a
    part of the file's: only names that begin so are read.
    """
    own = weights(model)
    loaded = matching(own, Path(file), partly, prefix)
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)
    return [name for name in own if name not in loaded]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return max(checkpoints(Path(folder)), key=step_of, default=None)


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run's folder, or a checkpoint's own, stands for; None if it holds none."""
    step = latest_checkpoint(folder / "checkpoints")
    return step or (folder if (folder / STATE).is_file() else None)


def best_weights(step: Path) -> Path:
    """The file of a checkpoint's averaged weights, or of its own where no average was kept."""
    averaged = step / EMA
    return averaged if averaged.is_file() else step / MODEL


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a complete checkpoint; ValueError says what is missing and what is there instead."""
    path = Path(path)
    fault = fault_of(path)
    if fault is None:
        return json.loads((path / STATE).read_text())
    others = checkpoints(path) or checkpoints(path.parent)
    there = f"use {others[-1]}" if others else "no complete checkpoint is near it"
    raise ValueError(f"{path} is no complete checkpoint ({fault}): {there}")


def differences(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """One line for each field in which two configs (as dicts) differ: 'model.dim was 64, now 128'."""
    lines = []
    for key in [*saved, *(key for key in now if key not in saved)]:
        a, b, full = saved.get(key), now.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{full}.")
        elif a != b:
            lines.append(f"{full} was {a}, now {b}")
    return lines


# ---- folders ----


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets the name `final` when the block ends well, and goes if it fails."""
    tmp = final.parent / f".tmp-{final.name}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in [*tmp.rglob("*"), tmp]:
            sync(path)
        hidden = hide(final) if final.exists() else None  # a folder cannot be renamed over a full one
        os.rename(tmp, final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)  # a full disk needs the room
        raise
    if hidden:
        shutil.rmtree(hidden)


def hide(path: Path) -> Path:
    """The folder's new name on its way out: it is out of sight at once, so nobody finds it half removed."""
    hidden = path.parent / f".tmp-old-{path.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    return hidden


def sync(path: Path) -> None:
    """Returns when the file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of the folder, lowest step first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and fault_of(p) is None]
    return sorted(found, key=step_of)


def fault_of(path: Path) -> str | None:
    """What keeps the folder from being a complete checkpoint, or None."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((path / STATE).read_text())["files"].items()
    except FileNotFoundError:
        return f"it has no {STATE}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {STATE} is damaged"
    for name, size in sizes:
        if not (path / name).is_file():
            return f"it has no {name}"
        if (path / name).stat().st_size != size:
            return f"its {name} has {(path / name).stat().st_size} bytes instead of {size}"
    return None


def versions() -> dict[str, str]:
    """The versions that wrote the checkpoint."""
    names = ("torch", "numpy", "safetensors", "transfusion")
    return {name: d.version for name in names for d in metadata.distributions(name=name)}


# ---- tensors ----


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and lasting buffers by name, a tied one once; they share the model's memory."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    once = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in every or name in once}


def save_weights(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a .safetensors file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)


def matching(own: dict[str, Tensor], file: Path, partly: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors, on the CPU; ValueError names the first that is left over, of another shape, or, unless the
    file may fill the model partly, missing."""
    if not file.is_file():
        raise ValueError(f"there is no {file}")
    try:
        loaded = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    loaded = {name.removeprefix(prefix): tensor for name, tensor in loaded.items() if name.startswith(prefix)}
    for name, tensor in own.items():
        if name not in loaded and not partly:
            raise ValueError(f"{file} does not fit this model: it has no {name}")
        if name in loaded and loaded[name].shape != tensor.shape:
            there, here = tuple(loaded[name].shape), tuple(tensor.shape)
            raise ValueError(f"{file} does not fit this model: {name} is {there} there and {here} here")
    for name in loaded:
        if name not in own:
            raise ValueError(f"{file} does not fit this model: it has {name}, which the model lacks")
    return loaded


def ema_of(model: nn.Module, ema: list[Tensor], own: dict[str, Tensor], path: Path) -> list[Tensor]:
    """The saved averages in the order of the model's trained parameters."""
    if not (path / EMA).is_file():
        raise ValueError(f"{path} has no {EMA}: it was saved without an average, so resume without one (optim.ema=0)")
    loaded = matching(own, path / EMA)
    averages = [loaded[name] for name, p in model.named_parameters() if p.requires_grad]
    assert len(averages) == len(ema), f"{len(ema)} averages for {len(averages)} parameters"
    return averages


def matching_optimizers(optimizers: list[torch.optim.Optimizer], path: Path) -> list[dict[str, Any]]:
    """The saved state dicts; ValueError if they are of other optimizers or of other groups of parameters."""
    saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    there, here = [s["type"] for s in saved], [type(o).__name__ for o in optimizers]
    if there != here:
        raise ValueError(f"{path / OPTIMIZER} is of {' + '.join(there)}, this run has {' + '.join(here)}")
    states = [s["state"] for s in saved]
    for kind, *both in zip(here, states, [o.state_dict() for o in optimizers]):
        a, b = [[(g.get("param_names"), g["params"]) for g in x["param_groups"]] for x in both]
        if a != b:
            raise ValueError(f"{path / OPTIMIZER}: {kind} has other parameters or groups there than in this run")
    return states
