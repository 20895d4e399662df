"""Arrays on disk, read in place: a process holds their names, and the system the pages that were looked at.

Growing("ids.npy", "<u2")       written piece by piece; its length stands in the header once it is closed
Mapped("ids.npy").array         read; sent to another process as the name alone
publish(new, final)             there whole or not at all, though the power fail: bytes first, then the name
"""

import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transfusion.checkpoint import sync

CHUNK = 1 << 24  # bytes that are in memory at a time
FORMAT = 2  # of what is built
DATASET = "dataset.json"  # beside the arrays of a data set; written last, it says that they are whole
LOCK = ".lock"  # beside it: of the process that builds; there from the beginning on, and stays


class Growing:
    """A one-dimensional .npy that is written before its length is known. Closed by `with`."""

    def __init__(self, path: Path, dtype: np.dtype | str):
        self.file, self.dtype, self.n = path.open("wb"), np.dtype(dtype), 0
        self.write_header()

    def write_header(self):
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self.file, header)  # of one length, whatever n: numpy leaves room for it

    def append(self, values: np.ndarray | list):
        step = max(CHUNK // self.dtype.itemsize, 1)
        for i in range(0, len(values), step):  # a memory map of any size passes through
            self.file.write(np.ascontiguousarray(values[i : i + step], self.dtype).tobytes())
        self.n += len(values)

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *error):
        self.file.seek(0)
        self.write_header()
        self.file.close()


class Mapped:
    """A .npy file; `array` is its memory map, made in each process when it is first asked for."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def array(self) -> np.ndarray:
        if "map" not in self.__dict__:
            self.map = np.load(self.path, mmap_mode="r")
        return self.map

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at):
        return self.array[at]

    def __reduce__(self):
        return Mapped, (self.path,)


def has_length(file: Path, n: int) -> bool:
    """Whether there is such a .npy, whole, of n things."""
    try:
        return len(Mapped(file)) == n
    except (OSError, ValueError, EOFError):
        return False


def publish(new: Path, final: Path):
    """Gives a file, or a folder with all in it, its final name, once its bytes are on the disk."""
    for path in (*(new.rglob("*") if new.is_dir() else ()), new):
        sync(path)
    os.replace(new, final)
    sync(final.parent)


def draft(file: Path) -> Path:
    """Where to write what is then published as this file, whoever else writes the same."""
    return file.with_name(f".{secrets.token_hex(4)}-{file.name}")  # a process number is another machine's too


def save(file: Path, write: Callable[[BinaryIO], object]):
    """Writes a file that is there whole or not at all."""
    new = draft(file)
    with new.open("wb") as out:
        write(out)
    publish(new, file)


def fingerprint(file: Path) -> list[int]:
    """[bytes, crc32] of a file."""
    size = crc = 0
    with file.open("rb") as data:
        while part := data.read(CHUNK):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]
