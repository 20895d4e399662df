"""Built folders as sources of a run: what has no room in a row is left out, all else stays on disk.

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


def caption_room(size: Size, config: DataConfig, codec: Codec, fmt: Format, seq_len: int) -> int:
    """Tokens that a caption may have beside an image of (height, width) pixels."""
    return seq_len - 2 - image_length(codec.grid(size, fmt.patch_size), fmt, has_copies(config, fmt.codes))


def too_long(seq_len: int) -> str:
    return f"caption and image longer than seq_len = {seq_len}"


def captions_at(
    path: str, config: DataConfig, tokenizer: Tokenizer, codec: Codec, fmt: Format, seq_len: int
) -> tuple[dict[str, Captions], Report]:
    """The captioned images of a built folder, by split; what was left out of it now."""
    rooms = [caption_room(size, config, codec, fmt, seq_len) for size in config.sizes]
    found, report = {}, Report(0)
    for split, all_of in load_built_images(path, config.sizes, tokenizer).items():
        fitting, out, less = keep_fitting(all_of, rooms)
        found[split] = Captions(*fitting)
        report = report.without_all(too_long(seq_len), all_of.names.__getitem__, out)
        report = report.without_all("a caption of several, too long", all_of.names.__getitem__, less)
    return found, replace(report, kept=sum(map(len, found.values())))


def text_at(path: str, name: str, tokenizer: Tokenizer) -> tuple[Stream, list[str], Report]:
    """The text of a built folder, some of what is held out, and how much there is."""
    ids, held_out, counts = load_built_text(path, tokenizer)
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


def documents_at(
    path: str, first: int, config: DataConfig, tokenizer: Tokenizer, codec: Codec, fmt: Format, seq_len: int
) -> tuple[TarImages, dict[str, PlacedDocuments], Report]:
    """The images of a built folder, numbered from `first` on, its documents by split; what was left out now."""
    images, by_split = load_built_documents(path, config.sizes, tokenizer)
    grids = [codec.grid(size, fmt.patch_size) for size in config.sizes]
    copies = (False, has_copies(config, fmt.codes))
    lengths = np.array([[image_length(grid, fmt, copy) for copy in copies] for grid in grids])
    found, report = {}, Report(0)
    for split, documents in by_split.items():
        longer = documents.longer(lengths, images, seq_len - 2)
        report = report.without_all(f"document longer than seq_len = {seq_len}", documents.name, longer)
        found[split] = PlacedDocuments(replace(documents, rows=documents.rows.without(longer)), first)
    return images, found, replace(report, kept=sum(map(len, found.values())))
