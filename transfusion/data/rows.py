"""Rows of JSON lines, Parquet and Hugging Face, one at a time: of any length, with a name to find each again.

lines.jsonl.gz    {"text": "..."}                              lines.jsonl.gz:1, line 1
table.parquet     columns image (bytes, or Hugging Face's      table.parquet:0, row 0
                  {"bytes", "path"}), text (one or a list)
hf:OWNER/NAME     the same columns                             hf:OWNER/NAME[3]:0, row 0 of its part 3
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

from transfusion.data.jsonl import parse_lines
from transfusion.data.storage import as_os_error, open_url, why

BATCH = 64  # rows that are in memory at a time


class Columns(NamedTuple):
    """Names of the columns of a table of images."""

    image: str = "image"
    text: str = "text"


COLUMNS = Columns()


class Left(NamedTuple):
    """What is left out, and why."""

    reason: str
    name: str


def json_rows(url: str, name: str) -> Iterator[tuple[str, dict | Left]]:
    """(file and line from 1, the object or what is wrong with the line)."""
    with open_url(url) as raw:
        lines = gzip.open(raw) if url.lower().endswith(".gz") else raw
        try:
            for number, record in parse_lines(lines):
                place = f"{name}:{number}"
                yield place, Left(record, place) if isinstance(record, str) else record
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield name, Left("compressed file that is broken from somewhere on", name)


def parquet_rows(url: str, name: str, columns: list[str], rest: bool = False) -> Iterator[tuple[str, dict | Left]]:
    """(file and row from 0, the row's columns of these names, or all); ValueError where the file lacks one of these."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"to read {url}: pip install 'transfusion[parquet]'") from None
    with open_url(url) as raw:
        try:
            with parquet.ParquetFile(raw) as table:
                require(columns, table.schema_arrow.names, url)
                batches = table.iter_batches(BATCH, columns=None if rest else columns)
                rows = (row for batch in batches for row in python_rows(batch))
                for number, row in enumerate(rows):
                    place = f"{name}:{number}"
                    yield place, Left("row with a value that is broken", place) if row is None else row
        except pyarrow.ArrowException:
            yield name, Left("table that is broken from somewhere on", name)


def python_rows(batch: Any) -> list[dict | None]:
    """The rows of a batch of Arrow; None for one with a value that Python has not, such as a text that is no UTF-8."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [row for i in range(len(batch)) for row in python_rows(batch.slice(i, 1))] if len(batch) > 1 else [None]


def require(columns: list[str], there: list[str], url: str):
    missing = [name for name in columns if name not in there]
    if missing:
        raise ValueError(
            f"{url} has no column {', '.join(map(repr, missing))}, but {', '.join(map(repr, there))}: "
            "say --image-column and --text-column, or rename it to segments for documents"
        )


def hf_rows(
    name: str, part: int, parts: int, columns: list[str], rest: bool = False
) -> Iterator[tuple[str, dict | Left]]:
    """The same of one part of a data set of Hugging Face, images as bytes."""
    _, rows = open_dataset(name)
    if rows.column_names is not None:
        require(columns, rows.column_names, name)
        rows = rows if rest else rows.select_columns(columns)
    rows = rows.shard(parts, part) if parts > 1 else rows
    rows = iter(rows.decode(False) if rows.features else rows)
    for number in count():
        with as_os_error():
            row = next(rows, None)
        if row is None:
            return
        yield f"hf:{name}[{part}]:{number}", row


def describe(name: str) -> tuple[str, int]:
    """(what the data set is known again by, the parts it comes in); ValueError where it cannot be read."""
    try:
        version, rows = open_dataset(name)
    except OSError as error:
        raise ValueError(f"hf:{name} cannot be read ({why(error)}): give hf:OWNER/NAME:CONFIG@SPLIT") from None
    return version, rows.num_shards


def open_dataset(name: str) -> tuple[str, Any]:
    """(version, rows to stream) of "OWNER/NAME:CONFIG@SPLIT", or of a folder; OSError where it cannot be read."""
    try:
        from datasets import load_dataset, load_dataset_builder
    except ImportError:
        raise ValueError(f"to read hf:{name}: pip install 'transfusion[hf]'") from None
    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    split = split or "train"
    with as_os_error():
        builder = load_dataset_builder(path, config or None)
        files = (builder.config.data_files or {}).get(split)
        version = hashlib.sha256(repr((builder.hash, getattr(files, "origin_metadata", ""))).encode()).hexdigest()[:20]
        return version, load_dataset(path, config or None, split=split, streaming=True)
