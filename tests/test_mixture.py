"""Mixtures: shares hold over every stretch, everything comes once an epoch of its source, from anywhere at no cost."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.data.mixture import Mixture, mixture, names_of

shares = st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any)


def of_shares(shares) -> Mixture:
    return Mixture(tuple(f"source {i}" for i in range(len(shares))), tuple(shares), tuple(shares))


@given(shares, st.integers(0, 10**15))
def test_documents_are_counted_as_they_are_drawn(shares, start):
    mix, counts = of_shares(shares), of_shares(shares).taken(start)
    for k in range(start, start + 60):
        source, number = mix.draw(k)
        assert number == counts[source] and shares[source]
        counts[source] += 1
        assert mix.taken(k + 1) == counts and sum(counts) == k + 1


@given(shares, st.integers(0, 1000), st.integers(0, 1000))
def test_every_stretch_has_the_shares_of_the_whole_to_within_a_document_a_source(shares, start, n):
    mix, total = of_shares(shares), sum(shares)
    found = [b - a for a, b in zip(mix.taken(start), mix.taken(start + n))]
    assert all(abs(count - Fraction(n * share, total)) < 1 + len(shares) for count, share in zip(found, shares))


@given(shares, st.integers(0, 10**6))
def test_without_weights_an_epoch_of_all_is_an_epoch_of_each(sizes, epoch):
    mix = mixture([str(i) for i in range(len(sizes))], sizes, (), [1.0] * len(sizes))
    assert mix.taken(epoch * sum(sizes)) == [epoch * size for size in sizes]


def test_weights_share_out_positions_whatever_the_sources_sizes_and_lengths():
    mix = mixture(["short", "none", "long"], [10, 5, 10**9], (3.0, 0.0, 1.0), [20.0, 7.0, 200.0])
    short, none, long = mix.taken(10**6)
    assert none == 0 and 20 * short / (20 * short + 200 * long) == pytest.approx(0.75, abs=1e-5)


def test_sources_are_named_by_the_ends_of_their_paths_as_far_as_these_differ():
    assert names_of("images", ["emoji:base", "/data/cc/train/", "my/coco/train", "my/coco/val"]) == [
        "images emoji:base",
        "images cc/train",
        "images coco/train",
        "images val",
    ]
    assert names_of("text", ["/a", "b/a"]) == ["text /a", "text b/a"]
    assert names_of("text", ()) == []


def test_a_weight_of_a_source_without_documents_is_refused():
    with pytest.raises(ValueError, match="text b has nothing to train on, and a weight of 2: set that to 0"):
        mixture(["text a", "text b"], [3, 0], (1.0, 2.0), [1.0, 1.0])
