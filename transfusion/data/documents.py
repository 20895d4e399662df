"""What the k-th document of training is, as a pure function of (seed, k): data in memory in, segments out.

    caption first (80 %)   <bos> caption [image] <eos>
       of which 10 %       <bos> [image]                        the caption is dropped, for guidance
    image first   (20 %)   <bos> [image] caption <eos>          the image's noise stays below the noise limit
    text                   <bos> a window of a work (<eos> where the work ends)

Shares of Zhou et al. 2024, section 4.1; caption dropout is ours (the paper is silent). An image without its caption is
not closed by <eos>: what follows an image at the beginning of a document is its caption, and <eos> would deny that.
Where conditioning is "clean", the image before a caption is noised as any other, and a clean copy of it is what the
caption sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data import latents as latent_cache
from transfusion.data.images import ImageSet, load_images
from transfusion.data.report import Report
from transfusion.data.text import TextSet, load_text
from transfusion.sequence import Codes, Format, Image, Segment, Special, Text, image_length
from transfusion.tokenizer import Tokenizer

CONDITIONING = ("noised", "clean")


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from. `images`: "emoji", "emoji:base", folders; `text`: "shakespeare", files, folders."""

    images: tuple[str, ...] = ("emoji",)
    text: tuple[str, ...] = ("shakespeare",)
    tokenizer: str = ""  # path of a tokenizer.json; "" = the shipped one
    codec: str = "pixels"  # or a trained one, as `transfusion train-codec` leaves it
    factor: int = 0  # pixels a latent cell; 0 = the codec's
    latent_mean: tuple[float, ...] = ()  # of each channel; () = measured over the training images when a run begins
    latent_std: tuple[float, ...] = ()
    latent_cache: str = ""  # folder; "" = ~/.cache/transfusion/latents
    image_size: int = 64
    image_share: float = 0.5  # of all positions: 0.5 is the paper's 1:1
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    other_captions: float = 0.3  # how often a caption other than an image's first is read, where it has several
    conditioning: str = "noised"  # what follows an image sees it "noised" (the paper), or as a "clean" copy
    noise_limit: float = 0.5  # largest t of an image that stands before its caption, where noised; 1 = no limit
    workers: int = 0  # processes that prepare batches; 0 = the training process itself

    def __post_init__(self):
        for name in ("image_share", "caption_first", "caption_dropout", "other_captions", "noise_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} = {getattr(self, name)} is a share: give a number from 0 to 1")
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"data.conditioning = {self.conditioning!r}: choose one of {', '.join(CONDITIONING)}")
        if self.image_share and not self.images:
            raise ValueError("data.images is empty: name a folder of captioned images, or set data.image_share=0")
        if self.image_share < 1 and not self.text:
            raise ValueError("data.text is empty: name a text file or folder, or set data.image_share=1")


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


@dataclass(frozen=True, eq=False)
class Corpus:
    """All data of a run, in memory."""

    config: DataConfig  # with the latents' statistics
    fmt: Format
    codec: Codec  # standardised by them
    captions: dict[str, Captions]  # by split: train, held_out_image, held_out_combination
    works: list[np.ndarray]  # token ids of each training text
    held_out_text: list[str]

    @property
    def special(self) -> Special:
        return self.fmt.special

    @cached_property
    def stream(self) -> np.ndarray:
        """All works one after the other, each closed by <eos>."""
        return np.concatenate([np.append(w, self.special.eos) for w in self.works])

    @cached_property
    def image_document_length(self) -> float:
        """Mean positions of an image document."""
        train, copies = self.captions["train"], (1 - self.config.caption_first) * (self.config.conditioning == "clean")
        lengths = []
        for image, ids in zip(train.images, train.ids):
            once, twice = (image_length(self.grid(image), self.fmt, copy) for copy in (False, True))
            lengths.append(2 + len(ids[0]) + once + copies * (twice - once))
        return float(np.mean(lengths))

    def grid(self, image: np.ndarray) -> tuple[int, int]:
        """(rows, columns) of patches, or of codes, of an image [H, W, 3]."""
        return self.codec.grid(image.shape[:2], self.fmt.patch_size)

    def image(self, captions: Captions, i: int, t_max: float = 1.0, copy: bool = False) -> Image | Codes:
        """The i-th image as a segment."""
        latents = captions.latents[i] if captions.latents else self.codec.encode(captions.images[i][None])[0]
        return Codes(latents) if self.fmt.codes else Image(latents, t_max, copy)

    def image_document(self, seed: int, k: int) -> list[Segment]:
        """The k-th captioned image: every image once an epoch, in an order of the epoch's own."""
        c, train = self.config, self.captions["train"]
        epoch, i = divmod(k, len(train))
        i = permutation(len(train), seed, 1, epoch)[i]
        rng = np.random.default_rng((seed, 2, k))
        other, which, first, drop = rng.random(4)
        ids = train.ids[i]
        caption = ids[0]
        if len(ids) > 1 and other < c.other_captions:
            caption = ids[1 + int(which * (len(ids) - 1))]
        if first < c.caption_first:
            if drop < c.caption_dropout:
                return image_alone(self.special, self.image(train, i))
            return caption_then_image(self.special, caption, self.image(train, i))
        clean = c.conditioning == "clean"
        return image_then_caption(
            self.special, caption, self.image(train, i, 1.0 if clean else c.noise_limit, copy=clean)
        )

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


