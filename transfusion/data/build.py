"""Sources of any size, indexed and tokenised once: shards -> parts, side by side -> one folder that is read in place.

    shard 0   tar        part 0   images starts ids letters      FOLDER/images.npy      those to train on, then
    shard 1   tar   ->   part 1   ...                       ->                          those held out
    shard 2   parquet    part 2   ... and a tar of its images    FOLDER/starts.npy ...  one part behind the other

What may happen at any moment is a kill: a part is there whole or not, and the next call makes those that are missing.
The bytes of the result follow from the sources alone. Parts stay, and serve the next build of a source that has grown:
whoever needs the room may delete FOLDER/parts.
"""

import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.data.built import FORMAT
from transfusion.data.images import held_out_hashes
from transfusion.data.mapped import DATASET, Growing
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
from transfusion.data.shards import Shard, find_shards
from transfusion.data.split import lowest
from transfusion.data.storage import has_size
from transfusion.data.text import HANDFUL, HELD_OUT_SHARE, LONG, split_texts

Part = tuple[Shard, Path, dict[str, Any]]


def build(
    kind: str, sources: Sequence[str], out: Path, tokenizer: str = "", workers: int = 0, columns: Columns = COLUMNS
) -> dict[str, Any]:
    """dataset.json of the folder that is built now, or was; ValueError where nothing usable is found."""
    shards = [shard for source in sources for shard in find_shards(kind, source)]
    twice = [shard.url for shard, n in Counter(shards).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name each source once")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system, however this process ends
        except OSError:
            raise ValueError(f"another process is building {out}: wait for it, or name another folder") from None
        return build_shards(shards, sources, Recipe(kind, out.absolute(), tokenizer, columns), workers)


def build_shards(shards: list[Shard], sources: Sequence[str], recipe: Recipe, workers: int) -> dict[str, Any]:
    """The same of these shards."""
    kind, out, tokenizer, columns = recipe
    file = out / DATASET
    if file.is_file():
        there = json.loads(file.read_text())
        if (there["kind"], there["format"]) != (kind, FORMAT):
            raise ValueError(
                f"{out} holds {there['kind']} of format {there['format']}: name another folder, or remove it"
            )
        same = [known(shard) for shard in shards] == [
            {k: s[k] for k in KNOWN} for s in there["shards"] if "problem" not in s
        ]
        same &= there["tokenizer"] == tokenizer_key(tokenizer) and there["columns"] == list(columns)
        if same and all(has_size(recipe.out, *tar) for tar in there.get("tars", [])):
            print(f"{out} is built of these sources already")
            return there
    made = list(make_parts(shards, recipe, workers))
    parts = [(shard, folder_of(shard, recipe), part) for shard, part in zip(shards, made) if not isinstance(part, str)]
    if not sum(part["samples"] for *_, part in parts):
        raise ValueError(f"nothing usable in {', '.join(sources)}\n{account(shards, made)}")
    new = out / f".{os.getpid()}-merged"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
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
        "skipped": dict(sorted(left.items())),
        "shards": described,
    }
    with (new / "skipped.jsonl").open("wb") as all_left:
        for _, folder, _ in parts:
            all_left.write((folder / "skipped.jsonl").read_bytes())
    (new / DATASET).write_text(json.dumps(dataset, indent=1) + "\n")
    file.unlink(missing_ok=True)  # not before: a build that fails leaves the folder as it was
    for path in sorted(new.iterdir(), key=lambda path: path.name == DATASET):  # the last of them says that it is whole
        os.replace(path, out / path.name)
    tidy(out, {folder.name for _, folder, _ in parts} | {Path(url).name for url, _ in found.get("tars", [])})
    print(f"{out}: {account(shards, made)}")
    return dataset


def tidy(out: Path, used: set[str]):
    """Removes what a kill left behind, and what was made of sources as they were before."""
    for path in (*out.glob(".*-merged"), *out.glob("parts/*"), *out.glob("shards/*")):
        if path.name not in used:
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


def join(parts: list[Part], name: str, out: Path) -> list[int]:
    """One array of all parts, one behind the other; where each begins."""
    arrays = [load(folder, name) for _, folder, _ in parts]
    with Growing(out / f"{name}.npy", arrays[0].dtype) as whole:
        bases = []
        for array in arrays:
            bases.append(whole.n)
            whole.append(array)
    return bases


def join_starts(parts: list[Part], bases: list[int], out: Path) -> list[int]:
    """Where each text begins in the joined ids, and, last, where they end; the number of each part's first text."""
    with Growing(out / "starts.npy", "<u8") as whole:
        numbers, end = [], 0
        for (_, folder, _), base in zip(parts, bases):
            starts = load(folder, "starts") + np.uint64(base)
            numbers.append(whole.n)
            whole.append(starts[:-1])
            end = int(starts[-1])
        whole.append([end])
    return numbers


