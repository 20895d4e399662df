"""What the k-th document of training is, as a pure function of (seed, k): data in memory in, segments out.

    caption first (80 %)   <bos> caption [image] <eos>
       of which 10 %       <bos> [image]                        the caption is dropped, for guidance
    image first   (20 %)   <bos> [image] caption <eos>          the image's noise stays below the noise limit
    text                   <bos> a window of a work (<eos> where the work ends)

Shares of Zhou et al. 2024, section 4.1; caption dropout is ours (the paper is silent). An image without its caption is
not closed by <eos>: what follows an image at the beginning of a document is its caption, and <eos> would deny that.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from transfusion.codec import CODECS, Codec
from transfusion.data.images import ImageSet, load_images
from transfusion.data.report import Report
from transfusion.data.text import TextSet, load_text
from transfusion.sequence import Image, Special, Text, length
from transfusion.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from. `images`: "emoji", "emoji:base", folders; `text`: "shakespeare", files, folders."""

    images: tuple[str, ...] = ("emoji",)
    text: tuple[str, ...] = ("shakespeare",)
    tokenizer: str = ""  # path of a tokenizer.json; "" = the shipped one
    codec: str = "pixels"
    image_size: int = 64
    image_share: float = 0.5  # of all positions: 0.5 is the paper's 1:1
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    other_captions: float = 0.3  # how often a caption other than an image's first is read, where it has several
    noise_limit: float = 0.5  # largest t of an image that stands before its caption; 1 = no limit
    workers: int = 0  # processes that prepare batches; 0 = the training process itself

    def __post_init__(self):
        for name in ("image_share", "caption_first", "caption_dropout", "other_captions", "noise_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} = {getattr(self, name)} is a share: give a number from 0 to 1")
        if self.codec not in CODECS:
            raise ValueError(f"data.codec = {self.codec!r}: choose one of {', '.join(CODECS)}")
        if self.image_share and not self.images:
            raise ValueError("data.images is empty: name a folder of captioned images, or set data.image_share=0")
        if self.image_share < 1 and not self.text:
            raise ValueError("data.text is empty: name a text file or folder, or set data.image_share=1")


def image_alone(special: Special, image: Image) -> list[Text | Image]:
    """An image without its caption: the unconditional half of guidance."""
    return [Text(np.array([special.bos])), image]


def caption_then_image(special: Special, caption: np.ndarray, image: Image) -> list[Text | Image]:
    return [Text(np.concatenate([[special.bos], caption])), image, Text(np.array([special.eos]))]


def image_then_caption(special: Special, caption: np.ndarray, image: Image) -> list[Text | Image]:
    return [Text(np.array([special.bos])), image, Text(np.concatenate([caption, [special.eos]]))]


@lru_cache(maxsize=8)
def permutation(n: int, *key: int) -> np.ndarray:
    """The order of n things in the epoch that `key` names."""
    return np.random.default_rng(key).permutation(n)


@dataclass(frozen=True, eq=False)
class Captions:
    """Captioned images of one split, captions as token ids."""

    images: np.ndarray  # [n, S, S, 3] uint8
    texts: list[list[str]]
    ids: list[list[np.ndarray]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Corpus:
    """All data of a run, in memory."""

    config: DataConfig
    special: Special
    grid: tuple[int, int]  # rows and columns of patches of an image
    captions: dict[str, Captions]  # by split: train, held_out_image, held_out_combination
    works: list[np.ndarray]  # token ids of each training text
    held_out_text: list[str]

    @property
    def codec(self) -> Codec:
        return CODECS[self.config.codec]

    @cached_property
    def stream(self) -> np.ndarray:
        """All works one after the other, each closed by <eos>."""
        return np.concatenate([np.append(w, self.special.eos) for w in self.works])

    @cached_property
    def image_document_length(self) -> float:
        """Mean positions of an image document."""
        return float(np.mean([length(2 + len(ids[0]), [self.grid]) for ids in self.captions["train"].ids]))

    def image(self, pixels: np.ndarray, t_max: float = 1.0) -> Image:
        return Image(self.codec.encode(pixels), t_max)

    def image_document(self, seed: int, k: int) -> list[Text | Image]:
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
                return image_alone(self.special, self.image(train.images[i]))
            return caption_then_image(self.special, caption, self.image(train.images[i]))
        return image_then_caption(self.special, caption, self.image(train.images[i], c.noise_limit))

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
    config: DataConfig, tokenizer: Tokenizer, patch_size: int, seq_len: int
) -> tuple[Corpus, dict[str, Report]]:
    """(all data of a config, what was left out of each source and why)."""
    grid = CODECS[config.codec].grid(config.image_size, patch_size)
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
                fits = [j for j, c in enumerate(of_image) if length(2 + len(c), [grid]) <= seq_len]
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
        size = config.image_size
        captions[split] = Captions(
            np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8), texts, ids, names
        )
    if config.image_share and not len(captions["train"]):
        need = length(2, [grid])
        raise ValueError(
            f"no captioned image fits into seq_len = {seq_len}: an image alone takes {need} positions; raise "
            "train.seq_len or model.patch_size"
        )
    works = [np.asarray(ids, np.int64) for s in text_sets for ids in tokenizer.encode_many(s.train)]
    held_out = [text for s in text_sets for text in s.held_out]
    return Corpus(config, tokenizer.special, grid, captions, works, held_out), reports