def build_corpus(
    config: DataConfig, tokenizer: Tokenizer, codec: Codec, fmt: Format, seq_len: int
) -> tuple[Corpus, dict[str, Report]]:
    """(all data of a config, what was left out of each source and why); the corpus's config has the statistics."""
    codec.grid(
        (config.image_size, config.image_size), fmt.patch_size
    )  # a wrong size is known before the images are read
    reports: dict[str, Report] = {}
    image_sets: list[ImageSet] = []
    text_sets: list[TextSet] = []
    for path in config.images:
        images, reports[f"images {path}"] = load_images(path, config.image_size)
        image_sets.append(images)
    for path in config.text:
        texts, reports[f"text {path}"] = load_text(path)
        text_sets.append(texts)
    captions: dict[str, Captions] = {}
    for split in ("train", "held_out_image", "held_out_combination"):
        pixels, names, texts, ids = [], [], [], []
        for images in image_sets:
            members = np.flatnonzero(images.split == split)
            coded = iter(tokenizer.encode_many([text for i in members for text in images.captions[i]]))
            for i in members:
                of_image = [np.asarray(next(coded), np.int64) for _ in images.captions[i]]
                grid = codec.grid(images.images[i].shape[:2], fmt.patch_size)
                room = seq_len - 2 - image_length(grid, fmt, config.conditioning == "clean")
                fits = [j for j, c in enumerate(of_image) if len(c) <= room]
                source = f"images {images.name}"
                if not fits:
                    too_long = f"caption and image longer than seq_len = {seq_len}"
                    reports[source] = reports[source].skip(too_long, images.ids[i])
                    continue
                if len(fits) < len(of_image):
                    reports[source] = reports[source].without_part("a caption of several, too long", images.ids[i])
                pixels.append(images.images[i])
                names.append(images.ids[i])
                texts.append([images.captions[i][j] for j in fits])
                ids.append([of_image[j] for j in fits])
        captions[split] = Captions(pixels, texts, ids, names)
    if config.image_share and not len(captions["train"]):
        grid = codec.grid((config.image_size, config.image_size), fmt.patch_size)
        need = 2 + image_length(grid, fmt, config.conditioning == "clean")
        raise ValueError(
            f"no captioned image fits into seq_len = {seq_len}: an image alone takes {need} positions; raise "
            "train.seq_len or model.patch_size"
        )
    config, codec, captions = with_latents(config, codec, captions, fmt)
    works = [np.asarray(ids, np.int64) for s in text_sets for ids in tokenizer.encode_many(s.train)]
    held_out = [text for s in text_sets for text in s.held_out]
    return Corpus(config, fmt, codec, captions, works, held_out), reports


def with_latents(
    config: DataConfig, codec: Codec, captions: dict[str, Captions], fmt: Format
) -> tuple[DataConfig, Codec, dict[str, Captions]]:
    """All images encoded, once: the config with the latents' statistics, the codec standardised by them, the captions
    with latents, or with codes where the format says so. A codec that costs nothing encodes when it is asked to."""
    if not codec.key:
        return config, codec, captions
    folder = Path(config.latent_cache).expanduser() if config.latent_cache else latent_cache.cache_folder()
    raw = {split: latent_cache.encode(c.images, codec, folder) for split, c in captions.items()}
    if fmt.codes:
        return (
            config,
            codec,
            {s: replace(c, latents=[codec.quantize(x[None])[0] for x in raw[s]]) for s, c in captions.items()},
        )
    if not config.latent_mean and raw["train"]:
        mean, std = latent_cache.statistics(raw["train"])
        config = replace(config, latent_mean=mean, latent_std=std)
    mean, std = (np.float32(v)[:, None, None] for v in (config.latent_mean, config.latent_std))
    captions = {s: replace(c, latents=[(x - mean) / std for x in raw[s]]) for s, c in captions.items()}
    return config, codec.standardised(config.latent_mean, config.latent_std), captions
