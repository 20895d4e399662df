import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from transfusion.data.interleaved import DocumentSet, ImageSegment, TextSegment, load_documents

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SQUARE = ((8, 8),)


def put(folder, name, color=RED, size=(8, 8)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write(folder, *lines, name="documents.jsonl"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))


def load(folder, sizes=SQUARE) -> tuple[DocumentSet, dict[str, list[str]]]:
    found, report = load_documents(str(folder), sizes)
    n = len(found)
    assert report.kept == n == len(found.documents) == len(found.split) == len(found.ids) == len(found.info)
    assert {s.image for d in found.documents for s in d if isinstance(s, ImageSegment)} == set(found.images)
    return found, report.skipped


def test_a_line_becomes_its_segments_in_their_order(tmp_path):
    put(tmp_path, "a/cat.png", RED)
    put(tmp_path, "b.png", BLUE)
    line = {
        "segments": [
            "a cat and",
            {"image": "a/cat.png"},
            {"text": "make it blue", "learn": False},
            {"image": "b.png", "learn": False},
        ],
        "split": "held_out",
        "shape": "cat",
        "sizes": [1, {"x": None}],
    }
    write(tmp_path, line)
    found, skipped = load(tmp_path)
    (document,) = found.documents
    assert document == [
        TextSegment("a cat and"),
        ImageSegment("a/cat.png"),
        TextSegment("make it blue", learn=False),
        ImageSegment("b.png", learn=False),
    ]
    assert (found.images["a/cat.png"] == RED).all() and (found.images["b.png"] == BLUE).all()
    assert found.split.tolist() == ["held_out"] and found.ids == ["documents.jsonl:1"]
    assert found.info == [{"shape": "cat", "sizes": [1, {"x": None}]}]
    assert found.name == str(tmp_path) and skipped == {}


def test_files_are_named_from_where_the_documents_lie(tmp_path):
    put(tmp_path, "shared.png", RED)
    put(tmp_path, "one/own.png", GREEN)
    write(tmp_path, {"segments": ["x", {"image": "shared.png"}]})
    write(tmp_path / "one", {"segments": [{"image": "own.png"}, {"image": "../shared.png"}, {"image": "./own.png"}]})
    found, skipped = load(tmp_path)
    assert found.ids == ["documents.jsonl:1", "one/documents.jsonl:1"] and skipped == {}
    assert [s.image for s in found.documents[1]] == ["one/own.png", "shared.png", "one/own.png"]


def test_an_image_named_often_is_decoded_and_stored_once(tmp_path, monkeypatch):
    from transfusion.data import interleaved

    decoded = []
    original = interleaved.decode
    monkeypatch.setattr(interleaved, "decode", lambda file, sizes: decoded.append(file.name) or original(file, sizes))
    put(tmp_path, "a.png")
    (tmp_path / "bad.png").write_text("no image")
    lines = [{"segments": [f"text {i}", {"image": name}]} for i in range(50) for name in ("a.png", "bad.png")]
    write(tmp_path, *lines)
    found, skipped = load(tmp_path)
    assert sorted(decoded) == ["a.png", "bad.png"]
    assert len(found) == 50 and list(found.images) == ["a.png"]
    assert len(skipped["broken or unknown image"]) == 50


def test_what_cannot_be_used_is_named_by_its_line(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path.parent, "outside.png")
    (tmp_path / "zero.png").touch()
    (tmp_path / "bad.png").write_text("no image")
    put(tmp_path, "unused.png")
    good = {"segments": ["kept", {"image": "a.png"}]}
    bad = {
        "document line that is not JSON": [b'{"segments": ["', b"[" * 100_000],
        "document line that is not a JSON object": [b'["a"]'],
        "document line that is not UTF-8 text": [b'{"segments": ["\xff"]}', b'{"segments": ["\\ud800"]}'],
        'document without a list of "segments"': [{"text": "a"}, {"segments": "a"}, {"segments": {"text": "a"}}],
        "empty document": [{"segments": []}, {"segments": ["", " \n"]}],
        "document in which nothing is learned": [{"segments": [{"text": "a", "learn": False}]}],
        "document whose split is not train or held_out": [
            good | {"split": "test"},
            good | {"split": ["train"]},
            good | {"split": None},
        ],
        "segment that is not either a text or an image": [
            {"segments": [3]},
            {"segments": [None]},
            {"segments": [["a"]]},
            {"segments": ["a", {"learn": True}]},
            {"segments": [{"text": "a", "image": "a.png"}]},
        ],
        'segment with a key other than "text" or "image", and "learn"': [{"segments": [{"text": "a", "lern": False}]}],
        "segment whose text is not a string": [{"segments": [{"text": ["a"]}]}],
        "segment whose image is not a string": [{"segments": [{"image": 1}]}],
        'segment whose "learn" is not true or false': [
            {"segments": [{"text": "a", "learn": 0}]},
            {"segments": [{"image": "a.png", "learn": "no"}]},
        ],
    }
    of_image = {
        "missing image file": ["gone.png", "../outside.png", "", ".", "A.PNG", "x\0y"],
        "empty file": ["zero.png"],
        "broken or unknown image": ["bad.png", "documents.jsonl"],
    }
    lines, expected = [], {}
    for reason, of_reason in bad.items():
        expected[reason] = [f"documents.jsonl:{len(lines) + i}" for i in range(1, len(of_reason) + 1)]
        lines += of_reason
    for reason, images in of_image.items():
        expected[reason] = []
        for image in images:
            lines.append({"segments": ["a", {"image": "a.png"}, {"image": image}]})
            shown = image if image not in ("", ".") else "."
            expected[reason].append(f"documents.jsonl:{len(lines)} {shown}")
    write(tmp_path, *lines, good)
    found, skipped = load(tmp_path)
    assert skipped == expected
    assert found.documents == [[TextSegment("kept"), ImageSegment("a.png")]] and list(found.images) == ["a.png"]
    assert found.ids == [f"documents.jsonl:{len(lines) + 1}"]


