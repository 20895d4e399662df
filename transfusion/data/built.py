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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.encoded import load_latents
from transfusion.data.images import Size, bucket_of, decode
from transfusion.data.mapped import DATASET, Mapped
from transfusion.data.storage import Span, has_size, is_remote, read_spans
from transfusion.tokenizer import Tokenizer

FORMAT = 1
CHANGED = "bytes that have changed since it was built"
SCANNED = 1 << 20  # images whose records are looked at together


def is_built(path: str | Path) -> bool:
    return (Path(path).expanduser() / DATASET).is_file()


def read_dataset(path: str | Path, kind: str = "", tokenizer: Tokenizer | None = None) -> tuple[Path, dict[str, Any]]:
    """(folder, its dataset.json); ValueError where it is not what was asked for (any kind and tokenizer by default), or
    where a tar of it is gone or changed."""
    folder = Path(path).expanduser().absolute()
    dataset = json.loads((folder / DATASET).read_text())
    if dataset["format"] != FORMAT:
        raise ValueError(f"{folder} has format {dataset['format']}, and {FORMAT} is read: build it anew")
    if kind and dataset["kind"] != kind:
        raise ValueError(f"{folder} holds {dataset['kind']}: name it as data.{dataset['kind']}, not as data.{kind}")
    if tokenizer and dataset["tokenizer"] != tokenizer.key:
        raise ValueError(
            f"{folder} was built with another tokenizer: build it with --tokenizer FILE, the one of data.tokenizer"
        )
    for url, size in dataset.get("tars", []):
        if not has_size(folder, url, size):
            raise ValueError(f"the tar {folder / url} of {folder} is gone or has changed: build the data anew")
    return folder, dataset


