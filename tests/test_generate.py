"""The Engine against slow roads to the same numbers: no cache, no batch, no guidance, and models that memorised."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rows import PATCH_DIM, SPECIAL, VOCAB
from test_transformer import CODES, OPTIONS, options, options_and_codes, random_model

from transfusion.chunk import Span
from transfusion.codec.codec import PIXELS
from transfusion.data.documents import DataConfig, caption_then_image, image_alone, image_then_caption
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.schedule import SCHEDULES, timesteps
from transfusion.diffusion.solver import SOLVERS, denoiser_from
from transfusion.generate import Engine
from transfusion.lanes import Lanes
from transfusion.loss import draw_noise, losses
from transfusion.model.mask import dense_mask
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.optim import OptimConfig, build_optimizers, clip_gradients, set_lr
from transfusion.request import pick
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.sequence import Codes, Image, Text, collate, image_length, lay_out, unpatchify

LETTERS = "abcdefghijklmnopqrstuvwxyz .,-0123"
FIRST = 6  # id of the first letter; VOCAB = 40 = FIRST + 34
SIZE = 4  # pixels: 2 x 2 patches of 2 x 2 pixels
SEQ_LEN = 40


class Letters:
    """A tokenizer of one token a letter."""

    special, vocab_size = SPECIAL, VOCAB

    def encode(self, text):
        return [FIRST + LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i - FIRST] for i in ids if i >= FIRST)


SAMPLE = SampleConfig(steps=4, guidance=3.0)


def engine_of(
    seq_len=SEQ_LEN, prediction="v", data_variance=0.0, sample=SAMPLE, codec=None, precision="fp32", **options
) -> Engine:
    """An engine of a random model whose every parameter matters."""
    model = random_model(**options)
    config = RunConfig(
        model=model.config,
        data=DataConfig(image_size=max(SIZE, model.config.patch_size)),
        diffusion=DiffusionConfig(prediction=prediction, data_variance=data_variance),
        optim=OptimConfig(freeze=("text", "image") if model.config.lora.r else ()),
        train=TrainConfig(seq_len=seq_len, precision=precision),
        sample=sample,
    )
    return Engine(model, Letters(), config, codec)


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8))


@torch.no_grad()
def whole(engine: Engine, document: list[Text | Image], z=None, t=None):
    """(logits [n, V], predictions [N, P]) of a document in one pass, no cache; z, t: of its images, else clean."""
    s = lay_out(document, engine.fmt)
    image = torch.from_numpy(s.image)[None]
    at = torch.nonzero(image[0] >= 0)[:, 0]
    z = torch.from_numpy(s.patches) if z is None else z
    t = torch.zeros(len(s.t_max)) if t is None else t
    inputs = (torch.from_numpy(s.tokens)[None], torch.from_numpy(s.place)[None])
    full = not engine.config.model.causal_images
    mask = dense_mask(torch.zeros_like(image), image, torch.from_numpy(s.hidden)[None], full)
    return engine.model(*inputs, mask, z, t, image[0, at], s.grids, at, torch.arange(len(s)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


TWO_IMAGES = ["ab", picture(0), "cd.", picture(1), "e"]

# ---- cached = whole ----


@options_and_codes
@pytest.mark.parametrize("parts", [["ab", picture(0), "cd"], TWO_IMAGES, [picture(0)], ["abc"]], ids=len)
def test_a_document_read_in_any_pieces_gives_the_logits_of_one_whole_pass(options, parts):
    engine = code_engine(**options) if options.get("patches") == "codes" else engine_of(**options)
    document = engine.open(parts)
    want, _ = whole(engine, document)
    s = lay_out(document, engine.fmt)
    inside = {i for i in range(1, len(s)) if s.image[i] >= 0 and s.image[i] == s.image[i - 1]}
    rng = np.random.default_rng(0)
    for trial in range(4):
        cuts = [i for i in range(1, len(s)) if i not in inside and (trial == 0 or rng.random() < 0.4)]
        batching = engine.batching()
        batching.lanes = Lanes(engine.model, engine.fmt, torch.float32, 3, len(s))
        batching.lanes.take([])
        branch = batching.lanes.take(document)
        for start, stop in zip([0, *cuts], [*cuts, len(s)]):
            chunk = batching.chunk([Span(branch, start, stop)])
            z, t = torch.from_numpy(chunk.patches), torch.zeros(len(chunk.grids))
            with torch.no_grad():
                got, _ = batching.forward(chunk, z, t, torch.arange(stop - start))
            close(got, want[start:stop])


@options
def test_what_follows_a_clean_copy_in_training_reads_what_follows_the_image_in_a_prompt(options):
    engine = engine_of(**options)
    document = engine.open(["ab", picture(0), "cd"])
    trained = [replace(s, t_max=1.0, copy=True) if isinstance(s, Image) else s for s in document]
    s = lay_out(trained, engine.fmt)
    n, behind = len(s.patches) // 2, 3  # <eoi> c d
    patches = torch.from_numpy(s.patches)
    noised = torch.cat([torch.randn(patches[:n].shape), patches[n:]])
    got, _ = whole(engine, trained, noised, torch.tensor([0.7, 0.0]))
    close(got[-behind:], whole(engine, document)[0][-behind:])


def test_a_document_with_a_noised_copy_is_no_prompt():
    engine = engine_of()
    document = [replace(s, t_max=1.0, copy=True) if isinstance(s, Image) else s for s in engine.open([picture(0)])]
    with pytest.raises(AssertionError, match="given is clean"):
        engine.complete([document], "text", 0, SAMPLE)


@options
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.5, 1.0), (2.5, 1.5), (1.0, 2.0)], ids=str)
@pytest.mark.parametrize("objective", [{"prediction": "v"}, {"prediction": "x0", "data_variance": 0.4}], ids=str)
def test_an_image_is_denoised_as_by_whole_passes_over_both_prefixes(options, guidance, objective):
    engine = engine_of(**objective, **options)
    text, image = guidance
    sampling, (size,) = replace(engine.config.sample, guidance=text, image_guidance=image), engine.config.data.sizes
    for prompt in (["abc"], ["ab", picture(0), "cd"]):
        got = engine.complete([engine.open(prompt)], "draw", [7], sampling, [engine.grid(size)])
        want = slow_image(engine, engine.open(prompt), torch.Generator().manual_seed(7), text, image, size)
        torch.testing.assert_close(torch.from_numpy(got[0][0].latents), want, rtol=0, atol=2e-5)


def slow_image(
    engine, document, random, text, image=1.0, size=(SIZE, SIZE), interval=(0.0, 1.0), renormalise=False
) -> torch.Tensor:
    """[C, h, w] latents of the image that continues a document, drawn by whole passes."""
    c, k = engine.config, engine.fmt.patch_size
    n = size[0] * size[1] // k**2
    canvas = Image(np.zeros((3, *size), np.float32))
    images = [s for s in document if isinstance(s, Image)]
    before = [torch.from_numpy(lay_out([s], engine.fmt).patches) for s in images]

    def predict(z, t):
        noisy, times = torch.cat([*before, z]), torch.tensor([0.0] * len(before) + [t[0, 0].item()])
        cond = whole(engine, [*document, canvas], noisy, times)[1][-n:]
        seen = whole(engine, [document[0], *images, canvas], noisy, times)[1][-n:]
        nothing = whole(engine, [document[0], canvas], z, t[0])[1]
        guided = nothing + image * (seen - nothing) + text * (cond - seen)
        if not images:
            guided = nothing + text * (cond - nothing)
        if renormalise:
            guided = guided * min(1.0, (cond.norm() / guided.norm()).item())
        return guided if interval[0] <= t[0, 0] <= interval[1] else cond

    schedule = SCHEDULES[c.diffusion.schedule]
    denoise = denoiser_from(predict, c.diffusion.prediction, schedule, 1.0, c.diffusion.data_variance)
    z = torch.randn(n, c.model.patch_dim, generator=random)
    times = timesteps(c.sample.steps)
    for t, t_next in pairwise(times):
        z = SOLVERS["ddim"](z, t.expand(n, 1), t_next.expand(n, 1), denoise, schedule, None)
    return torch.from_numpy(unpatchify(z.numpy(), k, *size).copy())


def test_a_finished_image_is_cached_clean_before_the_text_goes_on():
    engine = engine_of()
    first = {0: FIRST + 3, 1: SPECIAL.boi, 2: FIRST + 5, 3: SPECIAL.eos}
    rig(engine, lambda r, n: first[n])
    seen = spy_on_writes(engine)
    document = engine.open("ab")
    (answer,) = engine.complete([document], "auto", [0], engine.config.sample)
    letter, image, after = answer
    prefixes = ([], [letter], [letter, image], [letter, image, after])
    assert isinstance(image, Image) and len(seen) == 4
    for logits, prefix in zip(seen, prefixes):
        close(logits, whole(engine, [*document, *prefix])[0][-1])


def test_an_image_that_the_model_opens_is_the_image_drawn_on_demand():
    engine = engine_of(sample=SampleConfig(steps=4, temperature=0, max_images=2))
    rig(engine, lambda r, n: [FIRST + 2, SPECIAL.boi, SPECIAL.boi, SPECIAL.eos][n])  # the second right behind the first
    ((text, one, two),) = engine.complete([engine.open("ab")], "auto", [3], engine.config.sample)
    assert text.ids.tolist() == [FIRST + 2]
    ((drawn,),) = engine.complete([engine.open("abc")], "draw", [3], engine.config.sample)
    np.testing.assert_allclose(one.latents, drawn.latents, rtol=0, atol=2e-5)
    spent = torch.Generator().manual_seed(3)
    torch.randn(4, PATCH_DIM, generator=spent)  # the noise of the first image
    want = slow_image(engine, [*engine.open("abc"), one], spent, engine.config.sample.guidance)
    torch.testing.assert_close(torch.from_numpy(two.latents), want, rtol=0, atol=2e-5)


# ---- rigged models ----


def rig(engine: Engine, choose):
    """Makes the engine's model want token choose(request, number of choices made so far) wherever it writes."""
    batching, made = engine.batching(), {}
    write = batching.write

    def rigged(r, logits):
        logits = torch.full_like(logits, -1e4)
        n = made.get(id(r), 0)
        made[id(r)] = n + 1
        logits[choose(r, n)] = 1e4
        write(r, logits)

    batching.write = rigged
    engine.batching = lambda: batching


