import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shard_files import picture, write_tar

from transfusion.data.build import build
from transfusion.data.built import (
    Rows,
    TarImages,
    is_built,
    keep_fitting,
    load_built_documents,
    load_built_images,
    load_built_text,
)
from transfusion.data.images import decode
from transfusion.data.storage import UNREADABLE
from transfusion.tokenizer import load_tokenizer, train_tokenizer

SIZES = [(16, 16), (16, 24), (24, 16)]


def files() -> dict[str, bytes | str]:
    """Nine captioned images of many sizes, in three forms, some of them turned."""
    found, turned = {}, Image.Exif()
    turned[0x0112] = 8
    rng = np.random.default_rng(0)
    for i, (form, size) in enumerate((f, s) for f in ("PNG", "JPEG", "WEBP") for s in ((40, 41), (241, 160), (33, 50))):
        options = {"exif": turned} if i % 2 else {}
        found[f"{i}.{form.lower()}"] = picture(tuple(rng.integers(0, 256, 3).tolist()), size, form, **options)
        found[f"{i}.txt"] = f"image {i}\nof {size}"
    return found


@pytest.fixture
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def built(tmp_path) -> Path:
    build("images", [str(write_tar(tmp_path / "a.tar", files()))], tmp_path / "built")
    return tmp_path / "built"


def test_shapes_are_known_without_decoding_and_are_those_of_the_pixels(built, tokenizer):
    images = load_built_images(built, SIZES, tokenizer)["train"].images
    pixels = images.read(range(9))
    assert (
        [images.shape(i) for i in range(9)]
        == [p.shape[:2] for p in pixels]
        == [SIZES[k] for k in images.closest(images.records[0:9])]
    )
    assert {p.shape[:2] for p in pixels} == set(SIZES)
    data = [d for d in files().values() if isinstance(d, bytes)]
    assert all((p == decode(d, SIZES)).all() for p, d in zip(pixels, data))
    assert (images[-1] == pixels[8]).all() and len(images) == 9
    with pytest.raises(IndexError):
        images.shape(9)


def test_captions_without_room_are_left_out_and_images_without_captions_too(built, tokenizer, monkeypatch):
    monkeypatch.setattr("transfusion.data.built.SCANNED", 4)
    found = load_built_images(built, SIZES, tokenizer)["train"]
    longest = [max(map(len, found.ids[i])) for i in range(9)]
    shortest = [min(map(len, found.ids[i])) for i in range(9)]
    for rooms in ((0, 0, 0), (99, 99, 99), (min(longest) - 1,) * 3, (min(longest), 99, min(shortest) - 1)):
        room = [rooms[SIZES.index(found.images.shape(i))] for i in range(9)]
        stay = [i for i in range(9) if shortest[i] <= room[i]]
        fitting, out, less = keep_fitting(found, rooms)
        assert list(fitting.names) == [str(i) for i in stay]
        assert out.tolist() == [i for i in range(9) if i not in stay]
        assert less.tolist() == [i for i in stay if longest[i] > room[i]]
        assert all((a == found.images[i]).all() for i, a in zip(stay, fitting.images))
        for k, i in enumerate(stay):
            texts = [text for text, ids in zip(found.texts[i], found.ids[i]) if len(ids) <= room[i]]
            assert fitting.texts[k] == texts and len(fitting.ids[k]) == len(texts)


@given(st.lists(st.booleans(), max_size=60))
def test_rows_without_some_are_the_others_in_their_order(left):
    rows = Rows(7, 7 + len(left)).without(np.flatnonzero(left))
    stay = [7 + i for i, out in enumerate(left) if not out]
    assert list(rows) == stay and len(rows) == len(stay)
    assert [rows[i - len(stay)] for i in range(len(stay))] == stay
    with pytest.raises(IndexError):
        rows[len(stay)]


def test_what_is_built_travels_as_names_of_files(built, tokenizer):
    found = load_built_images(built, SIZES, tokenizer)["train"]
    before = found.images[3], found.names[3], found.ids[3]
    sent = pickle.dumps((found.images, found.names, found.ids))
    assert len(sent) < 2000
    images, names, ids = pickle.loads(sent)
    assert (images[3] == before[0]).all() and names[3] == before[1] == "3"
    assert [i.tolist() for i in ids[3]] == [i.tolist() for i in before[2]]
    assert pickle.loads(pickle.dumps(found)).texts[3] == ["image 3", "of (40, 41)"]


