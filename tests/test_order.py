"""Orders: bijections of any size, each key's its own, with no pattern that a look at the places shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.data.order import key_of, shuffled


@given(st.integers(1, 300), st.integers(0, 2**64), st.integers(0, 100))
def test_an_order_has_everything_once(n, seed, epoch):
    assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_orders_of_different_keys_differ():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, "a"), (0, "b"), ("a", 0), (2**64 - 1,)]
    orders = {tuple(shuffled(i, 50, *key) for i in range(50)) for key in keys}
    assert len(orders) == len({key_of(*key) for key in keys}) == len(keys)


def test_a_key_is_the_same_in_every_process():
    assert key_of(1, "images emoji", 2) == 12332362465416449419
    assert [shuffled(i, 10, 0, "text") for i in range(10)] == [6, 9, 4, 2, 5, 0, 7, 3, 8, 1]


def test_every_place_gets_every_number_alike_often():
    n, draws = 12, 6000
    seen = np.zeros((n, n))
    for key in range(draws):
        for i in range(n):
            seen[i, shuffled(i, n, key)] += 1
    expected = draws / n
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 121 + 6 * (2 * 121) ** 0.5  # 11 x 11 degrees of freedom; six standard deviations


def test_neighbours_come_apart_as_in_a_random_order():
    for n in (1000, 1863, 10**6):
        order = np.array([shuffled(i, n, 7) for i in range(1000)])
        # |a - b| of two random places is n / 3 in the mean, with a deviation of n / sqrt(18)
        apart = np.abs(np.diff(order)).mean() / n
        assert apart == pytest.approx(1 / 3, abs=5 * (1 / 18 / len(order)) ** 0.5)
        moved = np.abs(order - np.arange(len(order))).mean() / n
        assert 0.25 < moved < 0.55
        assert np.abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15


@pytest.mark.parametrize("n", [2**40, 2**40 + 1, 10**12 - 11])
def test_an_order_of_a_trillion_costs_no_more_than_one_of_ten(n):
    places = [*range(200), *range(n - 200, n)]
    found = [shuffled(i, n, 3, 1) for i in places]
    assert len(set(found)) == len(places) and all(0 <= x < n for x in found)
    assert min(found) < n / 20 and max(found) > n * 19 / 20 and abs(np.mean(found) / n - 0.5) < 0.1


def test_there_is_no_place_beyond_the_end():
    with pytest.raises(AssertionError, match="no place 5 in an order of 5"):
        shuffled(5, 5, 0)
