"""Batches: pure functions of (seed, step), the same from any number of workers, full, and mixed as configured."""

import multiprocessing
import os
import signal
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_documents import PATCH, SPECIAL, corpus_of

from transfusion.codec.codec import PIXELS
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import Corpus, DataConfig
from transfusion.data.loader import Packer, load_batches
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.loss import draw_noise
from transfusion.sequence import NONE, Batch, Format
from transfusion.tokenizer import load_tokenizer

FORMAT = Format(SPECIAL, PATCH)
RNG = np.random.default_rng(0)
CORPUS = corpus_of(
    [[RNG.integers(10, 99, RNG.integers(1, 9)).tolist()] for _ in range(23)], [RNG.integers(10, 99, 3000).tolist()]
)
PACKER = Packer(CORPUS, FORMAT, seed=0, rows=4, seq_len=48)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@cache
def shipped() -> tuple[Corpus, Format]:
    """The shipped data in small pictures."""
    tokenizer = load_tokenizer()
    fmt = Format(tokenizer.special, 8)
    return build_corpus(DataConfig(image_size=32), tokenizer, PIXELS, fmt, 256)[0], fmt


def image_share(batches: list[Batch]) -> float:
    """The share of all positions that belong to documents with an image."""
    of_images = total = 0
    for b in batches:
        total += b.tokens.numel()
        for document, image in zip(b.document, b.image):
            with_image = document[image != NONE].unique()
            of_images += torch.isin(document, with_image).sum().item()
    return of_images / total


def test_a_step_is_a_pure_function_of_seed_and_step():
    forwards = [PACKER.batches(step)[0] for step in range(6)]
    backwards = [replace(PACKER).batches(step)[0] for step in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards))
    assert not any(same(a, b) for a, b in pairwise(forwards))
    assert not same(forwards[0], replace(PACKER, seed=1).batches(0)[0])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_side_by_side_are_the_rows_of_the_whole_step(accumulate):
    for step in range(4):
        (whole,), parts = PACKER.batches(step), replace(PACKER, accumulate=accumulate).batches(step)
        assert len(parts) == accumulate
        for name in ("tokens", "document", "place", "target", "t_max"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert torch.equal(torch.cat([p.patches for p in parts if p.n_images]), whole.patches)
        for name in ("images_in_row", "grids"):
            assert sum((getattr(p, name) for p in parts), ()) == getattr(whole, name)
        first = np.cumsum([0, *(p.n_images for p in parts)])
        image = torch.cat([torch.where(p.image == NONE, NONE, p.image + int(n)) for p, n in zip(parts, first)])
        assert torch.equal(image, whole.image)


def rows_of(batches: list[Batch]) -> dict[int, list[torch.Tensor]]:
    """All that a row holds, noise included, by its number within the step."""
    found = {}
    for b in batches:
        noise, images, patches = draw_noise(b, DiffusionConfig(), 0, 5), 0, 0
        for r, n in enumerate(b.images_in_row):
            size = sum(rows * columns for rows, columns in b.grids[images : images + n])
            own = torch.where(b.image[r] == NONE, NONE, b.image[r] - images)
            of_images = [x[images : images + n] for x in (b.t_max, noise.t)]
            of_patches = [x[patches : patches + size].reshape(-1) for x in (b.patches, noise.eps)]
            found[b.first_row + r] = [b.tokens[r], b.document[r], b.place[r], own, *of_images, *of_patches]
            images, patches = images + n, patches + size
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_rows_that_one_rank_has(ranks, accumulate):
    alone = replace(PACKER, rows=8, accumulate=accumulate)
    of_ranks = [replace(alone, rank=rank, ranks=ranks).batches(5) for rank in range(ranks)]
    whole = rows_of(alone.batches(5))
    assert list(whole) == list(range(8)) and all(len(micro) == accumulate for micro in of_ranks)
    together = {}
    for micro in of_ranks:
        for m, batch in enumerate(micro):
            size = 8 // accumulate
            assert len(batch.tokens) == size // ranks and m * size <= batch.first_row < (m + 1) * size
        together |= rows_of(micro)
    assert sorted(together) == list(range(8))  # no row twice: there are 8 in all
    for row, parts in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, together[row], strict=True))


def test_rows_that_do_not_part_among_the_ranks_are_refused_with_a_number_that_does():
    with pytest.raises(ValueError, match=r"train.rows = 4 .* train.accumulate = 2 .* 4 ranks: .* multiple of 8"):
        replace(PACKER, accumulate=2, ranks=4)


@pytest.mark.parametrize("start", [0, 3])
def test_two_workers_give_what_none_gives_in_the_same_order(start):
    packer = replace(PACKER, accumulate=2)
    alone, beside = ([*load_batches(packer, start, 10, n, pin_memory=False)] for n in (0, 2))
    assert len(alone) == len(beside) == 10 - start
    for a, b in zip(alone, beside):
        assert len(a) == len(b) == 2 and all(map(same, a, b))


