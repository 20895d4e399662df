"""What is built is what the readers of memory give; a build may be killed anywhere."""

import errno
import fcntl
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shard_files import picture, tree, write_table, write_tar
from tiny_run import write_documents, write_tiny

from transfusion.cli import main
from transfusion.data import parts
from transfusion.data.build import MERGES, build
from transfusion.data.built import load_built_documents, load_built_images, load_built_text
from transfusion.data.images import SPLITS, load_images
from transfusion.data.interleaved import ImageSegment, load_documents
from transfusion.data.rows import Columns
from transfusion.data.text import load_text
from transfusion.tokenizer import load_tokenizer, train_tokenizer

SIZES = [(16, 16), (16, 24)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


def tables(folder: Path) -> dict[str, list[str]]:
    """The images of a folder as others ship them: form -> sources."""
    files = {p.stem: p.read_bytes() for p in sorted((folder / "pictures").glob("*.png"))}
    captions = {stem: (folder / "pictures" / f"{stem}.txt").read_text().strip() for stem in files}
    tarred = [(f"{s}.png", b) for s, b in files.items()], [(f"{s}.txt", c) for s, c in captions.items()]
    pairs = [pair for both in zip(*tarred) for pair in both]
    for i in range(3):
        write_tar(folder / "tars" / f"{i:05}.tar", dict(pairs[i * 16 : i * 16 + 16]))
    cells = [{"bytes": data, "path": None} for data in files.values()]
    write_table(folder / "t" / "a.parquet", image=cells[:9], text=[[c] for c in list(captions.values())[:9]])
    write_table(folder / "t" / "b.parquet", image=cells[9:], text=[[c] for c in list(captions.values())[9:]])
    return {
        "folder": [str(folder / "pictures")],
        "tars": [str(folder / "tars")],
        "braces": [str(folder / "tars" / "{00000..00002}.tar")],
        "parquet": [str(folder / "t")],
        "two sources": [str(folder / "t" / "a.parquet"), str(folder / "t" / "b.parquet")],
        "hugging face": [f"hf:{folder / 't'}"],
    }


@pytest.mark.parametrize("form", ["folder", "tars", "braces", "parquet", "two sources", "hugging face"])
def test_built_images_are_those_of_the_folder_pixel_by_pixel(tiny, tmp_path, tokenizer, form, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    read, _ = load_images(str(tiny / "pictures"), SIZES)
    expected = {c[0]: pixels for c, pixels in zip(read.captions, read.images)}
    dataset = build("images", tables(tiny)[form], tmp_path / "built")
    found = load_built_images(tmp_path / "built", SIZES, tokenizer)
    assert tuple(found) == SPLITS and dataset["skipped"] == {}
    seen = {}
    for of_split in found.values():
        for i, pixels in enumerate(of_split.images.read(range(len(of_split.images)))):
            (text,), (ids,) = of_split.texts[i], of_split.ids[i]
            assert ids.tolist() == tokenizer.encode(text) and ids.dtype == np.int64
            seen[text] = pixels
    assert seen.keys() == expected.keys() and all((seen[text] == expected[text]).all() for text in expected)
    assert len(found["held_out_image"].images) >= 1
    if form == "folder":  # where the names are the same, so is the split
        for split, of_split in found.items():
            assert list(of_split.names) == [n for n, s in zip(read.ids, read.split) if s == split]


def test_a_folder_that_says_its_splits_is_built_with_them(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    lines = []
    for i, split in enumerate(["train"] * 30 + ["held_out_combination", "held_out_image"]):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture())
        lines.append({"file_name": f"{i}.png", "text": [f"a {i}", "and more"], "split": split})
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build("images", [str(tmp_path / "in")], tmp_path / "built")
    found = load_built_images(tmp_path / "built", SIZES, tokenizer)
    assert {split: len(of) for split, of in ((s, f.names) for s, f in found.items())} == {
        "train": 30,
        "held_out_image": 1,
        "held_out_combination": 1,
    }
    assert list(found["held_out_image"].texts) == [["a 31", "and more"]]


@pytest.mark.parametrize("n, words", [(1, 900), (3, 900), (5, 3), (60, 12), (400, 2)])
def test_built_text_is_the_stream_and_the_held_out_texts_of_the_reader(tmp_path, tokenizer, n, words):
    rng = np.random.default_rng(n)
    texts = [" ".join(f"w{x}" for x in rng.integers(0, 999, words)) for _ in range(n)]
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, " "]] + ["broken\n"]
    (tmp_path / "a" / "a.jsonl").write_text("".join(lines[: n // 2]))
    (tmp_path / "a" / "b.jsonl").write_text("".join(lines[n // 2 :]))
    read, report = load_text(str(tmp_path / "a"))
    stream = [i for text in read.train for i in [*tokenizer.encode(text), tokenizer.special.eos]]
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[: n // 2]).encode()))
    write_table(tmp_path / "z" / "b.parquet", text=texts[n // 2 :])
    for name in ("a", "z"):
        dataset = build("text", [str(tmp_path / name)], tmp_path / f"built-{name}")
        tokens, held_out, _ = load_built_text(tmp_path / f"built-{name}", tokenizer)
        assert tokens.array.tolist() == stream and tokens.array.dtype == np.uint16
        assert held_out == read.held_out and dataset["tokens"] == len(stream)
    assert sum(report.skipped[r] != [] for r in report.skipped) == 2
    left = json.loads((tmp_path / "built-a" / "dataset.json").read_text())["skipped"]
    assert left == {reason: len(names) for reason, names in report.skipped.items()}


def test_txt_files_of_a_folder_are_a_document_each(tiny, tmp_path, tokenizer):
    read, _ = load_text(str(tiny / "texts"))
    build("text", [str(tiny / "texts")], tmp_path)
    tokens, held_out, _ = load_built_text(tmp_path, tokenizer)
    assert tokenizer.decode(tokens.array.tolist()) == "".join(read.train) and held_out == read.held_out


def test_of_many_held_out_texts_the_lowest_hashes_are_kept_and_none_is_trained_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(parts, "KEPT", 7)
    monkeypatch.setattr("transfusion.data.build.KEPT", 7)
    texts = [f"text {i}" for i in range(1000)]
    (tmp_path / "in").mkdir()
    for k in range(3):
        lines = [json.dumps({"text": t}) + "\n" for t in texts[k::3]]
        (tmp_path / "in" / f"{k}.jsonl").write_text("".join(lines))
    read, _ = load_text(str(tmp_path / "in"))
    dataset = build("text", [str(tmp_path / "in")], tmp_path / "built")
    tokens, held_out, _ = load_built_text(tmp_path / "built", tokenizer)
    assert len(held_out) == 7 < len(read.held_out) == dataset["documents"]["held_out"]
    assert set(held_out) < set(read.held_out)
    assert tokens.array.tolist() == [i for t in read.train for i in [*tokenizer.encode(t), tokenizer.special.eos]]


def told(documents, images, tokenizer) -> list:
    """Documents as texts and pixels."""
    found = []
    for i in range(len(documents)):
        pieces, info = documents[i]
        said = [
            (images[p.content].tobytes() if isinstance(p.content, int) else tokenizer.decode(p.content), p.learn)
            for p in pieces
        ]
        found.append((said, info))
    return found


def as_read(folder: Path, split: str) -> list:
    """The same, as the reader of memory has them."""
    read, _ = load_documents(str(folder), SIZES)
    found = []
    for i in np.flatnonzero(read.split == split):
        said = [
            (read.images[s.image].tobytes() if isinstance(s, ImageSegment) else s.text, s.learn)
            for s in read.documents[i]
        ]
        found.append((said, read.info[i]))
    return found


def test_built_documents_are_those_of_the_folder(tmp_path, tokenizer):
    folder = write_documents(tmp_path / "docs")
    build("documents", [str(folder)], tmp_path / "built")
    images, found = load_built_documents(tmp_path / "built", SIZES, tokenizer)
    assert len(images) == 12  # each once
    for split in ("train", "held_out"):
        assert told(found[split], images, tokenizer) == as_read(folder, split)
    assert found["train"].name(0) == "documents.jsonl:2"


def test_documents_name_members_of_tars_and_tables_hold_their_images(tmp_path, tokenizer):
    folder = write_documents(tmp_path / "docs")
    lines = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    files = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    write_tar(tmp_path / "tarred" / "deep" / "0.tar", {f"./{name}": data for name, data in files.items()})
    rows, named = [], []
    for line in lines:
        segments = [{"text": s} if isinstance(s, str) else s for s in line["segments"]]
        tarred = [{**s, "image": f"deep/0.tar/{s['image']}"} if "image" in s else s for s in segments]
        named.append(json.dumps({**line, "segments": tarred}) + "\n")
        empty = {"text": None, "image": None, "learn": None}
        rows.append([{**empty, **s, **({"image": files[s["image"]]} if "image" in s else {})} for s in segments])
    (tmp_path / "tarred" / "documents.jsonl").write_text("".join(named))
    splits = [line["split"] if line["split"] != "train" else None for line in lines]
    more = {"to": [line.get("to") for line in lines], "icon": [picture()] * len(lines)}  # bytes are no info
    write_table(tmp_path / "table" / "d.parquet", segments=rows, split=splits, **more)
    for name in ("tarred", "table"):
        build("documents", [str(tmp_path / name)], tmp_path / f"built-{name}")
        images, found = load_built_documents(tmp_path / f"built-{name}", SIZES, tokenizer)
        for split in ("train", "held_out"):
            assert told(found[split], images, tokenizer) == as_read(folder, split)
    assert not list((tmp_path / "built-tarred" / "shards").iterdir())  # they stay where they are


def test_bad_documents_are_counted_and_the_good_ones_built(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture())
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    (tmp_path / "secret.png").write_bytes(picture())
    names = ["a.png", "bad.png", "gone.png", "gone.tar/a.png", "../secret.png", str(tmp_path / "secret.png")]
    lines = [json.dumps({"segments": ["see", {"image": name}]}) for name in names] + ["{", '{"segments": []}']
    (tmp_path / "in" / "documents.jsonl").write_text("\n".join(lines))
    dataset = build("documents", [str(tmp_path / "in")], tmp_path / "built")
    assert dataset["splits"] == {"train": [0, 1], "held_out": [1, 1]}
    assert dataset["skipped"] == {
        "broken or unknown image": 1,
        "document line that is not JSON": 1,
        "empty document": 1,
        "missing image file": 3,
        "missing tar": 1,
    }
    named = [json.loads(line) for line in (tmp_path / "built" / "skipped.jsonl").read_text().splitlines()]
    assert ["missing tar", "documents.jsonl:4 gone.tar/a.png"] in named and len(named) == 7


def test_a_column_of_segments_in_json_is_read_and_any_other_is_said_to_be_none(tmp_path, tokenizer):
    cells = [
        '["a text", {"text": "and more", "learn": false}]',
        "a plain text",
        '{"text": "a"}',
        '["\\ud800"]',
        "",
        None,
    ]
    write_table(tmp_path / "a.parquet", segments=cells)
    write_table(tmp_path / "b.parquet", segments=[3])
    dataset = build("documents", [str(tmp_path / f"{name}.parquet") for name in "ab"], tmp_path / "built")
    images, found = load_built_documents(tmp_path / "built", SIZES, tokenizer)
    assert told(found["train"], images, tokenizer) == [([("a text", True), ("and more", False)], {})]
    assert dataset["skipped"] == {'document without a list of "segments"': 6}


def test_columns_have_the_names_that_are_given(tmp_path, tokenizer):
    table = str(write_table(tmp_path / "a.parquet", jpg=[picture("red"), None], alt=["a red one", "none"]))
    with pytest.raises(ValueError, match="no column 'image', 'text', but 'jpg', 'alt': say --image-column"):
        build("images", [table], tmp_path / "built")
    dataset = build("images", [table], tmp_path / "built", columns=Columns("jpg", "alt"))
    assert dataset["skipped"] == {"row without an image": 1}
    assert list(load_built_images(tmp_path / "built", SIZES, tokenizer)["train"].texts) == [["a red one"]]


def test_two_processes_build_what_one_builds(tiny, tmp_path):
    sources = tables(tiny)["tars"]
    build("images", sources, tmp_path / "one")
    build("images", sources, tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_build_does_what_is_new_and_no_more(tiny, tmp_path, capsys):
    sources = tables(tiny)["tars"]
    build("images", sources, tmp_path / "built")
    before = tree(tmp_path / "built")
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "built" / "parts").rglob("*.npy")}
    capsys.readouterr()
    build("images", sources, tmp_path / "built")
    assert "already" in capsys.readouterr().out and tree(tmp_path / "built") == before
    (tmp_path / "more").mkdir()
    more = write_tar(tmp_path / "more" / "9.tar", {"new.png": picture(), "new.txt": "a new one"})
    dataset = build("images", [*sources, str(more)], tmp_path / "built")
    assert sum(s["samples"] for s in dataset["shards"]) == 25
    assert all(p.stat().st_mtime_ns == at for p, at in made.items())
    os.utime(more, ns=(1, 1))  # changed, for all that can be known
    build("images", [*sources, str(more)], tmp_path / "built")
    assert len(list((tmp_path / "built" / "parts").iterdir())) == 4  # none of what it was before
    with pytest.raises(ValueError, match="holds images of format 2: name another folder"):
        build("text", [str(tiny / "texts")], tmp_path / "built")


def test_a_build_that_fails_leaves_the_folder_as_it_was(tiny, tmp_path, tokenizer, monkeypatch):
    source, *more = (str(tiny / "more" / f"{i}.tar") for i in range(2))
    for i, url in enumerate([source, *more]):
        write_tar(Path(url), {f"{i}.png": picture(), f"{i}.txt": "one"})
    build("images", [source], tmp_path / "built")
    before = tree(tmp_path / "built")

    def fails(*rest):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(parts.PARTS, "images", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        build("images", [source, *more], tmp_path / "built")
    after = tree(tmp_path / "built")
    assert {name: after[name] for name in before} == before
    load_built_images(tmp_path / "built", SIZES, tokenizer)


def test_a_tar_of_loose_images_that_was_lost_is_made_again(tiny, tmp_path, tokenizer):
    build("images", [str(tiny / "pictures")], tmp_path / "built")
    before = tree(tmp_path / "built")
    (tar,) = (tmp_path / "built" / "shards").iterdir()
    tar.unlink()
    with pytest.raises(ValueError, match="is gone or has changed: build the data anew"):
        load_built_images(tmp_path / "built", SIZES, tokenizer)
    build("images", [str(tiny / "pictures")], tmp_path / "built")
    assert tree(tmp_path / "built") == before


def test_documents_are_built_anew_when_an_image_of_theirs_or_a_tar_changes(tmp_path, tokenizer):
    folder = write_documents(tmp_path / "docs")
    write_tar(folder / "0.tar", {"a.png": picture("red")})
    with (folder / "documents.jsonl").open("a") as file:
        file.write(json.dumps({"segments": ["in a tar", {"image": "0.tar/a.png"}], "split": "train"}) + "\n")

    def last_images() -> list[bytes]:
        images, found = load_built_documents(tmp_path / "built", SIZES, tokenizer)
        return [images[p.content].tobytes() for d in found["train"] for p in d[0] if isinstance(p.content, int)][-2:]

    build("documents", [str(folder)], tmp_path / "built")
    before = last_images()
    (folder / "purple-bar.png").write_bytes(picture("white", (24, 16)))
    build("documents", [str(folder)], tmp_path / "built")
    assert last_images() == [b"\xff" * (16 * 24 * 3), before[1]] != before
    write_tar(folder / "0.tar", {"b.png": picture("green"), "a.png": picture("white")})
    with pytest.raises(ValueError, match="bytes that have changed since it was built"):
        last_images()
    build("documents", [str(folder)], tmp_path / "built")
    assert last_images()[1] == b"\xff" * (16 * 16 * 3)


def test_a_folder_is_built_by_one_process_at_a_time_from_each_source_once(tiny, tmp_path):
    sources = [str(tiny / "pictures")]
    with pytest.raises(ValueError, match="is named twice: name each source once"):
        build("images", sources * 2, tmp_path / "built")
    (tmp_path / "built").mkdir()
    with (tmp_path / "built" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another process is building .*built: wait for it"):
            build("images", sources, tmp_path / "built")
    build("images", sources, tmp_path / "built")


def test_a_file_system_without_locks_is_told_as_what_it_is(tiny, tmp_path, monkeypatch):
    def fails(*rest):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(ValueError, match=r"cannot be locked \(.*No locks available\): name a folder on another file"):
        build("images", [str(tiny / "pictures")], tmp_path / "built")


def test_no_file_of_the_user_is_touched(tiny, tmp_path):
    (tmp_path / "c4" / "parts").mkdir(parents=True)
    (tmp_path / "c4" / "parts" / "a.jsonl").write_text('{"text": "a"}\n')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"c4 holds files that no build made: name a new folder, or an empty one"):
        build("text", [str(tmp_path / "c4" / "parts")], tmp_path / "c4")
    with pytest.raises(ValueError, match=r"a\.jsonl is a file: name a folder"):
        build("images", [str(tiny / "pictures")], tmp_path / "c4" / "parts" / "a.jsonl")
    assert tree(tmp_path) == before
    sources = tables(tiny)["parquet"]
    build("images", sources, tmp_path / "built")
    stale = [f"parts/{'0' * 20}-{'0' * 16}", f"shards/.7-{'0' * 20}-{'0' * 16}.tar"]
    mine = ["parts/notes.txt", "shards/00000.tar"]
    for name in (*stale, *mine):
        (tmp_path / "built" / name).write_text("x")
    build("images", sources[:1] + [tables(tiny)["tars"][0]], tmp_path / "built")
    assert [(tmp_path / "built" / name).exists() for name in (*stale, *mine)] == [False, False, True, True]


@pytest.mark.parametrize(
    "source, inside", [("{}", "built"), ("{}", "."), ("hf:{}", "deep/built"), ("{}/{{0..1}}", "1/b")]
)
def test_nothing_is_built_within_its_own_source(tmp_path, source, inside, monkeypatch):
    monkeypatch.setattr("transfusion.data.build.find_shards", lambda *rest: [])
    for i in range(2):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    if inside == ".":
        (tmp_path / "in" / ".lock").touch()
    for folder in ("in", "link"):
        with pytest.raises(ValueError, match=r"lies in its own source .*: name a folder outside of it"):
            build("images", [source.format(tmp_path / "in")], tmp_path / folder / inside)


def test_there_may_be_more_parts_than_files_that_a_process_may_have_open(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for i in range(60):
        (tmp_path / "in" / f"{i:02}.jsonl").write_text(json.dumps({"segments": [f"a text {i}"]}) + "\n")
        write_tar(tmp_path / "in" / f"{i:02}.tar", {"a.png": picture(), "a.txt": f"a text {i}"})
    files = [str(tmp_path / "in" / f"{{00..59}}.{ending}") for ending in ("jsonl", "tar")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        built = [build(*what, tmp_path / what[0]) for what in (("documents", files[:1]), ("images", files[1:]))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [sum(s["samples"] for s in dataset["shards"]) for dataset in built] == [60, 60]


def test_a_merge_that_failed_or_was_killed_leaves_nothing(tiny, tmp_path, monkeypatch):
    there = []

    def fails(parts, recipe, new):
        there.extend(path.name for path in recipe.out.iterdir())
        raise RuntimeError("no space")

    (tmp_path / "built" / ".77-merged").mkdir(parents=True)
    (tmp_path / "built" / ".lock").touch()
    monkeypatch.setitem(MERGES, "images", fails)
    with pytest.raises(RuntimeError, match="no space"):
        build("images", tables(tiny)["tars"], tmp_path / "built")
    assert len([name for name in there if name.endswith("-merged")]) == 1 and ".77-merged" not in there
    assert {path.name for path in (tmp_path / "built").iterdir()} == {".lock", "parts"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_account_of_what_is_built_is_said_with_the_remedy(tiny, tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json is broken: remove it, and build the data anew"):
        build("images", [str(tiny / "pictures")], tmp_path)


def test_a_file_whose_name_is_not_utf8_is_built_and_said_in_letters_that_can_be_printed(tmp_path, tokenizer, capfd):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.tar")
    write_tar(tmp_path / "in" / name, {"a.png": picture(), "a.txt": "a", "b.png": picture()})
    out = ["--out", str(tmp_path / "built"), "--workers", "0"]
    assert main(["data", "build", "images", str(tmp_path / "in"), *out]) == 0
    assert main(["data", "check", "images", str(tmp_path / "in"), "--workers", "0"]) == 0
    assert "caf\ufffd.tar/b.png" in capfd.readouterr().out
    assert len(load_built_images(tmp_path / "built", SIZES, tokenizer)["train"].images) == 1


def test_a_link_into_nowhere_is_one_image_less(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    (tmp_path / "in" / "a.png").write_bytes(picture())
    os.symlink(tmp_path / "gone.png", tmp_path / "in" / "b.png")
    dataset = build("images", [str(tmp_path / "in")], tmp_path / "built")
    assert dataset["splits"]["train"] == [0, 1] and dataset["skipped"] == {"file that cannot be read": 1}


def test_a_shard_that_cannot_be_read_is_told_and_tried_again(tiny, tmp_path, monkeypatch):
    def fails(shard, *rest):
        if shard.name == "00001.tar":
            raise OSError("the disk is gone")
        return reads(shard, *rest)

    sources, reads = tables(tiny)["tars"], parts.PARTS["images"]
    with monkeypatch.context() as patch:
        patch.setitem(parts.PARTS, "images", fails)
        dataset = build("images", sources, tmp_path / "built")
    assert [s.get("problem") for s in dataset["shards"]] == [None, "shard that cannot be read: the disk is gone", None]
    assert sum(stop - start for start, stop in dataset["splits"].values()) == 16
    dataset = build("images", sources, tmp_path / "built")
    assert sum(stop - start for start, stop in dataset["splits"].values()) == 24


def test_a_folder_stays_as_it_was_while_a_shard_in_it_cannot_be_read(tiny, tmp_path, monkeypatch, capsys):
    def fails(shard, *rest):
        if shard.name == "00001.tar":
            raise OSError("the store is away")
        return reads(shard, *rest)

    sources, reads = tables(tiny)["tars"], parts.PARTS["images"]
    build("images", sources, tmp_path / "built")
    shutil.rmtree(tmp_path / "built" / "parts")
    before = tree(tmp_path / "built")
    monkeypatch.setitem(parts.PARTS, "images", fails)
    asked = ["data", "build", "images", *sources, "--workers", "0", "--tokenizer"]
    train_tokenizer(["other words"], 300).save(tmp_path / "other.json")
    assert main([*asked, str(tmp_path / "other.json"), "--out", str(tmp_path / "built")]) == 2
    said = capsys.readouterr().err
    assert "stays as it was, as 1 of the shards in it cannot be read now: call again" in said
    assert "00001.tar: shard that cannot be read: the store is away" in said
    after = tree(tmp_path / "built")
    assert {name: data for name, data in after.items() if not name.startswith("parts/")} == before
    assert main([*asked, "", "--out", str(tmp_path / "new")]) == 1  # what there is, and the account of it
    assert "it lacks 1 of 3 shards, which the same call tries again" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["images", "text", "documents"])
def test_sources_of_which_nothing_is_usable_are_refused_with_the_reasons(tmp_path, kind):
    files = {"images": "a.tar", "text": "a.jsonl", "documents": "documents.jsonl"}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / files[kind]).write_bytes(b"x\n" * 600)
    with pytest.raises(ValueError, match=r"nothing usable in .*\nkept 0, skipped [1-9]"):
        build(kind, [str(tmp_path / "in")], tmp_path / "built")
    assert not (tmp_path / "built" / "dataset.json").exists()


KILLED = """
import os, sys
from pathlib import Path
from transfusion.data.build import build
from transfusion.data.mapped import Growing

kind, source, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
left = 0

def until(function):
    def counted(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*args, **options)
    return counted

os.replace, Growing.append = until(os.replace), until(Growing.append)
kills = 0
while True:  # before the first thing is written or renamed, before the fifth, ...
    pid = os.fork()
    if not pid:
        left = 4 * kills
        build(kind, [source], out / str(kills))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    kills += 1
print(kills)
"""


@pytest.mark.parametrize("kind, source", [("images", "t"), ("text", "lines"), ("documents", "docs")])
def test_a_build_that_was_killed_anywhere_goes_on_to_the_same_bytes(tiny, tmp_path, kind, source):
    tables(tiny)
    if not (tiny / "docs").exists():
        write_documents(tiny / "docs")
        (tiny / "lines").mkdir()
        for i in range(3):
            lines = [json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(20)]
            (tiny / "lines" / f"{i}.jsonl").write_text("".join(lines))
    done = [sys.executable, "-W", "ignore", "-c", KILLED, kind, str(tiny / source), str(tmp_path / "killed")]
    said = subprocess.run(done, capture_output=True, text=True, check=True).stdout
    kills = int(said.split()[-1])
    assert kills >= 5
    build(kind, [str(tiny / source)], tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    for n in range(kills):
        assert not (tmp_path / "killed" / str(n) / "dataset.json").exists()
        build(kind, [str(tiny / source)], tmp_path / "killed" / str(n))
        assert tree(tmp_path / "killed" / str(n)) == whole, n
