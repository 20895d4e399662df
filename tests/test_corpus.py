"""From a config to a corpus: images anywhere, sizes, latents and codes, each as the sources say, nothing lost."""

import json
import pickle
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from transfusion.codec.codec import PIXELS
from transfusion.data.corpus import build_corpus, with_latents
from transfusion.data.documents import DataConfig, Placed, Plan
from transfusion.data.latents import encode, statistics
from transfusion.data.loader import Packer
from transfusion.run import same_codec
from transfusion.sequence import Codes, Format, Text, lay_out
from transfusion.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
FMT = Format(TOKENIZER.special, 4, text_tokens=TOKENIZER.vocab_size)
CODEBOOK = np.linspace(-1, 1, 5).astype(np.float32)
KEYED = replace(PIXELS, name="keyed", key="v1", limit=None)  # pixels as a codec whose latents are worth keeping
DISCRETE = replace(KEYED, codes=5, quantize=lambda z: np.abs(z.mean(1)[..., None] - CODEBOOK).argmin(-1))


def picture(level: int, width: int = 8, height: int = 8) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), (level, level, level))


def folder_of_documents(folder, lines, **sizes):
    """A folder with these lines, and every image they name as a grey square, or of its size in `sizes`."""
    folder.mkdir()
    names = {s["image"] for line in lines for s in line["segments"] if isinstance(s, dict) and "image" in s}
    for i, name in enumerate(sorted(names)):
        picture(10 * i, *sizes.get(name.removesuffix(".png"), (8, 8))).save(folder / name)
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


EDIT = [{"image": "a.png", "learn": False}, {"text": "make it darker", "learn": False}, {"image": "b.png"}]
CHAIN = ["one", {"image": "a.png"}, "two", {"image": "c.png"}, "end"]


def corpus_of(folder, lines=({"segments": EDIT}, {"segments": CHAIN}), codec=PIXELS, fmt=FMT, seq_len=64, **config):
    config = {"images": (), "text": (), "image_share": 1.0, "image_size": 8, "caption_dropout": 0.0, **config}
    folder.mkdir(exist_ok=True)
    path = folder_of_documents(folder / "documents", list(lines))
    return build_corpus(DataConfig(documents=(path,), **config), TOKENIZER, codec, fmt, seq_len)


def forms(corpus, n=40):
    """What the first documents look like: texts as they read, images as their grey level, t_max and copy."""
    found = set()
    for k in range(n):
        parts = []
        for s in corpus.image_document(0, k):
            if isinstance(s, Text):
                parts.append((TOKENIZER.decode(s.ids.tolist()), s.learn))
            else:
                parts.append((round((float(s.latents[0, 0, 0]) + 1) * 127.5), s.t_max, s.copy))
        found.add(tuple(parts))
    return found


BOS = EOS = ("", True)


# ---- images anywhere ----


def test_a_document_is_written_as_its_line_says_with_earlier_images_noised_below_the_limit(tmp_path):
    corpus, _ = corpus_of(tmp_path, noise_limit=0.4)
    edit = (BOS, (0, 0.0, False), ("make it darker", False), (10, 1.0, False), EOS)
    chain = (BOS, ("one", True), (0, 0.4, False), ("two", True), (20, 0.4, False), ("end", True), EOS)
    assert forms(corpus) == {edit, chain}


def test_clean_conditioning_copies_what_is_learned_and_read_later_and_nothing_else(tmp_path):
    corpus, _ = corpus_of(tmp_path, conditioning="clean")
    edit = (BOS, (0, 0.0, False), ("make it darker", False), (10, 1.0, False), EOS)
    chain = (BOS, ("one", True), (0, 1.0, True), ("two", True), (20, 1.0, True), ("end", True), EOS)
    assert forms(corpus) == {edit, chain}


def test_before_a_last_image_to_draw_texts_are_dropped_and_all_images_with_them(tmp_path):
    corpus, _ = corpus_of(tmp_path, lines=[{"segments": EDIT}], caption_dropout=0.2)
    whole = (BOS, (0, 0.0, False), ("make it darker", False), (10, 1.0, False), EOS)
    images, alone = (BOS, (0, 0.0, False), (10, 1.0, False)), (BOS, (10, 1.0, False))
    assert forms(corpus) == {whole, images, alone}
    n, kinds = 4000, {2: 0, 3: 0, 5: 0}
    for k in range(n):
        kinds[len(corpus.image_document(1, k))] += 1
    assert kinds[2] / n == pytest.approx(0.2, abs=0.03) and kinds[3] / n == pytest.approx(0.2, abs=0.03)


