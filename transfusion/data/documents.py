"""What the k-th document of a source is, as a pure function of (seed, k): data in, segments out.

    plan     <bos> red apple [image 1426, t_max 1] <eos>, 23 positions      from what is recorded; no image is read
    fill     the same with the image, of all documents that are wanted at once

    caption first (80 %)   <bos> caption [image] <eos>
       of which 10 %       <bos> [image]                        the caption is dropped, for guidance
    image first   (20 %)   <bos> [image] caption <eos>          the image's noise stays below the noise limit
    images anywhere        <bos> text [image] text [image] ... <eos>      each text and image learned or given
       of which 10 %       <bos> [image] [image]                the texts are dropped before a last image to draw,
                10 %       <bos> [image]                        and the images with them, for guidance by both

Shares of Zhou et al. 2024, section 4.1; caption dropout is ours (the paper is silent). An image without its caption is
not closed by <eos>: what follows an image at the beginning of a document is its caption, and <eos> would deny that.
Where conditioning is "clean", the image before a caption is noised as any other, and a clean copy of it is what the
caption sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.arrays import Joined
from transfusion.data.images import Size, parse_size
from transfusion.data.mixture import Mixture, mixture, names_of
from transfusion.data.order import key_of, shuffled
from transfusion.data.windows import Stream
from transfusion.sequence import Codes, Format, Image, Segment, Special, Text, image_length

CONDITIONING = ("noised", "clean")
Shown = TypeVar("Shown")  # an image, as it is read or as it is planned
SAMPLE = 4096  # documents of a source, evenly spread, whose mean length stands for all


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from. `images`: "emoji", "emoji:base", folders; `text`: "shakespeare", files, folders;
    `documents`: folders with a documents.jsonl, images anywhere."""

    images: tuple[str, ...] = ("emoji",)
    text: tuple[str, ...] = ("shakespeare",)
    tokenizer: str = ""  # path of a tokenizer.json; "" = the shipped one
    documents: tuple[str, ...] = ()
    # shares in the positions of all of them of each of `images`, then of `documents`; () = each document once an epoch
    image_weights: tuple[float, ...] = ()
    text_weights: tuple[float, ...] = ()  # the same for `text`
    codec: str = "pixels"  # or a trained one, as `transfusion train-codec` leaves it
    factor: int = 0  # pixels a latent cell; 0 = the codec's
    latent_mean: tuple[float, ...] = ()  # of each channel; () = measured over the training images when a run begins
    latent_std: tuple[float, ...] = ()
    codec_key: str = ""  # of the codec's weights, which must stay those that the run began with; "" = any
    image_size: int = 64  # pixels a side
    buckets: tuple[str, ...] = ()  # "48x80": the sizes that images take, each the closest; () = a square of image_size
    image_share: float = 0.5  # of all positions: 0.5 is the paper's 1:1
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    other_captions: float = 0.3  # how often a caption other than an image's first is read, where it has several
    conditioning: str = "noised"  # what follows an image sees it "noised" (the paper), or as a "clean" copy
    # largest t of an image before its caption, where noised: its t is uniform below; 1 = the law of all images
    noise_limit: float = 0.5
    max_lost: int = 1000  # documents that a run may find unreadable before it stops
    workers: int = 0  # processes that prepare batches; 0 = the training process itself

    def __post_init__(self):
        for name in ("image_share", "caption_first", "caption_dropout", "other_captions", "noise_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} = {getattr(self, name)} is a share: give a number from 0 to 1")
        for kind, paths in (("images", self.images), ("documents", self.documents), ("text", self.text)):
            twice = [path for i, path in enumerate(paths) if Path(path) in map(Path, paths[:i])]
            if twice:
                how = "text_weights" if kind == "text" else "image_weights"
                raise ValueError(f"data.{kind} names {', '.join(twice)} twice: name it once, and give it a data.{how}")
        for name, paths in (("image_weights", [*self.images, *self.documents]), ("text_weights", self.text)):
            weights = getattr(self, name)
            if weights and (len(weights) != len(paths) or min(weights) < 0 or not sum(weights)):
                raise ValueError(
                    f"data.{name} = {', '.join(f'{w:g}' for w in weights)}: give a number of at least 0 for each of "
                    f"{', '.join(paths) or 'no source'}, or leave it out"
                )
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"data.conditioning = {self.conditioning!r}: choose one of {', '.join(CONDITIONING)}")
        if self.image_share and not self.images and not self.documents:
            raise ValueError("data.images is empty: name a folder of captioned images, or set data.image_share=0")
        if self.image_share < 1 and not self.text:
            raise ValueError("data.text is empty: name a text file or folder, or set data.image_share=1")
        if len(self.latent_mean) != len(self.latent_std):
            raise ValueError(
                f"data.latent_mean has {len(self.latent_mean)} numbers, data.latent_std has {len(self.latent_std)}: "
                "give one of each for every channel, or leave both out, and they are measured"
            )
        for text in self.buckets:
            parse_size(text)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of the images, in pixels."""
        return tuple(map(parse_size, self.buckets)) or ((self.image_size, self.image_size),)


def has_copies(config: DataConfig, codes: int) -> bool:
    """Whether an image that is read later has a clean copy; codes are clean as they are."""
    return config.conditioning == "clean" and not codes


def image_alone(special: Special, image: Shown) -> list[Text | Shown]:
    """An image without its caption: the unconditional half of guidance."""
    return [Text(np.array([special.bos])), image]


def caption_then_image(special: Special, caption: np.ndarray, image: Shown) -> list[Text | Shown]:
    return [Text(np.concatenate([[special.bos], caption])), image, Text(np.array([special.eos]))]


def image_then_caption(special: Special, caption: np.ndarray, image: Shown) -> list[Text | Shown]:
    return [Text(np.array([special.bos])), image, Text(np.concatenate([caption, [special.eos]]))]


@dataclass(frozen=True, eq=False)
class Captions:
    """Captioned images of one split, captions as token ids; of several sources each is `Joined` of theirs."""

    images: Sequence[np.ndarray]  # as data/arrays.py says
    texts: Sequence[list[str]]
    ids: Sequence[list[np.ndarray]]
    names: Sequence[str]
    latents: Sequence[np.ndarray] | None = None  # as the codec makes them, or codes; None = encoded when asked for

    def __len__(self) -> int:
        return len(self.ids)


class Placed(NamedTuple):
    """An image in a document: its number, and whether it is to be drawn or given."""

    number: int
    learn: bool


class Document(NamedTuple):
    segments: list[Text | Placed]
    info: dict[str, Any]
    name: str = ""  # file and line


@dataclass(frozen=True, eq=False)
class Interleaved:
    """Documents with images anywhere, texts as token ids, and all their images."""

    images: Sequence[np.ndarray]  # as data/arrays.py says
    documents: dict[str, Sequence[Document]]  # by split: train, held_out
    latents: Sequence[np.ndarray] | None = None  # as in Captions


NOTHING = Interleaved(Joined([]), {"train": Joined([]), "held_out": Joined([])})


class Source(NamedTuple):
    """Documents of training: `size` of them, from number `first` on; captioned images have the first numbers."""

    name: str
    first: int
    size: int


class Pictures(NamedTuple):
    """Images, and their latents if they are kept."""

    images: Sequence[np.ndarray]
    latents: Sequence[np.ndarray] | None


class Planned(NamedTuple):
    """An image of a planned document: its number in `Corpus.pictures`, and how it is to be learned."""

    number: int
    t_max: float
    copy: bool


class Plan(NamedTuple):
    """What a document is, before its images are read."""

    name: str
    segments: list[Text | Planned]
    length: int  # positions


@dataclass(frozen=True, eq=False)
class Corpus:
    """All data of a run."""

    config: DataConfig  # with the latents' statistics
    fmt: Format
    codec: Codec  # standardised by them
    captions: dict[str, Captions]  # by split: train, held_out_image, held_out_combination
    text: tuple[Stream, ...]  # of training, a source each
    held_out_text: list[str]
    interleaved: Interleaved = NOTHING

    @property
    def special(self) -> Special:
        return self.fmt.special

    def summary(self) -> str:
        """One line of what there is to train on, and what is held out."""
        images, held_out = len(self.captions["train"]), sum(map(len, self.captions.values()))
        documents = {split: len(of_split) for split, of_split in self.interleaved.documents.items()}
        return (
            f"to train on: {images} images, {documents['train']} documents, {sum(s.texts for s in self.text)} texts; "
            f"held out: {held_out - images} images, {documents['held_out']} documents, {len(self.held_out_text)} texts"
        )

    def without_networks(self) -> "Corpus":
        """The corpus for processes that only write documents: they need no more of a codec than its sizes."""
        if not self.codec.key:  # it encodes when it is asked to
            return self
        return replace(self, codec=replace(self.codec, encode=None, decode=None, quantize=None, lookup=None))

    @cached_property
    def image_sources(self) -> list[Source]:
        """The sources of documents with images: those of config.images, then those of config.documents."""
        found, first = [], 0
        for kind, paths, documents in (
            ("images", self.config.images, self.captions["train"].ids),
            ("documents", self.config.documents, self.interleaved.documents["train"]),
        ):
            parts = documents.parts if isinstance(documents, Joined) else [documents]
            for name, part in zip(names_of(kind, paths), parts, strict=True):
                found.append(Source(name, first, len(part)))
                first += len(part)
        return found

    @cached_property
    def image_mixture(self) -> Mixture:
        """How the sources of documents with images take turns."""
        names, sizes = [s.name for s in self.image_sources], [s.size for s in self.image_sources]
        return mixture(names, sizes, self.config.image_weights, self.lengths)

    @cached_property
    def lengths(self) -> list[float]:
        """Mean positions of the documents of each source of images; of a large one estimated from some."""
        found = []
        for _, first, size in self.image_sources:
            some = first + np.linspace(0, size - 1, min(size, SAMPLE)).round().astype(int)
            found.append(float(np.mean([self.expected_length(int(i)) for i in some])) if size else 0.0)
        return found

    @property
    def image_document_length(self) -> float:
        """Mean positions of a document with images, as the sources are mixed."""
        shares = self.image_mixture.shares
        return float(np.average(self.lengths, weights=np.array(shares, float)))

    def expected_length(self, i: int) -> float:
        """Mean positions of the i-th document of training."""
        train = self.captions["train"]
        if i >= len(train):
            return self.length(self.interleaved.documents["train"][i - len(train)].segments)
        grid = self.grid(train.images.shape(i))
        once, twice = (image_length(grid, self.fmt, copy) for copy in (False, True))
        return 2 + len(train.ids[i][0]) + once + (1 - self.config.caption_first) * self.copies * (twice - once)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches, or of codes, of an image of (height, width) pixels."""
        return self.codec.grid(shape, self.fmt.patch_size)

    def length(self, segments: Sequence[Text | Placed]) -> int:
        """Positions of a document with images anywhere, <bos> and <eos> included."""
        return 2 + self.planned_length(self.planned(segments))

    def planned_length(self, segments: Sequence[Text | Planned]) -> int:
        """Positions of these segments."""
        return sum(
            len(s.ids)
            if isinstance(s, Text)
            else image_length(self.grid(self.pictures.images.shape(s.number)), self.fmt, s.copy)
            for s in segments
        )

    @property
    def copies(self) -> bool:
        """Whether an image that is read later has a clean copy."""
        return has_copies(self.config, self.fmt.codes)

    @property
    def read_limit(self) -> float:
        """Largest t of an image that is read later; codes know no noise."""
        return 1.0 if self.copies or self.fmt.codes else self.config.noise_limit

    @cached_property
    def pictures(self) -> Pictures:
        """All images of training: the captioned ones, then those of documents with images anywhere."""
        of = [group for group in (self.captions["train"], self.interleaved) if len(group.images)]
        kept = bool(of) and all(group.latents is not None for group in of)
        return Pictures(Joined(g.images for g in of), Joined(g.latents for g in of) if kept else None)

    def encoded(self, of: Captions | Interleaved | Pictures, numbers: Sequence[int]) -> list[np.ndarray | str]:
        """Of each image the latents as the model learns them, or its codes, or why they cannot be had."""
        if of.latents is None:
            found = of.images.read(numbers)
            return [one if isinstance(one, str) else self.codec.encode(one[None])[0] for one in found]
        found = of.latents.read(numbers)
        if self.fmt.codes or not self.config.latent_mean:
            return found
        mean, std = (np.float32(v)[:, None, None] for v in (self.config.latent_mean, self.config.latent_std))
        return [one if isinstance(one, str) else (one - mean) / std for one in found]

    def segment(self, latents: np.ndarray, t_max: float, copy: bool) -> Image | Codes:
        return Codes(latents, learn=t_max > 0) if self.fmt.codes else Image(latents, t_max, copy)

    def image(self, of: Captions | Interleaved, i: int, t_max: float = 1.0, copy: bool = False) -> Image | Codes:
        """The i-th image as a segment; with t_max 0 it is given, not learned. ValueError if it cannot be read."""
        (found,) = self.encoded(of, [i])
        if isinstance(found, str):
            raise ValueError(f"image {i}: {found}")
        return self.segment(found, t_max, copy)

    def planned(self, segments: Sequence[Text | Placed]) -> list[Text | Planned]:
        """A document with images anywhere, each with its t_max, and a clean copy or none: what follows decides."""
        last, before = len(segments) - 1, len(self.captions["train"])
        limits = [0.0 if isinstance(s, Placed) and not s.learn else 1.0 for s in segments]
        limits = [min(t, self.read_limit) if i < last else t for i, t in enumerate(limits)]
        return [
            s if isinstance(s, Text) else Planned(before + s.number, t, t > 0 and i < last and self.copies)
            for i, (s, t) in enumerate(zip(segments, limits))
        ]

    def plan(self, seed: int, source: int, k: int) -> Plan:
        """The k-th document of a source of images: every one once an epoch, in an order of the epoch's own."""
        name, first, size = self.image_sources[source]
        epoch, i = divmod(k, size)
        i = first + shuffled(i, size, seed, 1, name, epoch)
        draws = np.random.default_rng(key_of(seed, 2, name, k)).random(4)
        train = self.captions["train"]
        if i < len(train):
            called, segments = train.names[i], self.captioned(i, *draws)
        else:
            document = self.interleaved.documents["train"][i - len(train)]
            called, segments = document.name or f"number {i - first}", self.interleaved_document(document, draws[3])
        return Plan(f"{name}, {called}", segments, self.planned_length(segments))

    def fill(self, plans: Sequence[Plan]) -> list[list[Segment] | str]:
        """The documents, all their images read at once; a str for one that lacks an image: its name, and why."""
        numbers = [s.number for plan in plans for s in plan.segments if isinstance(s, Planned)]
        found = iter(self.encoded(self.pictures, numbers))
        documents = []
        for plan in plans:
            got = [s if isinstance(s, Text) else next(found) for s in plan.segments]
            why = next((one for one in got if isinstance(one, str)), "")
            documents.append(
                f"{plan.name}: {why}"
                if why
                else [s if s is one else self.segment(one, s.t_max, s.copy) for s, one in zip(plan.segments, got)]
            )
        return documents

    def image_document(self, seed: int, k: int) -> list[Segment]:
        """The k-th document with images of a run; ValueError if an image of it cannot be read."""
        (document,) = self.fill([self.plan(seed, *self.image_mixture.draw(k))])
        if isinstance(document, str):
            raise ValueError(document)
        return document

    def captioned(self, i: int, other: float, which: float, first: float, drop: float) -> list[Text | Planned]:
        """The i-th captioned image as a document; draws in [0, 1) decide which caption it has, and where."""
        c, ids = self.config, self.captions["train"].ids[i]
        caption = ids[0]
        if len(ids) > 1 and other < c.other_captions:
            caption = ids[1 + int(which * (len(ids) - 1))]
        if first >= c.caption_first:
            return image_then_caption(self.special, caption, Planned(i, self.read_limit, self.copies))
        image = Planned(i, 1.0, False)
        if drop < c.caption_dropout:
            return image_alone(self.special, image)
        return caption_then_image(self.special, caption, image)

    def interleaved_document(self, document: Document, drop: float) -> list[Text | Planned]:
        """A document with images anywhere; `drop` in [0, 1) decides what is dropped before a last image to draw."""
        segments, p = document.segments, self.config.caption_dropout
        images = [s for s in segments if isinstance(s, Placed)]
        bos, eos = (Text(np.array([token])) for token in (self.special.bos, self.special.eos))
        if segments[-1] not in images or not segments[-1].learn or drop >= p * min(len(images), 2):
            return [bos, *self.planned(segments), eos]
        return [bos, *self.planned(images if drop < p and len(images) > 1 else images[-1:])]
