"""From a config to a corpus: sources are read, texts tokenised, images encoded; what fits into no row is reported."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from transfusion.cachedir import cachedir
from transfusion.codec.codec import Codec
from transfusion.data import latents as latent_cache
from transfusion.data.arrays import Held, Joined
from transfusion.data.built import is_built
from transfusion.data.documents import NOTHING, Captions, Corpus, DataConfig, Document, Interleaved, Placed
from transfusion.data.images import SPLITS, load_images
from transfusion.data.interleaved import DocumentSet, TextSegment, load_documents
from transfusion.data.mixture import names_of
from transfusion.data.report import Report
from transfusion.data.sources import CAPTION_TOO_LONG, Reading, captions_at, documents_at, text_at
from transfusion.data.text import load_text
from transfusion.data.windows import Stream
from transfusion.sequence import Format, Text
from transfusion.tokenizer import Tokenizer

# images, or documents, of training, evenly spread, whose latents stand for all in their statistics
STATISTICS_OF = 16384


def build_corpus(
    config: DataConfig, tokenizer: Tokenizer, codec: Codec, fmt: Format, seq_len: int
) -> tuple[Corpus, dict[str, Report]]:
    """(all data of a config, what was left out of each source and why); the corpus's config has the statistics."""
    reading, reports = Reading(config, tokenizer, codec, fmt, seq_len), {}
    need = 2 + min(reading.positions(size, reading.copies) for size in config.sizes)  # or a wrong size is refused
    of_images: list[dict[str, Captions]] = []
    for path in config.images:
        found, reports[f"images {path}"] = (captions_at if is_built(path) else captions_in)(path, reading)
        of_images.append(found)
    captions = {split: joined([found[split] for found in of_images]) for split in SPLITS}
    streams: list[Stream] = []
    held_out: list[str] = []
    for path, name in zip(config.text, names_of("text", config.text)):
        stream, apart, reports[f"text {path}"] = (text_at if is_built(path) else text_in)(path, name, reading)
        streams.append(stream)
        held_out += apart
    corpus = Corpus(config, fmt, codec, captions, tuple(streams), held_out)
    corpus = with_documents(corpus, reading, reports)
    if config.image_share and not len(captions["train"]) + len(corpus.interleaved.documents["train"]):
        raise ValueError(
            f"no captioned image fits into seq_len = {seq_len}: an image alone takes {need} positions; raise "
            "train.seq_len or model.patch_size"
        )
    return with_latents(corpus), reports


def joined(parts: Sequence[Captions]) -> Captions:
    """The captioned images of several sources as those of one."""
    return Captions(*(Joined(getattr(p, name) for p in parts) for name in ("images", "texts", "ids", "names")))


def text_in(path: str, name: str, reading: Reading) -> tuple[Stream, list[str], Report]:
    """The training texts of a source in memory, one after the other, each closed by <eos>; those held out."""
    texts, report = load_text(path)
    eos = reading.fmt.special.eos
    works = [np.append(np.asarray(ids, np.int64), eos) for ids in reading.tokenizer.encode_many(texts.train)]
    ids = np.concatenate(works) if works else np.zeros(0, np.int64)
    return Stream(name, ids, len(works)), texts.held_out, report


def captions_in(path: str, reading: Reading) -> tuple[dict[str, Captions], Report]:
    """The captioned images of a source in memory, by split; what of it is left out."""
    images, report = load_images(path, reading.config.sizes)
    found: dict[str, Captions] = {}
    for split in SPLITS:
        members = np.flatnonzero(images.split == split)
        coded = iter(reading.tokenizer.encode_many([text for i in members for text in images.captions[i]]))
        pixels, names, texts, ids = [], [], [], []
        for i in members:
            of_image = [np.asarray(next(coded), np.int64) for _ in images.captions[i]]
            room = reading.caption_room(images.images[i].shape[:2])
            fits = [j for j, c in enumerate(of_image) if len(c) <= room]
            if not fits:
                report = report.skip(reading.image_too_long, images.ids[i])
                continue
            if len(fits) < len(of_image):
                report = report.without_part(CAPTION_TOO_LONG, images.ids[i])
            pixels.append(images.images[i])
            names.append(images.ids[i])
            texts.append([images.captions[i][j] for j in fits])
            ids.append([of_image[j] for j in fits])
        found[split] = Captions(Held(pixels), texts, ids, names)
    return found, report


def with_documents(corpus: Corpus, reading: Reading, reports: dict[str, Report]) -> Corpus:
    """The corpus with documents that have images anywhere; what does not fit into a row goes into `reports`."""
    images: list[Sequence[np.ndarray]] = []
    documents: dict[str, list[Sequence[Document]]] = {split: [] for split in NOTHING.documents}
    for path in corpus.config.documents:
        source, first = f"documents {path}", sum(map(len, images))
        if is_built(path):
            pictures, found, reports[source] = documents_at(path, first, reading)
            images.append(pictures)
        else:
            loaded, report = load_documents(path, corpus.config.sizes)
            images.append(Held(list(loaded.images.values())))
            seen = replace(corpus, interleaved=replace(NOTHING, images=Joined(images)))
            found, reports[source] = documents_in(loaded, report, first, seen, reading)
        for split, of_split in documents.items():
            of_split.append(found[split])
    by_split = {split: Joined(of_sources) for split, of_sources in documents.items()}
    return replace(corpus, interleaved=Interleaved(Joined(images), by_split))


