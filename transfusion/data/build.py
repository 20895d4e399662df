"""Sources of any size, indexed and tokenised once: shards -> parts, side by side -> one folder that is read in place.

    shard 0   tar        part 0   images starts ids letters      FOLDER/images.npy      those to train on, then
    shard 1   tar   ->   part 1   ...                       ->                          those held out
    shard 2   parquet    part 2   ... and a tar of its images    FOLDER/starts.npy ...  one part behind the other

What may happen at any moment is a kill: a part is there whole or not, and the next call makes those that are missing.
The bytes of the result follow from the sources alone. Parts stay, and serve the next build of a source that has grown:
whoever needs the room may delete FOLDER/parts.
"""

import fcntl
import heapq
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from transfusion.data import images
from transfusion.data.built import files_of
from transfusion.data.images import MIN_FOR_HELD_OUT, plain
from transfusion.data.mapped import DATASET, FORMAT, LOCK, Growing, fingerprint, publish
from transfusion.data.parts import (
    KEPT,
    SPLITS,
    Recipe,
    folder_of,
    id_type,
    make_part,
    tokenizer_at,
    tokenizer_key,
)
from transfusion.data.processes import side_by_side
from transfusion.data.rows import COLUMNS, Columns, Left
from transfusion.data.samples import texts
from transfusion.data.shards import HF, Shard, braces, find_shards
from transfusion.data.split import limit_of, within
from transfusion.data.storage import has_size, is_remote, local, why
from transfusion.data.text import HANDFUL, HELD_OUT_SHARE, LONG, split_texts

Part = tuple[Shard, Path, dict[str, Any]]
Moved = Callable[[int, np.ndarray], np.ndarray]  # (which part, some of its records): what they are among those of all
AT_ONCE = 1 << 20  # records that are in memory at a time
OURS = re.compile(r"(\.\d+-)?[0-9a-f]{20}-[0-9a-f]{16}(\.tar)?")  # names of parts and their tars, drafts of them too
MERGED = re.compile(r"\.\w+-merged")  # what is joined before it takes its place


