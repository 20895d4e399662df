"""Random documents and packed rows that the tests of several files feed on.

A document is written down as its parts: 3 = three tokens of text, (2, 1) = an image of 2 rows and 1 column of patches,
(2, 1, "copy") = one with a clean copy, (2, 1, "given") = one given clean, without a loss.
"""

import numpy as np
from hypothesis import strategies as st

from transfusion.sequence import IMAGE_POSITIONS, Batch, Codes, Format, Image, Segment, Special, Text, collate, lay_out

SPECIAL = Special(pad=0, bos=1, eos=2, boi=3, eoi=4, patch=5)
VOCAB = 40  # ids from 6 on are text
CHANNELS, PATCH_SIZE = 3, 2
PATCH_DIM = CHANNELS * PATCH_SIZE**2
FORMATS = {name: Format(SPECIAL, PATCH_SIZE, name) for name in IMAGE_POSITIONS}

Parts = list[int | tuple]
grids = st.tuples(st.integers(1, 3), st.integers(1, 3))
parts = st.lists(st.one_of(st.integers(1, 5), grids), min_size=1, max_size=5)
rows_of_parts = st.lists(st.lists(parts, max_size=3), min_size=1, max_size=3)
kinds = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["copy", "given"]))
rich_parts = st.lists(st.one_of(st.integers(1, 5), grids, kinds), min_size=1, max_size=5)
rich_rows = st.lists(st.lists(rich_parts, max_size=3), min_size=1, max_size=3)
seeds = st.integers(0, 2**32 - 1)
formats = st.sampled_from(list(FORMATS.values()))


def document(rng: np.random.Generator, parts: Parts, fmt: Format = FORMATS["raster"]) -> list[Segment]:
    """A document of these parts, its tokens and its latents or codes drawn from rng."""

    def segment(part):
        if isinstance(part, int):
            return Text(rng.integers(6, VOCAB, part))
        if fmt.codes:
            return Codes(rng.integers(fmt.codes, size=part[:2]), learn="given" not in part)
        h, w = (fmt.patch_size * side for side in part[:2])
        latents, t_max = rng.standard_normal((CHANNELS, h, w), np.float32), float(rng.choice([0.5, 1.0]))
        return Image(latents, 0.0 if "given" in part else t_max, copy="copy" in part)

    return [segment(part) for part in parts]


def packed(seed: int, rows: list[list[Parts]], fmt: Format = FORMATS["raster"], seq_len: int = 0) -> Batch:
    """The batch of these documents; seq_len 0 = the longest row."""
    rng = np.random.default_rng(seed)
    sequences = [[lay_out(document(rng, parts, fmt), fmt) for parts in row] for row in rows]
    return collate(sequences, seq_len or max(1, *(sum(map(len, row)) for row in sequences)), fmt)
