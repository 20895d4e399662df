"""Sources as a run reads them; of built folders what has no room in a row is left out, all else stays on disk.

data.images = FOLDER       captions_at    ->  Captions by split, Report
data.text = FOLDER         text_at        ->  Stream, held-out texts, Report
data.documents = FOLDER    documents_at   ->  images, documents by split, Report
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.built import (
    BuiltDocuments,
    TarImages,
    keep_fitting,
    load_built_documents,
    load_built_images,
    load_built_text,
)
from transfusion.data.documents import Captions, DataConfig, Document, Placed, has_copies
from transfusion.data.images import Size
from transfusion.data.report import Report
from transfusion.data.windows import Stream
from transfusion.sequence import Format, Text, image_length
from transfusion.tokenizer import Tokenizer

CAPTION_TOO_LONG = "a caption of several, too long"


@dataclass(frozen=True, eq=False)
class Reading:
    """What a run reads its sources for: rows of so many positions, written as its format says."""

    config: DataConfig
    tokenizer: Tokenizer
    codec: Codec
    fmt: Format
    seq_len: int

    @property
    def image_too_long(self) -> str:
        return f"caption and image longer than seq_len = {self.seq_len}"

    @property
    def document_too_long(self) -> str:
        return f"document longer than seq_len = {self.seq_len}"

    @property
    def copies(self) -> bool:
        """Whether an image that something follows has a clean copy."""
        return has_copies(self.config, self.fmt.codes)

    def positions(self, size: Size, copy: bool) -> int:
        """Of an image of (height, width) pixels."""
        return image_length(self.codec.grid(size, self.fmt.patch_size), self.fmt, copy)

    def caption_room(self, size: Size) -> int:
        """Tokens that a caption may have beside such an image."""
        return self.seq_len - 2 - self.positions(size, self.copies)


def captions_at(path: str, reading: Reading) -> tuple[dict[str, Captions], Report]:
    """The captioned images of a built folder, by split; what was left out of it now."""
    sizes = reading.config.sizes
    rooms, found, report = [reading.caption_room(size) for size in sizes], {}, Report(0)
    for split, all_of in load_built_images(path, sizes, reading.tokenizer).items():
        fitting, out, less = keep_fitting(all_of, rooms)
        found[split] = Captions(*fitting)
        report = report.without_all(reading.image_too_long, all_of.names.__getitem__, out)
        report = report.without_all(CAPTION_TOO_LONG, all_of.names.__getitem__, less)
    return found, replace(report, kept=sum(map(len, found.values())))


def text_at(path: str, name: str, reading: Reading) -> tuple[Stream, list[str], Report]:
    """The text of a built folder, some of what is held out, and how much there is."""
    ids, held_out, counts = load_built_text(path, reading.tokenizer)
    return Stream(name, ids, counts["train"]), held_out, Report(counts["all"])


@dataclass(frozen=True, eq=False)
class PlacedDocuments(Sequence):
    """The documents of a built folder whose images are numbered from `first` on."""

    built: BuiltDocuments
    first: int

    def __len__(self) -> int:
        return len(self.built)

    def __getitem__(self, i: int) -> Document:
        pieces, info = self.built[i]
        segments = [
            Placed(self.first + piece.content, piece.learn)
            if isinstance(piece.content, int)
            else Text(piece.content, piece.learn)
            for piece in pieces
        ]
        return Document(segments, info, self.built.name(i))


def documents_at(path: str, first: int, reading: Reading) -> tuple[TarImages, dict[str, PlacedDocuments], Report]:
    """The images of a built folder, numbered from `first` on, its documents by split; what was left out now."""
    sizes = reading.config.sizes
    images, by_split = load_built_documents(path, sizes, reading.tokenizer)
    lengths = np.array([[reading.positions(size, copy) for copy in (False, reading.copies)] for size in sizes])
    found, report = {}, Report(0)
    for split, documents in by_split.items():
        longer = documents.longer(lengths, images, reading.seq_len - 2)
        report = report.without_all(reading.document_too_long, documents.name, longer)
        found[split] = PlacedDocuments(replace(documents, rows=documents.rows.without(longer)), first)
    return images, found, replace(report, kept=sum(map(len, found.values())))
