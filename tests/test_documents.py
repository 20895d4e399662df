"""Documents: pure functions of (seed, k), every image once an epoch, shares as configured, nothing lost in silence."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from transfusion.codec.codec import PIXELS
from transfusion.data.arrays import Held
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import Captions, Corpus, DataConfig
from transfusion.data.report import Report
from transfusion.data.windows import Stream
from transfusion.sequence import Format, Image, Special, Text
from transfusion.tokenizer import load_tokenizer

SPECIAL = Special(pad=0, bos=1, eos=2, boi=3, eoi=4, patch=5)
SIZE, PATCH = 8, 4  # 4 patches an image
FMT = Format(SPECIAL, PATCH)
DRAWS = 4000
SPREAD = 4 * 0.5 / DRAWS**0.5  # four standard deviations of a share, at most


def folder_of_images(folder, n: int, captions=lambda i: f"picture number {i}"):
    """A folder of n PNGs in colours of their own, each with its captions in a .txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        colour = (37 * i % 256, 91 * i % 256, 17 * i % 256)
        PIL.Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(captions(i))
    return folder


def corpus_of(captions: list[list[list[int]]], works: Sequence[list[int]] = (), **config) -> Corpus:
    """A corpus of these captions and works as token ids; the image of caption i is flat, of grey level i."""
    n = len(captions)
    images = np.repeat(np.arange(n, dtype=np.uint8), SIZE * SIZE * 3).reshape(n, SIZE, SIZE, 3)
    ids = [[np.array(c) for c in own] for own in captions]
    train = Captions(Held(images), [[""]] * n, ids, [str(i) for i in range(n)])
    config = DataConfig(images=("here",), text=("here",), image_size=SIZE, **config)
    text = [id for work in works for id in (*work, SPECIAL.eos)]
    return Corpus(config, FMT, PIXELS, {"train": train}, (Stream("text here", np.array(text), len(works)),), [])


def flat(document: list[Text | Image]) -> list:
    """A document as numbers that compare."""
    return [s.ids.tolist() if isinstance(s, Text) else (s.latents.tolist(), s.t_max) for s in document]


def number_of(document: list[Text | Image]) -> int:
    """Which image of `corpus_of` a document shows."""
    image = next(s for s in document if isinstance(s, Image))
    return round((float(image.latents[0, 0, 0]) + 1) * 127.5)


CAPTIONED = corpus_of([[[10 + i], [100 + i], [200 + i]] for i in range(7)], caption_dropout=0.2, noise_limit=0.4)


def test_the_kth_image_document_is_a_pure_function_of_seed_and_k():
    forwards = [flat(CAPTIONED.image_document(3, k)) for k in range(40)]
    fresh = replace(CAPTIONED)
    backwards = [flat(fresh.image_document(3, k)) for k in reversed(range(40))][::-1]
    assert forwards == backwards
    assert forwards != [flat(CAPTIONED.image_document(4, k)) for k in range(40)]


