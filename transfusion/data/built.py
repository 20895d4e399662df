"""Data that `transfusion data build` has built, read in place: nothing is loaded, whatever its size.

    FOLDER/dataset.json     format, kind, tokenizer; of images and documents: tars, and splits as ranges of records
           images.npy       a record an image: where its bytes lie, how large it is, its captions, its name
           starts.npy  ids.npy      text j, a caption or a segment, is ids[starts[j]:starts[j+1]]; of text: ids alone
           letters.npy      names, and infos of documents
           documents.npy  segments.npy      of documents; held_out.jsonl: of text
           shards/          tars of images that lay loose when they were built

`images.read` gives pixels as a folder of the same files would, or says in words why an image cannot be had.
All that is here goes to other processes as names of files.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transfusion.data.images import Size, bucket_of, decode
from transfusion.data.mapped import Mapped
from transfusion.data.storage import Span, is_remote, read_spans, stamp
from transfusion.tokenizer import Tokenizer

DATASET = "dataset.json"
FORMAT = 1


def is_built(path: str | Path) -> bool:
    return (Path(path).expanduser() / DATASET).is_file()


def read_dataset(path: str | Path, kind: str, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any]]:
    """(folder, its dataset.json); ValueError where it is not what was asked for, or a tar of it is gone or changed."""
    folder = Path(path).expanduser().absolute()
    dataset = json.loads((folder / DATASET).read_text())
    if dataset["format"] != FORMAT:
        raise ValueError(f"{folder} has format {dataset['format']}, and {FORMAT} is read: build it anew")
    if dataset["kind"] != kind:
        raise ValueError(f"{folder} holds {dataset['kind']}: name it as data.{dataset['kind']}, not as data.{kind}")
    if dataset["tokenizer"] != tokenizer.key:
        raise ValueError(
            f"{folder} was built with another tokenizer: build it with --tokenizer FILE, the one of data.tokenizer"
        )
    for url, size in dataset.get("tars", []):
        if not is_remote(url) and size != size_of(folder / url):
            raise ValueError(f"the tar {folder / url} of {folder} is gone or has changed: build the data anew")
    return folder, dataset


def size_of(path: Path) -> int:
    try:
        return stamp(str(path)).bytes
    except OSError:
        return -1


@dataclass(frozen=True, eq=False)
class TarImages(Sequence):
    """Images `first` ... `stop` - 1 of a built folder, each at the closest of `sizes`, decoded as it is asked for."""

    folder: Path
    tars: tuple[str, ...]
    records: Mapped
    first: int
    stop: int
    sizes: tuple[Size, ...]

    def __len__(self) -> int:
        return self.stop - self.first

    def record(self, i: int) -> np.void:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self.records.array[self.first + i % len(self)]

    def shape(self, i: int) -> Size:
        """(height, width) in pixels that the image has here."""
        record = self.record(i)
        return bucket_of(int(record["width"]), int(record["height"]), self.sizes)

    def shapes(self) -> np.ndarray:
        """int64 [n, 2]: shape(i) of all."""
        sizes, records = np.array(self.sizes), self.records.array[self.first : self.stop]
        a = records["width"].astype(np.int64)[:, None] * sizes[:, 0]
        b = records["height"].astype(np.int64)[:, None] * sizes[:, 1]
        return sizes[(np.maximum(a, b) / np.minimum(a, b)).argmin(1)]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray | str]:
        """uint8 [h, w, 3] of each of these images, or why it cannot be had."""
        records = [self.record(i) for i in numbers]
        spans = [Span(self.url(r), int(r["offset"]), int(r["bytes"])) for r in records]
        return [self.pixels(data, int(r["crc"])) for data, r in zip(read_spans(spans), records)]

    def pixels(self, data: bytes | str, crc: int) -> np.ndarray | str:
        if isinstance(data, str):
            return data
        return decode(data, self.sizes) if zlib.crc32(data) == crc else "bytes that have changed since it was built"

    def url(self, record: np.void) -> str:
        url = self.tars[record["tar"]]
        return url if is_remote(url) else str(self.folder / url)  # an absolute path stays what it is

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 [h, w, 3]; ValueError where it cannot be had."""
        (image,) = self.read([i])
        if isinstance(image, str):
            record = self.record(i)
            raise ValueError(f"image {i} of {self.folder}, in {self.url(record)} at {record['offset']}: {image}")
        return image


@dataclass(frozen=True, eq=False)
class Ids:
    """Text j as token ids."""

    ids: Mapped
    starts: Mapped

    def of(self, j: int) -> np.ndarray:
        """int64 [n]."""
        start, stop = (int(x) for x in self.starts.array[j : j + 2])
        return np.array(self.ids.array[start:stop], np.int64)


