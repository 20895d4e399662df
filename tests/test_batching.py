"""Requests under way together: each comes out as alone, whatever else comes and goes; nothing is left behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_generate import FIRST, OPTIONS, SAMPLE, Engine, alike, code_engine, engine_of, picture, rig

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


def run(engine: Engine, entering: list[tuple[int, Request]]) -> list[Request]:
    """The requests in the order in which they come to their ends."""
    finished, at = [], 0
    while len(finished) < len(entering):
        for when, r in entering:
            if when == at:
                engine.submit(r)
        finished += engine.step()
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
        done = run(engine, [(ASKED[i][0] if len(which) > 1 else 0, r) for i, r in requests.items()])
        assert len(done) == len(which) and all(r.done for r in done)
        return {i: engine.read(r.answer) for i, r in requests.items()}

    together = answers(range(len(ASKED)))
    assert len({len(a) for a in together.values()}) > 1, "some answer with an image, some with more"
    for i, beside in together.items():
        alike(beside, answers([i])[i])


def test_a_request_that_ends_makes_room_at_once_and_nothing_is_left_behind():
    engine = engine_of()
    rig(engine, lambda r, n: FIRST)
    long, short, next_one = (engine.request(engine.open("a"), "text", 0, replace(SAMPLE, max_tokens=n, batch=2), None)
                             for n in (9, 2, 3))  # fmt: skip
    for r in (long, short, next_one):
        engine.submit(r)
    ends = [engine.step() for _ in range(9)]
    assert [ends.index([r]) for r in (short, next_one, long)] == [1, 4, 8], "the third one enters as the second ends"
    assert engine.batching.lanes is None and engine.step() == []


def test_a_cancelled_request_disturbs_nobody():
    for when in range(5):
        engine = engine_of()
        gone, stays = asked(engine, 0, batch=1 if when == 4 else 8), asked(engine, 2)
        engine.submit(stays)
        engine.submit(gone)
        finished = []
        for step in range(12):
            if step == when:
                engine.cancel(gone)
            finished += engine.step()
        assert finished == [stays] and not gone.done and engine.batching.lanes is None
        alone = engine.complete([engine.open(ASKED[2][1])], "draw", 12, stays.sampling, [ASKED[2][3]])
        np.testing.assert_allclose(stays.answer[0].latents, alone[0][0].latents, rtol=0, atol=2e-5)


def test_an_error_on_the_way_leaves_the_engine_empty():
    engine = engine_of()
    rig(engine, lambda r, n: [FIRST, "no token"][n])
    with pytest.raises(IndexError):
        engine.generate(["a"] * 3, mode="text")
    assert not engine.batching.running and not engine.batching.waiting and engine.batching.lanes is None


def test_an_image_whose_size_cannot_be_written_is_refused_before_it_stands_beside_others():
    engine = engine_of(seq_len=60, **OPTIONS["all"], sides=3)
    with pytest.raises(ValueError, match="a side of 4 patches cannot be written"):
        engine.request(engine.open(["a"]), "draw", 0, SAMPLE, (4, 1))
    assert engine.request(engine.open(["a"]), "draw", 0, SAMPLE, (3, 1)).grid == (3, 1)


def test_images_as_codes_are_written_beside_text_as_alone():
    def answers(which):
        engine = code_engine(seq_len=60)
        made = [engine.request(engine.open("ab" * (1 + i)), ("draw", "text")[i % 2], i, SAMPLE, (2, 3)) for i in which]
        run(engine, [(2 * j, r) for j, r in enumerate(made)])
        return [r.answer for r in made]

    together = answers(range(4))
    assert isinstance(together[0][0], Codes)
    for i in (0, 2):
        np.testing.assert_array_equal(together[i][0].codes, answers([i])[0][0].codes)


@torch.no_grad()
def test_what_writes_and_what_draws_is_read_from_the_cache_without_a_copy():
    engine, read = engine_of(), []
    rig(engine, lambda r, n: FIRST)
    chunk = engine.batching.chunk

    def spying(spans):
        made = chunk(spans)
        read.append(made.layers[0].lanes)
        return made

    engine.batching.chunk = spying
    for i in (0, 1, 7, 6):
        engine.submit(asked(engine, i, max_tokens=9, steps=20))
    for _ in range(8):
        engine.step()
    assert len(read) == 1 + 1 + 7, "prompts, the plan of two images, then tokens beside them"
    assert all(isinstance(lanes, slice) for lanes in read[1:]) and read[1].stop == 4 and read[2] == slice(4, 6)


def test_half_precision_draws_and_writes_what_full_precision_does_within_its_rounding():
    engines = [engine_of(precision=p, prediction="x0", data_variance=0.4) for p in ("fp32", "bf16")]
    prompts = ["abc", ["d", picture(0), "e"], [picture(1)]]
    full, half = ([np.asarray(a[0], int) for a in e.generate(prompts, mode="draw", guidance=1.5)] for e in engines)
    for a, b in zip(full, half):
        assert 0 < np.abs(a - b).mean() < 6, "of 255 levels, after four steps of a random model"
    seen = []
    for engine in engines:
        seen.append([])
        write = engine.batching.write
        rig(engine, lambda r, n: FIRST + n)
        rigged = engine.batching.write
        engine.batching.write = lambda r, x, of=seen[-1], go=rigged: of.append(x.clone()) or go(r, x)
        engine.generate(prompts, mode="text", max_tokens=4)
        assert write is not rigged
    logits, halved = (torch.stack(x) for x in seen)
    error = (logits - halved).abs().max() / logits.std()
    assert len(logits) == 12 and 0 < error < 0.1, "of the logits' spread"