def test_every_image_comes_once_an_epoch_and_epochs_differ_in_order():
    order = [number_of(CAPTIONED.image_document(0, k)) for k in range(7 * 20)]
    epochs = [tuple(order[i : i + 7]) for i in range(0, len(order), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 15  # of 5040 orders


def test_documents_take_their_forms_in_the_configured_shares():
    documents = [CAPTIONED.image_document(1, k) for k in range(DRAWS)]
    image_first = [d for d in documents if isinstance(d[1], Image) and len(d) == 3 and len(d[2].ids) > 1]
    rest = [d for d in documents if not any(d is e for e in image_first)]
    dropped = [d for d in rest if d[0].ids.tolist() == [SPECIAL.bos]]
    assert len(image_first) / DRAWS == pytest.approx(0.2, abs=SPREAD)
    assert len(dropped) / len(rest) == pytest.approx(0.2, abs=SPREAD)
    captions = [d[2].ids[0] for d in image_first] + [d[0].ids[1] for d in rest if len(d[0].ids) > 1]
    first, second, third = (sum(low <= c < low + 10 for c in captions) / len(captions) for low in (10, 100, 200))
    assert first == pytest.approx(0.7, abs=SPREAD)
    assert second == pytest.approx(0.15, abs=SPREAD)
    assert third == pytest.approx(0.15, abs=SPREAD)


def test_an_image_before_its_caption_is_noised_to_the_limit_and_one_behind_it_to_the_end():
    for k in range(200):
        document = CAPTIONED.image_document(2, k)
        before_caption = len(document) == 3 and len(document[2].ids) > 1
        assert document[1].t_max == (0.4 if before_caption else 1.0)


def test_an_image_stands_beside_its_own_caption_between_bos_and_eos():
    for k in range(200):
        document = CAPTIONED.image_document(2, k)
        if len(document) == 2:  # its caption is dropped, and no <eos> says that none comes
            assert document[0].ids.tolist() == [SPECIAL.bos]
            continue
        ids = np.concatenate([document[0].ids, document[2].ids]).tolist()
        assert ids[0] == SPECIAL.bos and ids[-1] == SPECIAL.eos
        assert [i % 10 for i in ids[1:-1]] == [number_of(document)]


def test_shares_of_nothing_and_of_everything_hold_exactly():
    always = replace(CAPTIONED, config=replace(CAPTIONED.config, caption_first=1.0, caption_dropout=1.0))
    never = replace(CAPTIONED, config=replace(CAPTIONED.config, caption_first=0.0, other_captions=0.0))
    for k in range(100):
        assert [len(s.ids) for s in always.image_document(0, k) if isinstance(s, Text)] == [1]
        assert never.image_document(0, k)[2].ids.tolist() == [10 + number_of(never.image_document(0, k)), SPECIAL.eos]


# ---- from sources ----


def names_of(report: Report) -> list[str]:
    """Everything that a report names as left out."""
    return [name for names in report.skipped.values() for name in names]


def test_a_folder_of_the_user_is_data_by_one_line_of_config(tmp_path):
    folder = folder_of_images(tmp_path / "mine", 30)
    (tmp_path / "words.txt").write_text("some words of mine. " * 200)
    config = DataConfig(images=(str(folder),), text=(str(tmp_path / "words.txt"),), image_size=SIZE)
    tokenizer = load_tokenizer()
    corpus, reports = build_corpus(config, tokenizer, PIXELS, FMT, 64)
    train, held_out = corpus.captions["train"], corpus.captions["held_out_image"]
    assert len(train) + len(held_out) == 30 and len(held_out) >= 1
    assert not set(train.names) & set(held_out.names)
    for split in (train, held_out):
        for name, texts, ids, pixels in zip(split.names, split.texts, split.ids, split.images):
            i = int(name[:3])
            assert texts == [f"picture number {i}"] and tokenizer.decode(ids[0].tolist()) == texts[0]
            assert pixels[0, 0].tolist() == [37 * i % 256, 91 * i % 256, 17 * i % 256]
    text = tokenizer.decode(corpus.text[0].ids[:-1].tolist())
    assert text.startswith("some words of mine.") and corpus.held_out_text
    assert len(text) + len(corpus.held_out_text[0]) == 20 * 200
    assert all(report.skipped == {} for report in reports.values())


def test_what_does_not_fit_is_reported_by_name(tmp_path):
    folder = folder_of_images(tmp_path / "mine", 6, lambda i: "very long words " * 50 if i == 2 else f"number {i}")
    (folder / "bad.png").write_bytes(b"not an image")
    (folder / "bad.txt").write_text("a caption")
    PIL.Image.new("RGB", (SIZE, SIZE)).save(folder / "mute.png")
    (tmp_path / "words.jsonl").write_text('{"text": "one"}\n{"wrong": 1}\n{"text": "two"}\n')
    config = DataConfig(images=(str(folder),), text=(str(tmp_path / "words.jsonl"),), image_size=SIZE)
    corpus, reports = build_corpus(config, load_tokenizer(), PIXELS, FMT, 32)
    images, text = reports.values()
    assert sorted(names_of(images)) == ["002.png", "bad.png", "mute.png"]
    assert images.kept == len(corpus.captions["train"]) == 5
    assert text.kept == 2 and names_of(text) == ["words.jsonl:2"]


def test_one_folder_of_images_and_of_text_has_both_of_its_reports(tmp_path):
    folder = folder_of_images(tmp_path / "both", 3)
    PIL.Image.new("RGB", (SIZE, SIZE)).save(folder / "mute.png")
    config = DataConfig(images=(str(folder),), text=(str(folder),), image_size=SIZE)
    _, reports = build_corpus(config, load_tokenizer(), PIXELS, FMT, 64)
    assert sorted(report.kept for report in reports.values()) == [3, 3]
    assert ["mute.png"] in [names for report in reports.values() for names in report.skipped.values()]


def test_a_caption_that_does_not_fit_is_reported_even_if_another_of_the_image_does(tmp_path):
    folder = folder_of_images(tmp_path / "mine", 3, lambda i: f"number {i}\n" + "very long words " * 50 * (i == 1))
    config = DataConfig(images=(str(folder),), text=(), image_size=SIZE, image_share=1.0)
    corpus, reports = build_corpus(config, load_tokenizer(), PIXELS, FMT, 32)
    report = next(iter(reports.values()))
    assert list(corpus.captions["train"].texts) == [["number 0"], ["number 1"], ["number 2"]]
    assert report.kept == 3 and names_of(report) == ["001.png"]


def test_shipped_data_comes_in_three_splits_that_share_no_image():
    config = DataConfig(image_size=16)
    corpus, reports = build_corpus(config, load_tokenizer(), PIXELS, Format(SPECIAL, 8), 256)
    names = {split: set(captions.names) for split, captions in corpus.captions.items()}
    assert set(names) == {"train", "held_out_image", "held_out_combination"} and all(names.values())
    assert sum(map(len, names.values())) == len(set.union(*names.values()))
    assert sum(map(len, names.values())) == next(iter(reports.values())).kept
    assert (
        corpus.grid(corpus.captions["train"].images.shape(0)) == (2, 2)
        and corpus.text[0].texts == 40
        and len(corpus.held_out_text) == 2
    )


@pytest.mark.parametrize(
    "wrong, remedy",
    [
        ({"image_share": 1.5}, "from 0 to 1"),
        ({"conditioning": "blurred"}, "choose one of noised, clean"),
        ({"images": ()}, "data.image_share=0"),
        ({"text": ()}, "data.image_share=1"),
        ({"images": ("a", "b", "a/")}, "data.images names a/ twice: name it once, and give it a data.image_weights"),
        ({"text": ("a", "a")}, "give it a data.text_weights"),
        ({"images": ("a",), "documents": ("b",), "image_weights": (1.0,)}, "= 1: give a number of .* each of a, b"),
        ({"text": ("a", "b"), "text_weights": (1.0, -2.0)}, "1, -2: give a number of at least 0"),
        ({"text_weights": (0.0,)}, "of at least 0 for each of shakespeare"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_remedy(wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        DataConfig(**wrong)


def test_sizes_that_do_not_fit_are_refused_with_their_remedy(tmp_path):
    folder = folder_of_images(tmp_path / "mine", 2)
    config = DataConfig(images=(str(folder),), text=(), image_size=SIZE, image_share=1.0)
    with pytest.raises(ValueError, match="multiples of 3"):
        build_corpus(config, load_tokenizer(), PIXELS, Format(SPECIAL, 3), 64)
    with pytest.raises(ValueError, match="takes 8 positions"):
        build_corpus(config, load_tokenizer(), PIXELS, FMT, 7)
