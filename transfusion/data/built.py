"""Data that `transfusion data build` has built, read in place: nothing is loaded, whatever its size.

    FOLDER/dataset.json     format, kind, tokenizer; bytes and checksum of every file; of images and documents: tars,
                            and splits as ranges of records
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
from transfusion.data.mapped import DATASET, FORMAT, LOCK, Mapped
from transfusion.data.storage import Span, has_size, is_remote, read_spans
from transfusion.tokenizer import Tokenizer

CHANGED = "bytes that have changed since it was built"
SCANNED = 1 << 18  # images, or documents, whose records are looked at together


def is_built(path: str | Path) -> bool:
    """Whether the path is a built folder; ValueError where a build of it has not come to its end."""
    folder = Path(path).expanduser()
    if (folder / DATASET).is_file():
        return True
    if (folder / LOCK).is_file():  # or its parts would be read as sources
        raise ValueError(f"{path} is not built to its end: call transfusion data build again, or remove the folder")
    return False


def described(path: str | Path, kind: str = "") -> tuple[Path, dict[str, Any]]:
    """(folder, its dataset.json), of any kind by default; ValueError where it is of another kind or format."""
    folder = Path(path).expanduser().absolute()
    try:
        dataset = json.loads((folder / DATASET).read_text())
    except ValueError:
        raise ValueError(f"{folder / DATASET} is broken: remove it, and build the data anew") from None
    if dataset["format"] != FORMAT:
        raise ValueError(f"{folder} has format {dataset['format']}, and {FORMAT} is read: build it anew")
    if kind and dataset["kind"] != kind:
        raise ValueError(f"{folder} holds {dataset['kind']}: name it as data.{dataset['kind']}, not as data.{kind}")
    return folder, dataset


def read_dataset(path: str | Path, kind: str = "", tokenizer: Tokenizer | None = None) -> tuple[Path, dict[str, Any]]:
    """The same; ValueError also where it was built with another tokenizer (any by default), or where an array or a tar
    of it is gone or has another size."""
    folder, dataset = described(path, kind)
    if tokenizer and dataset["tokenizer"] != tokenizer.key:
        raise ValueError(
            f"{folder} was built with another tokenizer: build it with --tokenizer FILE, the one of data.tokenizer"
        )
    for url, size in files_of(dataset):
        if not has_size(folder, url, size):
            raise ValueError(f"{folder / url} of {folder} is gone or has changed: build the data anew")
    return folder, dataset


def files_of(dataset: dict[str, Any]) -> list[tuple[str, int]]:
    """(address, bytes) of all that is read in place."""
    return [*((name, size) for name, (size, _) in dataset["files"].items()), *map(tuple, dataset.get("tars", []))]


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

    def closest(self, records: np.ndarray) -> np.ndarray:
        """int64 [n]: which of the sizes each of the images of these records has."""
        sizes = np.array(self.sizes)
        a = records["width"].astype(np.int64)[:, None] * sizes[:, 0]
        b = records["height"].astype(np.int64)[:, None] * sizes[:, 1]
        return (np.maximum(a, b) / np.minimum(a, b)).argmin(1)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The number of the first, and records, some at a time, those left out included."""
        for start in range(self.rows.first, self.rows.stop, SCANNED):
            yield start - self.rows.first, self.records[start : min(start + SCANNED, self.rows.stop)]

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
        starts, none, some = self.ids.starts, [], []
        for first, records in self.images.blocks():
            counts = records["captions"].astype(np.int64)
            caption, begins = runs(records["first"].astype(np.int64), counts)
            room = np.repeat(np.array(rooms)[self.images.closest(records)], counts)
            ends = np.concatenate([[0], np.cumsum((starts[caption + 1] - starts[caption]).astype(np.int64) <= room)])
            fit = ends[begins + counts] - ends[begins]
            none.append(first + np.flatnonzero(fit == 0))
            some.append(first + np.flatnonzero((fit > 0) & (fit < counts)))
        return tuple(np.concatenate(found) if found else np.zeros(0, np.int64) for found in (none, some))