def test_a_document_that_ends_with_text_or_a_given_image_drops_nothing(tmp_path):
    given = [*EDIT[:2], {"image": "b.png", "learn": False}, "so"]
    corpus, _ = corpus_of(tmp_path, lines=[{"segments": CHAIN}, {"segments": given}], caption_dropout=0.5)
    assert {len(corpus.image_document(0, k)) for k in range(100)} == {len(CHAIN) + 2, len(given) + 2}


def test_documents_and_captioned_images_come_once_an_epoch_together(tmp_path):
    corpus, _ = corpus_of(tmp_path, images=("emoji:base",))
    captioned = len(corpus.captions["train"])
    n, seen = captioned + 2, []
    for k in range(n):
        segments = corpus.image_document(0, k)
        seen.append(tuple(i for s in segments if isinstance(s, Text) for i in s.ids.tolist()))
    edits = [s for s in seen if TOKENIZER.decode(list(s)) in ("make it darker", "onetwoend")]
    assert len(edits) == 2 and len(seen) == captioned + 2


def test_lengths_are_those_that_lay_out_gives_and_what_is_too_long_is_named(tmp_path):
    for conditioning in ("noised", "clean"):
        folder = tmp_path / conditioning
        folder.mkdir()
        corpus, reports = corpus_of(folder, conditioning=conditioning, fmt=replace(FMT, sides=4))
        documents = corpus.interleaved.documents["train"]
        lengths = {corpus.length(d.segments) for d in documents}
        assert lengths == {len(lay_out(corpus.image_document(0, k), corpus.fmt)) for k in range(10)}
        assert corpus.image_document_length == pytest.approx(np.mean([corpus.length(d.segments) for d in documents]))
        assert all(report.skipped == {} for report in reports.values())
        assert len(lengths) == 2
        folder, limit = folder / "short", max(lengths) - 1
        folder.mkdir()
        short, reports = corpus_of(folder, conditioning=conditioning, fmt=replace(FMT, sides=4), seq_len=limit)
        (report,) = reports.values()
        longest = 1 + [corpus.length(d.segments) for d in documents].index(max(lengths))
        assert list(report.skipped.values()) == [[f"documents.jsonl:{longest}"]] and report.kept == 1
        assert len(short.interleaved.documents["train"]) == 1


def test_held_out_documents_never_enter_training_and_keep_what_is_said_of_them(tmp_path):
    lines = [{"segments": EDIT, "split": "held_out", "to": "dark"}, {"segments": CHAIN, "split": "train"}]
    corpus, _ = corpus_of(tmp_path, lines=lines)
    held_out, train = (corpus.interleaved.documents[split] for split in ("held_out", "train"))
    assert [d.info for d in held_out] == [{"to": "dark"}] and len(train) == 1
    assert [s.learn for s in held_out[0].segments] == [False, False, True]
    assert isinstance(held_out[0].segments[0], Placed)
    assert all(len(corpus.image_document(0, k)) == len(CHAIN) + 2 for k in range(20))


def test_a_step_packs_documents_whose_given_images_have_no_loss(tmp_path):
    corpus, _ = corpus_of(tmp_path, lines=[{"segments": EDIT}])
    (batch,) = Packer(corpus, FMT, 0, 2, 64).batches(0)
    assert batch.n_images == len(batch.grids) / 2 and sorted(set(batch.t_max.tolist())) == [0.0, 1.0]


# ---- sizes ----


def test_images_take_the_closest_of_the_buckets_and_pack_together(tmp_path):
    lines = [{"segments": ["see", {"image": "wide.png"}, {"image": "tall.png"}, {"image": "square.png"}]}]
    path = folder_of_documents(tmp_path / "d", lines, wide=(40, 20), tall=(9, 30), square=(11, 10))
    config = DataConfig((), (), documents=(path,), image_share=1.0, buckets=("8x8", "4x8", "8x4"), caption_dropout=0.0)
    corpus, _ = build_corpus(config, TOKENIZER, PIXELS, FMT, 64)
    (batch,) = Packer(corpus, FMT, 0, 1, 64).batches(0)
    assert batch.grids[:3] == ((1, 2), (2, 1), (2, 2))
    with pytest.raises(ValueError, match="choose multiples of 4"):
        build_corpus(replace(config, buckets=("8x8", "6x8")), TOKENIZER, PIXELS, FMT, 64)
    with pytest.raises(ValueError, match='as in "64x64"'):
        replace(config, buckets=("8 by 8",))


# ---- latents ----


