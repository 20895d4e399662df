import gzip
import sys

import numpy as np
import pyarrow
import pytest
from shard_files import picture, write_table

from transfusion.data.rows import Left, describe, hf_rows, json_rows, parquet_rows

OFFSETS = np.array([0, 2, 3, 4], np.int32).tobytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_lines_are_read_one_by_one_packed_or_not(tmp_path):
    lines = b'{"text": "a"}\n\nnot JSON\n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert list(json_rows(str(tmp_path / name), name)) == [
            (f"{name}:1", {"text": "a"}),
            (f"{name}:3", Left("line that is not JSON", f"{name}:3")),
            (f"{name}:4", {"text": "b"}),
        ]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:5000] + b"\xff" * 50 + b[5050:]]
)
def test_a_packed_file_that_breaks_gives_what_came_before(tmp_path, damage):
    lines = b"".join(b'{"n": %d}\n' % (i * 7919 % 10007) for i in range(4000))
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines)))
    *rows, (_, last) = json_rows(str(tmp_path / "a.jsonl.gz"), "a")
    assert last == Left("compressed file that is broken from somewhere on", "a")
    assert all(isinstance(row, Left) or row["n"] == i * 7919 % 10007 for i, (_, row) in enumerate(rows))


def test_a_table_is_read_by_the_columns_that_are_asked_for(tmp_path):
    path = write_table(tmp_path / "t.parquet", image=[b"1", b"2"], text=["a", None], other=[1, 2])
    rows = list(parquet_rows(str(path), "t", ["image", "text"]))
    assert rows == [("t:0", {"image": b"1", "text": "a"}), ("t:1", {"image": b"2", "text": None})]
    assert "other" in next(parquet_rows(str(path), "t", ["text"], rest=True))[1]
    with pytest.raises(ValueError, match="no column 'caption', but 'image', 'text', 'other': say --image-column"):
        next(parquet_rows(str(path), "t", ["caption"]))
    path.write_bytes(path.read_bytes()[:-20])
    assert list(parquet_rows(str(path), "t", ["text"])) == [("t", Left("table that is broken from somewhere on", "t"))]


def test_a_row_of_a_table_that_python_cannot_hold_is_left_out_alone(tmp_path):
    text = pyarrow.StringArray.from_buffers(3, *(pyarrow.py_buffer(b) for b in (OFFSETS, b"ab\xffc")))
    dates = pyarrow.array([0, 0, 2**50], pyarrow.timestamp("ms"))
    path = write_table(tmp_path / "t.parquet", text=text, date=dates)
    broken = [("t:1", Left("row with a value that is broken", "t:1"))]
    assert list(parquet_rows(str(path), "t", ["text"])) == [("t:0", {"text": "ab"}), *broken, ("t:2", {"text": "c"})]
    assert [row for _, row in parquet_rows(str(path), "t", ["date"])][2] == Left(
        "row with a value that is broken", "t:2"
    )


def test_a_data_set_of_hugging_face_comes_in_parts_with_its_images_as_bytes(tmp_path):
    from datasets import Dataset, Features, Image, Value, disable_progress_bars

    disable_progress_bars()
    features, files = (
        Features({"image": Image(), "text": Value("string")}),
        [picture(c) for c in ("red", "blue", "green")],
    )
    for i in range(2):
        rows = {"image": [{"bytes": b, "path": None} for b in files], "text": [f"{i}{j}" for j in range(3)]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"train-{i}.parquet")
    name = str(tmp_path / "set")
    version, parts = describe(name)
    assert parts == 2 and describe(name + "@train") == (version, 2)
    rows = list(hf_rows(name, 1, 2, ["image", "text"]))
    assert [place for place, _ in rows] == [f"hf:{name}[1]:{j}" for j in range(3)]
    assert [(row["image"]["bytes"], row["text"]) for _, row in rows] == [(b, f"1{j}") for j, b in enumerate(files)]
    with pytest.raises(ValueError, match="no column 'caption'"):
        next(hf_rows(name, 0, 2, ["caption"]))
    with pytest.raises(ValueError, match=r"cannot be read .*: give hf:OWNER/NAME:CONFIG@SPLIT"):
        describe(name + "@gone")
    files = [tmp_path / "set" / f"train-{i}.parquet" for i in range(2)]
    files[0].write_bytes(files[1].read_bytes())
    assert describe(name)[0] != version


@pytest.mark.parametrize("package, extra", [("pyarrow", "parquet"), ("datasets", "hf")])
def test_what_has_to_be_installed_is_said(monkeypatch, tmp_path, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'transfusion\[{extra}\]'"):
        next(parquet_rows("t.parquet", "t", [])) if extra == "parquet" else describe("x")