def build(
    kind: str, sources: Sequence[str], out: Path, tokenizer: str = "", workers: int = 0, columns: Columns = COLUMNS
) -> dict[str, Any]:
    """dataset.json of the folder that is built now, or was; ValueError where nothing usable is found."""
    shards = [shard for source in sources for shard in find_shards(kind, source)]
    twice = [shard.url for shard, n in Counter(shards).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name each source once")
    require_own(out, sources)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system, however this process ends
        except BlockingIOError:
            raise ValueError(f"another process is building {out}: wait for it, or name another folder") from None
        except OSError as error:
            raise ValueError(f"{out} cannot be locked ({why(error)}): name a folder on another file system") from None
        return build_shards(shards, sources, Recipe(kind, out.absolute(), tokenizer, columns), workers)


def require_own(out: Path, sources: Sequence[str]):
    """ValueError where the folder holds the user's files, or lies in a source, of which the next call would take it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    if out.is_dir() and not any((out / name).is_file() for name in (LOCK, DATASET)) and any(out.iterdir()):
        raise ValueError(f"{out} holds files that no build made: name a new folder, or an empty one")
    whole = out.resolve()
    for url in (url for source in sources for url in braces(source.removeprefix(HF)) if not is_remote(url)):
        if local(url).is_dir() and local(url).resolve() in (whole, *whole.parents):
            raise ValueError(f"{out} lies in its own source {url}: name a folder outside of it")


def build_shards(shards: list[Shard], sources: Sequence[str], recipe: Recipe, workers: int) -> dict[str, Any]:
    """dataset.json of the folder, of which this process has the lock, built of these shards."""
    kind, out = recipe.kind, recipe.out
    for left in out.iterdir():
        if MERGED.fullmatch(left.name):  # of a kill, as large as all that is built
            shutil.rmtree(left)
    there = built_before(out, kind)
    if there and is_of(there, shards, recipe):
        print(f"{out} is built of these sources already")
        return there
    made = list(make_parts(shards, recipe, workers))
    require_as_much(there, shards, made, out)
    parts = [(shard, folder_of(shard, recipe), part) for shard, part in zip(shards, made) if not isinstance(part, str)]
    if not sum(part["samples"] for *_, part in parts):
        raise ValueError(plain(f"nothing usable in {', '.join(sources)}\n{account(shards, made)}"))
    with TemporaryDirectory(prefix=".", suffix="-merged", dir=out) as new:
        dataset = merge(shards, made, sources, recipe, Path(new))
        (out / DATASET).unlink(missing_ok=True)  # not before: a build that fails leaves the folder as it was
        for path in sorted(Path(new).iterdir(), key=lambda path: path.name == DATASET):  # the last says: it is whole
            publish(path, out / path.name)
    tidy(out, {folder.name for _, folder, _ in parts} | {Path(url).name for url, _ in dataset.get("tars", [])})
    print(plain(f"{out}: {account(shards, made)}"))
    return dataset


def built_before(out: Path, kind: str) -> dict[str, Any] | None:
    """dataset.json of the folder as it is; ValueError where it is of another kind or format, or broken."""
    file = out / DATASET
    if not file.is_file():
        return None
    try:
        there = json.loads(file.read_text())
        held = there["kind"], there["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is broken: remove it, and build the data anew") from None
    if held != (kind, FORMAT):
        raise ValueError(f"{out} holds {held[0]} of format {held[1]}: name another folder, or remove it")
    return there


def is_of(there: dict[str, Any], shards: list[Shard], recipe: Recipe) -> bool:
    """Whether the folder is whole, and what would be built."""
    read = [{name: shard[name] for name in KNOWN} for shard in there["shards"] if "problem" not in shard]
    asked = [known(shard) for shard in shards], tokenizer_key(recipe.tokenizer), list(recipe.columns)
    return (read, there["tokenizer"], there["columns"]) == asked and all(
        has_size(recipe.out, *file) for file in files_of(there)
    )


def require_as_much(there: dict[str, Any] | None, shards: list[Shard], made: list[dict[str, Any] | str], out: Path):
    """ValueError where a shard that is in the folder cannot be read now: without it the folder would be worth less."""
    held = {(s["url"], s["part"]) for s in there["shards"] if "problem" not in s} if there else set()
    away = [
        f"  {shard.url}: {part}"
        for shard, part in zip(shards, made)
        if isinstance(part, str) and (shard.url, shard.part) in held
    ]
    if away:
        raise ValueError(
            f"{out} stays as it was, as {len(away)} of the shards in it cannot be read now: call again once they can, "
            "or build what there is into another folder\n" + plain("\n".join(away))
        )


def merge(
    shards: list[Shard], made: list[dict[str, Any] | str], sources: Sequence[str], recipe: Recipe, new: Path
) -> dict[str, Any]:
    """dataset.json of all parts, joined in the folder `new`."""
    kind, _, tokenizer, columns = recipe
    parts = [(shard, folder_of(shard, recipe), part) for shard, part in zip(shards, made) if not isinstance(part, str)]
    found = MERGES[kind](parts, recipe, new)
    described = [
        {
            **known(shard),
            **({"problem": part} if isinstance(part, str) else {k: part[k] for k in ("samples", "skipped")}),
        }
        for shard, part in zip(shards, made)
    ]
    left = sum((Counter(shard.get("skipped", {})) for shard in described), Counter())
    dataset = {
        "format": FORMAT,
        "kind": kind,
        "sources": list(sources),
        "columns": list(columns),
        "tokenizer": tokenizer_key(tokenizer),
        **found,
        "files": {path.name: fingerprint(path) for path in sorted(new.iterdir())},
        "skipped": dict(sorted(left.items())),
        "shards": described,
    }
    with (new / "skipped.jsonl").open("wb") as all_left:
        for _, folder, _ in parts:
            with (folder / "skipped.jsonl").open("rb") as left_of_part:
                shutil.copyfileobj(left_of_part, all_left)
    (new / DATASET).write_text(json.dumps(dataset, indent=1) + "\n")
    return dataset


def tidy(out: Path, used: set[str]):
    """Removes what a kill left behind, and what was made of sources as they were before."""
    for path in (*out.glob("parts/*"), *out.glob("shards/*")):
        if OURS.fullmatch(path.name) and path.name not in used:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


KNOWN = ("url", "bytes", "version", "part")


def known(shard: Shard) -> dict[str, Any]:
    """What a shard is known again by."""
    return {name: getattr(shard, name) for name in KNOWN}


def make_parts(shards: list[Shard], recipe: Recipe, workers: int) -> Iterator[dict[str, Any] | str]:
    """make_part of each shard, in their order, by so many processes; 0 = this one. Tells how far it is."""
    (recipe.out / "parts").mkdir(parents=True, exist_ok=True)
    samples, tty = 0, sys.stdout.isatty()
    for i, part in enumerate(side_by_side(partial(make_part, recipe=recipe), shards, workers), 1):
        samples += 0 if isinstance(part, str) else part["samples"]
        if tty or i * 10 // len(shards) > (i - 1) * 10 // len(shards):
            end = "\r" if tty and i < len(shards) else "\n"
            print(f"{i} of {len(shards)} shards: kept {samples}", end=end, flush=True)
        yield part


def account(shards: list[Shard], made: list[dict[str, Any] | str]) -> str:
    """What was kept, and what was left out by its reason."""
    read = [part for part in made if not isinstance(part, str)]
    left = sum((Counter(part["skipped"]) for part in read), Counter())
    lines = [f"kept {sum(part['samples'] for part in read)}, skipped {left.total()}"]
    lines += [f"  {n} x {reason}" for reason, n in left.most_common()]
    lines += [f"  {shard.url}: {part}" for shard, part in zip(shards, made) if isinstance(part, str)]
    return "\n".join(lines)


def load(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def blocks(folder: Path, name: str) -> Iterator[np.ndarray]:
    """The records of a part, some at a time, to be changed at will."""
    records = load(folder, name)
    yield from (np.array(records[i : i + AT_ONCE]) for i in range(0, len(records), AT_ONCE))


def as_they_are(p: int, records: np.ndarray) -> np.ndarray:
    return records


def join(parts: list[Part], name: str, out: Path, moved: Moved = as_they_are) -> list[int]:
    """One array of all parts, one behind the other; where each begins."""
    with Growing(out / f"{name}.npy", load(parts[0][1], name).dtype) as whole:
        bases = []
        for p, (_, folder, _) in enumerate(parts):  # one is open at a time: more may be than a process may have open
            bases.append(whole.n)
            for records in blocks(folder, name):
                whole.append(moved(p, records))
    return bases


def join_starts(parts: list[Part], bases: list[int], out: Path) -> list[int]:
    """Where each text begins in the joined ids, and, last, where they end; the number of each part's first text."""
    with Growing(out / "starts.npy", "<u8") as whole:
        numbers, end = [], 0
        for (_, folder, _), base in zip(parts, bases):
            numbers.append(whole.n)
            left = len(load(folder, "starts")) - 1  # the last says where they end
            for starts in blocks(folder, "starts"):
                starts += np.uint64(base)
                whole.append(starts[:left])
                left, end = left - len(starts), int(starts[-1])
        whole.append([end])
    return numbers


def join_tars(parts: list[Part]) -> tuple[list[list[Any]], list[np.ndarray]]:
    """(all tars, each once: [url, bytes]; of each part the numbers of its own)."""
    number: dict[tuple[str, int], int] = {}
    of_part = [[number.setdefault(tuple(tar), len(number)) for tar in part["tars"]] for *_, part in parts]
    return [list(tar) for tar in number], [np.array(numbers, np.uint32) for numbers in of_part]


def drawn(parts: list[Part]) -> Iterator[np.ndarray]:
    """The hashes of the things whose split is not given, some at a time."""
    for _, folder, _ in parts:
        yield from (choice["hash"][choice["split"] == 0] for choice in blocks(folder, "choice"))


def by_split(parts: list[Part], kind: str, name: str, out: Path, moved: Moved) -> dict[str, list[int]]:
    """Writes the records of all parts by split; [first, behind the last] of each."""
    splits, limit = {}, limit_of(drawn(parts), images.HELD_OUT_SHARE, MIN_FOR_HELD_OUT)
    with Growing(out / f"{name}.npy", load(parts[0][1], name).dtype) as whole:
        for code, split in enumerate(SPLITS[kind]):
            first = whole.n
            for p, (_, folder, _) in enumerate(parts):
                for records, choice in zip(blocks(folder, name), blocks(folder, "choice")):
                    whole.append(moved(p, records[split_of(choice, limit) == code]))
            splits[split] = [first, whole.n]
    return splits


def split_of(choice: np.ndarray, limit: int) -> np.ndarray:
    """The number of the split of each: the one given, else 1, the first that is held out, or 0 by its hash."""
    return np.where(choice["split"] > 0, choice["split"].astype(np.int64) - 1, within(choice["hash"], limit))


def merge_images(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    tars, of_part = join_tars(parts)
    captions, letters = join_starts(parts, join(parts, "ids", out), out), join(parts, "letters", out)

    def moved(p: int, records: np.ndarray) -> np.ndarray:
        records["tar"] = of_part[p][records["tar"]]
        records["first"] += np.uint64(captions[p])
        records["name"] += np.uint64(letters[p])
        return records

    return {"splits": by_split(parts, "images", "images", out, moved), "tars": tars}


def merge_documents(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    tars, of_part = join_tars(parts)
    spoken, letters = join_starts(parts, join(parts, "ids", out), out), join(parts, "letters", out)

    def of_image(p: int, records: np.ndarray) -> np.ndarray:
        records["tar"] = of_part[p][records["tar"]]
        records["name"] += np.uint64(letters[p])
        return records

    def of_segment(p: int, records: np.ndarray) -> np.ndarray:
        records["number"] += np.where(records["image"], pictures[p], spoken[p]).astype(np.uint64)
        return records

    def of_document(p: int, records: np.ndarray) -> np.ndarray:
        records["first"] += np.uint64(segments[p])
        for name in ("name", "info"):
            records[name] += np.uint64(letters[p])
        return records

    pictures = join(parts, "images", out, of_image)
    segments = join(parts, "segments", out, of_segment)
    return {"splits": by_split(parts, "documents", "documents", out, of_document), "tars": tars}


def merge_text(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    n, longest = sum(part["samples"] for *_, part in parts), max(part["longest"] for *_, part in parts)
    if n < HANDFUL and longest >= LONG:  # held out by their ends, for which they are read once more
        return few_texts(parts, recipe, out)
    limit = limit_of(drawn(parts), HELD_OUT_SHARE)
    if (apart := sum(int(within(hashes, limit).sum()) for hashes in drawn(parts))) == n:
        apart, limit = 0, -1
    with Growing(out / "ids.npy", load(parts[0][1], "ids").dtype) as whole:
        for _, folder, _ in parts:
            ids, starts, first = load(folder, "ids"), load(folder, "starts"), 0
            for choice in blocks(folder, "choice"):
                mine = within(choice["hash"], limit)
                edges = first + np.flatnonzero(np.diff(mine, prepend=True, append=True))  # between those held out
                for a, b in zip(edges[::2], edges[1::2]):
                    whole.append(ids[int(starts[a]) : int(starts[b])])
                first += len(choice)
    kept = heapq.nsmallest(KEPT, held_out_texts(parts, limit))
    write_held_out([text for *_, text in sorted(kept, key=lambda k: k[1:3])], out)
    return {"tokens": whole.n, "documents": {"train": n - apart, "held_out": apart, "all": n}}


def held_out_texts(parts: list[Part], limit: int) -> Iterator[tuple[int, int, int, str]]:
    """(hash, part, number, text) of those that the parts keep."""
    for p, (_, folder, _) in enumerate(parts):
        with (folder / "held_out.jsonl").open() as lines:
            for line in map(json.loads, lines):
                if line["hash"] <= limit:
                    yield line["hash"], p, line["number"], line["text"]


def few_texts(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    found = [item for shard, *_ in parts for item in texts(shard, recipe.columns.text)]
    every = [item[1] for item in found if not isinstance(item, Left)]
    train, apart = split_texts(every)
    tokenizer = tokenizer_at(recipe.tokenizer)
    with Growing(out / "ids.npy", id_type(tokenizer)) as whole:
        for text in train:
            whole.append([*tokenizer.encode(text), tokenizer.special.eos])
    write_held_out(apart, out)
    return {"tokens": whole.n, "documents": {"train": len(train), "held_out": len(apart), "all": len(every)}}


def write_held_out(held: list[str], out: Path):
    (out / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held))


MERGES = {"images": merge_images, "documents": merge_documents, "text": merge_text}
