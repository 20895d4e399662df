"""Batches: pure functions of (seed, step), the same from any number of workers, full, and mixed as configured."""

import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_documents import PATCH, SIZE, SPECIAL, corpus_of

from transfusion.codec.codec import PIXELS
from transfusion.config import load_config
from transfusion.data.arrays import Held, Joined
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import SAMPLE, Captions, Corpus, DataConfig
from transfusion.data.loader import MEASURED, Packer, keep_memory, load_batches, micro_batches
from transfusion.data.windows import Stream
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.loss import draw_noise
from transfusion.run import RunConfig, format_of, resolve
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


@pytest.mark.parametrize("micro_batch, n", [(2, 2), (1, 4), (3, 2)])
def test_micro_batches_side_by_side_are_the_rows_of_the_whole_step(micro_batch, n):
    for step in range(4):
        (whole,), parts = PACKER.batches(step), replace(PACKER, micro_batch=micro_batch).batches(step)
        assert len(parts) == n
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


@pytest.mark.parametrize("micro_batch", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_rows_that_one_rank_has(ranks, micro_batch):
    alone = replace(PACKER, rows=8, micro_batch=micro_batch)
    of_ranks = [replace(alone, rank=rank, ranks=ranks).batches(5) for rank in range(ranks)]
    whole = rows_of(alone.batches(5))
    assert list(whole) == list(range(8))
    together, size = {}, micro_batch or 8 // ranks
    for rank, micro in enumerate(of_ranks):
        firsts = range(rank * 8 // ranks, (rank + 1) * 8 // ranks, size)
        assert [(b.first_row, len(b.tokens)) for b in micro] == [(first, size) for first in firsts]
        together |= rows_of(micro)
    assert sorted(together) == list(range(8))  # no row twice: there are 8 in all
    for row, parts in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, together[row], strict=True))


class Counted(Held):
    """Images of which every one that is read is noted; `broken` ones cannot be."""

    def __init__(self, arrays, broken=()):
        super().__init__(arrays)
        self.seen, self.broken = [], broken

    def __getitem__(self, i):
        raise AssertionError("images are read many at once")

    def read(self, numbers):
        self.seen.append(list(numbers))
        return ["it is gone" if i in self.broken else self.arrays[i] for i in numbers]


def counted(broken=()) -> tuple[Corpus, Counted]:
    """CORPUS with images that are counted."""
    train = CORPUS.captions["train"]
    images = Counted(train.images.arrays, broken)
    return replace(CORPUS, captions={"train": replace(train, images=images)}), images


def levels(batch: Batch) -> list[int]:
    """Which images of `corpus_of` stand in a batch, in their order."""
    if not batch.n_images:
        return []
    return ((batch.patches[:, 0] + 1) * 127.5).round().int().reshape(batch.n_images, -1)[:, 0].tolist()


def test_ranks_read_their_own_images_alone_in_one_call_and_plans_need_none():
    corpus, images = counted()
    packers = [replace(PACKER, corpus=corpus, rows=8, rank=rank, ranks=4) for rank in range(4)]
    for packer in packers:
        assert len(packer.planned(3)) == 8
    assert images.seen == []
    shown = [levels(batch) for packer in packers for batch in packer.batches(3)]
    assert images.seen == shown and all(shown)
    (whole,) = replace(PACKER, rows=8).batches(3)
    assert [level for of_rank in shown for level in of_rank] == levels(whole)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_alike_many_images(ranks):
    packer = replace(PACKER, rows=32, ranks=ranks)
    numbers = [sum(b.n_images for b in replace(packer, rank=rank).batches(1)) for rank in range(ranks)]
    assert min(numbers) >= 0.5 * max(numbers)


def test_a_large_step_is_packed_as_several_of_32_rows():
    large, small = replace(PACKER, rows=96), replace(PACKER, rows=32)
    assert (large.pack_rows, large.packs, replace(PACKER, rows=34).pack_rows) == (32, 3, 17)
    (whole,) = large.batches(2)
    parts = [small.batches(2 * 3 + pack)[0] for pack in range(3)]
    for name in ("tokens", "document", "place"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([p.patches for p in parts]), whole.patches)
    alone = rows_of([whole])
    shared = rows_of(b for rank in range(4) for b in replace(large, micro_batch=12, rank=rank, ranks=4).batches(2))
    assert sorted(shared) == list(range(96))
    assert all(torch.equal(a, b) for row in alone for a, b in zip(alone[row], shared[row], strict=True))


