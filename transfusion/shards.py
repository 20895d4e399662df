"""Named tensors as shards in a folder, by torch's distributed checkpoint (DCP): each rank writes what it holds.

    FOLDER/__0_0.distcp   __1_0.distcp ...    the parts of rank 0, 1, ...
           .metadata                          which part of which tensor lies where; written last

Whatever the number of ranks that wrote, any number can read: each takes the parts that it is to hold.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

METADATA = ".metadata"


class Kind(NamedTuple):
    """What a stored tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_shards(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None):
    """Writes and syncs this rank's parts, and returns once all ranks did; OSError on all of them if one cannot."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    with own_errors(OSError, f"{folder} cannot be written"), alone_is_fine():
        save(tensors, storage_writer=FileSystemWriter(folder), process_group=group)


def read_shards(tensors: dict[str, Tensor], folder: Path):
    """Fills the tensors, sharded or not, by name, in place; each rank by itself. ValueError where one is damaged."""
    from torch.distributed.checkpoint import FileSystemReader, load

    with own_errors(ValueError, f"{folder} is damaged"), alone_is_fine(), torch.no_grad():
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)


def kinds(folder: Path) -> dict[str, Kind]:
    """What is stored, by name."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / METADATA).is_file():
        raise ValueError(
            f"{folder} has no {METADATA}, as checkpoints of other versions have none: by the version that wrote it "
            "`transfusion export` the model, and begin a new run with it by init=FOLDER"
        )
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # of unpickling anything
        raise ValueError(f"{folder / METADATA} is damaged: {error}") from None
    return {name: Kind(tuple(x.size), x.properties.dtype) for name, x in stored.items()}


def missing(folder: Path) -> list[str]:
    """The files that should be there and are not."""
    from torch.distributed.checkpoint import FileSystemReader

    parts = FileSystemReader(folder).read_metadata().storage_data.values()
    return sorted({part.relative_path for part in parts if not (folder / part.relative_path).is_file()})


def staged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, sharded as they are, which may be written while training goes on."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(tensors)
    finally:
        stager.close()


@contextmanager
def own_errors(kind: type[Exception], what: str) -> Iterator[None]:
    """Turns DCP's errors, which except clauses for Exception miss, into `kind`, in one line."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures = "; ".join(f"rank {rank}: {e}" for rank, (e, _) in sorted(error.failures.items()))
        raise kind(f"{what}: {failures}") from None


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """Without DCP's warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


# ---- the ranks that write together ----


def leads() -> bool:
    """Whether this process does what one alone must do, such as to print; known before the ranks have met."""
    return int(os.environ.get("RANK", 0)) == 0


def agree(problem: str, group: dist.ProcessGroup | None = None):
    """Returns once all ranks have called it, each with "" ; OSError on all of them if one has a problem."""
    if not dist.is_initialized():
        problems = [problem]
    else:
        problems = [""] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group)
    if any(problems):
        raise OSError("; ".join(f"rank {rank}: {said}" for rank, said in enumerate(problems) if said))
