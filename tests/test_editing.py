"""Edits: an engine that draws what is wanted is right, one that copies is as wrong as a copy, and splits stay apart."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from test_corpus import TOKENIZER, folder_of_documents

from transfusion.codec.codec import PIXELS
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import DataConfig
from transfusion.evals.colour import PALETTE
from transfusion.evals.config import EvalConfig
from transfusion.evals.editing import edits, evaluate_editing
from transfusion.evals.run import table
from transfusion.sequence import Format, Image, Text

SIZE = 16
FMT = Format(TOKENIZER.special, 4, text_tokens=TOKENIZER.vocab_size)
PAIRS = [("red", "green"), ("green", "blue"), ("blue", "red"), ("black", "pink")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Discs to be recoloured: two pairs to train on, one held out as a pair, one as a shape; and a caption."""
    folder = tmp_path_factory.mktemp("edits") / "documents"
    lines = []
    for (before, after), why in zip(PAIRS, ("", "", "pair", "shape")):
        segments = [{"image": f"{before}.png", "learn": False}, f"make it {after}", {"image": f"{after}.png"}]
        split = "held_out" if why else "train"
        lines.append({"segments": segments, "split": split, "to": after, "unseen": why})
    lines.append({"segments": ["a red disc", {"image": "red.png"}], "split": "train", "to": "red"})
    path = folder_of_documents(folder, lines)
    rows, columns = np.indices((SIZE, SIZE)) - SIZE / 2
    for name, colour in PALETTE.items():
        disc = np.where((np.hypot(rows, columns) < 6)[..., None], colour, 255).astype(np.uint8)
        PIL.Image.fromarray(disc).save(folder / f"{name}.png")
    config = DataConfig((), (), documents=(path,), image_share=1.0, image_size=SIZE)
    return build_corpus(config, TOKENIZER, PIXELS, FMT, 128)[0]


def engine_that(draws, corpus):
    """An engine whose drawing is draws(prompt segments)."""
    seen = []

    def complete(prompts, mode, seed, sampling, grids):
        seen.extend(zip(prompts, grids))
        return [[draws(prompt)] for prompt in prompts]

    picture = lambda image: PIL.Image.fromarray(PIXELS.decode(image.latents[None])[0])  # noqa: E731
    read = lambda segments: [TOKENIZER.decode(s.ids.tolist()) for s in segments]  # noqa: E731
    return SimpleNamespace(complete=complete, picture=picture, read=read, sampling=lambda **o: o, seen=seen)


def wanted(prompt) -> Image:
    said = "".join(TOKENIZER.decode(s.ids.tolist()) for s in prompt if isinstance(s, Text))
    colour, given = PALETTE[said.removeprefix("make it ")], prompt[1].latents
    white = (given > 0.999).all(0)
    return Image(np.where(white, 1.0, np.array(colour)[:, None, None] / 127.5 - 1).astype(np.float32))


def test_only_documents_that_end_with_an_image_behind_another_are_edits_and_held_out_ones_say_why(corpus):
    found = {split: [d.info["to"] for d in documents] for split, documents in edits(corpus).items()}
    assert found == {"train": ["green", "blue"], "held_out_pair": ["red"], "held_out_shape": ["pink"]}


def test_an_engine_that_draws_what_is_wanted_is_right_in_every_number(corpus):
    engine = engine_that(wanted, corpus)
    found = dict(evaluate_editing(engine, corpus, EvalConfig()))
    for split in ("train", "held_out_pair", "held_out_shape"):
        assert found[f"editing/{split}/mse"] == pytest.approx(0, abs=1e-9)
        assert found[f"editing/{split}/colour"] == found[f"editing/{split}/overlap"] == 1
        assert found[f"editing/{split}/unchanged"] > 0.01
    for prompt, grid in engine.seen:
        assert len(prompt) == 3 and prompt[1].t_max == 0 and grid == (4, 4), (
            "the image to draw is no part of the prompt"
        )
    assert "Edits" in table(found) and "100.0 %" in table(found)


@pytest.mark.parametrize("conditioning", ["noised", "clean"])
def test_an_image_that_is_learned_itself_is_given_clean_and_once(corpus, conditioning):
    chain = [d._replace(segments=[d.segments[0]._replace(learn=True), *d.segments[1:]])
             for d in corpus.interleaved.documents["train"] if len(d.segments) == 3]  # fmt: skip
    learned = replace(
        corpus,
        config=replace(corpus.config, conditioning=conditioning),
        interleaved=replace(corpus.interleaved, documents={"train": chain, "held_out": []}),
    )
    assert all(learned.planned(d.segments)[0].t_max > 0 for d in chain), "in training it is noised"
    engine = engine_that(wanted, learned)
    assert dict(evaluate_editing(engine, learned, EvalConfig()))["editing/train/mse"] == pytest.approx(0, abs=1e-9)
    for prompt, _ in engine.seen:
        assert [type(s) for s in prompt] == [Text, Image, Text] and prompt[1].t_max == 0 and not prompt[1].copy


def test_an_engine_that_copies_keeps_the_shape_and_misses_the_colour(corpus):
    found = dict(evaluate_editing(engine_that(lambda prompt: Image(prompt[1].latents), corpus), corpus, EvalConfig()))
    assert found["editing/train/mse"] == pytest.approx(found["editing/train/unchanged"])
    assert found["editing/train/colour"] == 0 and found["editing/train/overlap"] > 0.9
    assert found["editing/train/mse_low"] < found["editing/train/mse"] < found["editing/train/mse_high"]


def test_an_empty_canvas_has_no_colour_and_no_shape(corpus):
    blank = Image(np.ones((3, SIZE, SIZE), np.float32))
    found = dict(evaluate_editing(engine_that(lambda prompt: blank, corpus), corpus, EvalConfig(n_edits=1)))
    assert found["editing/train/n"] == 1 and found["editing/train/colour"] == found["editing/train/overlap"] == 0
    assert dict(evaluate_editing(engine_that(wanted, corpus), corpus, EvalConfig(n_edits=0))) == {}


def test_what_is_asked_for_that_is_no_colour_is_not_taken_for_one(corpus):
    documents = {
        "train": [d._replace(info={"to": "relief"}) for d in corpus.interleaved.documents["train"]],
        "held_out": [],
    }
    maps = replace(corpus, interleaved=replace(corpus.interleaved, documents=documents))
    found = dict(evaluate_editing(engine_that(wanted, corpus), maps, EvalConfig()))
    assert "editing/train/mse" in found and not any(name.endswith(("colour", "overlap")) for name in found)


def test_edits_with_an_image_that_cannot_be_read_are_passed_over_and_counted(corpus, tmp_path, monkeypatch, capsys):
    images = corpus.interleaved.images
    bad, reads = corpus.interleaved.documents["train"][0].segments[0].number, images.read
    gone = lambda numbers: ["gone" if i == bad else x for i, x in zip(numbers, reads(numbers))]  # noqa: E731
    monkeypatch.setattr(images, "read", gone)
    found = dict(evaluate_editing(engine_that(wanted, corpus), corpus, EvalConfig(sheets=str(tmp_path))))
    assert found["editing/train/n"] == 1 and found["editing/train/mse"] == pytest.approx(0, abs=1e-9)
    assert "1 of 2 documents are passed over: gone\n" in capsys.readouterr().err


def test_sheets_show_what_was_given_drawn_and_wanted(corpus, tmp_path):
    list(evaluate_editing(engine_that(wanted, corpus), corpus, EvalConfig(sheets=str(tmp_path))))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["edited_held_out_pair.png", "edited_held_out_shape.png", "edited_train.png"]
