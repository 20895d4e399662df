"""The weights of a model by name, and where they come from: an exported .safetensors file, or a checkpoint's shards.

model.NAME   the weights          ema.NAME   the average of those that train, in a checkpoint
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from transfusion.shards import METADATA, kinds, read_shards

MODEL, EMA = "model.", "ema."


class Source(NamedTuple):
    """Weights on disk: the shape of each by name, and how to read some of them into tensors of these shapes."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[dict[str, Tensor]], None]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and lasting buffers by name, a tied one once; they share the model's memory."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    once = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in every or name in once}


def trained_names(model: nn.Module) -> list[str]:
    """The parameters that train, in the model's order: those that have an average, frozen ones being their own."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def load_weights(
    model: nn.Module, path: Path, partly: bool = False, prefix: str = "", averaged: bool = True
) -> list[str]:
    """Copies an exported file's or a checkpoint's weights into the model; ValueError, before that, if they do not fit.

    `partly` lets the source lack weights, which keep their values; returns their names. With `prefix`, the model is a
    part of the source's: only names that begin so are read. Of a checkpoint the average, unless told otherwise.
    """
    source, own = part(open_weights(path, averaged), prefix), weights(model)
    fit({name: tuple(tensor.shape) for name, tensor in own.items()}, source, path, partly)
    source.read({name: own[name] for name in source.shapes})
    return [name for name in own if name not in source.shapes]


def read_weights(path: Path, averaged: bool = True) -> dict[str, Tensor]:
    """All weights of an exported file or a checkpoint, on the CPU."""
    if path.is_file():
        with opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    stored = kinds(path)
    tensors = {
        name: torch.empty(stored[key].shape, dtype=stored[key].dtype) for name, key in keys_of(stored, averaged).items()
    }
    open_weights(path, averaged).read(tensors)
    return tensors


def keys_of(stored: Iterable[str], averaged: bool) -> dict[str, str]:
    """Under what each weight is stored in a checkpoint; `averaged`: its average where one was kept."""
    kinds = (MODEL, EMA) if averaged else (MODEL,)
    return {key.removeprefix(kind): key for kind in kinds for key in stored if key.startswith(kind)}


@contextmanager
def opened(path: Path) -> Iterator[safetensors.safe_open]:
    """An exported file; ValueError where it is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; export the model again, or fetch it again") from None


def open_weights(path: Path, averaged: bool = True) -> Source:
    """The weights that lie at `path`, nothing of them read yet."""
    if (path / METADATA).is_file():
        stored = kinds(path)
        keys = keys_of(stored, averaged)
        return Source(
            {name: stored[key].shape for name, key in keys.items()},
            lambda tensors: read_shards({keys[name]: tensor for name, tensor in tensors.items()}, path),
        )
    if path.is_dir():
        kinds(path)  # says what it lacks
    if not path.is_file():
        raise ValueError(f"there is no {path}")

    @torch.no_grad()
    def read(tensors: dict[str, Tensor]):
        with opened(path) as file:
            for name, tensor in tensors.items():  # one at a time: never all of it twice
                tensor.copy_(file.get_tensor(name))

    with opened(path) as file:
        return Source({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, read)


def part(source: Source, prefix: str) -> Source:
    """The source's weights whose names begin with `prefix`, without it."""
    inside = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    return Source(inside, lambda tensors: source.read({prefix + name: tensor for name, tensor in tensors.items()}))


def fit(own: dict[str, tuple[int, ...]], source: Source, path: Path, partly: bool = False):
    """ValueError names the first weight that is left over, of another shape or, unless `partly`, missing."""
    for name, here in own.items():
        there = source.shapes.get(name)
        if there is None and not partly:
            raise ValueError(f"{path} does not fit this model: it has no {name}")
        if there is not None and there != here:
            raise ValueError(f"{path} does not fit this model: {name} is {there} there and {here} here")
    for name in source.shapes:
        if name not in own:
            raise ValueError(f"{path} does not fit this model: it has {name}, which the model lacks")
