"""What the k-th document of training is, as a pure function of (seed, k): data in memory in, segments out.

    caption first (80 %)   <bos> caption [image] <eos>
       of which 10 %       <bos> [image]                        the caption is dropped, for guidance
    image first   (20 %)   <bos> [image] caption <eos>          the image's noise stays below the noise limit
    images anywhere        <bos> text [image] text [image] ... <eos>      each text and image learned or given
       of which 10 %       <bos> [image] [image]                the texts are dropped before a last image to draw,
                10 %       <bos> [image]                        and the images with them, for guidance by both
    text                   <bos> a window of a work (<eos> where the work ends)

Shares of Zhou et al. 2024, section 4.1; caption dropout is ours (the paper is silent). An image without its caption is
not closed by <eos>: what follows an image at the beginning of a document is its caption, and <eos> would deny that.
Where conditioning is "clean", the image before a caption is noised as any other, and a clean copy of it is what the
caption sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.images import Size, parse_size
from transfusion.sequence import Codes, Format, Image, Segment, Special, Text, image_length

CONDITIONING = ("noised", "clean")


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from. `images`: "emoji", "emoji:base", folders; `text`: "shakespeare", files, folders;
    `documents`: folders with a documents.jsonl, images anywhere."""

    images: tuple[str, ...] = ("emoji",)
    text: tuple[str, ...] = ("shakespeare",)
    tokenizer: str = ""  # path of a tokenizer.json; "" = the shipped one
    documents: tuple[str, ...] = ()
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
    workers: int = 0  # processes that prepare batches; 0 = the training process itself

    def __post_init__(self):
        for name in ("image_share", "caption_first", "caption_dropout", "other_captions", "noise_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} = {getattr(self, name)} is a share: give a number from 0 to 1")
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


def image_alone(special: Special, image: Image | Codes) -> list[Segment]:
    """An image without its caption: the unconditional half of guidance."""
    return [Text(np.array([special.bos])), image]


def caption_then_image(special: Special, caption: np.ndarray, image: Image | Codes) -> list[Segment]:
    return [Text(np.concatenate([[special.bos], caption])), image, Text(np.array([special.eos]))]


def image_then_caption(special: Special, caption: np.ndarray, image: Image | Codes) -> list[Segment]:
    return [Text(np.array([special.bos])), image, Text(np.concatenate([caption, [special.eos]]))]


@lru_cache(maxsize=8)
def permutation(n: int, *key: int) -> np.ndarray:
    """The order of n things in the epoch that `key` names."""
    return np.random.default_rng(key).permutation(n)


@dataclass(frozen=True, eq=False)
class Captions:
    """Captioned images of one split, captions as token ids."""

    images: Sequence[np.ndarray]  # [H, W, 3] uint8 each
    texts: list[list[str]]
    ids: list[list[np.ndarray]]
    names: list[str]
    latents: list[np.ndarray] | None = None  # [C, h, w] float32 each, or codes [h, w]; None = encoded when asked for

    def __len__(self) -> int:
        return len(self.ids)


class Placed(NamedTuple):
    """An image in a document: its number, and whether it is to be drawn or given."""

    number: int
    learn: bool


class Document(NamedTuple):
    segments: list[Text | Placed]
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Interleaved:
    """Documents with images anywhere, texts as token ids, and all their images."""

    images: Sequence[np.ndarray]  # [H, W, 3] uint8 each
    documents: dict[str, list[Document]]  # by split: train, held_out
    latents: list[np.ndarray] | None = None  # as in Captions


NOTHING = Interleaved([], {"train": [], "held_out": []})


