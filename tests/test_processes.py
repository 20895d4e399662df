import os

import pytest

from transfusion.data.processes import side_by_side


def square_or_die(n: int) -> int:
    if n == 13:
        os._exit(1)
    return n * n


def test_results_come_in_order_and_a_killed_process_is_told():
    assert list(side_by_side(square_or_die, range(5), 0)) == [0, 1, 4, 9, 16]
    found = side_by_side(square_or_die, [3, 2, 13], 2)
    with pytest.raises(ValueError, match=r"killed, most likely for want of memory: .* fewer --workers"):
        list(found)
