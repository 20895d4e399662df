"""Latents of the images of a built folder, or their codes, read in place.

    FOLDER/latents/KEY/starts.npy     where those of each image begin; KEY = sha256(codec, sizes, dataset.json)
                       000000.bin     float32 [C, h, w], or int32 codes [h, w], of 1024 images, one behind the other
                       000000.json    bytes and checksum of these, and [number, why] of those that are broken
                       latents.json   the same of all and of starts.npy, written last: with it all are there

An image that could not be encoded has NaN, or codes of -1.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.images import Size
from transfusion.data.mapped import DATASET, Mapped, fingerprint
from transfusion.data.storage import Span, has_size, read_spans

BLOCK = 1024  # images
FORMAT = 2  # of what is kept
WHOLE = "latents.json"
BROKEN = "image that could not be encoded"


class Numbered(Protocol):
    """What has to be known of images: `TarImages` in built.py."""

    folder: Path
    sizes: tuple[Size, ...]

    def __len__(self) -> int: ...
    def number(self, i: int) -> int: ...
    def shape(self, i: int) -> Size: ...


@dataclass(frozen=True, eq=False)
class Kept(Sequence):
    """What is kept of each of these images: float32 [C, h, w], or int64 codes [h, w]."""

    images: Numbered
    folder: Path
    channels: int
    factor: int
    codes: bool
    starts: Mapped

    @property
    def dtype(self) -> str:
        """On disk."""
        return "<i4" if self.codes else "<f4"

    @property
    def missing(self) -> float:
        return -1 if self.codes else np.nan

    def __len__(self) -> int:
        return len(self.images)

    def shape_of(self, size: Size) -> tuple[int, ...]:
        """Of an image of (height, width) pixels: (C, h, w), or (h, w)."""
        return (self.channels,) * (not self.codes) + (size[0] // self.factor, size[1] // self.factor)

    def read(self, numbers: Sequence[int]) -> list[np.ndarray | str]:
        """What is kept of each of these images, or why it cannot be had."""
        spans = []
        for i in map(self.images.number, numbers):
            start, stop = (int(x) for x in self.starts[i : i + 2])
            first = int(self.starts[i // BLOCK * BLOCK])
            spans.append(Span(str(self.folder / f"{i // BLOCK:06}.bin"), (start - first) * 4, (stop - start) * 4))
        return [self.array(data, i) for data, i in zip(read_spans(spans), numbers)]

    def array(self, data: bytes | str, i: int) -> np.ndarray | str:
        if isinstance(data, str):
            return data
        found = np.frombuffer(data, self.dtype).reshape(self.shape_of(self.images.shape(i)))
        if self.codes:
            return BROKEN if found.flat[0] < 0 else found.astype(np.int64)
        return BROKEN if np.isnan(found).all() else found

    def __getitem__(self, i: int) -> np.ndarray:
        """ValueError where it cannot be had."""
        (found,) = self.read([i])
        if isinstance(found, str):
            raise ValueError(f"latents of image {i} of {self.images.folder}: {found}")
        return found


def kept_at(images: Numbered, codec: Codec, codes: bool) -> Kept:
    """Where the latents, or the codes, of a built folder's images lie, or will lie: of all else elsewhere."""
    said = f"{FORMAT} {codec.key} {codes} {[tuple(size) for size in images.sizes]}".encode()
    key = hashlib.sha256(said + (images.folder / DATASET).read_bytes()).hexdigest()[:20]
    folder = images.folder / "latents" / key
    return Kept(images, folder, codec.channels, codec.factor, codes, Mapped(folder / "starts.npy"))


def load_latents(images: Numbered, codec: Codec, codes: bool = False) -> Kept:
    """The latents of these images, or their codes; ValueError where they were not encoded yet."""
    kept = kept_at(images, codec, codes)
    if not (kept.folder / WHOLE).is_file():
        raise ValueError(
            f"the images of {images.folder} are not encoded with {codec.name}: call transfusion data encode CONFIG "
            "with this config first"
        )
    for name, (size, _) in described(kept.folder)["files"].items():
        if not has_size(kept.folder, name, size):
            raise ValueError(
                f"{kept.folder / name} is gone or has another size: call transfusion data encode CONFIG again, which "
                "encodes it anew"
            )
    return kept


def described(folder: Path) -> dict[str, Any]:
    """What latents.json says; ValueError where it is broken."""
    try:
        return json.loads((folder / WHOLE).read_text())
    except ValueError:
        raise ValueError(
            f"{folder / WHOLE} is broken: remove it, and call transfusion data encode CONFIG again"
        ) from None


def spoiled(folder: Path) -> list[str]:
    """The files of all latents of a built folder that are not those that were written, by their checksums."""
    return [
        str(file.relative_to(folder))
        for whole in sorted(folder.glob(f"latents/*/{WHOLE}"))
        for name, known in described(whole.parent).get("files", {}).items()  # {}: of format 1, which nothing reads
        if not (file := whole.with_name(name)).is_file() or fingerprint(file) != known
    ]
