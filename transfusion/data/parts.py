"""What is built of one shard: a folder of arrays, there whole or not at all. All in it begins at 0; `build.py` joins.

images      images     a record an image (`IMAGE`)        starts, ids    caption j is ids[starts[j]:starts[j+1]]
            letters    all names, in UTF-8                choice         hash and split of each image
documents   the same of their images and the texts of their segments, letters of infos, as JSON, too, and
            documents  a record each (`DOCUMENT`)         segments       a record each (`SEGMENT`)
            choice     of each document
text        ids        each document closed by <eos>      starts, choice of each document
            held_out.jsonl     texts that may be held out, as many as are kept
all         part.json  counts, tars                       skipped.jsonl  [reason, name] of what is left out
"""

import errno
import heapq
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transfusion.data import images, interleaved
from transfusion.data.images import measure
from transfusion.data.interleaved import ImageSegment, said
from transfusion.data.mapped import FORMAT, Growing, publish
from transfusion.data.rows import Columns, Left
from transfusion.data.samples import documents, image_samples, texts
from transfusion.data.shards import Shard
from transfusion.data.split import hash_of
from transfusion.data.storage import has_size, stamp, why
from transfusion.data.tars import Picture, TarWriter
from transfusion.data.text import HELD_OUT_SHARE
from transfusion.tokenizer import Tokenizer, load_tokenizer

IMAGE = np.dtype(
    [
        ("tar", "<u4"),  # which of dataset.json's
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("crc", "<u4"),
        ("height", "<u4"),  # upright, as the file has it
        ("width", "<u4"),
        ("first", "<u8"),  # caption
        ("captions", "<u2"),  # how many
        ("name", "<u8"),  # where it begins in letters
        ("letters", "<u2"),  # its length there
    ]
)
DOCUMENT = np.dtype(
    [
        ("first", "<u8"),  # segment
        ("segments", "<u4"),
        ("name", "<u8"),
        ("letters", "<u2"),
        ("info", "<u8"),
        ("info_letters", "<u4"),
    ]
)
SEGMENT = np.dtype([("image", "u1"), ("learn", "u1"), ("number", "<u8")])  # of the image, or of the text
CHOICE = np.dtype([("hash", "<u8"), ("split", "u1")])  # 0 = by the hash, k = the k-th of its kind's splits
SPLITS = {"images": images.SPLITS, "documents": interleaved.SPLITS, "text": ("train", "held_out")}
PACKED = "shards/"  # where tars of loose images lie, within the built folder, which may be moved
KEPT = 1000  # held-out documents of text that are kept as text
UNREADABLE_SHARD = "shard that cannot be read"
AT_ONCE = 1 << 20  # characters that are tokenised together


class Recipe(NamedTuple):
    """All that a part follows from, besides its shard."""

    kind: str
    out: Path
    tokenizer: str  # path; "" = the shipped one
    columns: Columns


@lru_cache(maxsize=1)
def tokenizer_at(path: str) -> Tokenizer:
    return load_tokenizer(path)


@lru_cache(maxsize=1)
def tokenizer_key(path: str) -> str:
    return tokenizer_at(path).key


def id_type(tokenizer: Tokenizer) -> str:
    """The smallest that holds every id."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


class Tokens:
    """The ids of one text after another, and where each begins; closed by `with`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, closed: bool):
        self.tokenizer, self.end = tokenizer, [tokenizer.special.eos] if closed else []
        self.ids, self.starts = Growing(folder / "ids.npy", id_type(tokenizer)), Growing(folder / "starts.npy", "<u8")
        self.starts.append([0])
        self.waiting: list[str] = []
        self.n = self.characters = 0

    def add(self, text: str) -> int:
        """The text's number."""
        self.waiting.append(text)
        self.n, self.characters = self.n + 1, self.characters + len(text)
        if self.characters >= AT_ONCE:
            self.flush()
        return self.n - 1

    def flush(self):
        coded = [[*ids, *self.end] for ids in self.tokenizer.encode_many(self.waiting)]
        ends = np.cumsum([len(ids) for ids in coded], dtype=np.uint64) + np.uint64(self.ids.n)
        self.ids.append(np.array([i for ids in coded for i in ids], self.ids.dtype))
        self.starts.append(ends)
        self.waiting, self.characters = [], 0

    def __enter__(self) -> "Tokens":
        return self

    def __exit__(self, *error):
        self.flush()
        self.ids.__exit__(*error)
        self.starts.__exit__(*error)


