"""Plain text in memory: the shipped works of Shakespeare, a .txt, a .jsonl of {"text": ...}, or a folder of both.

Held-out text never enters training: two whole works of Shakespeare; of a user's documents about 5 %, drawn by a hash of
their words, so that two copies fall on the same side; of a handful of long documents the last 5 % of each.
"""

import lzma
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion.data.jsonl import read_jsonl
from transfusion.data.report import Report
from transfusion.data.split import hash_of, lowest
from transfusion.data.storage import names_below

SHAKESPEARE = Path(__file__).resolve().parent.parent / "assets" / "shakespeare.txt.xz"
SUFFIXES = (".txt", ".jsonl")
HELD_OUT_SHARE = 0.05
HANDFUL = 20  # fewer documents than this are held out by their ends
LONG = 2000  # characters from which a document has an end to spare


@dataclass(frozen=True)
class TextSet:
    """Documents to train on and documents to evaluate on."""

    name: str  # the path it was loaded by
    train: list[str]
    held_out: list[str]


def load_text(path: str) -> tuple[TextSet, Report]:
    """(documents, what was skipped); ValueError where nothing usable is found."""
    return load_shakespeare() if str(path) == "shakespeare" else load_files(str(path))


def load_shakespeare() -> tuple[TextSet, Report]:
    """42 works, two held out; in the file a form feed parts them and each opens with 'train|held_out <TAB> title'."""
    works = defaultdict(list)
    for work in lzma.decompress(SHAKESPEARE.read_bytes()).decode().split("\f"):
        head, text = work.split("\n", 1)
        works[head.split("\t")[0]].append(text)
    texts = TextSet("shakespeare", works["train"], works["held_out"])
    return texts, Report(len(texts.train) + len(texts.held_out))


def load_files(path: str) -> tuple[TextSet, Report]:
    """The documents of a file or of all files under a folder: a .txt is one, each line of a .jsonl is one."""
    skipped: dict[str, list[str]] = defaultdict(list)
    documents: list[str] = []
    files = list_files(path)
    for file in files:
        for name, text, problem in read_texts(file):
            if not problem and not text.strip():
                problem = "empty document"
            if problem:
                skipped[problem].append(name)
            else:
                documents.append(text)
    report = Report(len(documents), dict(skipped))
    if not documents:
        raise ValueError(
            f"no text in {path} ({len(files)} files): give 'shakespeare', a .txt in UTF-8, a .jsonl with lines of "
            f'{{"text": ...}}, or a folder of them\n{report.summary()}'
        )
    train, held_out = split_texts(documents)
    return TextSet(path, train, held_out), report


def list_files(path: str) -> list[Path]:
    """A file itself, or the text files under a folder, sorted, without hidden ones; ValueError if there is neither."""
    root = Path(path).expanduser()
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is neither {' nor '.join(SUFFIXES)}: rename it if it is text")
        return [root]
    if not root.is_dir():
        raise ValueError(f"no file or folder {path}: give 'shakespeare', a .txt, a .jsonl, or a folder of them")
    return [root / name for name in names_below(root) if name.lower().endswith(SUFFIXES)]


def read_texts(file: Path):
    """Yields (name, text, problem or '')."""
    try:
        if file.suffix.lower() == ".txt":
            text = file.read_bytes().decode("utf-8-sig")
            yield file.name, text.replace("\r\n", "\n"), ""
            return
        for number, record in read_jsonl(file):
            name = f"{file.name}:{number}"
            if isinstance(record, str):
                yield name, "", record
            elif not isinstance(record.get("text"), str):
                yield name, "", 'line without "text"'
            else:
                yield name, record["text"], ""
    except UnicodeDecodeError:
        yield file.name, "", "file that is not UTF-8"
    except OSError:
        yield file.name, "", "file that cannot be read"


def split_texts(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, held out): nothing is in both, and train is never empty."""
    if len(documents) < HANDFUL and any(len(text) >= LONG for text in documents):
        ends = [end_of(text) for text in documents]
        return [t[:cut] for t, cut in zip(documents, ends)], [t[cut:] for t, cut in zip(documents, ends) if t[cut:]]
    apart = lowest(np.array(list(map(hash_of, documents)), np.uint64), HELD_OUT_SHARE)
    train = [t for t, out in zip(documents, apart) if not out]
    held_out = [t for t, out in zip(documents, apart) if out]
    return (train, held_out) if train else (documents, [])


def end_of(text: str) -> int:
    """Where a document's held-out end begins: behind the last line or word before the last 5 %."""
    if len(text) < LONG:
        return len(text)
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    near = cut - len(text) // 100
    return next((at + 1 for at in (text.rfind(c, near, cut) for c in "\n ") if at >= 0), cut)
