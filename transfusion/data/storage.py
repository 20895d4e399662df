"""Bytes by address: files of this machine, and whatever fsspec reads elsewhere.

    /data/00000.tar   file:///data/00000.tar          read by the system
    s3://bucket/00000.tar   gs://...   https://...    read by fsspec, which wants pip install 'transfusion[remote]'
                                                      and a package of the scheme's own, such as s3fs

A read that fails is a word in the answer, not an exception: one image that cannot be had ends no run.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

UNREADABLE = "file that cannot be read"
SHORT = "file that ends too early"


class Span(NamedTuple):
    """Some bytes of a file."""

    url: str
    offset: int
    size: int


class Stamp(NamedTuple):
    """What a file is known again by."""

    bytes: int
    version: str  # changes when the file does: the time of the last change, or what the store keeps


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def local(url: str) -> Path:
    """The path of an address of this machine, whole."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def absolute(url: str) -> str:
    """The address as it can be written down: a path of this machine whole, any other as it is."""
    return url if is_remote(url) else str(local(url))


def join(folder: str, name: str) -> str:
    """The address of a name below a folder; an address stays what it is."""
    return name if "://" in name or os.path.isabs(name) else f"{folder.rstrip('/')}/{name}"


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path within it); ValueError where fsspec or the scheme's package is missing."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"to read {url}: pip install 'transfusion[remote]'") from None
    try:
        return url_to_fs(url)  # anew each time: fsspec keeps one a process, which a fork must not share
    except ImportError as error:  # it names the package
        raise ValueError(f"to read {url}: {error}") from None


def open_url(url: str) -> BinaryIO:
    """The file, to be read from its beginning, or from anywhere; OSError where it cannot be."""
    if not is_remote(url):
        return local(url).open("rb")
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def stamp(url: str) -> Stamp:
    """OSError where there is no such file."""
    if not is_remote(url):
        found = local(url).stat()
        return Stamp(found.st_size, str(found.st_mtime_ns))
    fs, path = filesystem(url)
    return Stamp(fs.size(path) or 0, str(fs.ukey(path)))


def has_size(folder: Path, url: str, size: int) -> bool:
    """Whether a file, named from a folder or whole, has so many bytes; of one elsewhere that is taken for granted."""
    path = folder / url.removeprefix("file://")  # a whole path stays what it is
    return is_remote(url) or (path.is_file() and path.stat().st_size == size)


def names_below(url: str) -> list[str]:
    """The files of a folder, as names within it, sorted, sub-folders included, hidden ones left out."""
    if is_remote(url):
        fs, root = filesystem(url)
        names = [path.removeprefix(root).lstrip("/") for path in fs.find(root)]
    else:
        root = local(url)
        names = [Path(at, name).relative_to(root).as_posix() for at, _, found in os.walk(root) for name in found]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def read_spans(spans: Sequence[Span]) -> list[bytes | str]:
    """The bytes of each, or why they cannot be had: files of this machine one by one, of another all at once."""
    found: list[bytes | str] = [UNREADABLE] * len(spans)
    of_file: dict[str, list[int]] = defaultdict(list)
    of_scheme: dict[str, list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        remote = is_remote(span.url)
        (of_scheme if remote else of_file)[span.url.partition("://")[0] if remote else span.url].append(i)
    for url, numbers in of_file.items():
        try:
            file = os.open(local(url), os.O_RDONLY)
        except OSError:
            continue
        try:
            for i in numbers:
                found[i] = whole(os.pread(file, spans[i].size, spans[i].offset), spans[i])
        except OSError:
            pass  # what was not read stays unreadable
        finally:
            os.close(file)
    for numbers in of_scheme.values():
        fs, _ = filesystem(spans[numbers[0]].url)
        paths = [fs._strip_protocol(spans[i].url) for i in numbers]
        starts, ends = ([spans[i].offset for i in numbers], [spans[i].offset + spans[i].size for i in numbers])
        try:
            answers = fs.cat_ranges(paths, starts, ends, on_error="return")
        except Exception:  # of whatever package reads the scheme
            continue
        for i, answer in zip(numbers, answers):
            if isinstance(answer, bytes | bytearray | memoryview):
                found[i] = whole(bytes(answer), spans[i])
    return found


def whole(data: bytes, span: Span) -> bytes | str:
    return data if len(data) == span.size else SHORT
