"""Arrays on disk, read in place: a process holds their names, and the system the pages that were looked at.

Growing("ids.npy", "<u2")       written piece by piece; its length stands in the header once it is closed
Mapped("ids.npy").array         read; sent to another process as the name alone
"""

from pathlib import Path

import numpy as np

CHUNK = 1 << 24  # elements
DATASET = "dataset.json"  # beside the arrays of a data set; written last, it says that they are whole


class Growing:
    """A one-dimensional .npy that is written before its length is known. Closed by `with`."""

    def __init__(self, path: Path, dtype: np.dtype | str):
        self.file, self.dtype, self.n = path.open("wb"), np.dtype(dtype), 0
        self.write_header()

    def write_header(self):
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self.file, header)  # of one length, whatever n: numpy leaves room for it

    def append(self, values: np.ndarray | list):
        for i in range(0, len(values), CHUNK):  # a memory map of any size passes through
            self.file.write(np.ascontiguousarray(values[i : i + CHUNK], self.dtype).tobytes())
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
