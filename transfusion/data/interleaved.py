"""Documents with images anywhere, in memory: a folder with one or more documents.jsonl beside the images. One a line:

    {"segments": ["a cat and", {"image": "a/cat.png"}, {"text": "make it green", "learn": false}, {"image": "b.png"}]}

A segment is a text or an image file, named from where the documents.jsonl lies. Where "learn" is false, a text is no
target, and an image is given clean and has no diffusion loss. A line may say its "split", train or held_out; where no
line of a file does, about 2 % are held out by a hash of what they say. Any other key is kept as `info`.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.data.images import Size, beside, decode, held_out, list_files
from transfusion.data.jsonl import read_jsonl
from transfusion.data.report import Report
from transfusion.data.split import default_split

DOCUMENTS = "documents.jsonl"
SPLITS = ("train", "held_out")
SCHEMA = (
    f'a folder with a {DOCUMENTS} of lines {{"segments": ["a text", {{"image": "beside/it.png"}}, '
    '{"text": "a text that is only read", "learn": false}]}'
)


@dataclass(frozen=True)
class TextSegment:
    """A text; without `learn` it is read, and no target."""

    text: str
    learn: bool = True


@dataclass(frozen=True)
class ImageSegment:
    """An image, by its name in the set; without `learn` it is given clean, and not to be drawn."""

    image: str
    learn: bool = True


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class DocumentSet:
    """n documents and, each once, the images that they name; `split` is train or held_out."""

    name: str  # the path it was loaded by
    images: dict[str, np.ndarray]  # file name within the folder -> [h, w, 3] uint8
    documents: list[list[Segment]]
    split: np.ndarray  # [n] str
    ids: list[str]  # file and line
    info: list[dict[str, Any]]  # of each document: the keys of its line that say nothing to the model

    def __len__(self) -> int:
        return len(self.ids)


def load_documents(path: str, sizes: Sequence[Size]) -> tuple[DocumentSet, Report]:
    """(documents with images of these sizes, what was skipped); ValueError where nothing usable is found."""
    files = list_files(path, SCHEMA)
    skipped: dict[str, list[str]] = defaultdict(list)
    read = list(read_lines(files, skipped))
    wanted = dict.fromkeys(name for document, *_ in read for name in image_names(document))
    decoded = {name: decode(files[name], sizes) if name in files else "missing image file" for name in wanted}
    documents, splits, ids, info = [], [], [], []
    for document, split, place, extra in read:
        broken = next((name for name in image_names(document) if isinstance(decoded[name], str)), None)
        if broken:
            skipped[decoded[broken]].append(f"{place} {broken}")
            continue
        documents.append(document)
        splits.append(split)
        ids.append(place)
        info.append(extra)
    report = Report(len(ids), dict(skipped))
    if not ids:
        raise ValueError(f"no document in {path} ({len(files)} files): give {SCHEMA}\n{report.summary()}")
    images = {name: decoded[name] for document in documents for name in image_names(document)}
    return DocumentSet(path, images, documents, drawn_splits(documents, splits), ids, info), report


def image_names(document: Sequence[Segment]) -> list[str]:
    return [segment.image for segment in document if isinstance(segment, ImageSegment)]


def read_lines(
    files: dict[str, Path], skipped: dict[str, list[str]]
) -> Iterator[tuple[list[Segment], str, str, dict[str, Any]]]:
    """(document, its split or "" where its file has none, file and line, info); problems go into `skipped`."""
    for name in [name for name in files if Path(name).name == DOCUMENTS]:
        records = list(read_jsonl(files[name]))
        default = default_split(record for _, record in records)
        for number, record in records:
            place = f"{name}:{number}"
            document = f"document {record}" if isinstance(record, str) else read_document(record, name)
            if isinstance(document, str):
                skipped[document].append(place)
            else:
                extra = {key: value for key, value in record.items() if key not in ("segments", "split")}
                yield document, record.get("split", default), place, extra


def read_document(record: dict[str, Any], name: str) -> list[Segment] | str:
    """The segments of a line of the file `name`, without texts of no letter; or what is wrong with the line."""
    if not isinstance(record.get("segments"), list):
        return 'document without a list of "segments"'
    if record.get("split", "train") not in SPLITS:
        return f"document whose split is not {' or '.join(SPLITS)}"
    document = []
    for raw in record["segments"]:
        segment = read_segment({"text": raw} if isinstance(raw, str) else raw, name)
        if isinstance(segment, str):
            return segment
        if segment != TextSegment("", segment.learn):
            document.append(segment)
    if all(isinstance(segment, TextSegment) and not segment.text.strip() for segment in document):
        return "empty document"
    if not any(segment.learn for segment in document):
        return "document in which nothing is learned"
    return document


def read_segment(raw: Any, name: str) -> Segment | str:
    """The segment, its image named within the folder; or what is wrong with it."""
    if not isinstance(raw, dict) or ("text" in raw) == ("image" in raw):
        return "segment that is not either a text or an image"
    kind = "text" if "text" in raw else "image"
    if set(raw) - {kind, "learn"}:
        return 'segment with a key other than "text" or "image", and "learn"'
    if not isinstance(raw[kind], str):
        return f"segment whose {kind} is not a string"
    learn = raw.get("learn", True)
    if not isinstance(learn, bool):
        return 'segment whose "learn" is not true or false'
    return TextSegment(raw[kind], learn) if kind == "text" else ImageSegment(beside(name, raw[kind]), learn)


def drawn_splits(documents: list[list[Segment]], splits: list[str]) -> np.ndarray:
    """[n] str: the splits given, and for "" one by a hash of the content, so that new documents move no old one."""
    split = np.array(splits, f"<U{max(map(len, SPLITS))}")
    free = np.flatnonzero(split == "")
    split[free] = np.where(held_out([said(documents[i]) for i in free]), "held_out", "train")
    return split


def said(document: list[Segment]) -> str:
    """All that a document says, in one text: what its split is drawn by."""
    return json.dumps([[type(s).__name__, *astuple(s)] for s in document])