def test_what_cannot_be_read_is_padding_and_named_and_nothing_else_changes():
    (whole,) = PACKER.batches(4)
    gone = levels(whole)[1]
    corpus, _ = counted(broken={gone})
    (batch,) = replace(PACKER, corpus=corpus).batches(4)
    times = levels(whole).count(gone)
    assert batch.lost == (f"images here, {gone}: it is gone",) * times and whole.lost == ()
    assert levels(batch) == [level for level in levels(whole) if level != gone]
    assert batch.n_images == whole.n_images - times
    for row in range(4):
        kept, all_ = ([x[d == i].tolist() for i in d.unique() if i != NONE] for x, d in of_row(batch, whole, row))
        assert [document for document in all_ if document in kept] == kept
    parts = [b for rank in range(2) for b in replace(PACKER, corpus=corpus, rank=rank, ranks=2).batches(4)]
    assert sum((b.lost for b in parts), ()) == batch.lost


def of_row(*batches_and_row) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, document) of a row of each batch."""
    *batches, row = batches_and_row
    return [(b.tokens[row], b.document[row]) for b in batches]


def test_a_document_that_no_row_can_hold_is_named_and_holds_up_no_other():
    corpus = corpus_of([[[10] * (60 if i == 3 else 4)] for i in range(9)], image_share=1.0, caption_dropout=0.0)
    packer = Packer(corpus, FORMAT, seed=0, rows=2, seq_len=48)
    seen, lost = [], []
    for step in range(9):
        batches = [b for rank in range(2) for b in replace(packer, rank=rank, ranks=2).batches(step)]
        seen += [level for b in batches for level in levels(b)]
        lost += [name for b in batches for name in b.lost]
    assert set(lost) == {"images here, 3: 68 positions, a row has 48"} and len(lost) == packer.images_per_step
    assert np.bincount(seen).tolist() == [packer.images_per_step] * 3 + [0] + [packer.images_per_step] * 5


# ---- mixing, and going on ----


def of_two(**weights) -> Corpus:
    """Images 0 to 22 of a source, 23 to 28, with longer captions, of another; two texts, whose tokens tell them."""
    short, long = (corpus_of([[[10 + i] * n] for i in range(count)]) for n, count in ((2, 23), (12, 6)))
    a, b = short.captions["train"], long.captions["train"]
    images = Joined([a.images, Held(b.images.arrays + np.uint8(23))])
    names = [f"{i}" for i in range(29)]
    train = Captions(images, Joined([a.texts, b.texts]), Joined([a.ids, b.ids]), Joined([names[:23], names[23:]]))
    config = replace(CORPUS.config, images=("here", "there"), text=("low", "high"), **weights)
    streams = [np.append(RNG.integers(*ends, 2000), SPECIAL.eos) for ends in ((50, 100), (100, 150))]
    text = tuple(Stream(f"text {name}", ids, 1) for name, ids in zip(config.text, streams))
    return replace(CORPUS, config=config, captions={"train": train}, text=text)


def test_sources_have_the_shares_of_positions_that_their_weights_say():
    corpus = of_two(image_weights=(1.0, 3.0), text_weights=(3.0, 1.0), image_share=0.6)
    packer = Packer(corpus, FORMAT, seed=0, rows=8, seq_len=96)
    positions, tokens = np.zeros(2), np.zeros(2)
    for step in range(30):
        for row in packer.planned(step):
            for plan in row.images:
                positions[int(plan.name.startswith("images there"))] += plan.length
        (batch,) = packer.batches(step)
        tokens += [((batch.tokens >= low) & (batch.tokens < low + 50)).sum().item() for low in (50, 100)]
    assert positions[1] / positions.sum() == pytest.approx(0.75, abs=0.02)
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (0.2, 5.0)])
def test_every_document_of_a_source_comes_once_an_epoch_of_that_source(weights):
    corpus = of_two(image_weights=weights)
    mix, seen = corpus.image_mixture, {0: [], 1: []}
    for k in range(400):
        source, number = mix.draw(k)
        assert number == len(seen[source])
        seen[source].append(int(corpus.plan(0, source, number).name.split()[-1]))
    for source, numbers, size in ((0, range(23), 23), (1, range(23, 29), 6)):
        epochs = [seen[source][i : i + size] for i in range(0, len(seen[source]) - size + 1, size)]
        assert epochs and all(sorted(epoch) == [*numbers] for epoch in epochs)
        assert len(epochs) == 1 or len(set(map(tuple, epochs))) > 1


def test_a_run_that_goes_on_unchanged_is_the_uninterrupted_one():
    packer = Packer(of_two(image_weights=(1.0, 2.0)), FORMAT, seed=0, rows=4, seq_len=96)
    again = replace(packer, since=(7, packer.cursors(7)))
    assert again.cursors(7) == packer.cursors(7) and again.cursors(20) == packer.cursors(20)
    assert all(same(a.batches(step)[0], packer.batches(step)[0]) for a in (again,) for step in (7, 8, 20))
    assert list(packer.cursors(0).values()) == [0, 0, 0, 0]
    assert set(packer.cursors(0)) == {"images here", "images there", "text low", "text high"}


def taken(packer: Packer, steps: range) -> dict[str, list[int]]:
    """Which documents of each source of images the packs of these steps look at, by their numbers in the source."""
    found = {name: [] for name in packer.corpus.image_mixture.names}
    for k in range(steps.start * packer.images_per_step, steps.stop * packer.images_per_step):
        source, number = packer.corpus.image_mixture.draw(k)
        name = packer.corpus.image_mixture.names[source]
        found[name].append(number + packer.moved.get(name, 0))
    return found


def test_a_run_whose_mixing_changed_goes_on_in_each_source_where_it_stopped():
    before = Packer(of_two(image_weights=(1.0, 3.0)), FORMAT, seed=0, rows=4, seq_len=96)
    cursors = before.cursors(10)
    assert {name: len(n) for name, n in taken(before, range(10)).items()}.items() <= cursors.items()
    other = of_two(image_weights=(2.0, 1.0), image_share=0.9, text_weights=(1.0, 2.0))
    after = Packer(other, FORMAT, seed=0, rows=8, seq_len=96, since=(10, cursors))
    assert after.cursors(10) == cursors and after.cursors(12) != before.cursors(12)
    for name, numbers in taken(after, range(10, 14)).items():
        assert numbers == [*range(cursors[name], after.cursors(14)[name])]
    third = replace(after, since=(14, after.cursors(14)))  # and when it stops again
    assert same(third.batches(15)[0], after.batches(15)[0])


def test_a_source_that_is_new_begins_at_its_beginning_and_one_that_is_gone_is_forgotten():
    corpus = of_two()
    old = {"images here": 50, "images gone": 9, "text low": 3}
    packer = Packer(corpus, FORMAT, seed=0, rows=4, seq_len=96, since=(6, old))
    assert packer.cursors(6) == {"images here": 50, "images there": 0, "text low": 3, "text high": 0}


class Endless(Sequence):
    """A billion things, the i-th made by a function when it is asked for; `asked` counts."""

    def __init__(self, make):
        self.make, self.asked = make, 0

    def __len__(self):
        return 10**9

    def __getitem__(self, i):
        self.asked += 1
        return self.make(i)

    def shape(self, i):
        self.asked += 1
        return SIZE, SIZE

    def read(self, numbers):
        return [self[i] for i in numbers]


def test_any_step_of_a_source_of_any_size_is_there_from_a_standing_start():
    images = Endless(lambda i: np.full((SIZE, SIZE, 3), i % 256, np.uint8))
    ids = Endless(lambda i: [np.full(1 + i % 7, 10 + i % 50)])
    train = Captions(images, Endless(lambda i: [""]), ids, Endless(str))
    packer = Packer(replace(CORPUS, captions={"train": train}), FORMAT, seed=0, rows=64, seq_len=96)
    (batch,) = packer.batches(10**6)
    assert (batch.document != NONE).float().mean() > 0.95 and batch.n_images > 100
    looked_at = SAMPLE + (MEASURED + packer.packs) * packer.images_per_pack
    assert ids.asked <= looked_at and images.asked <= looked_at + batch.n_images
    packer.batches(10**15)


# ---- rows ----


def test_rows_that_do_not_part_among_the_ranks_are_refused_with_a_number_that_does():
    with pytest.raises(
        ValueError, match=r"train.rows = 4 .* 3 ranks: start a number that divides them, .* a multiple of 3"
    ):
        replace(PACKER, ranks=3)


def test_micro_batches_are_as_few_as_part_a_ranks_rows_evenly():
    asked = [(512, 4), (512, 4, 8), (512, 0, 8), (12, 5), (12, 100, 4), (14, 4, 2)]
    assert [micro_batches(*of) for of in asked] == [(128, 4), (16, 4), (1, 64), (3, 4), (1, 3), (7, 1)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on a machine of two cores
@pytest.mark.parametrize("workers, start", [(1, 0), (3, 4)])
def test_any_number_of_workers_gives_what_none_gives_in_the_same_order(workers, start):
    packer = replace(PACKER, micro_batch=1, rank=1, ranks=2)
    alone, beside = ([*load_batches(packer, start, 10, n, pin_memory=False)] for n in (0, workers))
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


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def keeps(size: int) -> bool:
    """Whether this process holds the memory of an array of so many MiB when that is gone."""
    least = resident()
    np.ones(size << 20, np.uint8)
    return resident() - least > size << 19


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_worker_keeps_what_a_batch_leaves_behind():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # glibc learns from what is freed
        assert not pool.submit(keeps, 24).result()
        pool.submit(keep_memory).result()
        assert pool.submit(keeps, 31).result()


def test_a_resumed_loader_begins_at_its_step():
    whole = [*load_batches(PACKER, 0, 8, 0, pin_memory=False)]
    rest = [*load_batches(PACKER, 5, 8, 0, pin_memory=False)]
    assert all(same(a[0], b[0]) for a, b in zip(whole[5:], rest, strict=True))


def test_steps_take_the_images_one_after_the_other_so_that_an_epoch_shows_each_once():
    n, seen = PACKER.images_per_step, []
    for step in range(23):
        batch = PACKER.batches(step)[0]
        assert batch.n_images == n  # none was left over in this corpus
        seen += levels(batch)
    counts = np.bincount(seen, minlength=23)
    assert counts.sum() == 23 * n and (counts == n).all()


def test_documents_of_any_length_are_trained_on_alike_where_few_fit_into_a_row():
    captions = [[list(range(10, 11 + i % 10))] for i in range(60)]  # 9 to 18 positions: one or two fit
    corpus = corpus_of(captions, image_share=1.0, caption_first=1.0, caption_dropout=0.3)
    packer = Packer(corpus, FORMAT, seed=0, rows=5, seq_len=26)
    trained, alone = np.zeros(60, int), 0
    for step in range(300):
        (batch,) = packer.batches(step)
        trained += np.bincount(levels(batch), minlength=60)
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


@pytest.mark.parametrize("name", ["demo", "emoji"])
def test_rows_of_a_shipped_config_are_full(name):
    config, tokenizer = load_config(RunConfig, Path(__file__).parent.parent / f"configs/{name}.toml"), load_tokenizer()
    fmt = format_of(resolve(config, PIXELS), tokenizer, PIXELS)
    corpus, _ = build_corpus(config.data, tokenizer, PIXELS, fmt, config.train.seq_len)
    packer = Packer(corpus, fmt, config.seed, config.train.rows, config.train.seq_len)
    filled = [(packer.batches(step)[0].document != NONE).float().mean().item() for step in range(5)]
    assert min(filled) >= 0.97


@pytest.mark.parametrize("share, once", [(0.0, 0.98), (0.5, 0.96), (0.9, 0.85)])
def test_an_epoch_reads_nearly_all_of_the_text_once(share, once):
    corpus, fmt = shipped()
    (stream,) = corpus.text
    places = np.arange(100_000)  # instead of tokens, so that each can be counted
    corpus = replace(corpus, text=(replace(stream, ids=places),))
    corpus = replace(corpus, config=replace(corpus.config, image_share=share))
    packer = Packer(corpus, fmt, seed=0, rows=16, seq_len=128)
    steps, read = len(places) // packer.text_per_pack, np.zeros(len(places), int)
    for step in range(steps):
        for part in (part for row in packer.planned(step) for part in row.text):
            read[packer.windows.read(0, 0, part.window, part.at, part.n)] += 1
    assert (read == 1).mean() > once and (read == 0).mean() < 0.6 * (1 - once)


def test_rows_of_the_shipped_data_are_full():
    corpus, fmt = shipped()
    for rows, seq_len in ((8, 256), (16, 128)):
        packer = Packer(corpus, fmt, seed=0, rows=rows, seq_len=seq_len)
        filled = [(packer.batches(step)[0].document != NONE).float().mean().item() for step in range(15)]
        assert np.mean(filled) >= 0.97 and min(filled) > 0.94


def test_a_run_on_text_alone_has_no_image_and_full_rows():
    corpus = corpus_of([], [list(range(10, 99)) * 5], image_share=0.0)
    batches = Packer(corpus, FORMAT, seed=0, rows=3, seq_len=32, micro_batch=1).batches(2)
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