def test_latents_are_standardised_by_statistics_of_training_that_the_config_then_holds(tmp_path):
    corpus, _ = corpus_of(tmp_path, codec=KEYED)
    c = corpus.config
    assert len(c.latent_mean) == len(c.latent_std) == 3
    latents = np.stack([corpus.image(corpus.interleaved, i).latents for i in range(3)])
    assert np.abs(latents.mean((0, 2, 3))).max() < 1e-5 and np.abs(latents.std((0, 2, 3)) - 1).max() < 1e-5
    for i, image in enumerate(corpus.interleaved.images):
        np.testing.assert_array_equal(corpus.codec.decode(latents[i : i + 1])[0], image)
        np.testing.assert_allclose(corpus.codec.encode(image[None])[0], latents[i], atol=1e-5)


def test_statistics_are_of_training_documents_alone_and_none_are_wanted_without_images(tmp_path):
    held_out = [{"image": "a.png", "learn": False}, "x", {"image": "b.png"}]
    train = [{"image": "c.png"}, "y", {"image": "d.png"}]
    lines = [{"segments": held_out, "split": "held_out"}, {"segments": train, "split": "train"}]
    corpus, _ = corpus_of(tmp_path, lines=lines, codec=KEYED)
    images = [corpus.interleaved.images[s.number] for s in corpus.interleaved.documents["train"][0].segments[::2]]
    mean, _ = statistics(list(PIXELS.encode(np.stack(images))))
    np.testing.assert_allclose(corpus.config.latent_mean, mean, atol=1e-6)
    (tmp_path / "words.txt").write_text("some words of mine. " * 200)
    alone = DataConfig((), (str(tmp_path / "words.txt"),), image_share=0.0, image_size=8)
    corpus, _ = build_corpus(alone, TOKENIZER, KEYED, FMT, 64)
    assert corpus.config.latent_std == (1.0, 1.0, 1.0) and corpus.config.codec_key == "v1"


def test_a_codec_whose_weights_changed_is_refused():
    data = DataConfig(image_size=8, codec_key="v1")
    assert same_codec(KEYED, data) is KEYED and same_codec(PIXELS, DataConfig()) is PIXELS
    with pytest.raises(ValueError, match="changed since the model learned its latents"):
        same_codec(replace(KEYED, key="v2"), data)


def test_statistics_that_the_config_names_are_used_as_they_are(tmp_path):
    given = {"latent_mean": (0.5, 0.5, 0.5), "latent_std": (2.0, 2.0, 2.0)}
    corpus, _ = corpus_of(tmp_path, codec=KEYED, **given)
    assert corpus.config.latent_mean == (0.5, 0.5, 0.5)
    raw = PIXELS.encode(corpus.interleaved.images[1][None])[0]
    np.testing.assert_allclose(corpus.image(corpus.interleaved, 1).latents, (raw - 0.5) / 2, atol=1e-6)


def test_a_channel_that_never_changes_is_named_with_the_statistics_to_give_instead(tmp_path):
    def encode(images):  # the second channel all but constant: what is left of it is rounding
        latents = PIXELS.encode(images)
        latents[:, 1] = np.float32(0.7) + 1e-7 * latents[:, 0]
        return latents

    flat = replace(KEYED, name="flat", key="flat", encode=encode)
    with pytest.raises(ValueError, match=r"channels \[1\] of flat .* in all of 3 images") as refused:
        corpus_of(tmp_path / "measured", codec=flat)
    said = [arg.split("=")[1] for arg in str(refused.value).split() if arg.startswith("data.latent_")]
    mean, std = (tuple(map(float, numbers.split(","))) for numbers in said)
    assert mean[1] == pytest.approx(0.7, abs=1e-3) and std[1] == 1 and 0 < std[0] != 1
    corpus, _ = corpus_of(tmp_path / "given", codec=flat, latent_mean=mean, latent_std=std)
    latents = np.stack([corpus.image(corpus.interleaved, i).latents for i in range(3)])
    assert np.abs(latents[:, 1]).max() < 1e-3 and np.abs(latents[:, 0].std() - 1) < 1e-3


@pytest.mark.parametrize(
    "given, remedy",
    [
        ({"latent_mean": (0.5,) * 3}, "latent_mean has 3 numbers, data.latent_std has 0: .* or leave both out"),
        ({"latent_std": (0.5,) * 3}, "latent_mean has 0 numbers, data.latent_std has 3: .* or leave both out"),
        ({"latent_mean": (0.5,) * 2, "latent_std": (0.5,) * 2}, "want 3 numbers each for keyed"),
        ({"latent_mean": (0.5,) * 3, "latent_std": (1.0, 0.0, 1.0)}, "the latter above 0"),
    ],
    ids=["mean alone", "deviation alone", "too few", "zero"],
)
def test_statistics_that_cannot_be_are_refused_with_what_to_give(given, remedy, tmp_path):
    with pytest.raises(ValueError, match=remedy):
        corpus_of(tmp_path, codec=KEYED, **given)