def test_an_image_that_cannot_be_had_is_a_word_among_the_others(built, tokenizer, tmp_path):
    images = load_built_images(built, SIZES, tokenizer)["train"].images
    tar, record = tmp_path / "a.tar", images.record(1)
    good = images.read([0])[0]
    data = bytearray(tar.read_bytes())
    data[int(record["offset"]) + 60] ^= 1
    tar.write_bytes(data)
    found = images.read([1, 0])
    assert found[0] == "bytes that have changed since it was built" and (found[1] == good).all()
    tar.write_bytes(data[: int(record["offset"])])
    assert images.read([8, 1]) == ["file that ends too early"] * 2 and not isinstance(images.read([0])[0], str)
    tar.unlink()
    assert images.read([0])[0].startswith(f"{UNREADABLE}: FileNotFoundError: [Errno 2]")
    with pytest.raises(ValueError, match=r"image 0 of .*built, in .*a\.tar at 512: file that cannot be read"):
        images[0]


def test_an_image_that_breaks_behind_its_header_is_a_word_too(tmp_path, tokenizer):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "n.jpg")
    data = (tmp_path / "n.jpg").read_bytes()
    write_tar(tmp_path / "a.tar", {"a.jpg": data[: len(data) // 2], "a.txt": "cut"})
    build("images", [str(tmp_path / "a.tar")], tmp_path / "built")  # which reads headers
    images = load_built_images(tmp_path / "built", SIZES, tokenizer)["train"].images
    assert images.read([0]) == ["broken or unknown image"]


def test_tars_elsewhere_are_read_by_fsspec_to_the_same_pixels(built, tokenizer, tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/there/00.tar", (tmp_path / "a.tar").read_bytes())
    try:
        build("images", ["memory://there/{00..00}.tar"], tmp_path / "remote")
        build("images", ["memory://there"], tmp_path / "folder")
        here, *there = (
            load_built_images(f, SIZES, tokenizer)["train"].images
            for f in (built, tmp_path / "remote", tmp_path / "folder")
        )
        for images in there:
            assert all((a == b).all() for a, b in zip(here.read(range(9)), images.read(range(9))))
        store.pipe("/there/00.tar", b"short")
        assert there[0].read([0, 5]) == ["file that ends too early"] * 2
    finally:
        store.rm("/there", recursive=True)
    assert there[0].read([0])[0].startswith(UNREADABLE)


def test_a_built_folder_may_be_moved_with_the_images_that_lay_loose(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture())
        (tmp_path / "in" / f"{i}.txt").write_text("a")
    build("images", [str(tmp_path / "in")], tmp_path / "built")
    (tmp_path / "built").rename(tmp_path / "moved")
    images = load_built_images(tmp_path / "moved", SIZES, tokenizer)["train"].images
    assert all(not isinstance(image, str) for image in images.read(range(3)))


def test_a_folder_that_does_not_fit_is_refused_with_the_remedy(built, tokenizer, tmp_path):
    assert is_built(built) and not is_built(tmp_path)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".lock").touch()
    with pytest.raises(ValueError, match="killed is not built to its end: call transfusion data build again"):
        is_built(tmp_path / "killed")
    other = train_tokenizer(["other words"], 300)
    with pytest.raises(ValueError, match="another tokenizer: build it with --tokenizer FILE"):
        load_built_images(built, SIZES, other)
    for load in (lambda: load_built_text(built, tokenizer), lambda: load_built_documents(built, SIZES, tokenizer)):
        with pytest.raises(ValueError, match=r"holds images: name it as data\.images"):
            load()
    with (tmp_path / "a.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(ValueError, match=r"a\.tar of .* is gone or has changed: build the data anew"):
        load_built_images(built, SIZES, tokenizer)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"a\.tar of .* is gone or has changed: build the data anew"):
        load_built_images(built, SIZES, tokenizer)
    dataset = json.loads((built / "dataset.json").read_text())
    (built / "dataset.json").write_text(json.dumps({**dataset, "format": 9}))
    with pytest.raises(ValueError, match="has format 9, and 2 is read: build it anew"):
        load_built_images(built, SIZES, tokenizer)


@pytest.mark.parametrize("name", ["images.npy", "ids.npy", "starts.npy", "letters.npy"])
def test_an_array_that_is_gone_or_cut_is_refused_and_built_anew(built, tokenizer, tmp_path, name):
    whole = (built / name).read_bytes()
    for break_it in (lambda: (built / name).write_bytes(whole[:-1]), (built / name).unlink):
        break_it()
        with pytest.raises(ValueError, match=rf"{name} of .*built is gone or has changed: build the data anew"):
            load_built_images(built, SIZES, tokenizer)
        build("images", [str(tmp_path / "a.tar")], built)
        assert (built / name).read_bytes() == whole
    (built / "dataset.json").write_text('{"format')
    with pytest.raises(ValueError, match=r"dataset\.json is broken: remove it, and build the data anew"):
        load_built_images(built, SIZES, tokenizer)


def test_a_tokenizer_that_is_saved_again_is_still_the_one(built, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "again.json")
    assert isinstance(
        load_built_images(built, SIZES, load_tokenizer(tmp_path / "again.json"))["train"].images, TarImages
    )
