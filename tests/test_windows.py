"""Text: windows of an epoch cover the stream, gaps are filled by lengths alone, documents keep to their room."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_documents import SPECIAL

from transfusion.data.windows import LEAST_TEXT, Stream, Windows, cut_to_gaps, text_documents


def stream_of(*works, name="text here") -> Stream:
    return Stream(name, np.array([id for work in works for id in (*work, SPECIAL.eos)]), len(works))


# ---- windows of a stream ----


def test_windows_of_an_epoch_read_every_token_once_but_for_the_rest_of_the_division():
    windows = Windows([stream_of(range(10, 1010))], 64)
    stream, n = windows.streams[0], len(windows.streams[0].ids) // 64
    for epoch in range(5):
        read = np.concatenate([windows.read(0, 0, k, 0, 64) for k in range(epoch * n, (epoch + 1) * n)])
        assert len(set(read.tolist())) == len(read) == n * 64 <= len(stream.ids)


def test_the_grid_of_windows_and_their_order_are_the_epochs_own():
    windows = Windows([stream_of(range(10, 1010))], 64)
    firsts = [[int(windows.read(0, 0, k, 0, 1)[0]) for k in range(e * 15, (e + 1) * 15)] for e in range(6)]
    assert len({first[0] % 64 for first in firsts}) > 1 and all(first != sorted(first) for first in firsts)
    assert firsts != [[int(windows.read(1, 0, k, 0, 1)[0]) for k in range(e * 15, (e + 1) * 15)] for e in range(6)]


def test_a_stream_shorter_than_the_window_goes_round():
    windows = Windows([stream_of([10, 11, 12])], 50)
    ids = windows.read(0, 0, 3, 0, 50)
    assert len(ids) == 50 and windows.mixture.sizes == (1,)
    assert (ids[4:] == ids[:-4]).all() and set(ids.tolist()) == {10, 11, 12, SPECIAL.eos}


def test_a_stream_can_be_mapped_from_a_file_in_any_width(tmp_path):
    ids = stream_of(range(10, 900)).ids
    for kind in (np.uint16, np.uint32):
        ids.astype(kind).tofile(tmp_path / "ids.bin")
        mapped = Windows([Stream("here", np.memmap(tmp_path / "ids.bin", kind, "r"), 1)], 33)
        for k in (0, 5, 26, 27, 100):
            read = mapped.read(0, 0, k, 7, 90)
            assert read.dtype == np.int64
            assert read.tolist() == Windows([Stream("here", ids, 1)], 33).read(0, 0, k, 7, 90).tolist()


# ---- into gaps ----

rooms = st.lists(st.integers(0, 64), min_size=1, max_size=12).filter(lambda rooms: max(rooms) >= LEAST_TEXT)


@given(rooms, st.integers(0, 10**9), st.integers(1, 500), st.integers(1, 80))
def test_gaps_are_filled_to_within_the_least_text_and_no_token_twice(rooms, start, n, window):
    filled = cut_to_gaps(rooms, start, n, window)
    assert len(filled) == len(rooms)
    read = []
    for room, parts in zip(rooms, filled):
        left = room - sum(part.n + 1 for part in parts)
        assert 0 <= left < LEAST_TEXT and all(part.n > 0 for part in parts)
        read += [(part.window, part.at + i) for part in parts for i in range(part.n)]
    assert len(set(read)) == len(read)
    within = [(w, at) for w, at in read if at < window and start <= w * window + at < start + n]
    beyond = len(read) - len(within)
    if beyond:  # all of the pack's own text is read first, but for single tokens where a document would be one token
        assert len(within) >= n - (n // window + 2)


def test_an_empty_row_is_one_window_whatever_the_other_gaps():
    filled = cut_to_gaps([10, 64, 0, 64, 20, 64, 30], start=5 * 63 + 20, n=4 * 63, window=63)
    whole = [filled[row] for row in (1, 3, 5)]
    assert [[(part.at, part.n) for part in parts] for parts in whole] == [[(0, 63)]] * 3
    # 126 + 20 tokens are before the first and behind the last whole window; a gap under LEAST_TEXT stays
    assert [sum(part.n + 1 for part in filled[row]) for row in (0, 4, 6)] == [10, 15, 30] and not filled[2]


def test_what_a_pack_lacks_it_reads_on_behind_its_end():
    filled = cut_to_gaps([64, 64], start=0, n=70, window=63)
    assert filled == [[(0, 0, 63)], [(1, 0, 63)]]
    filled = cut_to_gaps([64, 64], start=0, n=63, window=63)
    assert filled == [[(0, 0, 63)], [(0, 63, 63)]]


# ---- documents ----


def test_parts_begin_with_bos_keep_to_their_room_and_end_where_a_text_ends():
    rng = np.random.default_rng(0)
    ids = stream_of(*(rng.integers(10, 99, n).tolist() for n in (1, 2, 2, 3, 5, 40, 80))).ids
    stream = [*ids.tolist()] * 2
    for start in range(len(ids)):
        for n in range(1, 45):
            documents = [d[0].ids.tolist() for d in text_documents(np.array(stream[start : start + n]), SPECIAL)]
            assert sum(map(len, documents)) <= n + 1
            for document in documents:
                assert document[0] == SPECIAL.bos and len(document) > 2 and SPECIAL.eos not in document[:-1]
                assert any(stream[i : i + len(document) - 1] == document[1:] for i in range(start, start + n))


def test_sources_take_turns_by_the_weights_of_their_tokens():
    streams = [stream_of(range(10, 500)), stream_of(range(1000, 9000), name="text there")]
    even = Windows(streams, 20, (1.0, 1.0)).mixture
    assert even.taken(1000) == [500, 500] and even.names == ("text here", "text there")
    assert Windows(streams, 20).mixture.taken(24 + 400) == [24, 400]
    with pytest.raises(ValueError, match="text empty has nothing to train on"):
        Windows([*streams, replace(stream_of(), name="text empty")], 20, (1.0, 1.0, 1.0)).mixture.taken(1)