@dataclass(frozen=True, eq=False)
class CaptionIds(Sequence):
    """Token ids of the captions of each image."""

    images: TarImages
    ids: Ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        record = self.images.record(i)
        return [self.ids.of(int(record["first"]) + k) for k in range(record["captions"])]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [m], of all captions of all images, and int64 [n + 1], where those of each image begin among them)."""
        images = self.images
        records, starts = images.records.array[images.first : images.stop], self.ids.starts.array
        counts = records["captions"].astype(np.int64)
        begins = np.concatenate([[0], np.cumsum(counts)])
        numbers = np.repeat(records["first"].astype(np.int64) - begins[:-1], counts) + np.arange(begins[-1])
        return (starts[numbers + 1] - starts[numbers]).astype(np.int64), begins


@dataclass(frozen=True, eq=False)
class CaptionTexts(Sequence):
    """The captions of each image as its tokenizer gives them back."""

    ids: CaptionIds
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> list[str]:
        return [self.tokenizer.decode(ids) for ids in self.ids[i]]


@dataclass(frozen=True, eq=False)
class Names(Sequence):
    """What each image is called."""

    images: TarImages
    letters: Mapped

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> str:
        record = self.images.record(i)
        return string(self.letters, int(record["name"]), int(record["letters"]))


def string(letters: Mapped, start: int, size: int) -> str:
    return letters.array[start : start + size].tobytes().decode(errors="replace")


class BuiltCaptions(NamedTuple):
    """Captioned images of one split."""

    images: TarImages
    texts: CaptionTexts
    ids: CaptionIds
    names: Names


def mapped_ids(folder: Path) -> Ids:
    return Ids(Mapped(folder / "ids.npy"), Mapped(folder / "starts.npy"))


def load_built_images(path: str | Path, sizes: Sequence[Size], tokenizer: Tokenizer) -> dict[str, BuiltCaptions]:
    """The captioned images of each split, in one of these sizes each; ValueError where the folder does not fit."""
    folder, dataset = read_dataset(path, "images", tokenizer)
    tars, records, letters = (
        tuple(url for url, _ in dataset["tars"]),
        Mapped(folder / "images.npy"),
        folder / "letters.npy",
    )
    found = {}
    for split, (first, stop) in dataset["splits"].items():
        images = TarImages(folder, tars, records, first, stop, tuple(sizes))
        ids = CaptionIds(images, mapped_ids(folder))
        found[split] = BuiltCaptions(images, CaptionTexts(ids, tokenizer), ids, Names(images, Mapped(letters)))
    return found


def load_built_text(path: str | Path, tokenizer: Tokenizer) -> tuple[Mapped, list[str]]:
    """(uint16 or uint32 ids of all training text, each document closed by <eos>; some of the texts held out)."""
    folder, _ = read_dataset(path, "text", tokenizer)
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    return Mapped(folder / "ids.npy"), [json.loads(line)["text"] for line in lines]


class Piece(NamedTuple):
    """A segment of a document: the ids of a text, or the number of an image; without `learn` it is given."""

    content: np.ndarray | int
    learn: bool


@dataclass(frozen=True, eq=False)
class BuiltDocuments(Sequence):
    """The documents of one split: (pieces, info) each."""

    documents: Mapped
    segments: Mapped
    ids: Ids
    letters: Mapped
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def record(self, i: int) -> np.void:
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.documents.array[self.first + i % len(self)]

    def __getitem__(self, i: int) -> tuple[list[Piece], dict[str, Any]]:
        record = self.record(i)
        first = int(record["first"])
        pieces = [
            Piece(int(s["number"]) if s["image"] else self.ids.of(int(s["number"])), bool(s["learn"]))
            for s in self.segments.array[first : first + int(record["segments"])]
        ]
        return pieces, json.loads(string(self.letters, int(record["info"]), int(record["info_letters"])))

    def name(self, i: int) -> str:
        """File and line."""
        record = self.record(i)
        return string(self.letters, int(record["name"]), int(record["letters"]))


def load_built_documents(
    path: str | Path, sizes: Sequence[Size], tokenizer: Tokenizer
) -> tuple[TarImages, dict[str, BuiltDocuments]]:
    """(all images, the documents of each split); ValueError where the folder does not fit."""
    folder, dataset = read_dataset(path, "documents", tokenizer)
    records = Mapped(folder / "images.npy")
    images = TarImages(folder, tuple(url for url, _ in dataset["tars"]), records, 0, len(records), tuple(sizes))
    files = [Mapped(folder / "documents.npy"), Mapped(folder / "segments.npy"), mapped_ids(folder)]
    letters = Mapped(folder / "letters.npy")
    return images, {s: BuiltDocuments(*files, letters, a, b) for s, (a, b) in dataset["splits"].items()}
