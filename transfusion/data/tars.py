"""Tars of captioned images, as WebDataset and img2dataset write them, read where they lie: by offsets, never unpacked.

    00000.tar   000000007.jpg    the image                      -> offset, bytes, checksum, height, width
                000000007.json   {"caption": "a cat"}           -> captions: one or a list of them
                000000007.txt    a cat                          -> captions, one a line, where no .json has any

What belongs together has the same name up to the first dot of its last part. Order does not matter. Of two files of one
name and kind the first stays.
"""

import io
import json
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from transfusion.data.images import SUFFIXES, Size, plain
from transfusion.data.rows import Left
from transfusion.data.storage import open_url

Look = Callable[[bytes], Size | str]  # the (height, width) of an image file, or why it cannot be had
CUT = "tar that ends before its end, or is none"
MORE = "tar with another one behind its end, which is not read: unpack them, and pack them together"
BLOCK = 1 << 20  # bytes that are looked at together


class Picture(NamedTuple):
    """Where the bytes of an image file lie in a tar, and what they hold."""

    offset: int
    bytes: int
    crc: int  # zlib.crc32 of them
    height: int  # upright
    width: int


class Member(NamedTuple):
    """A plain file of a tar."""

    name: str  # as `name_of` has it
    offset: int
    bytes: int


class Sample(NamedTuple):
    """An image with its captions."""

    name: str
    picture: Picture
    captions: list[str]
    split: str = ""  # "" = drawn by the name


def picture_of(data: bytes, offset: int, look: Look) -> Picture | str:
    size = look(data)
    return size if isinstance(size, str) else Picture(offset, len(data), zlib.crc32(data), *size)


def name_of(member: tarfile.TarInfo) -> str:
    """The name that documents call a member by: `tar cf a.tar ./` calls it ./a.jpg."""
    return plain(posixpath.normpath(member.name))


def members(file: BinaryIO) -> Iterator[Member | Left]:
    """The plain files of a tar, hidden ones left out; last, where the tar is cut, that it is."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # it would keep them all
                base = member.name.rpartition("/")[2]
                if member.isfile() and not member.issparse() and not base.startswith("."):
                    yield Member(name_of(member), member.offset_data, member.size)
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE) or b"cut"):
                yield Left(CUT, "")
            elif any(map(any, iter(partial(file.read, BLOCK), b""))):  # `cat a.tar b.tar`; else zeros to a full record
                yield Left(MORE, "")
    except tarfile.TarError:
        yield Left(CUT, "")


def find_members(url: str) -> dict[str, tuple[int, int]]:
    """Name -> (offset, bytes) of the files of a tar."""
    with open_url(url) as file:
        return {m.name: (m.offset, m.bytes) for m in members(file) if not isinstance(m, Left)}


def read_samples(url: str, name: str, look: Look) -> Iterator[Sample | Left]:
    """The captioned images of a tar, in the order of their images; what is left out with its reason."""
    pictures: dict[str, Picture | str] = {}
    captions: dict[tuple[str, str], list[str]] = {}
    of_file: dict[str, str] = {}  # sample -> its image's name
    with open_url(url) as file:
        for member in members(file):
            if isinstance(member, Left):
                yield Left(member.reason, name)
                break
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key, kind = folder + slash + stem, "." + ending.lower()
            if kind not in (".txt", ".json", *SUFFIXES):
                if kind.endswith(SUFFIXES):  # else of another field, such as .cls
                    yield Left("image with a dot in its name, which ends at the first", f"{name}/{member.name}")
                continue
            seen = key in pictures if kind in SUFFIXES else (key, kind) in captions
            if seen:
                yield Left("file of a name that came before", f"{name}/{member.name}")
                continue
            file.seek(member.offset)
            data = file.read(member.bytes)
            if len(data) < member.bytes:
                yield Left(CUT, name)
                break
            if kind in SUFFIXES:
                pictures[key], of_file[key] = picture_of(data, member.offset, look), member.name
                continue
            said = captions_in(kind, data)
            if isinstance(said, str):
                yield Left(said, f"{name}/{member.name}")
            captions[key, kind] = [] if isinstance(said, str) else said
    for key, picture in pictures.items():
        said = captions.pop((key, ".json"), []), captions.pop((key, ".txt"), [])
        if isinstance(picture, str):
            yield Left(picture, f"{name}/{of_file[key]}")
        elif not any(said):
            yield Left("no caption", f"{name}/{of_file[key]}")
        else:
            yield Sample(key, picture, said[0] or said[1])
    for (key, kind), said in captions.items():
        if said:
            yield Left("caption file without an image", f"{name}/{key}{kind}")


def captions_in(kind: str, data: bytes) -> list[str] | str:
    """The captions of a .txt or .json file; or what is wrong with it."""
    try:
        text = data.decode("utf-8-sig")
        if kind == ".txt":
            return clean(text.splitlines())
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except UnicodeError:
        return "caption file that is not UTF-8"
    except (ValueError, RecursionError):
        return "caption file that is not JSON"
    said = record.get("caption") if isinstance(record, dict) else None
    return clean(said if isinstance(said, list) else [said])


def clean(texts: list) -> list[str]:
    """The texts among them that say something."""
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


class TarWriter:
    """A new tar of image files that lay elsewhere; its bytes follow from what is written alone. Closed by `with`."""

    def __init__(self, path: Path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)
        self.n = 0

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *error):
        self.tar.close()

    def add(self, data: bytes, captions: list[str] = ()) -> int:
        """The offset at which an image now lies."""
        name, self.n = f"{self.n:09}", self.n + 1
        ending = next((e for magic, e in MAGIC.items() if data.startswith(magic)), ".img")
        offset = self.put(name + ending, data)
        if captions:
            self.put(name + ".json", json.dumps({"caption": list(captions)}, ensure_ascii=False).encode())
        return offset

    def put(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self.tar.addfile(info, io.BytesIO(data))
        return self.tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


MAGIC = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
