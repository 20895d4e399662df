"""Sequences that grow in lanes are those laid out whole, wherever they are moved."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rows import FORMATS, document, formats, parts, seeds
from test_transformer import options, outputs, random_model, row

from transfusion.lanes import Lanes
from transfusion.model.cache import Cache
from transfusion.model.paths import Linear, is_adapter
from transfusion.model.precision import at_precision
from transfusion.sequence import NONE, lay_out


def lanes_of(fmt=FORMATS["raster"], n=4, slots=60) -> Lanes:
    return Lanes(random_model(), fmt, torch.float32, n, slots)


def stands_as(lanes: Lanes, branch, whole):
    here = (branch.lane, slice(0, branch.length))
    assert branch.length == len(whole)
    for table, want in ((lanes.tokens, whole.tokens), (lanes.image, whole.image), (lanes.place, whole.place)):
        np.testing.assert_array_equal(table[here], want)
    assert (lanes.image[branch.lane, branch.length :] == NONE).all()
    assert tuple(image.grid for image in branch.images) == whole.grids
    firsts = [int((whole.image == i).argmax()) for i in range(len(whole.grids))]
    assert [image.start for image in branch.images] == firsts
    if firsts:
        np.testing.assert_array_equal(np.concatenate([image.patches for image in branch.images]), whole.patches)


@given(seeds, formats, parts, st.data())
def test_a_document_appended_in_pieces_stands_as_the_one_laid_out_whole(seed, fmt, parts, data):
    segments = document(np.random.default_rng(seed), parts)
    lanes = LANES[fmt]
    lanes.held.clear()
    branch = lanes.take([])
    while segments:
        n = data.draw(st.integers(1, len(segments)))
        lanes.append(branch, segments[:n])
        segments = segments[n:]
    stands_as(lanes, branch, lay_out(document(np.random.default_rng(seed), parts), fmt))


LANES = {fmt: lanes_of(fmt) for fmt in FORMATS.values()}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_is_cut_off_leaves_no_trace(fmt):
    lanes, rng = lanes_of(fmt), np.random.default_rng(0)
    first, image, other = (document(rng, p) for p in ([2], [(2, 2)], [(1, 3), 4]))
    branch = lanes.take([*first, *image])
    branch.settled = branch.length
    lanes.cut(branch, 2)
    assert branch.settled == 2
    lanes.append(branch, other)
    stands_as(lanes, branch, lay_out([*first, *other], fmt))


def test_branches_that_move_side_by_side_take_along_all_that_they_have_and_few_move():
    lanes, rng = lanes_of(n=6), np.random.default_rng(0)
    documents = [document(rng, p) for p in ([3], [1, (2, 2)], [5], [2, (1, 1)], [4])]
    branches = [lanes.take(d) for d in documents]
    for i, branch in enumerate(branches):
        branch.settled = branch.length
        for x in (*lanes.cache.k, *lanes.cache.v):
            x[branch.lane, :, : branch.length] = i
    lanes.release(branches[:1])
    a, b, c, d = branches[1:]
    lanes.arrange([[b, d], [a, c]])
    assert {b.lane, d.lane} == {0, 1} and {a.lane, c.lane} == {2, 3} and c.lane == 3, "which stood where it may"
    for i, branch in enumerate(branches[1:], 1):
        stands_as(lanes, branch, lay_out(documents[i], lanes.fmt))
        assert all((x[branch.lane, :, : branch.length] == i).all() for x in (*lanes.cache.k, *lanes.cache.v))
    grown = lanes.grown(7, 80)
    stands_as(grown, a, lay_out(documents[1], lanes.fmt))
    assert (grown.cache.k[0][a.lane, :, : a.length] == 1).all() and grown.take([]).lane == 4


def test_a_lane_that_is_taken_again_holds_nothing_of_who_had_it_before():
    lanes = lanes_of()
    branch = lanes.take([])
    for x in (*lanes.cache.k, *lanes.cache.v):
        x[branch.lane] = torch.nan  # of a drawing that diverged
    lanes.release([branch])
    assert lanes.take([]).lane == branch.lane
    assert all((x[branch.lane] == 0).all() for x in (*lanes.cache.k, *lanes.cache.v))


def test_neighbouring_lanes_are_read_where_they_are_and_others_as_a_copy_of_the_same():
    cache = Cache(1, 5, 2, 7, 4, device="cpu", dtype=torch.float32)
    cache.k[0].normal_(), cache.v[0].normal_()
    new, slots = torch.randn(2, 2, 3, 4), torch.tensor([[1, 2, 3], [4, 5, 7]])
    for lanes, copied in (([2, 3], False), ([3, 2], True), ([0, 4], True)):
        (layer,) = cache.at(lanes, slots, 6)
        k, v = layer.extend(new, -new)
        assert (k.untyped_storage().data_ptr() != cache.k[0].untyped_storage().data_ptr()) == copied
        assert torch.equal(k, cache.k[0][lanes, :, :6]) and torch.equal(v, cache.v[0][lanes, :, :6])
        assert torch.equal(k[0, :, 1:4], new[0]) and torch.equal(v[1, :, 4:6], -new[1, :, :2])


@options
@torch.no_grad()
def test_the_stacked_matrices_of_a_model_in_half_precision_answer_as_each_by_itself(options):
    model = random_model(**options)
    half = at_precision(model, torch.bfloat16)
    stacked = [m for m in half.modules() if isinstance(m, Linear) and m.stacked is not None]
    parts = [(layer.attention, layer.feed_forward) for layer in model.layers]
    groups = [group for a, f in parts for group in ((a.wq, a.wk, a.wv), (f.w1, f.w3))]
    adapted = [any(is_adapter(name) for w in group for name, _ in w.named_parameters()) for group in groups]
    assert len(stacked) == adapted.count(False)
    b, z, t = row(options)
    found = outputs(half, b, z, t)
    for linear in stacked:
        linear.stacked = None
    for together, alone in zip(found, outputs(half, b, z, t)):
        assert (together - alone).abs().max() <= 1e-2 * alone.abs().max()


def test_a_model_in_half_precision_has_matrices_of_its_own_and_shares_norms_and_embeddings():
    model = random_model(refine_width=4)
    assert at_precision(model, torch.float32) is model
    half = at_precision(model, torch.bfloat16)
    full = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert full == {n for n, _ in model.named_parameters() if "norm" in n or n.startswith("tok_embeddings")}
    for (name, p), q in zip(model.named_parameters(), half.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p.to(q.dtype), q), name
        assert (p is q) == (name in full), name