@dataclass(frozen=True, eq=False)
class Rows(Sequence):
    """The numbers first ... stop - 1, without some that are left out, of which alone something is kept in memory."""

    first: int
    stop: int
    gaps: Sequence[int] = ()  # of each that is left out, in their order: how many that stay come before it

    def __len__(self) -> int:
        return self.stop - self.first - len(self.gaps)

    def __getitem__(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        i = int(i) % len(self)
        return self.first + i + (int(np.searchsorted(self.gaps, i, "right")) if len(self.gaps) else 0)

    def without(self, out: np.ndarray) -> "Rows":
        """The others than number out[0], out[1], ... (rising) of these, of which none was left out before."""
        assert not len(self.gaps)
        return Rows(self.first, self.stop, out - np.arange(len(out)))


@dataclass(frozen=True, eq=False)
class TarImages(Sequence):
    """Images of a built folder, each at the closest of `sizes`, decoded as it is asked for."""

    folder: Path
    tars: tuple[str, ...]
    records: Mapped
    rows: Rows
    sizes: tuple[Size, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def number(self, i: int) -> int:
        """Which of all images of the folder is the i-th here."""
        return self.rows[i]

    def record(self, i: int) -> np.void:
        return self.records[self.rows[i]]

    def shape(self, i: int) -> Size:
        """(height, width) in pixels that the image has here."""
        record = self.record(i)
        return bucket_of(int(record["width"]), int(record["height"]), self.sizes)

    def closest(self) -> np.ndarray:
        """int16 [n]: which of the sizes each of the images has, those left out included."""
        sizes, found = np.array(self.sizes), np.empty(self.rows.stop - self.rows.first, np.int16)
        for part, records in self.blocks():
            a = records["width"].astype(np.int64)[:, None] * sizes[:, 0]
            b = records["height"].astype(np.int64)[:, None] * sizes[:, 1]
            found[part] = (np.maximum(a, b) / np.minimum(a, b)).argmin(1)
        return found

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Which, and their records, some at a time, those left out included."""
        for start in range(self.rows.first, self.rows.stop, SCANNED):
            stop = min(start + SCANNED, self.rows.stop)
            yield slice(start - self.rows.first, stop - self.rows.first), self.records[start:stop]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray | str]:
        """uint8 [h, w, 3] of each of these images, or why it cannot be had."""
        records = [self.record(i) for i in numbers]
        spans = [Span(self.url(r), int(r["offset"]), int(r["bytes"])) for r in records]
        return [self.pixels(data, int(r["crc"])) for data, r in zip(read_spans(spans), records)]

    def pixels(self, data: bytes | str, crc: int) -> np.ndarray | str:
        if isinstance(data, str):
            return data
        return decode(data, self.sizes) if zlib.crc32(data) == crc else CHANGED

    def url(self, record: np.void) -> str:
        url = self.tars[record["tar"]]
        return url if is_remote(url) else str(self.folder / url)  # an absolute path stays what it is

    def latents(self, codec: Codec, codes: bool) -> Sequence[np.ndarray]:
        """What `transfusion data encode` kept of each; ValueError where it was not called yet."""
        return load_latents(self, codec, codes)

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
        start, stop = (int(x) for x in self.starts[j : j + 2])
        return np.array(self.ids[start:stop], np.int64)


@dataclass(frozen=True, eq=False)
class CaptionIds(Sequence):
    """Token ids of the captions of each image: of those that have room beside it."""

    images: TarImages
    ids: Ids
    rooms: tuple[int, ...] = ()  # beside an image of each of the sizes, in tokens; () = any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        record = self.images.record(i)
        found = [self.ids.of(int(record["first"]) + k) for k in range(record["captions"])]
        if not self.rooms:
            return found
        room = self.rooms[self.images.sizes.index(self.images.shape(i))]
        return [ids for ids in found if len(ids) <= room]

    def lacking(self, rooms: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of images beside which no caption has room, and of those beside which some have none."""
        closest, starts, none, some = self.images.closest(), self.ids.starts, [], []
        for part, records in self.images.blocks():
            counts = records["captions"].astype(np.int64)
            begins = np.cumsum(counts) - counts
            caption = np.repeat(records["first"].astype(np.int64) - begins, counts) + np.arange(counts.sum())
            room = np.repeat(np.array(rooms)[closest[part]], counts)
            ends = np.concatenate([[0], np.cumsum((starts[caption + 1] - starts[caption]).astype(np.int64) <= room)])
            fit = ends[begins + counts] - ends[begins]
            none.append(part.start + np.flatnonzero(fit == 0))
            some.append(part.start + np.flatnonzero((fit > 0) & (fit < counts)))
        return tuple(np.concatenate(found) if found else np.zeros(0, np.int64) for found in (none, some))


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
    return letters[start : start + size].tobytes().decode(errors="replace")


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
        mapped_letters(folder),
    )
    return {
        split: captions_of(TarImages(folder, tars, records, Rows(*span), tuple(sizes)), tokenizer, letters)
        for split, span in dataset["splits"].items()
    }


def captions_of(images: TarImages, tokenizer: Tokenizer, letters: Mapped, rooms: tuple[int, ...] = ()) -> BuiltCaptions:
    """All that belongs to these images, captions without room left out."""
    ids = CaptionIds(images, mapped_ids(images.folder), rooms)
    return BuiltCaptions(images, CaptionTexts(ids, tokenizer), ids, Names(images, letters))


def mapped_letters(folder: Path) -> Mapped:
    return Mapped(folder / "letters.npy")


def keep_fitting(found: BuiltCaptions, rooms: Sequence[int]) -> tuple[BuiltCaptions, list[str], list[str]]:
    """(the images some caption of which has room beside them, the names of the others, those that lost a caption)."""
    out, less = found.ids.lacking(rooms)
    images = replace(found.images, rows=found.images.rows.without(out))
    named = [[found.names[i] for i in numbers] for numbers in (out, less)]
    return captions_of(images, found.texts.tokenizer, found.names.letters, tuple(rooms)), *named


def load_built_text(path: str | Path, tokenizer: Tokenizer) -> tuple[Mapped, list[str], dict[str, int]]:
    """(uint16 or uint32 ids of all training text, each document closed by <eos>; some of the texts held out; how many
    documents there are by split, and in all)."""
    folder, dataset = read_dataset(path, "text", tokenizer)
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    return Mapped(folder / "ids.npy"), [json.loads(line)["text"] for line in lines], dataset["documents"]


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
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> np.void:
        return self.documents[self.rows[i]]

    def __getitem__(self, i: int) -> tuple[list[Piece], dict[str, Any]]:
        record = self.record(i)
        first = int(record["first"])
        pieces = [
            Piece(int(s["number"]) if s["image"] else self.ids.of(int(s["number"])), bool(s["learn"]))
            for s in self.segments[first : first + int(record["segments"])]
        ]
        return pieces, json.loads(string(self.letters, int(record["info"]), int(record["info_letters"])))

    def longer(self, lengths: np.ndarray, images: TarImages, most: int) -> np.ndarray:
        """The numbers of documents of more than `most` positions, where an image of size s takes lengths[s, 1] if it
        is learned and something follows it, else lengths[s, 0]."""
        segments, starts, records = self.segments.array, self.ids.starts, self.documents.array
        last = np.zeros(len(segments), bool)
        ends = records["first"].astype(np.int64) + records["segments"]
        last[ends - 1] = True
        sizes = np.zeros(len(segments), np.int64)
        image = segments["image"] == 1
        text = segments["number"][~image].astype(np.int64)
        sizes[~image] = (starts[text + 1] - starts[text]).astype(np.int64)
        followed = (segments["learn"] == 1) & ~last
        sizes[image] = lengths[
            images.closest()[segments["number"][image].astype(np.int64)], followed[image].astype(int)
        ]
        upto = np.concatenate([[0], np.cumsum(sizes)])
        mine = slice(self.rows.first, self.rows.stop)
        return np.flatnonzero(upto[ends[mine]] - upto[records["first"][mine].astype(np.int64)] > most)

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
    tars, rows = tuple(url for url, _ in dataset["tars"]), Rows(0, len(records))
    images = TarImages(folder, tars, records, rows, tuple(sizes))
    files = [Mapped(folder / "documents.npy"), Mapped(folder / "segments.npy"), mapped_ids(folder)]
    spans = dataset["splits"].items()
    return images, {s: BuiltDocuments(*files, mapped_letters(folder), Rows(*span)) for s, span in spans}