def spy_on_writes(engine: Engine) -> list[torch.Tensor]:
    """The logits of every token that the engine draws from here on."""
    batching, seen = engine.batching(), []
    write = batching.write

    def spying(r, logits):
        seen.append(logits.clone())
        write(r, logits)

    batching.write = spying
    engine.batching = lambda: batching
    return seen


def kinds(answer) -> str:
    """An answer in short: t for a text, i for an image."""
    return "".join("t" if isinstance(part, str | Text) else "i" for part in answer)


def test_a_model_that_always_opens_images_stops_at_max_images():
    for most in (0, 1, 3):
        engine = engine_of()
        rig(engine, lambda r, n: SPECIAL.boi)
        (answer,) = engine.generate(["a"], max_images=most, max_tokens=3, steps=1)
        assert kinds(answer) in ("i" * most, "i" * most + "t") and kinds(answer).count("i") == most


def test_text_stops_at_max_tokens_over_all_its_stretches():
    engine = engine_of()
    rig(engine, lambda r, n: SPECIAL.boi if n == 2 else FIRST)
    (answer,) = engine.generate([""], max_tokens=5, steps=1)
    assert [part if isinstance(part, str) else "image" for part in answer] == ["aa", "image", "aaa"]


@pytest.mark.parametrize("seq_len", range(9, 22))
@pytest.mark.parametrize("every", [1, 2, 5])
def test_no_document_outgrows_the_model(seq_len, every):
    engine = engine_of(seq_len=seq_len)
    rig(engine, lambda r, n: SPECIAL.boi if n % every == every - 1 else FIRST)
    document = engine.open("ab")
    (answer,) = engine.complete([document], "auto", [0], SampleConfig(steps=1, max_images=9, max_tokens=99))
    n = len(lay_out([*document, *answer], engine.fmt))
    assert n == seq_len or (n > seq_len - 6 and kinds(answer).endswith("i"))


