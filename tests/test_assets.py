"""What the shipped data promises: splits that do not leak, captions that tell images apart, nothing missing."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import transfusion
from transfusion.codec.load import load_codec
from transfusion.data.images import OPENMOJI, load_images
from transfusion.data.text import load_text
from transfusion.evals.similarity import psnr, ssim
from transfusion.tokenizer import load_tokenizer

ASSETS = Path(transfusion.__file__).parent / "assets"
TONES = {"light", "medium-light", "medium", "medium-dark", "dark"}
TONE_CODES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


@pytest.fixture(scope="module")
def openmoji():
    with np.load(OPENMOJI) as file:
        return {name: file[name] for name in file.files}


def test_the_counts_are_those_of_the_attribution_page(openmoji):
    counts = Counter(openmoji["split"].tolist())
    assert counts == {"train": 3372, "held_out_image": 60, "held_out_combination": 106}
    assert openmoji["images"].shape == (3538, 64, 64, 3) and openmoji["images"].dtype == np.uint8
    page = (ASSETS / "ATTRIBUTION.md").read_text()
    assert "3,538" in page and all(f"| {name} | {n:,} |" in page for name, n in counts.items())
    assert all(f"`{path.name}`" in page for path in ASSETS.iterdir() if path.name != "ATTRIBUTION.md")


def test_captions_tell_all_images_apart_in_every_language(openmoji):
    assert openmoji["languages"].tolist() == ["en", "de", "fr", "es"]
    for column in openmoji["captions"].T.tolist():
        assert len(set(column)) == len(column) == 3538
        assert all(c == c.strip() and c and "_" not in c and not c.startswith(":") for c in column)


def test_every_image_shows_something_on_white(openmoji):
    images = openmoji["images"]
    assert ((images < 200).any(-1).sum((1, 2)) > 10).all()
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all((1, 2)).mean() > 0.99  # corners


def test_training_sees_no_image_of_a_held_out_concept(openmoji):
    code, split = openmoji["code"].tolist(), openmoji["split"]
    held = {c for c, s in zip(code, split) if s == "held_out_image"}
    train = {c for c, s in zip(code, split) if s != "held_out_image"}
    whole = ("1F1E", "1F1F", "1F3F4-E00", "00")  # flags and keycaps: their first code point is only a letter or a sign
    for c in held:
        assert c.startswith(whole) or not [t for t in train if t.split("-")[0] == c.split("-")[0]]
    names = [f" {n.lower().removesuffix(' face')} " for n in openmoji["captions"][:, 0].tolist()]
    for name in (n for n, s in zip(names, split) if s == "held_out_image"):
        assert [n for n in names if name in n or n in name] == [name]


def test_no_held_out_image_looks_like_one_of_training(openmoji):
    train = openmoji["split"] == "train"
    seen = {image.tobytes() for image in openmoji["images"][train]}
    assert not [1 for image in openmoji["images"][~train] if image.tobytes() in seen]
    small = openmoji["images"].reshape(-1, 16, 4, 16, 4, 3).mean((2, 4)).reshape(-1, 768)
    for image in small[openmoji["split"] == "held_out_image"]:
        assert np.sqrt(((small[train] - image) ** 2).mean(1)).min() >= 8


def test_a_held_out_combination_misses_one_tone_of_a_base_that_training_knows_well(openmoji):
    train_tones = defaultdict(set)
    for base, tone, split in zip(openmoji["base"].tolist(), openmoji["tone"].tolist(), openmoji["split"].tolist()):
        if split == "train":
            train_tones[base].add(tone)
    held = openmoji["split"] == "held_out_combination"
    pairs = list(zip(openmoji["base"][held].tolist(), openmoji["tone"][held].tolist()))
    assert len({base for base, _ in pairs}) == len(pairs)
    for base, tone in pairs:
        assert train_tones[base] == (TONES | {""}) - {tone}
    assert all(15 <= n <= 30 for n in Counter(tone for _, tone in pairs).values())
    seen = Counter(openmoji["tone"][openmoji["split"] == "train"].tolist())
    assert all(seen[tone] > 280 for tone in TONES)


def test_every_base_is_seen_unless_its_concept_is_held_out(openmoji):
    seen = set(openmoji["base"][openmoji["split"] == "train"].tolist())
    held = set(openmoji["base"][openmoji["split"] == "held_out_image"].tolist())
    assert set(openmoji["base"].tolist()) == seen | held and not seen & held
    assert not (openmoji["tone"][openmoji["split"] == "held_out_image"] != "").any()
    assert not (openmoji["group"][openmoji["split"] == "held_out_image"] == "person").any()


def test_code_base_and_tone_agree(openmoji):
    for code, base, tone in zip(*(openmoji[k].tolist() for k in ("code", "base", "tone"))):
        tones = [part for part in code.split("-") if part in TONE_CODES]
        assert bool(tone) == (len(tones) == 1 and code not in TONE_CODES) and len(tones) <= 1
        assert (code == base) == (not tone)


def test_the_base_set_is_the_whole_set_without_skin_tones():
    whole, _ = load_images("emoji", 32)
    base, report = load_images("emoji:base", 32)
    assert report.kept == len(base) == 1923 and report.skipped == {}
    assert whole.images.shape == (3538, 32, 32, 3)
    assert set(base.ids) < set(whole.ids) and set(base.split) == {"train", "held_out_image"}
    flag = whole.ids.index("1F1EB-1F1F7")
    assert whole.captions[flag] == [
        "flag of France",
        "de: flagge frankreich",
        "fr: drapeau france",
        "es: bandera francia",
    ]
    full, _ = load_images("emoji", 64)
    means = np.abs(full.images.mean((1, 2)) - whole.images.mean((1, 2)))
    assert means.max() < 0.3  # an average of whole pixels keeps the light: no ringing that white would clip


def test_two_whole_works_of_shakespeare_are_held_out():
    texts, report = load_text("shakespeare")
    assert len(texts.train) == 40 and report.kept == 42
    assert [work.splitlines()[0] for work in texts.held_out] == ["MACBETH", "TWELFTH NIGHT; OR, WHAT YOU WILL"]
    assert 4.7e6 < sum(map(len, texts.train)) < 5.1e6
    together = "".join(texts.train)
    assert "\f" not in together
    for work in texts.held_out:
        long_lines = [line for line in work.splitlines() if len(line) > 40]
        assert np.mean([line in together for line in long_lines]) < 0.01


def test_the_shipped_tokenizer_has_2048_tokens_and_short_captions(openmoji):
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 2048
    lengths = [len(ids) for ids in tokenizer.encode_many(openmoji["captions"][:, 0].tolist())]
    assert np.mean(lengths) < 6.5 and max(lengths) <= 25
    macbeth = load_text("shakespeare")[0].held_out[0]
    ids = tokenizer.encode(macbeth)
    assert tokenizer.decode(ids) == macbeth and len(macbeth) / len(ids) > 2.5


@pytest.mark.parametrize(("name", "codes", "decibels"), [("emoji", 0, 28), ("emoji-vq", 1024, 24.5)])
def test_a_shipped_codec_gives_drawings_back_that_it_never_saw(openmoji, name, codes, decibels):
    codec = load_codec(f"pretrained:{name}")
    assert (codec.channels, codec.factor, codec.codes) == (8, 4, codes)
    held_out = openmoji["images"][openmoji["split"] == "held_out_image"][::6]
    latents = codec.encode(held_out)
    back = codec.decode(codec.lookup(codec.quantize(latents)) if codes else latents)
    assert psnr(held_out, back).mean() > decibels and ssim(held_out, back).mean() > 0.93
