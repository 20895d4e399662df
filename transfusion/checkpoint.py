"""Training checkpoints: a folder a step, which either is there and whole or is not there.

    step_00001200/  __0_0.distcp ... .metadata    weights, average and optimizer state, by the ranks that held them
                    state.json                    step, config, counters, versions, size of each file

    model.NAME        a weight                      optimizer.NAME.KEY   what an optimizer keeps of it
    ema.NAME          its average, if one is kept

Written under a .tmp- name, synced, then renamed: a crash at any moment leaves the old ones, and what it left half done
is cleared by the next save. Damage is known by a file's size: what leaves it its size is not looked for. Resuming is
bitwise: same weights, same optimizer state, and no random state to save.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from transfusion.shards import Kind, agree, kinds, leads, missing, read_shards, staged, write_shards
from transfusion.weights import EMA, MODEL, fit, open_weights, trained_names, weights

OPTIMIZER, STATE = "optimizer.", "state.json"


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    ema: list[Tensor] | None = None,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 0,
    every: int = 0,
    group: ProcessGroup | None = None,
    wait: bool = True,
) -> Future[Path]:
    """The new checkpoint's path, once it is on disk and older ones are gone: beyond the last `keep` (0: all stay)
    those whose step is no multiple of `every` (0: none is spared).

    All ranks call it and hold their parts; with `group`, one that nothing else talks on, where they are several. Unless
    `wait`, it returns as soon as copies are made, and writes while training goes on.
    """
    final = Path(folder) / f"step_{step:08d}"
    tensors = {f"{MODEL}{name}": tensor.detach() for name, tensor in weights(model).items()}
    if ema is not None:
        tensors |= {f"{EMA}{name}": tensor for name, tensor in zip(trained_names(model), ema, strict=True)}
    tensors |= {
        f"{OPTIMIZER}{name}.{key}": tensor
        for optimizer in optimizers
        for name, p in named(optimizer)
        for key, tensor in optimizer.state.get(p, {}).items()
    }
    record = {**state, "step": step, "optimizers": types(optimizers), "versions": versions()}
    if wait:
        done: Future[Path] = Future()
        done.set_result(write(tensors, final, record, keep, every, group))
        return done
    pool = ThreadPoolExecutor(1, "checkpoint")
    done = pool.submit(write, staged(tensors), final, record, keep, every, group)
    pool.shutdown(wait=False)
    return done


def write(
    tensors: dict[str, Tensor], final: Path, record: dict, keep: int, every: int, group: ProcessGroup | None
) -> Path:
    """`final`, once it is there; on all ranks an OSError where one of them cannot write."""
    folder, tmp, stack, problem = final.parent, temporary(final), ExitStack(), ""
    try:
        if leads():
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(".tmp-*step_*"):
                shutil.rmtree(stale)
            stack.enter_context(atomic_folder(final))
    except OSError as error:
        problem = str(error)
    agree(problem, group)  # nobody writes before the folder is there
    try:
        with stack:
            write_shards(tensors, tmp, group)
            if leads():
                if lacking := missing(tmp):
                    raise OSError(f"{final} lacks {', '.join(lacking)}: is the run's folder one that all ranks share?")
                sizes = {path.name: path.stat().st_size for path in sorted(tmp.iterdir())}
                (tmp / STATE).write_text(json.dumps({**record, "files": sizes}, indent=1) + "\n")
        if leads():
            prune(folder, step_of(final), keep, every)
    except OSError as error:
        problem = str(error)
    agree(problem, group)
    return final


def prune(folder: Path, step: int, keep: int, every: int):
    """Leaves the last `keep` checkpoints up to `step` (0: all) and those whose step is a multiple of `every`."""
    older = [path for path in checkpoints(folder) if step_of(path) < step]
    for path in older[: max(0, len(older) - keep + 1)] if keep else []:
        if not every or step_of(path) % every:
            shutil.rmtree(hide(path))


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    ema: list[Tensor] | None = None,
    optimizers: list[torch.optim.Optimizer] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The saved state, after model, ema and optimizers took theirs, in place, sharded as they are; ValueError, before
    that, if anything does not fit.

    The optimizers' options (lr, weight decay) stay those of the present config. With config, an error also names
    the fields in which the saved one differs.
    """
    state, path = read_state(path), Path(path)
    hint = "".join(f"\n  config: {line}" for line in differences(state.get("config", {}), config or {})[:8] if config)
    with older_than(path):
        stored = kinds(path)
    try:
        own = weights(model)
        fit({name: tuple(tensor.shape) for name, tensor in own.items()}, open_weights(path, averaged=False), path)
        wanted = {f"{MODEL}{name}": tensor.detach() for name, tensor in own.items()}
        if ema is not None:
            wanted |= averages(model, ema, stored, path)
        states = [kept_of(o, stored, path) for o in optimizers or []]
        if optimizers is not None:
            same_optimizers(model, optimizers, state, stored, path)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    wanted |= {key: tensor for of_one in states for of_name in of_one.values() for key, tensor in of_name.items()}
    with older_than(path):
        read_shards(wanted, path)
    for optimizer, of_one in zip(optimizers or [], states):
        # The groups are the live ones: a weight decay changed for the rest of the run must hold, not the saved one.
        live, names = optimizer.state_dict()["param_groups"], [name for name, _ in named(optimizer)]
        numbers = [number for group in live for number in group["params"]]
        took = {
            number: {key.rpartition(".")[2]: tensor for key, tensor in of_one[name].items()}
            for number, name in zip(numbers, names)
            if of_one[name]
        }
        optimizer.load_state_dict({"state": took, "param_groups": live})
    return state


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return max(checkpoints(Path(folder)), key=step_of, default=None)


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run's folder, or a checkpoint's own, stands for; None if it holds none."""
    step = latest_checkpoint(folder / "checkpoints")
    return step or (folder if (folder / STATE).is_file() else None)


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
    tmp = temporary(final)
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


def temporary(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.parent / f".tmp-{final.name}"


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


@contextmanager
def older_than(path: Path) -> Iterator[None]:
    """Errors of a checkpoint that a run would go on from say which one comes before it."""
    try:
        yield
    except ValueError as error:
        older = [p for p in checkpoints(path.parent) if step_of(p) < step_of(path)]
        remedy = f"move it away to go on from {older[-1]}" if older else "no checkpoint is before it"
        raise ValueError(f"{error}; {remedy}") from None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of the folder, lowest step first."""
    return [path for path, fault in faults(folder).items() if fault is None]