@given(st.integers(0, 2**31), st.sampled_from(["auto", "text"]))
def test_no_special_token_is_ever_written_and_text_mode_never_draws(seed, mode):
    engine = tiny_engine()
    options = SampleConfig(steps=1, guidance=1, temperature=4.0, max_images=2, max_tokens=12)
    answers = engine.complete([engine.open("ab"), engine.open(["c", picture(0)])], mode, [seed, seed + 1], options)
    for answer in answers:
        assert mode == "auto" or "i" not in kinds(answer)
        assert kinds(answer).count("i") <= 2 and "tt" not in kinds(answer)
        for part in answer:
            assert isinstance(part, Image) or (len(part.ids) and min(part.ids) >= FIRST)


@cache
def tiny_engine() -> Engine:
    return engine_of()


# ---- batched = alone ----

PROMPTS = ["a", ["bcd, efg"], ["what is it", picture(2), "ab"], [picture(3)], ["", picture(4), picture(5), "z"], "zz"]


def alike(a, b):
    assert kinds(a) == kinds(b)
    for x, y in zip(a, b):
        if isinstance(x, str):
            assert x == y
        else:
            assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1


@pytest.mark.parametrize("mode", ["draw", "text", "auto"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["plain", "all", "unet", "sides"])
def test_a_request_comes_out_the_same_alone_and_beside_others(mode, guidance, name):
    engine = engine_of(**OPTIONS[name])
    settings = {"mode": mode, "guidance": guidance, "max_tokens": 9, "temperature": 0.7, "max_images": 2}
    seeds = [11, 5, 8, 2, 9, 1]
    together = engine.generate(PROMPTS, seed=seeds, **settings)
    for prompt, seed, beside in zip(PROMPTS, seeds, together):
        alike(beside, engine.generate([prompt], seed=seed, **settings)[0])
    alike(together[3], engine.generate(PROMPTS[::-1], seed=seeds[::-1], **settings)[2])
    for a, b in zip(together, engine.generate(PROMPTS, seed=seeds, batch=4, **settings)):
        alike(a, b)


def test_the_cache_is_as_long_as_a_batch_needs_with_a_second_lane_only_for_guidance():
    engine, sizes = engine_of(), []
    new_cache, image = engine.model.new_cache, image_length((2, 2), engine.fmt)
    engine.model.new_cache = lambda *size: sizes.append(size[:2]) or new_cache(*size)
    engine.generate(["a"] * 4 + ["abc"], mode="draw", batch=2, steps=1)  # <bos> a [image]
    assert set(sizes) == {(4, 2 + image), (2, 4 + image)}, "as many as the longest needs, and none twice as many"
    sizes.clear()
    engine.generate(["a"] * 5, mode="draw", batch=8, steps=1, guidance=1.0)
    engine.generate(["a"] * 5, mode="text", batch=3, max_tokens=2, max_images=0)
    engine.generate(["a"], mode="auto", max_tokens=10**6)
    assert sizes == [(5, 2 + image), (3, 4), (2, 4), (2, SEQ_LEN)]


def test_requests_that_write_and_draw_at_different_times_do_not_disturb_each_other():
    plans = {2: [SPECIAL.boi, FIRST, SPECIAL.boi, SPECIAL.boi, SPECIAL.eos], 3: [FIRST, FIRST + 1, SPECIAL.boi] * 3,
             4: [FIRST] * 9, 5: [SPECIAL.eos]}  # by the prompt's length  # fmt: skip

    def run(prompts, seeds):
        engine = engine_of()
        rig(engine, lambda r, n: plans[r.document[1].ids.size + 1][n])
        return engine.generate(prompts, seed=seeds, max_images=3, max_tokens=6)

    prompts, seeds = ["a", "ab", "abc", "abcd", "x"], [1, 2, 3, 4, 5]
    together = run(prompts, seeds)
    assert [kinds(a) for a in together] == ["itii", "tititi"[: len(together[1])], "t", "", "itii"]
    for prompt, seed, beside in zip(prompts, seeds, together):
        alike(beside, run([prompt], [seed])[0])


# ---- seeds, solvers, guidance ----


def test_the_same_seed_gives_the_same_and_another_seed_another():
    engine = engine_of()
    for mode in ("draw", "auto"):
        once, again, other = (engine.generate(["abc"] * 2, mode=mode, seed=s, max_tokens=12) for s in (0, 0, 5))
        for a, b in zip(once, again):
            assert kinds(a) == kinds(b) and all(x == y for x, y in zip(a, b))
        assert once[0] != once[1] and once[0] != other[0]  # seeds are seed + i: 0, 1 and 5
    assert engine.generate(["abc"] * 2, mode="draw", seed=4)[1] == engine.generate(["abc"], mode="draw", seed=5)[0]


def test_the_seed_of_torch_changes_nothing_and_is_not_changed():
    engine = engine_of()
    torch.manual_seed(1)
    once, state = engine.draw(["abc"], solver="ddpm"), torch.get_rng_state()
    torch.manual_seed(2)
    again = engine.draw(["abc"], solver="ddpm")
    assert once == again
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_every_solver_draws_in_range_the_same_alone_and_batched(solver, prediction):
    engine = engine_of(prediction=prediction)
    documents = [engine.open(p) for p in ("ab", "a long one")]
    sampling = SampleConfig(solver=solver, steps=5, guidance=2.0)
    together = engine.complete(documents, "draw", [1, 2], sampling)
    for (image,), document, seed in zip(together, documents, (1, 2)):
        ((alone,),) = engine.complete([document], "draw", [seed], sampling)
        assert np.abs(image.latents).max() <= 1 + 1e-6 and image.latents.std() > 0.05
        np.testing.assert_allclose(image.latents, alone.latents, rtol=0, atol=2e-3)


def test_without_guidance_weight_the_prompt_is_not_seen_and_with_it_it_is():
    engine = engine_of()
    prompts = ["a", "quite another one", ["x", picture(0)]]
    blind = [engine.generate([p], mode="draw", guidance=0.0, image_guidance=0.0)[0][0] for p in prompts]
    for image in blind[1:]:
        alike([image], [blind[0]])
    for w in (1.0, 2.0):
        seeing = [engine.generate([p], mode="draw", guidance=w)[0][0] for p in prompts]
        assert np.abs(np.asarray(seeing[0], int) - np.asarray(seeing[1], int)).max() > 10


def test_guidance_keeps_to_its_interval():
    engine = engine_of()
    for interval in ((0.3, 0.8), (0.0, 0.0)):
        sampling = replace(engine.config.sample, guidance=2.5, guidance_interval=interval)
        ((drawn,),) = engine.complete([engine.open("abc")], "draw", [7], sampling)
        random = torch.Generator().manual_seed(7)
        want = slow_image(engine, engine.open("abc"), random, 2.5, interval=interval)
        torch.testing.assert_close(torch.from_numpy(drawn.latents), want, rtol=0, atol=2e-5)
    assert engine.draw(["abc"], guidance_interval=(0, 0)) == engine.draw(["abc"], guidance=1.0)


def test_a_renormalised_image_is_that_of_whole_passes_alone_and_beside_others_and_differs_from_a_plain_one():
    engine = engine_of()
    sampling = replace(engine.config.sample, guidance=4.0, renormalise=True)
    ((drawn,),) = engine.complete([engine.open("abc")], "draw", [7], sampling)
    want = slow_image(engine, engine.open("abc"), torch.Generator().manual_seed(7), 4.0, renormalise=True)
    torch.testing.assert_close(torch.from_numpy(drawn.latents), want, rtol=0, atol=2e-5)
    plain = engine.draw(["ab", "cd"], guidance=4.0, seed=3)
    pair = engine.draw(["ab", "cd"], guidance=4.0, seed=3, renormalise=True)
    alike([pair[1]], engine.draw(["cd"], guidance=4.0, seed=4, renormalise=True))
    assert plain != pair


# ---- sizes ----


def test_an_image_has_the_size_that_the_caller_names_and_is_the_one_of_whole_passes():
    engine = engine_of(image_positions="axial")
    for size in ((2, 6), (8, 4)):
        assert engine.draw(["abc"], size=size)[0].size == size[::-1]
        grid = (size[0] // 2, size[1] // 2)
        ((drawn,),) = engine.complete([engine.open("abc")], "draw", [7], engine.config.sample, [grid])
        want = slow_image(engine, engine.open("abc"), torch.Generator().manual_seed(7), 3.0, size=size)
        torch.testing.assert_close(torch.from_numpy(drawn.latents), want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="choose multiples of 2"):
        engine.draw(["abc"], size=(3, 4))


def test_images_of_different_sizes_are_drawn_side_by_side_as_alone():
    engine, grids = engine_of(), [(1, 3), (2, 2), (4, 1)]
    documents = [engine.open(p) for p in ("a", "bcd", ["x", picture(1)])]
    together = engine.complete(documents, "draw", [1, 2, 3], engine.config.sample, grids)
    for document, seed, grid, (drawn,) in zip(documents, (1, 2, 3), grids, together):
        assert drawn.latents.shape == (3, 2 * grid[0], 2 * grid[1])
        ((alone,),) = engine.complete([document], "draw", [seed], engine.config.sample, [grid])
        np.testing.assert_allclose(drawn.latents, alone.latents, rtol=0, atol=2e-5)


SIDES = 5


def sized_engine(seq_len=SEQ_LEN) -> Engine:
    """An engine of a model that writes the sizes of its images."""
    return engine_of(seq_len=seq_len, sides=SIDES, vocab_size=VOCAB + SIDES)


@pytest.mark.parametrize("mode", ["draw", "auto"])
def test_a_model_that_writes_sizes_draws_what_it_wrote(mode):
    engine = sized_engine()
    side = engine.fmt.side
    opening = [SPECIAL.boi] * (mode == "auto") + [side(3), side(2)]
    rig(engine, lambda r, n: [*opening, FIRST, SPECIAL.eos][n])
    greedy = replace(engine.config.sample, temperature=0)  # writing takes no random numbers from the noise
    answer = engine.complete([engine.open("ab")], mode, [7], greedy)[0]
    assert kinds(answer) == ("i" if mode == "draw" else "it")
    assert answer[0].latents.shape == (3, 6, 4)
    tokens = lay_out([*engine.open("ab"), *answer], engine.fmt).tokens.tolist()
    assert tokens[3:6] == [SPECIAL.boi, side(3), side(2)] and tokens[6:13] == [SPECIAL.patch] * 6 + [SPECIAL.eoi]
    want = slow_image(engine, engine.open("ab"), torch.Generator().manual_seed(7), 3.0, size=(6, 4))
    torch.testing.assert_close(torch.from_numpy(answer[0].latents), want, rtol=0, atol=2e-5)


def test_what_is_cached_of_a_written_size_is_what_whole_passes_give():
    engine = sized_engine()
    side = engine.fmt.side
    rig(engine, lambda r, n: [SPECIAL.boi, side(2), side(1), FIRST + 3, SPECIAL.eos][n])
    seen, document = spy_on_writes(engine), engine.open("ab")
    ((image, text),) = engine.complete([document], "auto", [7], engine.config.sample)
    opened = [*document, Text(np.array([SPECIAL.boi, side(2)]))]
    for logits, n in ((seen[0], 3), (seen[1], 4), (seen[2], 5)):
        close(logits, whole(engine, opened)[0][n - 1])
    close(seen[3], whole(engine, [*document, image])[0][-1])
    close(seen[4], whole(engine, [*document, image, text])[0][-1])


@pytest.mark.parametrize("seq_len", range(12, 24))
def test_a_size_is_written_so_that_the_image_fits(seq_len):
    engine = sized_engine(seq_len)
    rig(engine, lambda r, n: SPECIAL.boi)  # wants what is often not allowed: the engine then picks among the rest
    options = SampleConfig(steps=1, max_images=9, max_tokens=99, temperature=1.0)
    for seed in range(3):
        answer = engine.complete([engine.open("ab")], "auto", [seed], options)[0]
        assert "i" in kinds(answer) and len(lay_out([*engine.open("ab"), *answer], engine.fmt)) <= seq_len


# ---- images as codes ----

CODEBOOK = np.random.default_rng(3).standard_normal((CODES, 3)).astype(np.float32)
DISCRETE = replace(
    PIXELS,
    limit=None,
    codes=CODES,
    quantize=lambda z: np.square(z[:, None] - CODEBOOK[None, :, :, None, None]).sum(2).argmin(1),
    lookup=lambda codes: CODEBOOK[codes].transpose(0, 3, 1, 2),
)


def code_engine(**options) -> Engine:
    """An engine of a model that writes images, 4 x 4 of one cell each, as codes."""
    sides = options.get("sides", 0)
    sizes = {"patches": "codes", "patch_size": 1, "vocab_size": VOCAB + sides + CODES}
    return engine_of(codec=DISCRETE, **{**sizes, **options})


def slow_codes(engine, document, text: float, image: float = 1.0, grid=(SIZE, SIZE)) -> np.ndarray:
    """[h, w] the likeliest codes of the image that continues a document, one whole pass a code and branch."""
    codes, fmt = np.zeros(grid, np.int64), engine.fmt
    images = [s for s in document if isinstance(s, Codes)]
    prefixes = ([*document], [document[0], *images], [document[0]])
    for i in range(codes.size):
        branches = []
        for prefix in prefixes:
            s = lay_out([*prefix, Codes(codes)], fmt)
            at = len(s) - 2 - (codes.size - i)  # the position whose next token is code i
            branches.append(whole(engine, [*prefix, Codes(codes)])[0][at])
        cond, seen, nothing = branches
        guided = nothing + image * (seen - nothing) + text * (cond - seen)
        if not images:
            guided = nothing + text * (cond - nothing)
        codes.flat[i] = int(guided[fmt.first_code :].argmax())
    return codes


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.5, 1.0), (2.5, 1.5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"image_positions": "axial", "sides": 4}], ids=["raster", "axial, sized"])
def test_codes_are_the_likeliest_of_whole_passes_guided_on_their_logits(guidance, options):
    engine = code_engine(**options)
    text, image = guidance
    sampling = replace(engine.config.sample, temperature=0, guidance=text, image_guidance=image)
    for prompt in (["abc"], ["ab", picture(0), "cd"]):
        document = engine.open(prompt)
        ((drawn,),) = engine.complete([document], "draw", [7], sampling, [(2, 3)])
        assert isinstance(drawn, Codes)
        np.testing.assert_array_equal(drawn.codes, slow_codes(engine, document, text, image, (2, 3)))