@dataclass(frozen=True, eq=False)
class Corpus:
    """All data of a run, in memory."""

    config: DataConfig  # with the latents' statistics
    fmt: Format
    codec: Codec  # standardised by them
    captions: dict[str, Captions]  # by split: train, held_out_image, held_out_combination
    works: list[np.ndarray]  # token ids of each training text
    held_out_text: list[str]
    interleaved: Interleaved = NOTHING

    @property
    def special(self) -> Special:
        return self.fmt.special

    def without_networks(self) -> "Corpus":
        """The corpus for processes that only write documents: they need no more of a codec than its sizes."""
        if not self.codec.key:  # it encodes when it is asked to
            return self
        return replace(self, codec=replace(self.codec, encode=None, decode=None, quantize=None, lookup=None))

    @cached_property
    def stream(self) -> np.ndarray:
        """All works one after the other, each closed by <eos>."""
        return np.concatenate([np.append(w, self.special.eos) for w in self.works])

    @cached_property
    def image_document_length(self) -> float:
        """Mean positions of an image document."""
        train, copies = self.captions["train"], (1 - self.config.caption_first) * self.copies
        lengths = [self.length(document.segments) for document in self.interleaved.documents["train"]]
        for image, ids in zip(train.images, train.ids):
            once, twice = (image_length(self.grid(image), self.fmt, copy) for copy in (False, True))
            lengths.append(2 + len(ids[0]) + once + copies * (twice - once))
        return float(np.mean(lengths))

    def grid(self, image: np.ndarray) -> tuple[int, int]:
        """(rows, columns) of patches, or of codes, of an image [H, W, 3]."""
        return self.codec.grid(image.shape[:2], self.fmt.patch_size)

    def length(self, segments: Sequence[Text | Placed]) -> int:
        """Positions of a document with images anywhere, <bos> and <eos> included."""
        parts = self.conditions(segments)
        return 2 + sum(
            len(s.ids)
            if isinstance(s, Text)
            else image_length(self.grid(self.interleaved.images[s.number]), self.fmt, copy)
            for s, _, copy in parts
        )

    @property
    def copies(self) -> bool:
        """Whether an image that is read later has a clean copy."""
        return has_copies(self.config, self.fmt.codes)

    @property
    def read_limit(self) -> float:
        """Largest t of an image that is read later; codes know no noise."""
        return 1.0 if self.copies or self.fmt.codes else self.config.noise_limit

    def conditions(self, segments: Sequence[Text | Placed]) -> list[tuple[Text | Placed, float, bool]]:
        """Each segment with, of an image, its t_max and whether it has a clean copy: what follows it decides."""
        last = len(segments) - 1
        limits = [0.0 if isinstance(s, Placed) and not s.learn else 1.0 for s in segments]
        limits = [min(t, self.read_limit) if i < last else t for i, t in enumerate(limits)]
        return [(s, t, t > 0 and i < last and self.copies) for i, (s, t) in enumerate(zip(segments, limits))]

    def image(self, of: Captions | Interleaved, i: int, t_max: float = 1.0, copy: bool = False) -> Image | Codes:
        """The i-th image as a segment; with t_max 0 it is given, not learned."""
        latents = of.latents[i] if of.latents else self.codec.encode(of.images[i][None])[0]
        return Codes(latents, learn=t_max > 0) if self.fmt.codes else Image(latents, t_max, copy)

    def document(self, segments: Sequence[Text | Placed]) -> list[Segment]:
        """A document with images anywhere, without <bos> and <eos>."""
        return [
            s if isinstance(s, Text) else self.image(self.interleaved, s.number, t_max, copy)
            for s, t_max, copy in self.conditions(segments)
        ]

    def image_document(self, seed: int, k: int) -> list[Segment]:
        """The k-th document with images: every one once an epoch, in an order of the epoch's own."""
        c, train, documents = self.config, self.captions["train"], self.interleaved.documents["train"]
        n = len(train) + len(documents)
        epoch, i = divmod(k, n)
        i = permutation(n, seed, 1, epoch)[i]
        rng = np.random.default_rng((seed, 2, k))
        other, which, first, drop = rng.random(4)
        if i >= len(train):
            return self.interleaved_document(documents[i - len(train)].segments, drop)
        ids = train.ids[i]
        caption = ids[0]
        if len(ids) > 1 and other < c.other_captions:
            caption = ids[1 + int(which * (len(ids) - 1))]
        if first < c.caption_first:
            if drop < c.caption_dropout:
                return image_alone(self.special, self.image(train, i))
            return caption_then_image(self.special, caption, self.image(train, i))
        return image_then_caption(self.special, caption, self.image(train, i, self.read_limit, self.copies))

    def interleaved_document(self, segments: Sequence[Text | Placed], drop: float) -> list[Segment]:
        """A document with images anywhere; `drop` in [0, 1) decides what is dropped before a last image to draw."""
        images, p = [s for s in segments if isinstance(s, Placed)], self.config.caption_dropout
        bos, eos = (Text(np.array([token])) for token in (self.special.bos, self.special.eos))
        if segments[-1] not in images or not segments[-1].learn or drop >= p * min(len(images), 2):
            return [bos, *self.document(segments), eos]
        return [bos, *self.document(images if drop < p and len(images) > 1 else images[-1:])]

    def text_documents(self, seed: int, k: int, room: int, window: int = 0) -> list[list[Text]]:
        """The k-th window of the text, parted where a work ends, cut to `room` positions in all.

        The text is a row of windows of `window` tokens (0: as many as fit into the room), shifted anew each epoch.
        """
        window = window or max(room, 2) - 1
        n = max(1, len(self.stream) // window)
        epoch, i = divmod(k, n)
        offset = int(np.random.default_rng((seed, 3, epoch)).integers(window))
        start = int(permutation(n, seed, 4, epoch)[i]) * window + offset
        ids = np.take(self.stream, range(start, start + min(window, max(room - 1, 0))), mode="wrap")
        documents = []
        for part in np.split(ids, np.flatnonzero(ids == self.special.eos) + 1):
            part = part[: max(room - 1, 0)]  # each <bos> takes a position too
            if len(part) > 1:
                documents.append([Text(np.concatenate([[self.special.bos], part]))])
                room -= len(part) + 1
        return documents
