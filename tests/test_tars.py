import io
import tarfile

import pytest
from PIL import Image
from shard_files import picture, write_tar

from transfusion.data.images import measure
from transfusion.data.rows import Left
from transfusion.data.tars import CUT, MORE, Sample, TarWriter, find_members, read_samples


def read(path) -> tuple[list[Sample], list[Left]]:
    found = list(read_samples(str(path), path.name, measure))
    return [s for s in found if isinstance(s, Sample)], [s for s in found if isinstance(s, Left)]


def bytes_at(path, sample: Sample) -> bytes:
    with path.open("rb") as file:
        file.seek(sample.picture.offset)
        return file.read(sample.picture.bytes)


def test_samples_are_found_where_they_lie_whatever_the_order_of_their_files(tmp_path):
    files = {
        "0/a.txt": "first\n\n second \n",
        "0/a.jpg": (jpeg := picture("red", (30, 20), "JPEG")),
        "0/b.json": {"caption": ["from json", " ", "again"], "key": "b"},
        "0/c.webp": (webp := picture("blue", form="WEBP")),
        "0/b.txt": "not read, as the json has captions",
        "0/c.json": {"url": "http://"},
        "0/b.png": (png := picture("green", (8, 9))),
        "0/c.txt": "\ufeffcaf\u00e9",
        "0/._c.png": b"what a Mac leaves",
        "0/c.cls": "7",
    }
    path = write_tar(tmp_path / "a.tar", files)
    samples, left = read(path)
    assert left == []
    assert [(s.name, s.captions) for s in samples] == [
        ("0/a", ["first", "second"]),
        ("0/c", ["caf\u00e9"]),
        ("0/b", ["from json", "again"]),
    ]
    assert [(s.picture.height, s.picture.width) for s in samples] == [(20, 30), (20, 20), (9, 8)]
    assert [bytes_at(path, s) for s in samples] == [jpeg, webp, png]


def test_what_is_wrong_with_a_sample_is_named_and_the_good_ones_stay(tmp_path):
    good = picture()
    files = {
        "good.v2.png": b"of another field, which is no image of the sample",
        "good.png": good,
        "good.txt": "kept",
        "silent.png": good,
        "blank.png": good,
        "blank.txt": " \n",
        "alone.txt": "without an image",
        "text.jpg": b"no image",
        "text.txt": "x",
        "empty.png": b"",
        "empty.txt": "x",
        "latin.png": good,
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "wrong.png": good,
        "wrong.json": "{",
        "twice.png": good,
        "twice.jpg": picture("blue"),
        "twice.txt": "the first stays",
        "half.png": good,
        "half.json": '{"caption": "\\ud800"}',
        "number.png": good,
        "number.json": {"caption": 3},
    }
    samples, left = read(write_tar(tmp_path / "t.tar", files))
    assert [(s.name, s.captions) for s in samples] == [("good", ["kept"]), ("twice", ["the first stays"])]
    assert set(left) == {
        Left("no caption", "t.tar/silent.png"),
        Left("no caption", "t.tar/blank.png"),
        Left("no caption", "t.tar/latin.png"),
        Left("no caption", "t.tar/wrong.png"),
        Left("no caption", "t.tar/half.png"),
        Left("no caption", "t.tar/number.png"),
        Left("caption file that is not UTF-8", "t.tar/latin.txt"),
        Left("caption file that is not UTF-8", "t.tar/half.json"),
        Left("caption file that is not JSON", "t.tar/wrong.json"),
        Left("caption file without an image", "t.tar/alone.txt"),
        Left("broken or unknown image", "t.tar/text.jpg"),
        Left("empty file", "t.tar/empty.png"),
        Left("file of a name that came before", "t.tar/twice.jpg"),
        Left("image with a dot in its name, which ends at the first", "t.tar/good.v2.png"),
    }


def test_of_a_tar_that_is_cut_the_whole_samples_stay(tmp_path):
    files = {f"{i}{end}": picture() if end == ".png" else "x" for i in range(4) for end in (".png", ".txt")}
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    spans = find_members(str(tmp_path / "whole.tar"))
    ends = {name: offset + size for name, (offset, size) in spans.items()}
    for cut in range(0, max(ends.values()) + 1, 50):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        samples, left = read(path)
        assert [s.name for s in samples] == [str(i) for i in range(4) if ends[f"{i}.txt"] <= cut], cut
        assert Left(CUT, "cut.tar") in left


def test_a_second_tar_behind_the_end_is_named(tmp_path):
    one, two = (write_tar(tmp_path / f"{n}.tar", {f"{n}.png": picture(), f"{n}.txt": n}).read_bytes() for n in "ab")
    for zeros, expected in ((b"", [Left(MORE, "c.tar")]), (bytes(3 << 20), [Left(MORE, "c.tar")]), (None, [])):
        (tmp_path / "c.tar").write_bytes(one + bytes(3 << 20) if zeros is None else one + zeros + two)
        samples, left = read(tmp_path / "c.tar")
        assert [s.name for s in samples] == ["a"] and left == expected


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b", None])
def test_what_is_no_plain_tar_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "a.tar"
    if content is None:
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    else:
        path.write_bytes(content)
    assert read(path) == ([], [Left(CUT, "a.tar")])


def test_a_tar_written_here_is_the_same_each_time_and_is_read_as_others_are(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    images = [picture("red", (30, 20), "JPEG", exif=turned), picture("blue", form="WEBP"), picture("green", form="BMP")]
    for name in ("a.tar", "b.tar"):
        with TarWriter(tmp_path / name) as tar:
            offsets = [tar.add(data, [f"image {i}", "another"]) for i, data in enumerate(images)]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    samples, left = read(tmp_path / "a.tar")
    assert left == [] and [s.picture.offset for s in samples] == offsets
    assert [bytes_at(tmp_path / "a.tar", s) for s in samples] == images
    assert [s.captions for s in samples] == [[f"image {i}", "another"] for i in range(3)]
    assert (samples[0].picture.height, samples[0].picture.width) == (30, 20)  # upright


def test_a_member_is_called_the_same_whether_its_tar_says_where_it_lies_or_not(tmp_path):
    files = {"./a.png": picture(), "./a.txt": "a", "b/../deep/./c.png": picture("blue"), "deep/c.txt": "c"}
    path = write_tar(tmp_path / "a.tar", files)
    samples, left = read(path)
    assert [(s.name, s.captions) for s in samples] == [("a", ["a"]), ("deep/c", ["c"])] and left == []
    assert list(find_members(str(path))) == ["a.png", "a.txt", "deep/c.png", "deep/c.txt"]