def test_a_model_of_codes_writes_text_then_an_image_then_text_and_each_comes_out_as_alone():
    engine = code_engine(seq_len=80)
    rig(engine, lambda r, n: [FIRST + 3, SPECIAL.boi, *[engine.fmt.first_code + 2] * 16, FIRST + 5, SPECIAL.eos][n])
    seen, document = spy_on_writes(engine), engine.open("ab")
    ((letter, image, after),) = engine.complete([document], "auto", [0], engine.config.sample)
    assert (image.codes == 2).all() and image.codes.shape == (4, 4)
    for logits, prefix in ((seen[0], []), (seen[1], [letter]), (seen[-2], [letter, image])):
        close(logits, whole(engine, [*document, *prefix])[0][-1])
    close(seen[-1], whole(engine, [*document, letter, image, after])[0][-1])


def test_drawings_as_codes_are_pictures_the_same_alone_and_beside_others():
    engine = code_engine()
    together = engine.draw(["ab", "cd", "efg"], seed=5, guidance=2.0)
    for i, prompt in enumerate(("ab", "cd", "efg")):
        assert together[i].size == (SIZE, SIZE)
        alike([together[i]], engine.draw([prompt], seed=5 + i, guidance=2.0))
    assert engine.caption([picture(0)], max_tokens=3)[0] is not None
    with pytest.raises(ValueError, match="writes images as codes"):
        engine.inpaint([picture(0)], [picture(1)], ["a"])
    for wrong in ({"renormalise": True}, {"guidance_interval": (0.1, 1.0)}):
        with pytest.raises(ValueError, match="of diffusion"):
            engine.draw(["a"], **wrong)


