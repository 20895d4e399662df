"""Requests under way together: each comes out as alone, whatever else comes and goes; nothing is left behind."""

import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_generate import FIRST, OPTIONS, SAMPLE, Engine, alike, code_engine, engine_of, picture, rig, spy_on_writes

from transfusion.batching import Batching
from transfusion.diffusion.schedule import timesteps
from transfusion.request import Request
from transfusion.sequence import Codes

ASKED = [  # (entering at this step, prompt, mode, rows and columns of patches, sampling)
    (0, ["abc"], "draw", (2, 2), {}),
    (0, ["a"], "text", None, {"max_tokens": 3}),
    (1, ["ab", picture(0), "cd"], "draw", (1, 3), {"image_guidance": 1.5, "steps": 3}),
    (1, [picture(1)], "auto", (2, 2), {"guidance": 1.0, "max_images": 2, "max_tokens": 9}),
    (2, ["zz"], "draw", (3, 1), {"guidance": 1.0, "solver": "ddpm", "steps": 5}),
    (4, ["x"], "auto", (2, 1), {"guidance_interval": (0.2, 0.7), "max_tokens": 12}),
    (6, [picture(2), "b"], "text", None, {"temperature": 0, "max_tokens": 8}),
    (6, ["efg"], "draw", (2, 2), {"renormalise": True, "t_shift": 2.0, "guidance": 5.0}),
]


def asked(engine: Engine, i: int, **options) -> Request:
    _, prompt, mode, grid, of_request = ASKED[i]
    return engine.request(engine.open(prompt), mode, 10 + i, replace(SAMPLE, **{**of_request, **options}), grid)


def run(batching: Batching, entering: list[tuple[int, Request]]) -> list[Request]:
    """The requests in the order in which they come to their ends."""
    finished, at = [], 0
    while len(finished) < len(entering):
        for when, r in entering:
            if when == at:
                batching.submit(r)
        finished += batching.step()
        at += 1
        assert at < 200
    return finished


def wants_images(r: Request, n: int) -> int:
    """The third token of a document, and the seventh, is <boi>."""
    return 3 if n in (2, 6) else FIRST + (7 * n + len(r.document)) % 30


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_requests_of_all_kinds_that_enter_at_different_steps_come_out_as_alone(batch, options):
    def answers(which):
        engine = engine_of(seq_len=60, **options)
        rig(engine, wants_images)
        requests = {i: asked(engine, i, batch=batch) for i in which}
        done = run(engine.batching(), [(ASKED[i][0] if len(which) > 1 else 0, r) for i, r in requests.items()])
        assert len(done) == len(which) and all(r.done for r in done)
        return {i: engine.read(r.answer) for i, r in requests.items()}

    together = answers(range(len(ASKED)))
    assert len({len(a) for a in together.values()}) > 1, "some answer with an image, some with more"
    for i, beside in together.items():
        alike(beside, answers([i])[i])


def test_a_request_that_ends_makes_room_at_once_and_nothing_is_left_behind():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST)
    batching = engine.batching()
    long, short, next_one = (engine.request(engine.open("a"), "text", 0, replace(SAMPLE, max_tokens=n, batch=2), None)
                             for n in (9, 2, 3))  # fmt: skip
    for r in (long, short, next_one):
        batching.submit(r)
    ends = [batching.step() for _ in range(9)]
    assert [ends.index([r]) for r in (short, next_one, long)] == [1, 4, 8], "the third one enters as the second ends"
    assert batching.lanes is None and batching.step() == []


def test_no_more_are_under_way_together_than_any_of_them_allows():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST)
    batching = engine.batching()
    for batch in (8, 2, 1, 8):
        batching.submit(asked(engine, 1, batch=batch))
    together = []
    while batching.waiting or batching.running:
        ended = batching.step()
        together.append(len(batching.running) + len(ended))
    assert together == [2] * 3 + [1] * 6, "two, then the one that is alone, then the last"


def test_a_cancelled_request_disturbs_nobody_and_keeps_what_it_had_finished():
    for when in range(5):
        engine = engine_of()
        batching = engine.batching()
        gone, stays = asked(engine, 0, batch=1 if when == 4 else 8), asked(engine, 2)
        batching.submit(stays)
        batching.submit(gone)
        finished = []
        for step in range(12):
            if step == when:
                batching.cancel(gone)
            finished += batching.step()
        assert finished == [stays] and not gone.done and gone.answer == [] and batching.lanes is None
        alone = engine.complete([engine.open(ASKED[2][1])], "draw", 12, stays.sampling, [ASKED[2][3]])
        np.testing.assert_allclose(stays.answer[0].latents, alone[0][0].latents, rtol=0, atol=2e-5)


def test_text_written_before_a_request_was_cancelled_is_its_answer():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST + n)
    batching, r = engine.batching(), asked(engine, 1, max_tokens=9)
    batching.submit(r)
    for _ in range(4):
        batching.step()
    batching.cancel(r)
    assert engine.read(r.answer) == ["abcd"]


def test_an_error_of_one_request_is_its_own_end_and_the_others_come_out_as_alone():
    engine = engine_of()
    batching = engine.batching()
    write, finish = batching.write, batching.finish_image
    bad, ugly, good = (asked(engine, i) for i in (1, 0, 2))

    def damaged(r, logits):
        write(r, logits * torch.nan if r is bad and r.written == 1 else logits)

    def spoiled(r):
        if r is ugly:
            r.z[0, 0] = torch.nan
        finish(r)

    batching.write, batching.finish_image = damaged, spoiled
    ended = run(batching, [(0, bad), (0, ugly), (1, good)])
    assert [(r, r.error is None) for r in ended] == [(bad, False), (ugly, False), (good, True)]
    for r in (bad, ugly):
        assert r.done and "training went astray" in str(r.error)
    assert batching.lanes is None
    alone = engine_of().complete([engine.open(ASKED[2][1])], "draw", 12, good.sampling, [ASKED[2][3]])
    np.testing.assert_allclose(good.answer[0].latents, alone[0][0].latents, rtol=0, atol=2e-5)


