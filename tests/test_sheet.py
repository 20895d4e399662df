"""Contact sheets: every picture and caption is on them, in order."""

import numpy as np
import PIL.Image
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from transfusion.sheet import CELL, FONT, contact_sheet, stack, wrap

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


def flat(colour, size=8):
    return np.full((size, size, 3), colour, np.uint8)


def found(sheet: PIL.Image.Image, colour) -> tuple[int, int]:
    """(row, column) of the top left pixel of a colour that fills a whole cell."""
    there = (np.asarray(sheet) == colour).all(-1)
    assert there.sum() == CELL * CELL
    return tuple(int(i) for i in np.argwhere(there)[0])


def test_pictures_stand_in_reading_order_item_by_item():
    items = [(f"caption {i}", [flat(c)]) for i, c in enumerate(COLOURS)]
    sheet = contact_sheet(items, columns=2)
    places = [found(sheet, c) for c in COLOURS]
    assert places == sorted(places)
    assert len({row for row, _ in places}) == 3 and len({column for _, column in places}) == 2


def test_pictures_of_an_item_stand_side_by_side_over_its_caption():
    sheet = contact_sheet([("drawn and real", [flat(COLOURS[0]), PIL.Image.fromarray(flat(COLOURS[1], 300))])])
    (row, column), (row2, column2) = (found(sheet, c) for c in COLOURS[:2])
    assert row == row2 and column2 == column + CELL
    below = np.asarray(sheet)[row + CELL :]
    assert (below < 128).all(-1).any() and (np.asarray(sheet)[:row] == 255).all()


def test_a_title_stands_above_all():
    plain, titled = (contact_sheet([("a", [flat(COLOURS[0])])], title=title) for title in ("", "step 100"))
    above = titled.height - plain.height
    assert above > 0 and (np.asarray(titled)[:above] < 128).all(-1).any()


def test_long_captions_are_cut_at_spaces_into_lines_that_fit():
    font = ImageFont.load_default(FONT)
    text = "a very long caption about many things that do not fit on one line"
    lines = wrap(text, 100, font)
    assert " ".join(lines) == text and len(lines) > 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrap("", 100, font) == [""]
    assert wrap("one\ntwo", 100, font) == ["one", "two"]


@given(st.text(alphabet="ab \n", max_size=60), st.integers(20, 80))
def test_wrapped_lines_fit_and_hold_all_words_in_order_whole_where_they_fit(text, width):
    font = ImageFont.load_default(FONT)
    lines = wrap(text, width, font)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    if all(font.getlength(word) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


def test_a_long_caption_makes_room_for_its_lines():
    short, long = (contact_sheet([(text, [flat(COLOURS[0])])]) for text in ("short", "many words " * 4))
    assert long.height > short.height
    assert found(long, COLOURS[0]) == found(short, COLOURS[0])


def test_a_stack_is_the_sheets_one_below_the_other():
    a, b = (contact_sheet([("a", [flat(c)])] * n, columns=n) for n, c in zip((2, 1), COLOURS))
    whole = stack([a, b])
    assert whole.size == (a.width, a.height + b.height)
    assert whole.crop((0, 0, *a.size)).tobytes() == a.tobytes()
    assert whole.crop((0, a.height, b.width, whole.height)).tobytes() == b.tobytes()