def test_a_model_of_codes_wants_a_codec_with_a_codebook():
    with pytest.raises(ValueError, match="wants a codec with a codebook, and pixels has none"):
        engine_of(patches="codes", patch_size=1, vocab_size=VOCAB + CODES)


# ---- editing ----


def test_inpainting_keeps_what_is_known_and_draws_the_rest():
    engine, image = engine_of(), picture(3)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:2] = 255
    for known in (mask, np.zeros_like(mask)):
        (drawn,) = engine.inpaint([image], [PIL.Image.fromarray(known)], ["abc"], seed=1)
        stays = known == 0
        assert (np.asarray(drawn)[stays] == np.asarray(image)[stays]).all()
    others = [engine.inpaint([other], [PIL.Image.fromarray(mask)], ["abc"], seed=1)[0] for other in (image, picture(4))]
    new = [np.asarray(x)[mask > 0].astype(int) for x in others]
    assert np.abs(new[0] - new[1]).max() > 10, "what is drawn fits what is known"
    everything = PIL.Image.fromarray(np.full_like(mask, 255))
    alike(engine.inpaint([image], [everything], ["abc"], seed=1), engine.draw(["abc"], seed=1))


def test_inpainting_keeps_whole_cells_of_a_codec_and_the_pixels_given():
    mean = replace(
        PIXELS,
        factor=2,
        encode=lambda x: PIXELS.encode(x).reshape(-1, 3, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((3, 5)),
        decode=lambda z: PIXELS.decode(z.repeat(2, 2).repeat(2, 3)),
    )
    engine = engine_of(codec=mean, patch_size=1, unet_blocks=1)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:1] = 255  # half of the upper cells: they are drawn, and the lower half of each keeps its pixels
    (drawn,) = engine.inpaint([picture(3)], [PIL.Image.fromarray(mask)], ["abc"], seed=1)
    assert (np.asarray(drawn)[1:] == np.asarray(picture(3))[1:]).all()
    known = engine.known(np.asarray(picture(3)), mask > 0)
    assert known.keep.tolist() == [[False] * 3] * 2 + [[True] * 3] * 2


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="make the mask as large"):
        engine_of().inpaint([picture(3)], [PIL.Image.new("L", (SIZE, 2 * SIZE))], ["abc"])