def faults(folder: Path) -> dict[Path, str | None]:
    """What keeps each checkpoint of the folder from being complete, or None, lowest step first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return {path: fault_of(path) for path in sorted(found, key=step_of)}


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


# ---- optimizers and averages ----


def averages(model: nn.Module, ema: list[Tensor], stored: dict[str, Kind], path: Path) -> dict[str, Tensor]:
    """The averages by what they are stored as; ValueError where they are not."""
    names = trained_names(model)
    assert len(ema) == len(names), f"{len(ema)} averages for {len(names)} parameters"
    if not any(key.startswith(EMA) for key in stored):
        raise ValueError(f"{path} was saved without an average: resume without one (optim.ema=0)")
    wanted = {f"{EMA}{name}": tensor for name, tensor in zip(names, ema)}
    if lacking := [key for key in wanted if key not in stored]:
        raise ValueError(f"{path} does not fit this run: it has no average of {lacking[0].removeprefix(EMA)}")
    return wanted


def named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The parameters that it moves, in its order, with their names."""
    return [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"])]


def types(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    return [type(o).__name__ for o in optimizers]


def kept_of(optimizer: torch.optim.Optimizer, stored: dict[str, Kind], path: Path) -> dict[str, dict[str, Tensor]]:
    """Room, by parameter, for what the optimizer has kept of it, sharded as the parameter is."""
    room, there = {}, by_parameter(stored)
    for name, p in named(optimizer):
        room[name] = {}
        for key in there.get(name, ()):
            shape, dtype = stored[key]
            whole = shape == tuple(p.shape)
            room[name][key] = torch.zeros_like(p, dtype=dtype).detach() if whole else torch.zeros(shape, dtype=dtype)
            if not whole and shape:
                raise ValueError(f"{path} does not fit this run: {key} is {shape} there, {name} {tuple(p.shape)} here")
    return room


def by_parameter(stored: Iterable[str]) -> dict[str, list[str]]:
    """The names under which optimizers' state is stored, by the parameter's."""
    found: dict[str, list[str]] = {}
    for key in stored:
        if key.startswith(OPTIMIZER):
            found.setdefault(key.removeprefix(OPTIMIZER).rpartition(".")[0], []).append(key)
    return found


def same_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict, stored: dict[str, Kind], path: Path
):
    """ValueError where others wrote the checkpoint, or for other parameters."""
    there, here = state["optimizers"], types(optimizers)
    if there != here:
        raise ValueError(f"{path} is of {' + '.join(there)}, this run has {' + '.join(here)}")
    if not by_parameter(stored).keys() <= set(trained_names(model)):
        raise ValueError(f"{path}: {' + '.join(here)} moved other parameters there than in this run: see optim.freeze")