def join_tars(parts: list[Part]) -> tuple[list[list[Any]], list[np.ndarray]]:
    """(all tars, each once: [url, bytes]; of each part the numbers of its own)."""
    number: dict[tuple[str, int], int] = {}
    of_part = [[number.setdefault(tuple(tar), len(number)) for tar in part["tars"]] for *_, part in parts]
    return [list(tar) for tar in number], [np.array(numbers, np.uint32) for numbers in of_part]


def choose(parts: list[Part], n_splits: int) -> list[np.ndarray]:
    """Of each part the split of each of its things, a number: what none was given for is held out by its hash."""
    choices = [load(folder, "choice") for _, folder, _ in parts]
    every = np.concatenate(choices)
    free = every["split"] == 0
    split = every["split"].astype(np.int64) - 1
    split[free] = held_out_hashes(every["hash"][free])  # 1, the first split that is held out
    assert (split < n_splits).all()
    return np.split(split, np.cumsum([len(c) for c in choices])[:-1])


def by_split(parts: list[Part], kind: str, name: str, out: Path, moved) -> dict[str, list[int]]:
    """Writes the records of all parts, `moved(part number, records)`, by split; [first, behind the last] of each."""
    splits, chosen = {}, choose(parts, len(SPLITS[kind]))
    with Growing(out / f"{name}.npy", load(parts[0][1], name).dtype) as whole:
        for code, split in enumerate(SPLITS[kind]):
            first = whole.n
            for p, (_, folder, _) in enumerate(parts):
                whole.append(moved(p, load(folder, name)[chosen[p] == code]))
            splits[split] = [first, whole.n]
    return splits


def merge_images(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    tars, of_part = join_tars(parts)
    captions, letters = join_starts(parts, join(parts, "ids", out), out), join(parts, "letters", out)

    def moved(p: int, records: np.ndarray) -> np.ndarray:
        records["tar"] = of_part[p][records["tar"]] if len(records) else 0
        records["first"] += np.uint64(captions[p])
        records["name"] += np.uint64(letters[p])
        return records

    return {"splits": by_split(parts, "images", "images", out, moved), "tars": tars}


def merge_documents(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    tars, of_part = join_tars(parts)
    spoken, letters = join_starts(parts, join(parts, "ids", out), out), join(parts, "letters", out)
    pictures, segments = [], []
    with Growing(out / "images.npy", load(parts[0][1], "images").dtype) as whole:
        for p, (_, folder, _) in enumerate(parts):
            records = np.array(load(folder, "images"))
            records["tar"] = of_part[p][records["tar"]] if len(records) else 0
            records["name"] += np.uint64(letters[p])
            pictures.append(whole.n)
            whole.append(records)
    with Growing(out / "segments.npy", load(parts[0][1], "segments").dtype) as whole:
        for p, (_, folder, _) in enumerate(parts):
            records = np.array(load(folder, "segments"))
            records["number"] += np.where(records["image"], pictures[p], spoken[p]).astype(np.uint64)
            segments.append(whole.n)
            whole.append(records)

    def moved(p: int, records: np.ndarray) -> np.ndarray:
        records["first"] += np.uint64(segments[p])
        for name in ("name", "info"):
            records[name] += np.uint64(letters[p])
        return records

    return {"splits": by_split(parts, "documents", "documents", out, moved), "tars": tars}


def merge_text(parts: list[Part], recipe: Recipe, out: Path) -> dict[str, Any]:
    n, longest = sum(part["samples"] for *_, part in parts), max(part["longest"] for *_, part in parts)
    if n < HANDFUL and longest >= LONG:  # held out by their ends, for which they are read once more
        return few_texts(parts, recipe, out)
    hashes = [load(folder, "choice")["hash"] for _, folder, _ in parts]
    apart = lowest(np.concatenate(hashes), HELD_OUT_SHARE)
    if apart.all():
        apart[:] = False
    limit = int(np.concatenate(hashes)[apart].max()) if apart.any() else -1
    with Growing(out / "ids.npy", load(parts[0][1], "ids").dtype) as whole:
        for (_, folder, _), mine in zip(parts, np.split(apart, np.cumsum([len(h) for h in hashes])[:-1])):
            ids, starts = load(folder, "ids"), load(folder, "starts")
            edges = np.flatnonzero(np.diff(mine, prepend=True, append=True))  # from one held out to the next
            for a, b in zip(edges[::2], edges[1::2]):
                whole.append(ids[int(starts[a]) : int(starts[b])])
    kept = [
        (line["hash"], p, line["number"], line["text"])
        for p, (_, folder, _) in enumerate(parts)
        for line in map(json.loads, (folder / "held_out.jsonl").read_text().splitlines())
        if line["hash"] <= limit
    ]
    kept = sorted(kept)[:KEPT]
    write_held_out([text for *_, text in sorted(kept, key=lambda k: k[1:3])], out)
    return {"tokens": whole.n, "documents": {"train": int((~apart).sum()), "held_out": int(apart.sum()), "all": n}}


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