@pytest.mark.parametrize("solver, steps", [("ddim", 50), ("euler", 50), ("ddpm", 100)])
def test_noise_predicted_from_unbounded_latents_becomes_data_and_does_not_run_away(solver, steps):
    engine = engine_of(prediction="eps", codec=replace(PIXELS, limit=None))
    schedule = SCHEDULES[engine.config.diffusion.schedule]

    def model(*inputs):  # the best guess of eps for data of mean 0 and deviation 1, 2 % too small
        z, t, patch_image = inputs[3], inputs[4], inputs[5]
        sigma = schedule(t)[1][patch_image, None]
        return torch.zeros(len(inputs[8]), VOCAB), 0.98 * sigma * z

    engine.model.forward = model
    answers = engine.complete(
        [engine.open("a")] * 40, "draw", 0, engine.sampling(solver=solver, steps=steps, guidance=1.0)
    )
    assert 0.8 < np.std([answer[0].latents for answer in answers]) < 2  # begun at t = 1 it is 12 for the first two


def test_an_edit_draws_behind_the_image_and_the_instruction():
    engine = engine_of()
    edited = engine.edit([picture(0), picture(1)], ["ab", "c"], seed=5, image_guidance=1.5)
    drawn = engine.generate([[picture(0), "ab"], [picture(1), "c"]], mode="draw", seed=5, image_guidance=1.5)
    alike(edited, [answer[0] for answer in drawn])
    with pytest.raises(ValueError, match="2 images, 1 instructions: give as many of each"):
        engine.edit([picture(0), picture(1)], ["ab"])


