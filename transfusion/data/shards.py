"""From the words of a command to shards, the files that are built one by one.

    my/tars                             every .tar in a folder; else every .parquet; else what lies loose in it
    my/tars/{00000..00099}.tar          a hundred of them, here or s3://bucket/{00000..00099}.tar
    my/table.parquet, my/lines.jsonl.gz
    hf:OWNER/NAME, hf:OWNER/NAME:CONFIG@SPLIT     a data set of Hugging Face; hf:FOLDER too; SPLIT is train

A shard has a form, which says how it is read (`samples.py`), and a stamp, by which it is known again.
"""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from transfusion.data.images import METADATA, SUFFIXES, plain
from transfusion.data.interleaved import DOCUMENTS
from transfusion.data.rows import describe
from transfusion.data.storage import Stamp, absolute, is_remote, join, local, stamp, stamps_below, why

FORMS = {  # kind -> ending -> form
    "images": {".tar": "tar", ".parquet": "parquet"},
    "text": {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl"},
    "documents": {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl"},
}
KINDS = tuple(FORMS)
HF = "hf:"
AT_ONCE = 32  # addresses that are asked for together


class Shard(NamedTuple):
    form: str  # tar, parquet, jsonl, txt, folder, hf
    url: str
    root: str  # the folder that names in it, and its own, begin from
    bytes: int
    version: str
    part: int = 0  # of `parts` that a data set of Hugging Face comes in
    parts: int = 1

    @property
    def name(self) -> str:
        """Below the root."""
        return plain(self.url.removeprefix(self.root).lstrip("/")) + (f"[{self.part}]" if self.parts > 1 else "")

    @property
    def key(self) -> str:
        """Names what is made of it: of another file, or of the same one once it changed, another."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:20]


def find_shards(kind: str, source: str) -> list[Shard]:
    """The shards of a source, in the order of their names; ValueError where it has none."""
    if kind not in FORMS:
        raise ValueError(f"{kind!r} is no kind of data: choose one of {', '.join(KINDS)}")
    if source.startswith(HF):
        return hf_shards(source)
    with ThreadPoolExecutor(AT_ONCE) as threads:  # a store takes its time to answer for each of a range
        found = [shard for some in threads.map(partial(shards_of, kind), braces(source)) for shard in some]
    if not found:
        raise ValueError(f"nothing to read in {source}: give {REMEDIES[kind]}")
    return found


REMEDIES = {
    "images": "a .tar of images with captions (cat.jpg beside cat.txt or cat.json), a folder of such tars, "
    f"a .parquet, hf:NAME, or, on this machine, a folder of images ({' '.join(SUFFIXES)}) with {METADATA} or .txt "
    "files",
    "text": 'a .jsonl (.gz) of lines {"text": ...}, a .parquet, a folder of them, hf:NAME, or, on this machine, a .txt '
    "or a folder with some",
    "documents": f"a folder with a {DOCUMENTS}, a .jsonl (.gz) or a .parquet of documents, or hf:NAME",
}


def braces(word: str) -> Iterator[str]:
    """The words that {00000..00099} stands for, with as many digits as the first number is written with."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", word)
    if not found:
        yield word
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from braces(f"{word[: found.start()]}{number:0{len(first)}}{word[found.end() :]}")


def form_of(kind: str, name: str) -> str:
    """The form of a file by its ending; "" = no such file is read."""
    return next((form for ending, form in FORMS[kind].items() if name.lower().endswith(ending)), "")


def shards_of(kind: str, url: str) -> list[Shard]:
    """The shards of one address without braces."""
    url = absolute(url)
    folder = url.rpartition("/")[0]
    if form := form_of(kind, url):
        return [named(form, url, folder)]
    if not is_remote(url) and not local(url).is_dir():
        if kind == "text" and url.lower().endswith(".txt"):
            return [named("txt", url, folder)]
        there = "of no form that is read" if local(url).exists() else "not there"
        raise ValueError(f"{url} is {there}: give {REMEDIES[kind]}")
    try:
        names = stamps_below(url)
    except OSError as error:
        raise ValueError(f"{url} cannot be listed ({why(error)}): name a folder that can be, or its files") from None
    files = [name for name in names if form_of(kind, name)]
    if kind == "documents":  # another .jsonl of such a folder may say anything
        files = [n for n in files if n.endswith(".parquet") or n.rpartition("/")[2].removesuffix(".gz") == DOCUMENTS]
    if kind == "images" and any(form_of(kind, name) == "tar" for name in files):
        files = [name for name in files if form_of(kind, name) == "tar"]
    shards = [Shard(form_of(kind, name), join(url, name), url, *names[name]) for name in files]
    if is_remote(url):
        return shards
    if kind == "documents":  # which are others when an image of theirs is another
        loose = together("folder", url, {n: s for n, s in names.items() if n.lower().endswith((*SUFFIXES, ".tar"))})
        return [shard._replace(version=f"{shard.version} {loose.version}") for shard in shards]
    if kind == "images" and not shards and any(name.lower().endswith(SUFFIXES) for name in names):
        return [together("folder", url, names)]
    if kind == "text" and (loose := {n: s for n, s in names.items() if n.lower().endswith(".txt")}):
        return [*shards, together("txt", url, loose)]
    return shards


def named(form: str, url: str, root: str) -> Shard:
    """A file that the command names."""
    try:
        return Shard(form, url, root, *stamp(url))
    except OSError as error:
        raise ValueError(f"{url} cannot be read ({why(error)}): name a file that is there") from None


def together(form: str, url: str, stamps: dict[str, Stamp]) -> Shard:
    """All these files of a folder, as one shard."""
    version = hashlib.sha256(repr(list(stamps.items())).encode()).hexdigest()[:20]
    return Shard(form, url, url, sum(found.bytes for found in stamps.values()), version)


def hf_shards(source: str) -> list[Shard]:
    """As many as the data set comes in."""
    version, parts = describe(source.removeprefix(HF))
    return [Shard("hf", source, HF, 0, version, part, parts) for part in range(parts)]
