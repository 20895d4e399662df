import pickle

import numpy as np
import pytest

from transfusion.data import mapped
from transfusion.data.mapped import Growing, Mapped


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
