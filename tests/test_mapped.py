import os
import pickle
import zlib

import numpy as np
import pytest

from transfusion.data import mapped
from transfusion.data.mapped import Growing, Mapped, fingerprint, publish, save


@pytest.mark.parametrize("pieces", [[], [[]], [[3]], [[1, 2], [], [3, 65535]], [range(1000)] * 3])
def test_what_grew_piece_by_piece_is_what_numpy_reads(tmp_path, pieces, monkeypatch):
    monkeypatch.setattr(mapped, "CHUNK", 7)  # so that a piece takes several
    with Growing(tmp_path / "a.npy", "<u2") as file:
        for piece in pieces:
            file.append(list(piece))
    whole = [x for piece in pieces for x in piece]
    assert np.load(tmp_path / "a.npy").tolist() == whole and np.load(tmp_path / "a.npy").dtype == np.uint16
    assert Mapped(tmp_path / "a.npy").array.tolist() == whole and len(Mapped(tmp_path / "a.npy")) == len(whole)


def test_a_map_travels_as_the_name_of_its_file(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100_000))
    here = Mapped(tmp_path / "a.npy")
    assert here.array[7] == 7  # opened, and yet
    sent = pickle.dumps(here)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert isinstance(there.array, np.memmap) and there.array[99_999] == 99_999


def test_what_is_published_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, synced, syncs, moves = [], [], mapped.sync, os.replace
    monkeypatch.setattr(mapped, "sync", lambda path: done.append(str(path)) or syncs(path))
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"{a} -> {b}") or moves(a, b))
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (tmp_path / "new" / name).write_text(name)
    publish(tmp_path / "new", tmp_path / "final")
    new = str(tmp_path / "new")
    assert set(done[:4]) == {new, f"{new}/a", f"{new}/deep", f"{new}/deep/b"}
    assert done[4:] == [f"{new} -> {tmp_path / 'final'}", str(tmp_path)]
    assert (tmp_path / "final" / "deep" / "b").read_text() == "deep/b" and len(synced) == 5


def test_a_file_whose_writing_fails_leaves_the_one_before(tmp_path):
    save(tmp_path / "a", lambda out: out.write(b"whole"))

    def fails(out):
        out.write(b"ha")
        raise OSError("no space left")

    with pytest.raises(OSError):
        save(tmp_path / "a", fails)
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_fingerprint_is_the_size_and_the_checksum_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "CHUNK", 7)
    (tmp_path / "a").write_bytes(b"0123456789" * 5)
    assert fingerprint(tmp_path / "a") == [50, zlib.crc32(b"0123456789" * 5)]