class Letters:
    """Strings, one behind the other, in UTF-8; closed by `with`."""

    def __init__(self, folder: Path):
        self.file = Growing(folder / "letters.npy", "u1")

    def add(self, text: str, most: int) -> tuple[int, int]:
        """(where it begins, how long it is): at most so many bytes."""
        data = text.encode()[:most]
        self.file.append(np.frombuffer(data, np.uint8))
        return self.file.n - len(data), len(data)

    def __enter__(self) -> "Letters":
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)


class Records:
    """Records that come one at a time; closed by `with`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.file, self.waiting, self.n = Growing(folder / f"{name}.npy", dtype), [], 0

    def add(self, *values: int) -> int:
        """The record's number."""
        self.waiting.append(values)
        self.n += 1
        if len(self.waiting) == 4096:
            self.flush()
        return self.n - 1

    def flush(self):
        self.file.append(np.array(self.waiting, self.file.dtype))
        self.waiting = []

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error):
        self.flush()
        self.file.__exit__(*error)


class Skipped:
    """What is left out, named in a file and counted."""

    def __init__(self, folder: Path):
        self.file, self.counts = (folder / "skipped.jsonl").open("w", encoding="utf-8"), Counter()

    def kept(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items that are not left out."""
        for item in items:
            if isinstance(item, Left):
                self.counts[item.reason] += 1
                self.file.write(json.dumps(item) + "\n")
            else:
                yield item

    def __enter__(self) -> "Skipped":
        return self

    def __exit__(self, *error):
        self.file.close()


def folder_of(shard: Shard, recipe: Recipe) -> Path:
    """Where the shard's part lies: a part of another format, tokenizer, or of other columns, lies elsewhere."""
    key = hash_of(repr((FORMAT, tokenizer_key(recipe.tokenizer), *recipe.columns)))
    return recipe.out / "parts" / f"{shard.key}-{key:016x}"


def make_part(shard: Shard, recipe: Recipe) -> dict[str, Any] | str:
    """The part.json of a shard, made now unless it is there; or why the shard cannot be read, for now."""
    folder = folder_of(shard, recipe)
    if not is_whole(folder, recipe):
        new = folder.with_name(f".{os.getpid()}-{folder.name}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            with Skipped(new) as skipped:
                found = PARTS[recipe.kind](shard, recipe, new, skipped)
            (new / "part.json").write_text(json.dumps({**found, "skipped": dict(skipped.counts)}))
            if is_whole(folder, recipe):  # made meanwhile, after a kill that this process outlived
                shutil.rmtree(new)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                publish(new, folder)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # here, not there
                raise
            return f"{UNREADABLE_SHARD}: {why(error)}"
    return json.loads((folder / "part.json").read_text())


def is_whole(folder: Path, recipe: Recipe) -> bool:
    """Whether the part is there, and the tars that it points into."""
    file = folder / "part.json"
    return file.is_file() and all(has_size(recipe.out, *tar) for tar in json.loads(file.read_text())["tars"])


def image_record(tar: int, picture: Picture, first: int, captions: int, name: tuple[int, int]) -> tuple[int, ...]:
    return (tar, picture.offset, picture.bytes, picture.crc, picture.height, picture.width, first, captions, *name)


def image_part(shard: Shard, recipe: Recipe, folder: Path, skipped: Skipped) -> dict[str, Any]:
    tokenizer = tokenizer_at(recipe.tokenizer)
    with ExitStack() as files:
        tokens = files.enter_context(Tokens(folder, tokenizer, closed=False))
        letters, table, choice = (
            files.enter_context(x)
            for x in (Letters(folder), Records(folder, "images", IMAGE), Records(folder, "choice", CHOICE))
        )
        pack = None if shard.form == "tar" else files.enter_context(Pack(shard, recipe))
        for sample in skipped.kept(image_samples(shard, recipe.columns, measure, pack and pack.tar)):
            first = tokens.n
            for caption in sample.captions[: 2**16 - 1]:
                tokens.add(caption)
            count, name = tokens.n - first, letters.add(sample.name, 2**16 - 1)
            table.add(*image_record(0, sample.picture, first, count, name))
            split = SPLITS["images"].index(sample.split) + 1 if sample.split else 0
            choice.add(hash_of(sample.name), split)
    tars = [[shard.url, shard.bytes]] if pack is None else pack.kept()
    return {"samples": table.n, "tars": tars}


def document_part(shard: Shard, recipe: Recipe, folder: Path, skipped: Skipped) -> dict[str, Any]:
    tokenizer, number, tars = tokenizer_at(recipe.tokenizer), {}, {}
    with ExitStack() as files:
        tokens = files.enter_context(Tokens(folder, tokenizer, closed=False))
        letters, table, told, segments, choice = (
            files.enter_context(x)
            for x in (
                Letters(folder),
                Records(folder, "images", IMAGE),
                Records(folder, "documents", DOCUMENT),
                Records(folder, "segments", SEGMENT),
                Records(folder, "choice", CHOICE),
            )
        )
        pack = files.enter_context(Pack(shard, recipe))
        for document in skipped.kept(documents(shard, measure, pack.tar)):
            first, located = segments.n, iter(document.images)
            for segment in document.segments:
                if not isinstance(segment, ImageSegment):
                    segments.add(0, segment.learn, tokens.add(segment.text))
                    continue
                image = next(located)
                if image not in number:
                    tar = tars.setdefault(image.url, len(tars))
                    name = letters.add(image.name, 2**16 - 1)
                    number[image] = table.add(*image_record(tar, image.picture, 0, 0, name))
                segments.add(1, segment.learn, number[image])
            name = letters.add(document.name, 2**16 - 1)
            info = letters.add(json.dumps(document.info), 2**32 - 1)
            told.add(first, segments.n - first, *name, *info)
            split = SPLITS["documents"].index(document.split) + 1 if document.split else 0
            choice.add(hash_of(said(document.segments)), split)
    packed = pack.kept()
    return {"samples": told.n, "tars": [[url, stamp(url).bytes] if url else packed[0] for url in tars]}


def text_part(shard: Shard, recipe: Recipe, folder: Path, skipped: Skipped) -> dict[str, Any]:
    tokenizer, limit = tokenizer_at(recipe.tokenizer), int(HELD_OUT_SHARE * 2**64)
    longest, lowest = 0, 2**64
    kept: list[tuple[int, int, str]] = []  # a heap, the highest hash first: the lowest stay
    with Tokens(folder, tokenizer, closed=True) as tokens, Records(folder, "choice", CHOICE) as choice:
        for _, text in skipped.kept(texts(shard, recipe.columns.text)):
            longest, code = max(longest, len(text)), hash_of(text)
            choice.add(code, 0)
            number = tokens.add(text)
            if code <= limit or code < lowest:  # the lowest of all is held out, wherever it lies
                heapq.heappush(kept, (-code, number, text))
                if len(kept) > KEPT:
                    heapq.heappop(kept)
            lowest = min(lowest, code)
    lines = [{"hash": -code, "number": number, "text": text} for code, number, text in kept]
    lines = [json.dumps(line) for line in sorted(lines, key=lambda line: line["number"])]
    (folder / "held_out.jsonl").write_text("".join(line + "\n" for line in lines))
    return {"samples": tokens.n, "tars": [], "longest": longest}


PARTS = {"images": image_part, "documents": document_part, "text": text_part}


class Pack:
    """The tar that a shard's loose images are put into, FOLDER/shards/....tar: whole or absent. Closed by `with`."""

    def __init__(self, shard: Shard, recipe: Recipe):
        key = hash_of(repr(recipe.columns))
        self.url = f"{PACKED}{shard.key}-{key:016x}.tar"
        self.file = recipe.out / self.url
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.new = self.file.with_name(f".{os.getpid()}-{self.file.name}")
        self.tar = TarWriter(self.new)

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, failed, *error):
        self.tar.__exit__()
        if failed is None and self.tar.n:
            publish(self.new, self.file)
        else:
            self.new.unlink()

    def kept(self) -> list[list[Any]]:
        """Its address and bytes, where anything was put into it."""
        return [[self.url, self.file.stat().st_size]] if self.tar.n else []
