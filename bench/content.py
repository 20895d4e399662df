"""What every implementation is given: the same documents, from (case, number of the repetition) alone.

row         | document | document | ...                 as many a row as `documents` says
document    text [image] text [image] ... text          `text_tokens` ids in images + 1 pieces, cut at random

Content only: each implementation adds its own markers, and is measured by positions of content. The peers' Pythons
read this file too, so it imports nothing but numpy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Case:
    """One setting that is measured."""

    # the model
    dim: int = 256
    depth: int = 8
    heads: int = 4
    config: str = ""  # one of configs/, whose sizes stand for the three above
    vocab: int = 256
    # the rows of a training step
    rows: int = 4
    documents: int = 1  # of a row
    images: int = 6  # of a document
    text_tokens: int = 603  # of a document; of several in a row the mean
    side: int = 8  # patches a side of an image
    patch_size: int = 1  # latent cells a side of a patch
    channels: int = 8
    seq_len: int = 0  # rows are padded to so many positions; 0 = as long as the longest
    # what is sampled
    batch: int = 1
    prompt: int = 16  # tokens
    image_in_prompt: bool = False
    steps: int = 50  # of Euler's method
    guidance: float = 1.0
    new: int = 64  # tokens to write
    # how
    row_by_row: bool = False  # a training step's gradients are added up from those of its rows
    way: str = ""  # which one of the ways that the answer knows
    precision: str = "bf16"  # or fp32
    threads: int = 1
    device: str = "cpu"
    compile: bool = False
    float8: bool = False  # the trunk's products, of a training step
    fsdp: bool = False  # a training step's weights are sharded, over one rank, as where torchrun starts it
    peak: tuple[int, ...] = (1024, 2048, 4096)  # sides of the products that the matmul peak is the best of

    def __post_init__(self):
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision = {self.precision!r}: choose bf16 or fp32")
        for f in fields(self):
            value, least = getattr(self, f.name), int(f.name not in ("images", "seq_len"))
            if type(value) is int and value < least:
                raise ValueError(f"{f.name} = {value}: at least {least}")
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim} does not split into heads = {self.heads}: make it a multiple")

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.side**2

    @property
    def positions(self) -> int:
        """Of content, in a row."""
        return self.documents * (self.text_tokens + self.images * self.patches)

    @property
    def units(self) -> dict[str, int]:
        """What a training step takes."""
        images = self.rows * self.documents * self.images
        return {"positions": self.rows * self.positions} | ({"images": images} if images else {})


Document = list[np.ndarray]  # [n] int64 = text, [channels, h, w] float32 = an image


def pieces(rng: np.random.Generator, total: int, n: int) -> list[int]:
    """n lengths, none of them 0, whose sum is `total`."""
    if total < n:
        raise ValueError(f"{total} text tokens do not make {n} pieces around the images: raise text_tokens")
    cuts = np.sort(rng.choice(total - 1, n - 1, replace=False) + 1)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()


def image(rng: np.random.Generator, case: Case) -> np.ndarray:
    """[channels, h, w] latents."""
    return rng.standard_normal((case.channels, *[case.side * case.patch_size] * 2), np.float32)


def document(rng: np.random.Generator, case: Case, text_tokens: int) -> Document:
    """Text and images in turn, text at both ends."""
    parts: Document = []
    for i, n in enumerate(pieces(rng, text_tokens, case.images + 1)):
        parts += [image(rng, case)] * (i > 0) + [rng.integers(0, case.vocab, n)]
    return parts


def lengths(rng: np.random.Generator, case: Case) -> Iterator[int]:
    """Text tokens of each document of a row: up to a half more or less than the mean, in pairs that make up for it."""
    for _ in range(case.documents // 2):
        more = int(rng.integers(0, case.text_tokens // 2 + 1))
        yield from (case.text_tokens + more, case.text_tokens - more)
    yield from [case.text_tokens] * (case.documents % 2)


def content(case: Case, repetition: int) -> list[list[Document]]:
    """The rows of a repetition, each a list of documents."""
    rng = np.random.default_rng(repetition)
    return [[document(rng, case, n) for n in lengths(rng, case)] for _ in range(case.rows)]


def prompts(case: Case, repetition: int) -> list[Document]:
    """A prompt for each of the batch: text, then an image where the case says so."""
    rng = np.random.default_rng(repetition)
    return [
        [rng.integers(0, case.vocab, case.prompt), *[image(rng, case)] * case.image_in_prompt]
        for _ in range(case.batch)
    ]