def test_an_error_of_a_step_ends_all_under_way_and_those_that_wait_take_their_turn():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST)
    batching = engine.batching()
    forward, first, second, waits = batching.forward, *(asked(engine, 1, batch=2) for _ in range(3))

    held = []

    def out_of_memory(*arguments):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    for r in (first, second, waits):
        batching.submit(r)
    batching.forward = out_of_memory
    assert batching.step() == [first, second] and str(first.error) == str(second.error) == "out of memory"
    assert held[0]() is None, "an error that is kept keeps no tensors"
    batching.forward = forward
    assert [batching.step() for _ in range(3)] == [[], [], [waits]] and waits.error is None


def test_no_room_for_new_ones_is_no_harm_to_those_under_way():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST)
    batching, small, large = engine.batching(), asked(engine, 1), asked(engine, 6)
    batching.submit(small)
    batching.step()

    def out_of_memory(n, slots):
        raise RuntimeError("out of memory")

    batching.lanes.grown = out_of_memory
    batching.submit(large)
    assert batching.step() == [large] and str(large.error) == "out of memory" and large.main is None
    assert batching.step() == [small] and small.error is None and len(small.answer[0].ids) == 3


def test_an_error_on_the_way_is_what_generate_raises():
    engine = engine_of()
    rig(engine, lambda r, n: [FIRST, "no token"][n])
    with pytest.raises(IndexError):
        engine.generate(["a"] * 3, mode="text")
    batching = engine.batching()
    assert not batching.running and not batching.waiting and batching.lanes is None


def test_an_image_whose_size_cannot_be_written_is_refused_before_it_stands_beside_others():
    engine = engine_of(seq_len=60, **OPTIONS["all"], sides=3)
    with pytest.raises(ValueError, match="a side of 4 patches cannot be written"):
        engine.request(engine.open(["a"]), "draw", 0, SAMPLE, (4, 1))
    assert engine.request(engine.open(["a"]), "draw", 0, SAMPLE, (3, 1)).grid == (3, 1)


def test_images_as_codes_are_written_beside_text_as_alone():
    def answers(which):
        engine = code_engine(seq_len=60)
        made = [engine.request(engine.open("ab" * (1 + i)), ("draw", "text")[i % 2], i, SAMPLE, (2, 3)) for i in which]
        run(engine.batching(), [(2 * j, r) for j, r in enumerate(made)])
        return [r.answer for r in made]

    together = answers(range(4))
    assert isinstance(together[0][0], Codes)
    for i in (0, 2):
        np.testing.assert_array_equal(together[i][0].codes, answers([i])[0][0].codes)


@torch.no_grad()
def test_what_writes_and_what_draws_is_read_from_the_cache_without_a_copy():
    engine, read = engine_of(), []
    rig(engine, lambda r, n: FIRST)
    batching = engine.batching()
    chunk = batching.chunk

    def spying(spans):
        made = chunk(spans)
        read.append(made.layers[0].lanes)
        return made

    batching.chunk = spying
    for i in (0, 1, 7, 6):
        batching.submit(asked(engine, i, max_tokens=9, steps=20))
    for _ in range(8):
        batching.step()
    assert len(read) == 1 + 1 + 7, "prompts, the plan of two images, then tokens beside them"
    assert all(isinstance(lanes, slice) for lanes in read[1:]) and read[1].stop == 4 and read[2] == slice(4, 6)


@pytest.mark.parametrize("solver, ends", [("euler", 1), ("heun", 2)])
def test_outside_of_its_interval_guidance_is_not_computed(solver, ends):
    engine, lanes = engine_of(), []
    batching, (low, high) = engine.batching(), (0.35, 0.55)
    forward = batching.forward

    def spying(chunk, *arguments, **options):
        lanes.append((len(chunk.tokens), isinstance(chunk.layers[0].lanes, slice)))
        return forward(chunk, *arguments, **options)

    batching.forward = spying
    sampling = replace(engine.config.sample, steps=10, solver=solver, guidance=2.5, guidance_interval=(low, high))
    for i in range(2):
        batching.submit(engine.request(engine.open("abc"), "draw", i, sampling))
    while batching.step() == []:
        pass
    times = timesteps(10).tolist()
    guided = [any(low <= t <= high for t in pair) for pair in pairwise(times)]
    assert 0 < sum(guided) < 10
    assert lanes[1:] == [(4 if inside else 2, True) for inside in guided for _ in range(ends)]


def test_half_precision_draws_and_writes_what_full_precision_does_within_its_rounding():
    engines = [engine_of(precision=p, prediction="x0", data_variance=0.4) for p in ("fp32", "bf16")]
    prompts = ["abc", ["d", picture(0), "e"], [picture(1)]]
    full, half = ([np.asarray(a[0], int) for a in e.generate(prompts, mode="draw", guidance=1.5)] for e in engines)
    for a, b in zip(full, half):
        assert 0 < np.abs(a - b).mean() < 6, "of 255 levels, after four steps of a random model"
    seen = []
    for engine in engines:
        rig(engine, lambda r, n: FIRST + n)
        seen.append(spy_on_writes(engine))
        engine.generate(prompts, mode="text", max_tokens=4)
    logits, halved = (torch.stack(x) for x in seen)
    error = (logits - halved).abs().max() / logits.std()
    assert len(logits) == 12 and 0 < error < 0.1, "of the logits' spread"
