"""The contract: patches and back, who is a target, who stands where, and rows that hold whole documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_rows import (
    FORMATS,
    PATCH_SIZE,
    SPECIAL,
    VOCAB,
    document,
    formats,
    grids,
    packed,
    parts,
    rows_of_parts,
    seeds,
)

from transfusion.sequence import (
    NONE,
    Codes,
    Format,
    Image,
    Text,
    collate,
    first_fit,
    image_length,
    lay_out,
    patchify,
    unpatchify,
)

lengths = st.lists(st.integers(1, 20), max_size=30)


# -- patches


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_undoes_patchify(seed, k, c, rows, columns):
    latents = np.random.default_rng(seed).standard_normal((c, rows * k, columns * k), np.float32)
    patches = patchify(latents, k)
    assert patches.shape == (rows * columns, k * k * c)
    np.testing.assert_array_equal(unpatchify(patches, k, rows * k, columns * k), latents)


def test_patches_come_in_raster_order_with_the_channel_last():
    latents = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    patches = patchify(latents, 2)
    for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        cells = [latents[:, 2 * row + y, 2 * column + x] for y in range(2) for x in range(2)]
        np.testing.assert_array_equal(patches[n], np.concatenate(cells))


def test_an_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="5 x 4 latent cells does not divide into 2 x 2 patches: resize"):
        patchify(np.zeros((3, 5, 4)), 2)


def test_unknown_image_positions_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="raster, axial"):
        Format(SPECIAL, 2, "spiral")


# -- lay_out against the recipe's words


def read_by_hand(document, k):
    """(tokens, kind of each, image of each, patches): position by position, as the recipe tells it."""
    tokens, kinds, image, patches, n_images = [], [], [], [], 0
    for segment in document:
        if isinstance(segment, Text):
            for i in segment.ids:
                tokens.append(int(i)), kinds.append("text"), image.append(NONE)
            continue
        tokens.append(SPECIAL.boi), kinds.append("boi"), image.append(NONE)
        _, h, w = segment.latents.shape
        for y in range(0, h, k):
            for x in range(0, w, k):
                tokens.append(SPECIAL.patch), kinds.append("patch"), image.append(n_images)
                cells = segment.latents[:, y : y + k, x : x + k]
                patches.append([cells[c, i, j] for i in range(k) for j in range(k) for c in range(len(cells))])
        tokens.append(SPECIAL.eoi), kinds.append("eoi"), image.append(NONE)
        n_images += 1
    return tokens, kinds, image, patches


@given(seeds, parts, formats)
def test_lay_out_writes_what_the_recipe_says(seed, parts, fmt):
    doc = document(np.random.default_rng(seed), parts)
    s = lay_out(doc, fmt)
    tokens, kinds, image, patches = read_by_hand(doc, PATCH_SIZE)
    assert s.tokens.tolist() == tokens and s.image.tolist() == image and len(s) == len(tokens)
    assert s.patches.tolist() == [[float(v) for v in p] for p in patches] or not patches
    assert s.t_max.tolist() == [segment.t_max for segment in doc if isinstance(segment, Image)]
    for i, target in enumerate(s.target.tolist()):
        if i == len(tokens) - 1:
            assert target == NONE, "nothing follows the last position"
        elif kinds[i] in ("boi", "patch"):
            assert target == NONE, "no loss where the input is BOI or a patch"
        else:
            assert target == tokens[i + 1], "the next token, BOI too"
    assert SPECIAL.eoi not in s.target and SPECIAL.patch not in s.target


def test_the_drawing_at_the_top_of_the_file_is_what_lay_out_does():
    apple = Image(np.zeros((3, 4, 4), np.float32))
    s = lay_out([Text(np.array([SPECIAL.bos, 7, 8, 9])), apple, Text(np.array([SPECIAL.eos]))], FORMATS["raster"])
    assert s.tokens.tolist() == [1, 7, 8, 9, 3, 5, 5, 5, 5, 4, 2]
    assert s.image.tolist() == [-1] * 5 + [0] * 4 + [-1] * 2
    assert s.target.tolist() == [7, 8, 9, 3, -1, -1, -1, -1, -1, 2, -1]


def test_an_empty_document_has_no_positions():
    s = lay_out([], FORMATS["raster"])
    assert len(s) == 0 and s.place.shape == (0, 4)


# -- places


@given(seeds, parts, formats)
def test_every_position_has_a_place_of_its_own(seed, parts, fmt):
    s = lay_out(document(np.random.default_rng(seed), parts), fmt)
    assert len({tuple(p) for p in s.place[:, :2].tolist()}) == len(s)


@given(seeds, parts)
def test_raster_places_count_positions(seed, parts):
    s = lay_out(document(np.random.default_rng(seed), parts), FORMATS["raster"])
    np.testing.assert_array_equal(s.place[:, :2], np.arange(len(s))[:, None].repeat(2, 1))


@given(seeds, parts)
def test_axial_places_are_rows_and_columns_and_text_goes_on_behind_the_larger_side(seed, parts):
    s = lay_out(document(np.random.default_rng(seed), parts), FORMATS["axial"])
    wanted, at = [], 0
    for part in parts:
        if isinstance(part, int):
            wanted += [(at + i, at + i) for i in range(part)]
            at += part
        else:
            rows, columns = part
            wanted += [(at, at)]  # <boi>
            wanted += [(at + 1 + row, at + 1 + column) for row in range(rows) for column in range(columns)]
            at += 1 + max(part)
            wanted += [(at, at)]  # <eoi>
            at += 1
    assert [tuple(p) for p in s.place[:, :2].tolist()] == wanted


@given(seeds, parts, formats)
def test_patches_know_their_row_and_column_and_text_has_none(seed, parts, fmt):
    s = lay_out(document(np.random.default_rng(seed), parts), fmt)
    images = [part for part in parts if not isinstance(part, int)]
    wanted = [[row, column] for rows, columns in images for row in range(rows) for column in range(columns)]
    assert s.place[s.image != NONE][:, 2:].tolist() == wanted
    assert not s.place[s.image == NONE][:, 2:].any()


@given(seeds, parts, parts, formats)
def test_what_comes_later_changes_nothing_before_it_but_the_last_target(seed, parts, more, fmt):
    doc = document(np.random.default_rng(seed), parts)
    short, long = lay_out(doc, fmt), lay_out([*doc, *document(np.random.default_rng(0), more)], fmt)
    n = len(short)
    for name in ("tokens", "image", "place"):
        np.testing.assert_array_equal(getattr(long, name)[:n], getattr(short, name))
    np.testing.assert_array_equal(long.target[: n - 1], short.target[: n - 1])
    np.testing.assert_array_equal(long.patches[: len(short.patches)].reshape(-1), short.patches.reshape(-1))


@given(grids, formats, st.sampled_from([0, 3]), st.booleans())
def test_image_length_is_the_length_that_lay_out_gives(grid, fmt, sides, copy):
    fmt = replace(fmt, text_tokens=VOCAB, sides=sides)
    image = document(np.random.default_rng(0), [(*grid, "copy") if copy else grid])
    assert image_length(grid, fmt, copy) == len(lay_out(image, fmt))


# -- variants of an image

IDS = Format(SPECIAL, PATCH_SIZE, text_tokens=40, sides=3, codes=9)
WORD, DOG, CAT = (Text(np.array(ids)) for ids in ([7], [8, 9], [10]))


def latents(rows=2, columns=1, value=1.0):
    return np.full((3, rows * PATCH_SIZE, columns * PATCH_SIZE), value, np.float32)


def test_a_size_is_written_as_two_targets_before_the_image():
    s = lay_out([WORD, Image(latents()), DOG], replace(IDS, codes=0))
    assert s.tokens.tolist() == [7, 3, 41, 40, 5, 5, 4, 8, 9]  # <boi> <2> <1> # # <eoi>
    assert s.target.tolist() == [3, 41, 40, -1, -1, -1, 8, 9, -1]
    with pytest.raises(ValueError, match=r"a side of 4 patches cannot be written: model.sides = 3"):
        lay_out([Image(latents(4))], IDS)


def test_a_clean_copy_stands_behind_the_image_at_its_places_and_the_noised_one_is_hidden():
    for fmt in FORMATS.values():
        s = lay_out([WORD, Image(latents(), 0.5, copy=True), DOG], fmt)
        plain = lay_out([WORD, Image(latents(), 0.5), DOG], fmt)
        assert s.tokens.tolist() == [7, 3, 5, 5, 5, 5, 4, 8, 9]
        assert s.image.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, -1]
        assert s.hidden.tolist() == [False, False, True, True] + [False] * 5
        assert s.t_max.tolist() == [0.5, 0.0] and s.grids == ((2, 1), (2, 1)) and len(s.patches) == 4
        assert s.place[[0, 1, 2, 3, 6, 7, 8]].tolist() == plain.place.tolist()
        assert s.place[4:6].tolist() == s.place[2:4].tolist()
        assert [t for t in s.target.tolist() if t != NONE] == [t for t in plain.target.tolist() if t != NONE]


def test_what_is_given_is_no_target_and_what_follows_it_is():
    given = Image(latents(), 0.0)
    s = lay_out([WORD, given, Text(np.array([8, 9]), learn=False), Image(latents()), CAT], IDS)
    tokens = s.tokens.tolist()
    assert [(i, t) for i, t in enumerate(s.target.tolist()) if t != NONE] == [
        (tokens.index(9), 3), (tokens.index(9) + 1, 41), (tokens.index(9) + 2, 40), (len(s) - 2, 10)
    ]  # fmt: skip
    batch = collate([[s]], len(s), IDS)
    assert batch.n_images == 1 and batch.t_max.tolist() == [0.0, 1.0]


def test_codes_are_causal_tokens_and_targets_from_boi_on_at_the_places_of_patches():
    codes = np.array([[3, 0], [8, 1]])
    for fmt, patches in ((replace(IDS, sides=0, image_positions=name), FORMATS[name]) for name in FORMATS):
        s = lay_out([WORD, Codes(codes), CAT], fmt)
        assert s.tokens.tolist() == [7, 3, 43, 40, 48, 41, 4, 10]
        assert s.target.tolist() == [3, 43, 40, 48, 41, -1, 10, -1]
        assert (s.image == NONE).all() and not s.patches.size and s.grids == ()
        assert s.place.tolist() == lay_out([WORD, Image(latents(2, 2)), CAT], patches).place.tolist()
    given = lay_out([WORD, Codes(codes, learn=False), CAT], fmt)
    assert given.target.tolist() == [-1] * 6 + [10, -1]


def test_ids_of_text_sides_and_codes_follow_each_other():
    assert [IDS.side(n) for n in (1, 3)] == [40, 42] and IDS.first_code == 43 and IDS.vocab_size == 52


# -- packing


@given(lengths, st.integers(1, 6), st.integers(1, 25))
def test_first_fit_never_overfills_a_row_and_accounts_for_every_item_once(lengths, rows, seq_len):
    placed, left_over = first_fit(lengths, rows, seq_len)
    assert len(placed) == rows
    assert sorted([i for row in placed for i in row] + left_over) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= seq_len for row in placed)


@given(lengths, st.integers(1, 6), st.integers(1, 25))
def test_first_fit_leaves_over_only_what_fits_in_no_row(lengths, rows, seq_len):
    placed, left_over = first_fit(lengths, rows, seq_len)
    free = [seq_len - sum(lengths[i] for i in row) for row in placed]
    assert all(lengths[i] > max(free) for i in left_over)


@given(lengths, st.integers(1, 25))
def test_first_fit_places_everything_where_every_item_could_have_a_row(lengths, seq_len):
    _, left_over = first_fit(lengths, max(1, len(lengths)), seq_len)
    assert sorted(left_over) == [i for i, n in enumerate(lengths) if n > seq_len]


@given(lengths, st.integers(1, 6), st.integers(1, 25))
def test_first_fit_is_a_function_of_the_lengths_and_ties_keep_their_order(lengths, rows, seq_len):
    placed, left_over = first_fit(iter(lengths), rows, seq_len)
    assert (placed, left_over) == first_fit(lengths, rows, seq_len)
    for row in [*placed, left_over]:
        assert row == sorted(row, key=lambda i: (-lengths[i], i))


# -- collate


@given(seeds, rows_of_parts, formats, st.integers(0, 5))
def test_every_document_stands_whole_in_its_row(seed, rows, fmt, padding):
    rng = np.random.default_rng(seed)
    sequences = [[lay_out(document(rng, parts), fmt) for parts in row] for row in rows]
    L = max(sum(map(len, row)) for row in sequences) + padding
    assume(L)
    b = collate(sequences, L, fmt)
    target = torch.full((len(rows) * L,), NONE).index_copy(0, b.text_at, b.target).view(len(rows), L)
    patches = iter(b.patches.numpy())
    for r, row in enumerate(sequences):
        at, images = 0, 0
        for d, s in enumerate(row):
            here = (r, slice(at, at + len(s)))
            assert (b.document[here] == d).all()
            np.testing.assert_array_equal(b.tokens[here], s.tokens)
            np.testing.assert_array_equal(b.place[here], s.place)
            np.testing.assert_array_equal(target[here], s.target)
            np.testing.assert_array_equal(b.image[here] == NONE, s.image == NONE)
            for patch in s.patches:
                np.testing.assert_array_equal(next(patches), patch)
            at, images = at + len(s), images + len(s.t_max)
        rest = (r, slice(at, L))
        assert (b.document[rest] == NONE).all() and (b.image[rest] == NONE).all() and (target[rest] == NONE).all()
        assert (b.tokens[rest] == SPECIAL.pad).all()
        assert b.images_in_row[r] == images
    assert next(patches, None) is None


@given(seeds, rows_of_parts, formats)
def test_flat_indices_name_the_patches_and_images_are_numbered_as_they_stand(seed, rows, fmt):
    assume(any(row for row in rows))
    b = packed(seed, rows, fmt)
    image = b.image.flatten()
    assert b.patch_at.tolist() == (b.tokens.flatten() == SPECIAL.patch).nonzero()[:, 0].tolist()
    assert b.patch_image.tolist() == image[b.patch_at].tolist() == sorted(b.patch_image.tolist())
    grids = [part for row in rows for parts in row for part in parts if not isinstance(part, int)]
    assert b.patch_image.bincount(minlength=len(grids)).tolist() == [r * c for r, c in grids]
    assert b.n_images == len(grids) == sum(b.images_in_row) and b.grids == tuple(grids)
    assert len(b.patches) == len(b.patch_at) == sum(r * c for r, c in b.grids)
    assert b.n_targets == len(b.text_at) == len(b.target)


def test_the_noise_limits_of_a_batch_stand_in_the_order_of_its_images():
    latents = np.zeros((3, 2, 2), np.float32)
    docs = [[Image(latents, t), Text(np.array([7]))] for t in (0.5, 1.0, 0.25)]
    a, b, c = (lay_out(d, FORMATS["raster"]) for d in docs)
    assert collate([[b], [], [a, c]], 12, FORMATS["raster"]).t_max.tolist() == [1.0, 0.5, 0.25]


def test_a_row_that_is_too_short_for_its_documents_is_our_mistake():
    s = lay_out([Text(np.arange(6, 12))], FORMATS["raster"])
    with pytest.raises(AssertionError, match="row 0 holds 12 positions"):
        collate([[s, s]], 11, FORMATS["raster"])


@settings(max_examples=20)
@given(seeds, rows_of_parts)
def test_moving_a_batch_to_the_device_it_is_on_changes_nothing(seed, rows):
    b = packed(seed, rows)
    moved = b.to("cpu")
    assert moved.images_in_row == b.images_in_row
    assert torch.equal(moved.tokens, b.tokens) and torch.equal(moved.patches, b.patches)
