"""Images by number: several sources are one sequence, each asked once for what it holds."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.data.arrays import Held, Joined


class Asked(Held):
    """Images that count how often they are asked, and of which those of an odd number cannot be read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.calls = []

    def read(self, numbers):
        self.calls.append(list(numbers))
        return [f"{i} is broken" if i % 2 else self.arrays[i] for i in numbers]


@given(st.lists(st.lists(st.integers(), max_size=4), max_size=5), st.integers(-25, 25))
def test_joined_parts_are_what_one_list_would_be(parts, i):
    joined, flat = Joined(parts), [x for part in parts for x in part]
    assert len(joined) == len(flat) and list(joined) == flat
    if -len(flat) <= i < len(flat):
        assert joined[i] == flat[i]
    else:
        with pytest.raises(IndexError):
            joined[i]


def test_each_part_is_asked_once_and_what_it_lacks_comes_back_in_words():
    a, b, c = (Asked([np.full((2, n), 10 * n + i) for i in range(3)]) for n in (1, 2, 3))
    found = Joined([a, b, c]).read([4, 0, 8, 1, 6, 0])
    assert (a.calls, b.calls, c.calls) == ([[0, 1, 0]], [[1]], [[2, 0]])
    assert [x if isinstance(x, str) else int(x[0, 0]) for x in found] == ["1 is broken", 10, 32, "1 is broken", 30, 10]
    assert Joined([a, b]).read([]) == [] and len(b.calls) == 1


def test_sizes_are_known_by_number_and_go_to_other_processes():
    joined = Joined([Held(np.zeros((3, 4, 6, 3), np.uint8)), Held([np.zeros((2, 5, 3), np.uint8)])])
    assert [pickle.loads(pickle.dumps(joined)).shape(i) for i in (0, 2, 3)] == [(4, 6), (4, 6), (2, 5)]