def test_an_unreadable_list_is_reported_beside_one_that_is_read(tmp_path):
    write(tmp_path, {"segments": ["a text"]})
    (tmp_path / "b" / "documents.jsonl").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "documents.jsonl").symlink_to(tmp_path / "gone")
    found, skipped = load(tmp_path)
    assert found.documents == [[TextSegment("a text")]] and found.images == {}
    assert skipped == {"document file that cannot be read": ["c/documents.jsonl:0"]}


@pytest.mark.parametrize("lines", [[], [{"segments": ["a", {"image": "gone.png"}]}]])
def test_nothing_usable_is_an_error_with_schema_and_reasons(tmp_path, lines):
    write(tmp_path, *lines)
    with pytest.raises(ValueError, match=r'documents\.jsonl of lines \{"segments"') as error:
        load_documents(str(tmp_path), SQUARE)
    assert "kept 0" in str(error.value) and ("gone.png" in str(error.value)) == bool(lines)
    with pytest.raises(ValueError, match=r"no folder .*: give a folder with a documents\.jsonl"):
        load_documents(str(tmp_path / "nowhere"), SQUARE)


def test_each_image_takes_the_bucket_closest_to_its_shape(tmp_path):
    for name, size in (("square", (90, 100)), ("wide", (80, 40)), ("tall", (40, 90))):
        put(tmp_path, f"{name}.png", GREEN, size)
    write(tmp_path, {"segments": [{"image": f"{name}.png"} for name in ("square", "wide", "tall")]})
    found, _ = load(tmp_path, ((16, 16), (8, 16), (32, 16)))
    shapes = {name: image.shape for name, image in found.images.items()}
    assert shapes == {"square.png": (16, 16, 3), "wide.png": (8, 16, 3), "tall.png": (32, 16, 3)}


def test_without_any_split_a_stable_share_is_held_out_by_content(tmp_path):
    lines = [{"segments": [f"text {i}"], "number": i} for i in range(2000)]
    write(tmp_path, *lines)
    before, _ = load(tmp_path)
    held = {d[0].text for d, s in zip(before.documents, before.split) if s == "held_out"}
    assert 20 <= len(held) <= 65
    same = [{"segments": [{"text": f"text {i}", "learn": True}, ""]} for i in range(1000, 2000)]  # said in other words
    more = [{"segments": [f"more {i}"]} for i in range(500)]
    write(tmp_path, *more, *same[::-1])
    write(tmp_path / "deeper", *lines[:1000], *lines[:5])
    after, _ = load(tmp_path)
    assert {d[0].text for d, s in zip(after.documents, after.split) if s == "held_out" and "text" in d[0].text} == held


def test_a_file_with_a_split_is_held_out_as_it_says_and_nowhere_else(tmp_path):
    lines = [{"segments": [f"text {i}"]} for i in range(1000)]
    write(tmp_path, *lines, {"segments": ["one"], "split": "held_out"})
    found, _ = load(tmp_path)
    assert found.split[-1] == "held_out" and (found.split[:-1] == "train").all()
    write(tmp_path / "free", *lines)
    found, _ = load(tmp_path)
    assert (found.split[:1000] == "train").all() and (found.split[1001:] == "held_out").any()


def test_a_few_documents_are_trained_on_whole(tmp_path):
    write(tmp_path, *({"segments": [f"text {i}"]} for i in range(19)))
    assert load(tmp_path)[0].split.tolist() == ["train"] * 19
    write(tmp_path, *({"segments": [f"text {i}"]} for i in range(20)))
    assert "held_out" in load(tmp_path)[0].split


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
SEGMENTS = st.lists(
    st.builds(TextSegment, TEXT, st.booleans())
    | st.builds(ImageSegment, st.sampled_from(["a.png", "in/b.png", "\u732b.png"]), st.booleans()),
    min_size=1,
)


def line_of(document) -> dict:
    """A document as its maker would write it: the short form where there is one."""
    segments = []
    for s in document:
        kind, value = ("text", s.text) if isinstance(s, TextSegment) else ("image", s.image)
        segments.append(value if kind == "text" and s.learn else {kind: value} | ({} if s.learn else {"learn": False}))
    return {"segments": segments}


@given(st.lists(SEGMENTS, max_size=6), st.data())
@settings(max_examples=50)
def test_loading_undoes_writing_whatever_broken_lines_stand_between(documents, data):
    def usable(document):
        shown = any(isinstance(s, ImageSegment) or s.text.strip() for s in document)
        return shown and any(s.learn for s in document)

    documents = [[TextSegment("first")], *filter(usable, documents)]
    broken = st.sampled_from([b"{", b"[]", b'{"segments": [{}]}', b'{"segments": [{"image": "gone.png"}]}'])
    lines, n_broken = [], 0
    for document in documents:
        between = data.draw(st.lists(broken, max_size=2))
        lines += [*between, line_of(document)]
        n_broken += len(between)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.png", "in/b.png", "\u732b.png"):
            put(Path(folder), name)
        write(Path(folder), *lines)
        found, skipped = load(folder)
    assert found.documents == documents
    assert sum(map(len, skipped.values())) == n_broken
    assert all(isinstance(image, np.ndarray) for image in found.images.values())
