"""What is in a shard, one thing at a time, judged: captioned images, texts, documents; or why something is left out.

    shard  ->  Sample | Left        images: of a tar as they lie, of any other form put into a new tar
    shard  ->  (name, text) | Left  text
    shard  ->  Told | Left          documents: segments, and their images by number in a table of `Located`

`check.py` counts these, `parts.py` writes them down: there is one reading of what is usable.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from transfusion.data.images import SUFFIXES, list_files, read_captions
from transfusion.data.interleaved import Segment, beside, image_names, read_document
from transfusion.data.jsonl import parse_lines
from transfusion.data.rows import Columns, Left, hf_rows, json_rows, parquet_rows
from transfusion.data.shards import HF, REMEDIES, Shard
from transfusion.data.split import default_split
from transfusion.data.storage import (
    FOR_GOOD,
    UNREADABLE,
    Span,
    is_remote,
    join,
    local,
    names_below,
    open_url,
    read_spans,
)
from transfusion.data.tars import Look, Picture, Sample, TarWriter, clean, find_members, picture_of, read_samples
from transfusion.data.text import read_texts


class Loose(NamedTuple):
    """A captioned image that is in no tar yet."""

    name: str
    data: bytes
    captions: list[str]
    split: str = ""


def image_samples(shard: Shard, columns: Columns, look: Look, pack: TarWriter | None) -> Iterator[Sample | Left]:
    """The captioned images of a shard; those of no tar are put into `pack`, where there is one."""
    if shard.form == "tar":
        yield from read_samples(shard.url, shard.name, look)
        return
    for loose in folder_images(shard.url) if shard.form == "folder" else row_images(shard, columns):
        if isinstance(loose, Left):
            yield loose
            continue
        picture = picture_of(loose.data, 0, look)
        if isinstance(picture, str):
            yield Left(picture, loose.name)
            continue
        if pack:
            picture = picture._replace(offset=pack.add(loose.data, loose.captions))
        yield Sample(loose.name, picture, loose.captions, loose.split)


def folder_images(url: str) -> Iterator[Loose | Left]:
    """Those of a folder, as `images.py` reads it."""
    files = list_files(url, REMEDIES["images"])
    skipped: dict[str, list[str]] = defaultdict(list)
    captions, splits = read_captions(files, skipped)
    yield from (Left(reason, name) for reason, names in skipped.items() for name in names)
    for name, file in files.items():
        if name not in captions and not name.lower().endswith(SUFFIXES):
            continue
        if not captions.get(name):
            yield Left("no caption", name)
            continue
        try:
            yield Loose(name, file.read_bytes(), captions[name], splits.get(name, ""))
        except OSError:
            yield Left(UNREADABLE, name)


def rows_of(shard: Shard, columns: list[str], rest: bool = False) -> Iterator[tuple[str, dict | Left]]:
    """The rows of a table, of these columns or with the rest too, or of JSON lines; by name."""
    if shard.form == "hf":
        return hf_rows(shard.url.removeprefix(HF), shard.part, shard.parts, columns, rest)
    if shard.form == "parquet":
        return parquet_rows(shard.url, shard.name, columns, rest)
    return json_rows(shard.url, shard.name)


def row_images(shard: Shard, columns: Columns) -> Iterator[Loose | Left]:
    """Those of a table."""
    for place, row in rows_of(shard, list(columns)):
        if isinstance(row, Left):
            yield row
            continue
        text = row[columns.text]
        captions = clean(text if isinstance(text, list) else [text])
        data = cell_bytes(row[columns.image], shard.root)
        if isinstance(data, str):
            yield Left(data, place)
        elif not captions:
            yield Left("no caption", place)
        else:
            yield Loose(place, data, captions)


def cell_bytes(cell: Any, root: str) -> bytes | str:
    """The image file of a table's cell: bytes, a name, or a dict of one of them; or why it cannot be had."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and root != HF:
        url = join(root, cell)
        try:
            with open_url(url) as file:
                return file.read()
        except OSError as error:
            return absent("missing image file", url, error)
    return cell if isinstance(cell, bytes) else "row without an image"


def absent(reason: str, url: str, error: OSError) -> str:
    """The reason, for a file that is not there; else, as a store may have failed for a moment only, the error again."""
    if is_remote(url) and not isinstance(error, FOR_GOOD):
        raise error
    return reason


def texts(shard: Shard, column: str) -> Iterator[tuple[str, str] | Left]:
    """(name, text) of each document of a shard."""
    if shard.form == "txt":
        root = local(shard.url)
        files = [root / name for name in names_below(root)] if root.is_dir() else [root]
        found = (item for file in files if file.suffix.lower() == ".txt" for item in read_texts(file))
    else:
        found = (text_of(place, row, column) for place, row in rows_of(shard, [column]))
    for name, text, problem in found:
        problem = problem or ("" if text.strip() else "empty document")
        yield Left(problem, name) if problem else (name, text)