def test_the_time_shift_of_a_call_is_used():
    engine = engine_of()
    assert engine.draw(["abc"], t_shift=4.0) != engine.draw(["abc"])


# ---- the user's mistakes ----


@pytest.mark.parametrize(
    "call, remedy",
    [
        (lambda e: e.generate(["a"], mode="paint"), "choose one of auto, draw, text"),
        (lambda e: e.generate([["a", 3]]), "str and PIL images, not int"),
        (lambda e: e.generate(["a", "b"], seed=[1]), "1 seeds for 2 prompts"),
        (lambda e: e.generate(["a" * 39], mode="text"), "shorten the prompt"),
        (lambda e: e.generate(["a" * 40], mode="auto"), "shorten the prompt"),
        (lambda e: e.generate(["a" * 34], mode="draw"), "shorten the prompt"),
        (lambda e: e.draw("a red apple"), "give a list"),
        (lambda e: e.draw(["a"], solver="magic"), "choose one of ddpm"),
        (lambda e: e.draw(["a"], steps=0), "at least 1 step"),
        (lambda e: e.generate(["a"], top_p=0.0), "0 < top_p"),
    ],
)
def test_a_mistake_is_a_value_error_with_its_remedy(call, remedy):
    with pytest.raises(ValueError, match=remedy):
        call(engine_of())


def test_the_longest_prompts_that_fit_do_fit():
    engine = engine_of()
    assert kinds(engine.generate(["a" * 33], mode="draw")[0]) == "i"  # <bos> + 33 + 6 = 40
    assert kinds(engine.generate(["a" * 38], mode="text", temperature=0)[0]) in ("t", "")
    assert engine.generate([]) == []


# ---- pick ----

distributions = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


def slow_nucleus(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """What may be drawn and how likely it is: sorted by hand, cut at top_p and at top_k."""
    weights = np.exp(np.array(logits, np.float64) / temperature)
    p = weights / weights.sum()
    kept, mass = {}, 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p or (top_k and len(kept) == top_k):
            break
        kept[i], mass = p[i], mass + p[i]
    return {i: q / sum(kept.values()) for i, q in kept.items()}


@given(distributions, st.floats(0.2, 3), st.floats(0.05, 0.98), st.integers(0, 5), st.integers(0, 2**31))
def test_a_token_is_picked_from_the_nucleus_alone(logits, temperature, top_p, top_k, seed):
    logits = [x + 1e-3 * i for i, x in enumerate(np.round(logits, 2).tolist())]  # no ties
    sampling = SampleConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    generous = slow_nucleus(logits, temperature, top_p + 1e-5, top_k)
    assert pick(torch.tensor(logits), sampling, torch.Generator().manual_seed(seed)) in generous


@given(distributions, st.integers(0, 2**31))
def test_no_temperature_one_candidate_and_a_tiny_nucleus_are_greedy(logits, seed):
    logits, random = torch.tensor(logits), torch.Generator().manual_seed(seed)
    best = logits.max()
    for sampling in (SampleConfig(temperature=0), SampleConfig(top_k=1), SampleConfig(top_p=1e-6)):
        assert logits[pick(logits, sampling, random)] > best - 1e-5


def test_tokens_are_picked_as_often_as_the_reference_says():
    logits, random = [0.0, 1.0, 2.0, -1.0, 1.5], torch.Generator().manual_seed(0)
    for temperature, top_p, top_k in ((1, 1, 0), (0.5, 1, 3), (2, 0.7, 0), (1, 0.9, 2)):
        want = slow_nucleus(logits, temperature, top_p, top_k)
        sampling = SampleConfig(temperature=float(temperature), top_p=float(top_p), top_k=top_k)
        drawn = [pick(torch.tensor(logits), sampling, random) for _ in range(2000)]
        for i in range(5):
            assert drawn.count(i) / 2000 == pytest.approx(want.get(i, 0), abs=0.045)  # four standard deviations


# ---- training and generation build the same sequence ----

CAPTIONS = ["red", "a green one", "blue and big", "z"]


def motifs() -> np.ndarray:
    """[4, 16, 16, 3] pictures that no two share a quarter of."""
    images = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 3)) * 200 + 27
    return images.repeat(4, 1).repeat(4, 2).astype(np.uint8)


def learned_by_heart(images, steps=450, codec=PIXELS, **options) -> Engine:
    """A model that has learnt four captioned images by heart, by the training's own functions.

    With `sides` it writes their sizes; then captions read clean copies of them. With a codebook images are codes.
    """
    torch.manual_seed(0)
    tokenizer, sides = Letters(), options.get("sides", 0)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "ffn_dim": 128, "channels": 3}
    patches = {"patches": "codes", "patch_size": 1} if codec.codes else {"patch_size": 8, "time_scale": True}
    model = build_model(ModelConfig(**sizes, vocab_size=VOCAB + sides + codec.codes, **patches, **options))
    diffusion = DiffusionConfig(schedule="linear", prediction="x0", loss_space="flow", data_variance=0.5)
    sample = SampleConfig(steps=10, solver="euler", guidance=1.5, temperature=0)
    buckets = tuple(dict.fromkeys(f"{image.shape[0]}x{image.shape[1]}" for image in images))
    parts = {
        "data": DataConfig(buckets=buckets),
        "diffusion": diffusion,
        "train": TrainConfig(seq_len=32, precision="fp32"),
    }
    engine = Engine(model, tokenizer, RunConfig(model=model.config, sample=sample, **parts), codec)
    optim = OptimConfig(lr=1e-2, min_lr=1e-4, warmup_steps=20, weight_decay=0.0)
    optimizers, rows = build_optimizers(model, optim), []
    for caption, image in zip(CAPTIONS, images):
        ids, shown = np.array(tokenizer.encode(caption)), engine.segment(image)
        rows += [caption_then_image(SPECIAL, ids, shown)] * 2
        rows += [image_alone(SPECIAL, shown)]
        read = {"t_max": 1.0 if sides else 0.5, "copy": bool(sides)}
        rows += [image_then_caption(SPECIAL, ids, shown if codec.codes else replace(shown, **read))]
    batch = collate([[lay_out(d, engine.fmt)] for d in rows * 2], 40, engine.fmt)
    for step in range(steps):
        set_lr(optimizers, step, steps, optim)
        lm, image = losses(model, batch, draw_noise(batch, diffusion, 0, step), diffusion)
        for p in model.parameters():
            p.grad = None
        (lm / batch.n_targets + image / max(1, batch.n_images)).backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return engine