def runs(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(firsts[0], firsts[0] + 1, ..., counts[0] of them, firsts[1], ...; where each of these runs begins)."""
    begins = np.cumsum(counts) - counts
    return np.repeat(firsts - begins, counts) + np.arange(counts.sum()), begins


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


def images_of(folder: Path, dataset: dict[str, Any], sizes: Sequence[Size]) -> TarImages:
    """All images of a built folder."""
    records, tars = Mapped(folder / "images.npy"), tuple(url for url, _ in dataset["tars"])
    return TarImages(folder, tars, records, Rows(0, len(records)), tuple(sizes))


def images_by_split(
    path: str | Path, sizes: Sequence[Size], tokenizer: Tokenizer | None = None
) -> dict[str, TarImages]:
    """The captioned images of each split, in one of these sizes each; ValueError where the folder does not fit."""
    folder, dataset = read_dataset(path, "images", tokenizer)
    images = images_of(folder, dataset, sizes)
    return {split: replace(images, rows=Rows(*span)) for split, span in dataset["splits"].items()}


def load_built_images(path: str | Path, sizes: Sequence[Size], tokenizer: Tokenizer) -> dict[str, BuiltCaptions]:
    """The same with their captions."""
    return {split: captions_of(of, tokenizer) for split, of in images_by_split(path, sizes, tokenizer).items()}


def captions_of(images: TarImages, tokenizer: Tokenizer, rooms: tuple[int, ...] = ()) -> BuiltCaptions:
    """All that belongs to these images, captions without room left out."""
    ids = CaptionIds(images, mapped_ids(images.folder), rooms)
    return BuiltCaptions(images, CaptionTexts(ids, tokenizer), ids, names_of(images))


def names_of(images: TarImages) -> Names:
    return Names(images, mapped_letters(images.folder))


def mapped_letters(folder: Path) -> Mapped:
    return Mapped(folder / "letters.npy")


def keep_fitting(found: BuiltCaptions, rooms: Sequence[int]) -> tuple[BuiltCaptions, np.ndarray, np.ndarray]:
    """(the images some caption of which has room beside them, the numbers of the others in `found`, of those that lost
    a caption)."""
    out, less = found.ids.lacking(rooms)
    images = replace(found.images, rows=found.images.rows.without(out))
    return captions_of(images, found.texts.tokenizer, tuple(rooms)), out, less


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
        starts, found = self.ids.starts, []
        for at in range(self.rows.first, self.rows.stop, SCANNED):
            records = self.documents[at : min(at + SCANNED, self.rows.stop)]
            counts = records["segments"].astype(np.int64)
            numbers, begins = runs(records["first"].astype(np.int64), counts)
            segments = self.segments[numbers]
            followed = segments["learn"] == 1
            followed[(begins + counts - 1)[counts > 0]] = False
            image, sizes = segments["image"] == 1, np.zeros(len(segments), np.int64)
            text = segments["number"][~image].astype(np.int64)
            sizes[~image] = (starts[text + 1] - starts[text]).astype(np.int64)
            closest = images.closest(images.records[segments["number"][image].astype(np.int64)])
            sizes[image] = lengths[closest, followed[image].astype(int)]
            upto = np.concatenate([[0], np.cumsum(sizes)])
            found.append(at - self.rows.first + np.flatnonzero(upto[begins + counts] - upto[begins] > most))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def name(self, i: int) -> str:
        """File and line."""
        record = self.record(i)
        return string(self.letters, int(record["name"]), int(record["letters"]))


def load_built_documents(
    path: str | Path, sizes: Sequence[Size], tokenizer: Tokenizer
) -> tuple[TarImages, dict[str, BuiltDocuments]]:
    """(all images, the documents of each split); ValueError where the folder does not fit."""
    folder, dataset = read_dataset(path, "documents", tokenizer)
    found = {split: documents_of(folder, Rows(*span)) for split, span in dataset["splits"].items()}
    return images_of(folder, dataset, sizes), found


def documents_of(folder: Path, rows: Rows) -> BuiltDocuments:
    files = [Mapped(folder / "documents.npy"), Mapped(folder / "segments.npy"), mapped_ids(folder)]
    return BuiltDocuments(*files, mapped_letters(folder), rows)