def documents_in(
    loaded: DocumentSet, report: Report, first: int, corpus: Corpus, reading: Reading
) -> tuple[dict[str, list[Document]], Report]:
    """The documents of a source in memory, by split, whose images `corpus` has from number `first` on."""
    number = {name: first + i for i, name in enumerate(loaded.images)}
    documents: dict[str, list[Document]] = {split: [] for split in NOTHING.documents}
    texts = [part.text for document in loaded.documents for part in document if isinstance(part, TextSegment)]
    coded = iter(reading.tokenizer.encode_many(texts))
    for document, split, place, info in zip(loaded.documents, loaded.split, loaded.ids, loaded.info):
        segments = [
            Text(np.asarray(next(coded), np.int64), part.learn)
            if isinstance(part, TextSegment)
            else Placed(number[part.image], part.learn)
            for part in document
        ]
        if corpus.length(segments) > reading.seq_len:
            report = report.skip(reading.document_too_long, place)
        else:
            documents[str(split)].append(Document(segments, info, place))
    return documents, report


def with_latents(corpus: Corpus) -> Corpus:
    """The corpus with all images encoded, once: as latents, by whose statistics it standardises what it reads, or as
    codes where the format says so. A codec that costs nothing encodes when it is asked to."""
    config, codec = corpus.config, corpus.codec
    if config.latent_mean and (corpus.fmt.codes or not codec.key):
        of = "codes" if corpus.fmt.codes else codec.name
        raise ValueError(f"data.latent_mean is of latents, and {of} are taken as they are: leave it out")
    if not codec.key:
        return corpus
    config = replace(config, codec_key=codec.key)
    groups = {**corpus.captions, "interleaved": corpus.interleaved}
    encoded = {name: latents_of(group.images, codec, bool(corpus.fmt.codes)) for name, group in groups.items()}
    if not corpus.fmt.codes:
        if not config.latent_mean:
            documents = corpus.interleaved.documents["train"]
            placed = {s.number for i in spread(len(documents)) for s in documents[i].segments if isinstance(s, Placed)}
            captioned = encoded["train"].read(spread(len(encoded["train"])))
            mean, std = measured(captioned + encoded["interleaved"].read(sorted(placed)), codec)
            config = replace(config, latent_mean=mean, latent_std=std)
        codec = codec.standardised(config.latent_mean, config.latent_std)
    interleaved = replace(corpus.interleaved, latents=encoded.pop("interleaved"))
    captions = {split: replace(c, latents=encoded[split]) for split, c in corpus.captions.items()}
    return replace(corpus, config=config, codec=codec, captions=captions, interleaved=interleaved)


def latents_of(images: Sequence[np.ndarray], codec: Codec, codes: bool) -> Sequence[np.ndarray]:
    """The latents, or codes, of images: those that a source keeps beside them, or, of images in memory, made once."""
    if isinstance(images, Joined):
        return Joined(latents_of(part, codec, codes) for part in images.parts)
    if not isinstance(images, Held):
        return images.latents(codec, codes)
    latents = latent_cache.encode(images, codec, cachedir("latents"))
    return Held([codec.quantize(x[None])[0] for x in latents] if codes else latents)


def spread(n: int) -> list[int]:
    """At most STATISTICS_OF of n numbers, evenly spread."""
    return np.linspace(0, n - 1, min(n, STATISTICS_OF)).round().astype(int).tolist()


def measured(found: list[np.ndarray | str], codec: Codec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel over the latents that could be read; ValueError where one never changes."""
    latents = [x for x in found if not isinstance(x, str)]
    if lost := [x for x in found if isinstance(x, str)]:  # or each rank might leave out others
        raise ValueError(
            f"{len(lost)} of {len(found)} latents that are to tell mean and deviation cannot be read ({lost[0]}): mend "
            "that, or give data.latent_mean and data.latent_std"
        )
    if not latents:
        return (0.0,) * codec.channels, (1.0,) * codec.channels
    mean, std = latent_cache.statistics(latents)
    rounding = 1e-6 * max(*std, *map(abs, mean))
    flat = [channel for channel, deviation in enumerate(std) if deviation <= rounding]
    if flat:
        given = [",".join(f"{x:.4g}" for x in v) for v in (mean, [1 if i in flat else x for i, x in enumerate(std)])]
        raise ValueError(
            f"channels {flat} of {codec.name} hold the same number in all of {len(latents)} images, which leaves no "
            "deviation to divide by: train on images that differ, name another data.codec, or say "
            f"data.latent_mean={given[0]} data.latent_std={given[1]}"
        )
    return mean, std
