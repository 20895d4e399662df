import os
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from shard_files import picture, write_tar

from transfusion.data.shards import braces, find_shards


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(kind, source) -> list[tuple[str, str]]:
    return [(shard.form, shard.name) for shard in find_shards(kind, str(source))]


def test_braces_count_with_as_many_digits_as_they_are_written_with():
    assert list(braces("s3://b/{008..010}.tar")) == ["s3://b/008.tar", "s3://b/009.tar", "s3://b/010.tar"]
    assert list(braces("{0..1}/{0..1}")) == ["0/0", "0/1", "1/0", "1/1"]
    assert list(braces("plain{}.tar")) == ["plain{}.tar"]


def test_a_folder_is_its_tars_or_its_tables_or_one_shard_of_what_lies_loose(tmp_path):
    touch(tmp_path, "loose/a.png", "loose/a.txt")
    assert found("images", tmp_path) == [("folder", "")]
    touch(tmp_path, "tables/1.parquet", "tables/.hidden.parquet")
    assert found("images", tmp_path) == [("parquet", "tables/1.parquet")]
    touch(tmp_path, "b.tar", "a.TAR")
    assert found("images", tmp_path) == [("tar", "a.TAR"), ("tar", "b.tar")]
    assert found("images", tmp_path / "{1..1}.tar".replace("{1..1}", "b")) == [("tar", "b.tar")]
    assert found("images", f"file://{tmp_path}/b.tar") == [("tar", "b.tar")]


def test_text_is_lines_and_tables_each_a_shard_and_all_txt_of_a_folder_in_one(tmp_path):
    touch(tmp_path, "a.txt", "deep/b.txt", "c.jsonl", "d.jsonl.gz", "e.parquet", "f.png")
    forms = [("jsonl", "c.jsonl"), ("jsonl", "d.jsonl.gz"), ("parquet", "e.parquet"), ("txt", "")]
    assert found("text", tmp_path) == forms
    assert found("text", tmp_path / "a.txt") == [("txt", "a.txt")]


def test_documents_are_files_of_their_name_in_a_folder_or_any_that_is_named(tmp_path):
    touch(tmp_path, "documents.jsonl", "deep/documents.jsonl", "metadata.jsonl", "t.parquet", "a.png")
    names = [("jsonl", "deep/documents.jsonl"), ("jsonl", "documents.jsonl"), ("parquet", "t.parquet")]
    assert found("documents", tmp_path) == names
    assert found("documents", tmp_path / "metadata.jsonl") == [("jsonl", "metadata.jsonl")]


def test_a_shard_that_changes_gets_another_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": picture()})
    (before,) = find_shards("images", str(path))
    assert find_shards("images", str(path)) == [before]
    os.utime(path, ns=(1, 1))
    (after,) = find_shards("images", str(path))
    assert after.key != before.key
    touch(tmp_path / "loose", "a.png")
    (before,) = find_shards("images", str(tmp_path / "loose"))
    touch(tmp_path / "loose", "b.txt")
    assert find_shards("images", str(tmp_path / "loose")) != [before]


@pytest.mark.parametrize("kind", ["images", "text", "documents"])
def test_a_source_that_is_none_is_refused_with_what_would_be_one(tmp_path, kind):
    touch(tmp_path, "file.xyz")
    for source, why in (
        ("", "nothing to read in"),
        ("gone", "not there"),
        ("file.xyz", "of no form"),
        ("{0..1}.parquet", ""),
    ):
        with pytest.raises(ValueError, match=f"{why}.*: (give|name) "):
            find_shards(kind, str(tmp_path / source))
    with pytest.raises(ValueError, match="choose one of images, text, documents"):
        find_shards("sounds", str(tmp_path))


def test_shards_elsewhere_are_asked_for_side_by_side_and_a_folder_by_its_list(monkeypatch):
    store, together = fsspec.filesystem("memory"), threading.Barrier(4)
    store.pipe({f"/shards/{i}.tar": b"x" * i for i in range(1, 5)})
    asks = MemoryFileSystem.info

    def info(self, path, **options):
        together.wait(timeout=20)  # which one after the other would never pass
        return asks(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    try:
        one_by_one = find_shards("images", "memory://shards/{1..4}.tar")
        monkeypatch.setattr(MemoryFileSystem, "info", None)  # of files of a folder nothing more is asked
        assert find_shards("images", "memory://shards") == one_by_one and [s.bytes for s in one_by_one] == [1, 2, 3, 4]
    finally:
        monkeypatch.undo()
        store.rm("/shards", recursive=True)