def test_pixels_are_not_standardised_and_statistics_for_them_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pixels are taken as they are: leave it out"):
        corpus_of(tmp_path, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3)
    coded = replace(KEYED, codes=4, quantize=lambda z: np.zeros(z[:, 0].shape, np.int64))
    corpus, _ = corpus_of(tmp_path / "coded", codec=coded)
    given = replace(corpus.config, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3)
    with pytest.raises(ValueError, match="codes are taken as they are"):
        with_latents(replace(corpus, config=given, fmt=replace(FMT, codes=4)))


def test_latents_are_encoded_once_and_anew_when_the_codec_or_an_image_changes(tmp_path):
    calls = []
    codec = replace(KEYED, encode=lambda images: calls.append(len(images)) or PIXELS.encode(images))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in [(4, 4)] * 40 + [(4, 8)] * 3]
    first = encode(images, codec, tmp_path)
    assert calls == [40, 3] and all(np.array_equal(a, PIXELS.encode(i[None])[0]) for a, i in zip(first, images))
    again = encode(images, codec, tmp_path)
    assert calls == [40, 3] and all(np.array_equal(a, b) for a, b in zip(first, again))
    encode(images, replace(codec, key="v2"), tmp_path)
    assert calls == [40, 3] * 2
    images[41] = images[41].copy()
    images[41][0, 0, 0] ^= 1
    encode(images, codec, tmp_path)
    assert calls == [40, 3] * 2 + [3]
    assert not list(tmp_path.glob(".tmp*")) and encode([], codec, tmp_path) == []


def test_statistics_are_those_of_all_cells_of_latents_of_any_size():
    rng = np.random.default_rng(0)
    latents = [rng.normal(3, 2, (2, *size)).astype(np.float32) for size in [(3, 4), (5, 2), (1, 7)]]
    flat = np.concatenate([x.reshape(2, -1) for x in latents], 1)
    mean, std = statistics(latents)
    np.testing.assert_allclose(mean, flat.mean(1), rtol=1e-6)
    np.testing.assert_allclose(std, flat.std(1), rtol=1e-6)


def test_workers_get_documents_without_the_networks_of_the_codec(tmp_path):
    corpus, _ = corpus_of(tmp_path, codec=KEYED)
    with pytest.raises(Exception, match="pickle"):  # functions made on the fly go to no other process
        pickle.dumps(corpus)
    sent = pickle.loads(pickle.dumps(corpus.without_networks()))
    for k in range(4):
        here, there = (lay_out(c.image_document(0, k), FMT) for c in (corpus, sent))
        np.testing.assert_array_equal(here.tokens, there.tokens)
        np.testing.assert_array_equal(here.patches, there.patches)
    plain, _ = corpus_of(tmp_path / "plain")
    assert plain.without_networks() is plain


# ---- codes ----


def test_images_are_codes_where_the_format_says_so_and_given_ones_are_no_targets(tmp_path):
    fmt = replace(FMT, patch_size=1, codes=5)
    corpus, _ = corpus_of(tmp_path, lines=[{"segments": EDIT}], codec=DISCRETE, fmt=fmt, seq_len=160)
    bos, given, text, drawn, eos = corpus.image_document(0, 0)
    assert isinstance(given, Codes) and given.codes.shape == (8, 8) and (given.learn, drawn.learn) == (False, True)
    np.testing.assert_array_equal(given.codes, DISCRETE.quantize(PIXELS.encode(corpus.interleaved.images[0][None]))[0])
    s = lay_out([bos, given, text, drawn, eos], fmt)
    assert (s.target >= fmt.first_code).sum() == 64 and not s.patches.size


def test_codes_know_no_noise_limit_and_no_clean_copies(tmp_path):
    fmt = replace(FMT, patch_size=1, codes=5)
    for i, options in enumerate(({"conditioning": "clean"}, {"noise_limit": 0.0})):
        corpus, reports = corpus_of(tmp_path / str(i), codec=DISCRETE, fmt=fmt, seq_len=160, **options)
        for d in corpus.interleaved.documents["train"]:
            (document,) = corpus.fill([Plan("one", corpus.planned(d.segments), 0)])
            written = lay_out([Text(np.array([1])), *document, Text(np.array([2]))], fmt)
            assert corpus.length(d.segments) == len(written)
            codes = [s for s in document if isinstance(s, Codes)]
            assert [s.learn for s in codes] == [s.learn for s in d.segments if isinstance(s, Placed)]
        assert all(report.skipped == {} for report in reports.values())