@pytest.fixture(scope="module")
def memorised() -> Engine:
    return learned_by_heart(motifs())


def errors(drawn, images) -> np.ndarray:
    """[drawn, images] mean squared differences, of pixels in [0, 1]."""
    a, b = (np.stack([np.asarray(x) for x in xs]).reshape(len(xs), 1, -1) / 255.0 for xs in (drawn, images))
    return ((a - b.transpose(1, 0, 2)) ** 2).mean(-1)


@pytest.mark.parametrize("solver, steps", [("euler", 10), ("ddim", 10), ("heun", 8), ("ddpm", 40)])
def test_a_model_that_memorised_images_draws_each_by_its_caption(memorised, solver, steps):
    for seed in (0, 100):
        together = memorised.draw(CAPTIONS, seed=seed, solver=solver, steps=steps)
        alone = [memorised.draw([c], seed=seed + i, solver=solver, steps=steps)[0] for i, c in enumerate(CAPTIONS)]
        for drawn in (together, alone):
            table = errors(drawn, motifs())
            assert table.argmin(1).tolist() == [0, 1, 2, 3]
            assert table.diagonal().max() < 0.02


def test_a_model_that_memorised_captions_writes_each_alone_and_batched(memorised):
    images = [PIL.Image.fromarray(image) for image in motifs()]
    assert memorised.caption(images) == CAPTIONS
    assert [memorised.caption([image])[0] for image in images] == CAPTIONS


def test_a_model_that_memorised_captions_goes_on_from_a_caption_to_its_image_by_itself(memorised):
    together = memorised.generate(CAPTIONS, mode="auto")
    assert [kinds(answer) for answer in together] == ["i"] * 4  # <boi>, the image, <eoi>, then <eos>
    assert errors([a[0] for a in together], motifs()).argmin(1).tolist() == [0, 1, 2, 3]


def test_a_model_that_memorised_images_of_several_sizes_writes_the_size_draws_it_and_reads_it():
    a, b, c, d = motifs()
    images = [a, np.concatenate([b, b[:8]]), c[:8], np.concatenate([d, a], 1)[:8, :24]]
    engine = learned_by_heart(images, sides=3, image_positions="axial")
    for answers in (engine.generate(CAPTIONS, mode="draw", seed=3), engine.generate(CAPTIONS, mode="auto", seed=4)):
        drawn = [answer[0] for answer in answers]
        assert [np.asarray(x).shape for x in drawn] == [x.shape for x in images]
        for one, real in zip(drawn, images):
            assert errors([one], [real])[0, 0] < 0.02
    assert engine.caption([PIL.Image.fromarray(image) for image in images]) == CAPTIONS


def test_a_model_of_codes_that_memorised_images_writes_each_by_its_caption_and_reads_it():
    shape = np.array([[r, g, b] for r in (27, 227) for g in (27, 227) for b in (27, 227)])
    cells = lambda x: x[:, ::4, ::4] // 128 @ np.array([4, 2, 1])  # noqa: E731
    blocks = replace(
        PIXELS,
        factor=4,
        codes=8,
        encode=lambda x: shape[cells(x)].transpose(0, 3, 1, 2).astype(np.float32),
        decode=lambda z: z.transpose(0, 2, 3, 1).repeat(4, 1).repeat(4, 2).astype(np.uint8),
        quantize=lambda z: (z // 128).astype(int).transpose(0, 2, 3, 1) @ np.array([4, 2, 1]),
        lookup=lambda codes: shape[codes].transpose(0, 3, 1, 2).astype(np.float32),
    )
    engine = learned_by_heart(motifs(), codec=blocks, steps=300)
    images = [PIL.Image.fromarray(image) for image in motifs()]
    drawn = engine.draw(CAPTIONS, guidance=1.5)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(drawn, images))
    assert engine.caption(images) == CAPTIONS


def test_a_bare_image_is_a_prompt_and_a_prompt_that_is_no_list_of_prompts_is_refused():
    engine = tiny_engine()
    bare, listed = (engine.generate([p], mode="text", max_tokens=4, seed=3) for p in (picture(1), [picture(1)]))
    assert bare == listed == [[engine.caption([picture(1)], max_tokens=4, temperature=1.0, seed=3)[0]]]
    for call in (engine.generate, engine.draw, engine.caption):
        for prompts in ("a", picture(1)):
            with pytest.raises(ValueError, match="give a list of prompts"):
                call(prompts)