def text_of(place: str, row: dict | Left, column: str) -> tuple[str, str, str]:
    """(name, text, problem or "")."""
    if isinstance(row, Left):
        return row.name, "", row.reason
    text = row.get(column)
    return (place, text, "") if isinstance(text, str) else (place, "", f'line without "{column}"')


class Located(NamedTuple):
    """An image of a document."""

    name: str
    url: str  # of the tar that it is in; "" = the new one
    picture: Picture


class Told(NamedTuple):
    """A document."""

    name: str  # file and line
    segments: list[Segment]
    images: list[Located]  # of its ImageSegments, in their order
    split: str  # "" = drawn by what it says
    info: dict[str, Any]


class Gallery:
    """The images that the documents of a shard name, each looked at once: members of tars, loose files, given bytes."""

    def __init__(self, root: str, look: Look, pack: TarWriter | None):
        self.root, self.look, self.pack = root, look, pack
        self.known: dict[str, Located | str] = {}
        self.tars: dict[str, dict[str, tuple[int, int]]] = {}

    def find(self, name: str, given: bytes | None) -> Located | str:
        """The image of that name below the root, or the one that is `given`; or why it cannot be had."""
        if name not in self.known:
            self.known[name] = self.locate(name, given)
        return self.known[name]

    def locate(self, name: str, given: bytes | None) -> Located | str:
        tar, inside, member = name.partition(".tar/")
        if inside and given is None:
            url = join(self.root, tar + ".tar")
            if url not in self.tars:
                try:
                    self.tars[url] = find_members(url)
                except OSError as error:
                    return absent("missing tar", url, error)
            if member not in self.tars[url]:
                return "missing image file"
            offset, size = self.tars[url][member]
            (data,) = read_spans([Span(url, offset, size)])
            if isinstance(data, str) and data.startswith(UNREADABLE):
                raise OSError(data)
            found = data if isinstance(data, str) else picture_of(data, offset, self.look)
            return found if isinstance(found, str) else Located(name, url, found)
        data = "missing image file" if name.startswith(("/", "../")) else cell_bytes(given or name, self.root)
        found = data if isinstance(data, str) else picture_of(data, 0, self.look)
        if isinstance(found, str):
            return found
        return Located(name, "", found._replace(offset=self.pack.add(data)) if self.pack else found)


def documents(shard: Shard, look: Look, pack: TarWriter | None) -> Iterator[Told | Left]:
    """The documents of a shard; images of no tar are put into `pack`, where there is one."""
    gallery = Gallery(shard.root, look, pack)
    default = default_split(row for _, row in rows_of(shard, [])) if shard.form == "jsonl" else ""
    for place, row in rows_of(shard, ["segments"], rest=True):
        if isinstance(row, Left):
            yield row._replace(reason=f"document {row.reason}")
            continue
        row, given = (row, {}) if shard.form == "jsonl" else plain_row(row, place, shard.name)
        segments = read_document(row, shard.name)
        if isinstance(segments, str):
            yield Left(segments, place)
            continue
        images = {name: gallery.find(name, given.get(name)) for name in image_names(segments)}
        broken = next((name for name, image in images.items() if isinstance(image, str)), None)
        if broken is not None:
            yield Left(images[broken], f"{place} {broken}")
            continue
        info = {key: value for key, value in row.items() if key not in ("segments", "split") and is_json(value)}
        yield Told(place, segments, [images[name] for name in image_names(segments)], row.get("split") or default, info)
        if given:  # their names are this row's own
            for name in given:
                gallery.known.pop(name, None)


def is_json(value: Any) -> bool:
    """Whether JSON can say it: not the bytes of an image, nor a date."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def plain_row(row: dict[str, Any], place: str, file: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A table's row as a line of JSON would say it, without keys of no value; and images that it holds, by name."""
    given, segments, cell = {}, [], row["segments"]
    if isinstance(cell, str):  # a column of JSON
        ((_, line),) = parse_lines([b'{"segments": %s}' % cell.encode()])
        cell = line["segments"] if isinstance(line, dict) else cell
    if not isinstance(cell, list):  # which `read_document` says
        return {"segments": cell}, {}
    for i, raw in enumerate(cell):
        raw = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw
        image = raw.get("image") if isinstance(raw, dict) else None
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
            raw = {**raw, "image": image}
        if isinstance(image, bytes):
            name = f"{place.rpartition('/')[2]}/{i}"
            given[beside(file, name)] = image
            raw = {**raw, "image": name}
        segments.append(raw)
    said = {key: value for key, value in row.items() if value is not None}
    return {**said, "segments": segments, **({"split": row["split"] or "train"} if "split" in row else {})}, given
