"""What is measured is the same for all: content from (case, repetition) alone, laid out by each without a loss."""

from dataclasses import replace

import numpy as np
import pytest
from content import Case, content, prompts
from ours import batch_of, format_of
from questions import QUESTIONS

from transfusion.sequence import patchify

TINY = Case(dim=32, depth=2, heads=2, rows=2, images=2, text_tokens=21, side=2, steps=2, new=5, batch=2, peak=(32,))
ALL = [(name, case) for name, q in QUESTIONS.items() for case in q.cases]


def test_a_repetition_has_the_same_content_each_time_and_another_one_has_other():
    first, again, other = (content(TINY, i)[1][0] for i in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and (a == b).all() for a, b in zip(first, other))


@pytest.mark.parametrize("documents", [1, 4, 5])
def test_a_row_has_as_many_positions_of_content_as_the_case_says(documents):
    case = replace(TINY, documents=documents)
    for row in content(case, 0):
        text = sum(len(part) for document in row for part in document if part.ndim == 1)
        images = sum(part.ndim == 3 for document in row for part in document)
        assert len(row) == documents and text + images * case.patches == case.positions
        assert all(len(part) for document in row for part in document)
    lengths = {sum(len(part) for part in document if part.ndim == 1) for document in row}
    assert documents == 1 or len(lengths) > 1, "documents of one length would be a gift to attention by documents"


def test_our_batch_has_the_content_and_markers_besides_nothing():
    case = replace(TINY, documents=3, patch_size=2)
    rows = content(case, 0)
    batch, special = batch_of(case, rows), format_of(case).special
    parts = [part for row in rows for document in row for part in document]
    text = batch.tokens[batch.tokens < case.vocab]
    assert text.tolist() == np.concatenate([p for p in parts if p.ndim == 1]).tolist()
    assert (batch.patches.numpy() == np.concatenate([patchify(p, 2) for p in parts if p.ndim == 3])).all()
    real = int((batch.document >= 0).sum())
    markers = sum(int((batch.tokens == t).sum()) for t in (special.bos, special.eos, special.boi, special.eoi))
    assert real - markers == case.rows * case.positions
    assert markers == case.rows * case.documents * (2 + 2 * case.images)


def test_a_prompt_ends_with_an_image_where_the_case_says_so():
    assert [[p.ndim for p in prompt] for prompt in prompts(TINY, 0)] == [[1], [1]]
    assert [[p.ndim for p in prompt] for prompt in prompts(replace(TINY, image_in_prompt=True), 0)] == [[1, 3], [1, 3]]


def test_too_little_text_for_the_images_is_refused():
    with pytest.raises(ValueError, match="2 text tokens do not make 3 pieces around the images: raise text_tokens"):
        content(replace(TINY, text_tokens=2), 0)


@pytest.mark.parametrize("name, case", ALL, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ALL)])
def test_every_case_of_every_question_has_content_that_fits_its_rows(name, case):
    (row,) = content(replace(case, rows=1), 1)
    markers = case.documents * (2 + 2 * case.images)
    assert len(row) == case.documents and case.positions + markers <= (case.seq_len or case.positions + markers)


def test_a_row_longer_than_it_may_be_is_refused():
    with pytest.raises(ValueError, match="more than seq_len = 8: raise it"):
        batch_of(replace(TINY, seq_len=8), content(TINY, 0))