def test_signals_that_reach_the_workers_lose_no_batch():
    batches = load_batches(PACKER, 0, 30, 2, pin_memory=False)
    got = [next(batches), next(batches)]  # one of each worker, so both are past their start
    for s in (signal.SIGINT, signal.SIGTERM):
        for child in multiprocessing.active_children():
            os.kill(child.pid, s)
    got += batches
    assert all(same(a[0], b[0]) for a, b in zip(got, load_batches(PACKER, 0, 30, 0, pin_memory=False), strict=True))


def test_a_resumed_loader_begins_at_its_step():
    whole = [*load_batches(PACKER, 0, 8, 0, pin_memory=False)]
    rest = [*load_batches(PACKER, 5, 8, 0, pin_memory=False)]
    assert all(same(a[0], b[0]) for a, b in zip(whole[5:], rest, strict=True))


def test_steps_take_the_images_one_after_the_other_so_that_an_epoch_shows_each_once():
    n, seen = PACKER.images_per_step, []
    for step in range(23):
        batch = PACKER.batches(step)[0]
        assert batch.n_images == n  # none was left over in this corpus
        levels = (batch.patches[:, 0] + 1) * 127.5
        seen += levels.reshape(n, -1)[:, 0].round().int().tolist()
    counts = np.bincount(seen, minlength=23)
    assert counts.sum() == 23 * n and (counts == n).all()


def test_documents_of_any_length_are_trained_on_alike_where_few_fit_into_a_row():
    captions = [[list(range(10, 11 + i % 10))] for i in range(60)]  # 9 to 18 positions: one or two fit
    corpus = corpus_of(captions, image_share=1.0, caption_first=1.0, caption_dropout=0.3)
    packer = Packer(corpus, FORMAT, seed=0, rows=5, seq_len=26)
    trained, alone = np.zeros(60, int), 0
    for step in range(300):
        (batch,) = packer.batches(step)
        levels = ((batch.patches[:, 0] + 1) * 127.5).round().int().reshape(batch.n_images, -1)[:, 0]
        trained += np.bincount(levels, minlength=60)
        alone += ((batch.tokens[:, :-1] == SPECIAL.bos) & (batch.tokens[:, 1:] == SPECIAL.boi)).sum().item()
    of_length = trained.reshape(6, 10).sum(0)
    assert of_length.min() > 0.8 * of_length.max()
    assert alone / trained.sum() == pytest.approx(0.3, abs=0.05)  # the shortest of all: no caption


def test_a_step_has_the_configured_share_of_images():
    for share in (0.25, 0.5, 0.8):
        corpus, fmt = shipped()
        corpus = replace(corpus, config=replace(corpus.config, image_share=share))
        packer = Packer(corpus, fmt, seed=0, rows=8, seq_len=256)
        batches = [packer.batches(step)[0] for step in range(15)]
        assert image_share(batches) == pytest.approx(share, abs=0.03)


def test_rows_of_the_shipped_data_are_full():
    corpus, fmt = shipped()
    for rows, seq_len in ((8, 256), (16, 128)):
        packer = Packer(corpus, fmt, seed=0, rows=rows, seq_len=seq_len)
        filled = [(packer.batches(step)[0].document != NONE).float().mean().item() for step in range(15)]
        assert np.mean(filled) >= 0.97 and min(filled) > 0.94


def test_a_run_on_text_alone_has_no_image_and_full_rows():
    corpus = corpus_of([], [list(range(10, 99)) * 5], image_share=0.0)
    batches = Packer(corpus, FORMAT, seed=0, rows=3, seq_len=32, accumulate=3).batches(2)
    for batch in batches:
        assert batch.n_images == 0 and batch.n_targets == 31 and (batch.document != NONE).all()


def test_a_run_on_images_alone_has_an_image_in_every_document():
    corpus = corpus_of([[[10 + i] * (1 + i % 5)] for i in range(9)], image_share=1.0)
    packer = Packer(corpus, FORMAT, seed=0, rows=4, seq_len=64)
    for step in range(5):
        batch = packer.batches(step)[0]
        documents = sum(len(set(d[d != NONE].tolist())) for d in batch.document)
        assert batch.n_images == documents > 0
        assert image_share([batch]) == (batch.document != NONE).float().mean().item()
        assert image_share([batch]) > 0.85


def test_the_longest_document_alone_in_a_row_is_not_lost():
    corpus = corpus_of([[[10] * 40]], [list(range(10, 60))])  # <bos> + 40 + 6 of the image + <eos> = 48
    packer = Packer(corpus, FORMAT, seed=0, rows=2, seq_len=48)
    assert [packer.batches(step)[0].n_images for step in range(5)] == [1] * 5
