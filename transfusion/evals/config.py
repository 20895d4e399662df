"""What an evaluation looks at: how much of which split, and how the engine draws for it.

Of data of any size it looks at so much and no more: an image that cannot be read is passed over.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from transfusion.data.documents import Corpus
from transfusion.data.images import SPLITS
from transfusion.data.order import shuffled

PERMUTED = 1 << 20  # things of which a permutation is written down
AT_ONCE = 64  # images that are read together


@dataclass(frozen=True)
class EvalConfig:
    """Sizes are of each split, 0 leaves the part out. The same config gives the same numbers."""

    n_captions: int = 200  # captioned and drawn; documents with images anywhere: read
    n_images: int = 200  # denoised
    n_candidates: int = 4096  # real images, of all splits, that what is drawn is compared with; those asked for too
    n_edits: int = 100  # of documents that end with an image to draw
    text_windows: int = 64  # of the run's seq_len, spread evenly over the held-out text
    times: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # t of the diffusion loss
    steps: int | None = None  # of the solver, as the next three: None = the run's own
    solver: str | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    features: str = ""  # EfficientNet-Lite0 weights for draw accuracy in features: a path, or "installed"; "" = none
    sheets: str = ""  # folder for sheets of what was drawn; "" = none
    batch: int = 32  # documents at once
    seed: int = 0

    def __post_init__(self):
        for name in ("n_captions", "n_images", "n_candidates", "n_edits", "text_windows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: give how many to look at, 0 for none")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: at least 1 document goes through the model at once")
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ValueError(f"times = {self.times}: give noise levels from 0 (data) to 1 (noise), e.g. times=0.2,0.5")

    @property
    def sampling(self) -> dict:
        """The fields of SampleConfig that are set here."""
        names = ("steps", "solver", "guidance", "image_guidance", "batch")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def some(n: int, most: int, seed: int) -> list[int]:
    """At most so many of the numbers below n, drawn once by seed, rising."""
    if n <= PERMUTED:
        return sorted(np.random.default_rng(seed).permutation(n)[:most].tolist())
    return sorted(shuffled(i, n, seed) for i in range(min(n, most)))


def chosen(corpus: Corpus, n: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """(split, numbers of at most n of its images, drawn once by seed) of each split that has any."""
    for split in SPLITS:
        images = corpus.captions[split].images
        numbers = some(len(images), n, seed)
        if numbers := [i for i, image in zip(numbers, images.read(numbers)) if not isinstance(image, str)]:
            yield split, numbers


class Candidate(NamedTuple):
    """A real image that one that was drawn may be nearest to."""

    image: np.ndarray  # [h, w, 3] uint8
    texts: list[str]


def candidates(corpus: Corpus, config: EvalConfig) -> Iterator[Candidate]:
    """All images of all splits; of more than n_candidates those that are looked at, and so many drawn by seed."""
    sizes = [len(corpus.captions[split]) for split in SPLITS]
    looked_at = dict(chosen(corpus, config.n_captions, config.seed)) if sum(sizes) > config.n_candidates else {}
    drawn, first = np.array(some(sum(sizes), config.n_candidates, config.seed), np.int64), 0
    for split, size in zip(SPLITS, sizes):
        captions, own = corpus.captions[split], drawn[(drawn >= first) & (drawn < first + size)] - first
        numbers, first = sorted({*own.tolist(), *looked_at.get(split, [])}), first + size
        for at in range(0, len(numbers), AT_ONCE):
            part = numbers[at : at + AT_ONCE]
            found = zip(part, captions.images.read(part))
            yield from (Candidate(image, captions.texts[i]) for i, image in found if not isinstance(image, str))


def look(image: np.ndarray) -> bytes:
    """The same for images of the same pixels."""
    return hashlib.sha256(image.tobytes()).digest()
