"""Bytes by address: files of this machine, and whatever fsspec reads elsewhere.

    /data/00000.tar   file:///data/00000.tar          read by the system
    s3://bucket/00000.tar   gs://...   https://...    read by fsspec, which wants pip install 'transfusion[remote]'
                                                      and a package of the scheme's own, such as s3fs

Each package raises errors of its own (botocore's, aiohttp's): here they all become OSError. A read of `read_spans` that
fails is a word in the answer, not an exception: one image that cannot be had ends no run.
"""

import io
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

UNREADABLE = "file that cannot be read"  # what an answer of read_spans begins with; the reason follows
SHORT = "file that ends too early"
PAUSES = (0.5, 2.0, 8.0)  # seconds before what a store did not give is asked for again
FOR_GOOD = (FileNotFoundError, PermissionError)  # a store that says so is not asked again
MOST = 200  # letters of a reason
MARKS = (  # under which stores say that a file is another one: the first that is there counts
    *("ETag", "etag", "md5Hash", "sha", "blob_id"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated", "created"),
)


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


def why(error: BaseException) -> str:
    """What went wrong, in one line of bounded length."""
    kind = "" if type(error) is OSError else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:MOST]


@contextmanager
def as_os_error() -> Iterator[None]:
    """Whatever the package of a store raises comes out as OSError."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(why(error)) from error


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path within it); ValueError where fsspec or the scheme's package is missing."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"to read {url}: pip install 'transfusion[remote]'") from None
    try:
        return url_to_fs(url)  # anew each time: fsspec keeps one a process, which a fork must not share
    except (ImportError, ValueError) as error:  # it names the package, or the schemes that it knows
        raise ValueError(f"to read {url}: {error}") from None
    except Exception as error:  # such as credentials that are not there
        raise OSError(why(error)) from error


class Elsewhere(io.RawIOBase):
    """A file of fsspec, read from anywhere; whatever goes wrong is an OSError."""

    def __init__(self, file: Any):
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with as_os_error():
            return self.file.seek(offset, whence)

    def readinto(self, buffer) -> int:
        with as_os_error():
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self):
        if not self.closed:
            super().close()
            with as_os_error():
                self.file.close()


def open_url(url: str) -> BinaryIO:
    """The file, to be read from its beginning, or from anywhere; OSError where it cannot be, or while it is read."""
    if not is_remote(url):
        with as_os_error():  # of a name that no file can have too
            return local(url).open("rb")
    fs, path = filesystem(url)
    with as_os_error():
        return io.BufferedReader(Elsewhere(fs.open(path, "rb")))


def stamp(url: str) -> Stamp:
    """OSError where there is no such file."""
    if not is_remote(url):
        return stamp_of(local(url))
    fs, path = filesystem(url)
    with as_os_error():
        return stamp_in(fs.info(path))


def stamp_of(file: Path) -> Stamp:
    """That of a file of this machine."""
    found = file.stat()
    return Stamp(found.st_size, str(found.st_mtime_ns))


def stamp_in(info: dict[str, Any]) -> Stamp:
    """That of a file of which a store said this: by a listing the same as alone."""
    mark = next((info[name] for name in MARKS if info.get(name)), "")
    return Stamp(info.get("size") or 0, str(mark.timestamp() if isinstance(mark, datetime) else mark))


def has_size(folder: Path, url: str, size: int) -> bool:
    """Whether a file, named from a folder or whole, has so many bytes; of one elsewhere that is taken for granted."""
    path = folder / url.removeprefix("file://")  # a whole path stays what it is
    return is_remote(url) or (path.is_file() and path.stat().st_size == size)


def names_below(root: Path) -> list[str]:
    """The files of a folder of this machine, as names within it, sorted, sub-folders included, hidden ones left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def stamps_below(url: str) -> dict[str, Stamp]:
    """The same files with their stamps, of a folder anywhere; OSError where a store does not list it."""
    if not is_remote(url):
        return {name: stamp_or_none(local(url) / name) for name in names_below(local(url))}
    fs, root = filesystem(url)
    with as_os_error():  # one request for many files, instead of one each
        found = {path.removeprefix(root).lstrip("/"): info for path, info in fs.find(root, detail=True).items()}
    return {
        name: stamp_in(info) for name, info in sorted(found.items()) if not name.startswith(".") and "/." not in name
    }


def stamp_or_none(file: Path) -> Stamp:
    """That of a link into nowhere too."""
    try:
        return stamp_of(file)
    except OSError:
        return Stamp(0, "")


def read_spans(spans: Sequence[Span]) -> list[bytes | str]:
    """The bytes of each, or why they cannot be had: files of this machine one by one, of another all at once."""
    found: list[bytes | str] = [UNREADABLE] * len(spans)
    of_url: dict[str, list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        of_url[span.url].append(i)
    of_store: dict[Any, list[int]] = defaultdict(list)  # of some schemes each host is one of its own
    for url, numbers in of_url.items():
        if is_remote(url):
            try:
                of_store[filesystem(url)[0]] += numbers
            except OSError as error:
                for i in numbers:
                    found[i] = unreadable(error)
        else:
            for i, answer in zip(numbers, read_here([spans[i] for i in numbers])):
                found[i] = answer
    for fs, numbers in of_store.items():
        for i, answer in zip(numbers, read_there(fs, [spans[i] for i in numbers])):
            found[i] = answer
    return found


def read_here(spans: list[Span]) -> list[bytes | str]:
    """The same of a file of this machine."""
    try:
        with as_os_error():
            file = os.open(local(spans[0].url), os.O_RDONLY)
    except OSError as error:
        return [unreadable(error)] * len(spans)
    try:
        return [pread(file, span) for span in spans]
    finally:
        os.close(file)


def pread(file: int, span: Span) -> bytes | str:
    try:
        return whole(os.pread(file, span.size, span.offset), span)
    except OSError as error:
        return unreadable(error)


def read_there(fs: Any, spans: list[Span]) -> list[bytes | str]:
    """The same of one store, which is asked again for what it did not give, or not whole."""
    found = ask(fs, spans)
    for pause in PAUSES:
        again = [i for i, one in enumerate(found) if not isinstance(one, FOR_GOOD) and not is_whole(one, spans[i])]
        if not again:
            break
        time.sleep(pause)
        for i, one in zip(again, ask(fs, [spans[i] for i in again])):
            found[i] = one
    return [unreadable(one) if isinstance(one, Exception) else whole(one, span) for one, span in zip(found, spans)]


def ask(fs: Any, spans: list[Span]) -> list[bytes | Exception]:
    """What a store answers."""
    starts, ends = [span.offset for span in spans], [span.offset + span.size for span in spans]
    try:
        answers = fs.cat_ranges([fs._strip_protocol(span.url) for span in spans], starts, ends, on_error="return")
    except Exception as error:  # of whatever package reads the scheme
        return [error] * len(spans)
    return [one if isinstance(one, Exception) else bytes(one) for one in answers]


def unreadable(error: Exception) -> str:
    return f"{UNREADABLE}: {why(error)}"


def whole(data: bytes, span: Span) -> bytes | str:
    return data if is_whole(data, span) else SHORT


def is_whole(answer: bytes | Exception, span: Span) -> bool:
    return not isinstance(answer, Exception) and len(answer) == span.size
