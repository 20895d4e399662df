"""Images without captions, as an autoencoder learns them: the step's images are a pure function of (seed, step).

Every image once an epoch, in an order of the epoch's own; of images loaded larger than they are trained on, another
square each time. One that cannot be read is named, counted, and gives its turn to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfusion.data.arrays import Held, Joined
from transfusion.data.built import images_by_split, is_built
from transfusion.data.images import load_images
from transfusion.data.order import key_of, shuffled
from transfusion.data.report import Report

TRIES = 100  # images in turn, of which one can be read


@dataclass(frozen=True)
class CropConfig:
    """Where images come from: "emoji", "emoji:base", folders of pictures, or built by `transfusion data build`."""

    images: tuple[str, ...] = ("emoji",)
    image_size: int = 64
    load_size: int = 0  # pixels a side as loaded, of which a random square of image_size is cut out; 0 = image_size
    flips: float = 0.0  # how often an image is mirrored, left to right
    recolour: float = 0.0  # how often its colour channels change places, so that rare hues are learned like common ones
    max_lost: int = 1000  # images that a run may find unreadable before it stops

    def __post_init__(self):
        if not self.images:
            raise ValueError("data.images is empty: name a folder of pictures, or emoji")
        for name in ("flips", "recolour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} = {getattr(self, name)} is a share: give a number from 0 to 1")
        if self.load_size and self.load_size < self.image_size:
            raise ValueError(f"data.load_size = {self.load_size} is below data.image_size = {self.image_size}")


@dataclass(frozen=True, eq=False)
class Crops:
    """All images of a run, by split."""

    config: CropConfig
    splits: dict[str, Sequence[np.ndarray]]  # n of uint8 [load_size, load_size, 3], as data/arrays.py says

    def batch(self, seed: int, step: int, n: int) -> tuple[np.ndarray, list[str]]:
        """([n, image_size, image_size, 3] uint8: images step * n ... of training; which of them could not be read)."""
        turns = range(step * n, (step + 1) * n)
        found, lost = self.whole(seed, turns)
        return np.stack([self.cut(image, seed, k) for image, k in zip(found, turns)]), lost

    def cut(self, image: np.ndarray, seed: int, k: int) -> np.ndarray:
        """The square of it that is trained on in turn k, mirrored and recoloured as that has it."""
        c, rng = self.config, np.random.default_rng(key_of(seed, 2, k))
        top, left = rng.integers(0, image.shape[0] - c.image_size, 2, endpoint=True)
        image = image[top : top + c.image_size, left : left + c.image_size]
        if rng.random() < c.flips:
            image = image[:, ::-1]
        return image[:, :, rng.permutation(3)] if rng.random() < c.recolour else image

    def whole(self, seed: int, turns: Sequence[int]) -> tuple[list[np.ndarray], list[str]]:
        """([load_size, load_size, 3] uint8 of each of these turns, of the next where it cannot be read; why that is, a
        line a turn)."""
        train, at, lost = self.splits["train"], list(turns), {}
        found: list[np.ndarray | str] = [""] * len(at)
        for _ in range(TRIES):
            todo = [i for i, one in enumerate(found) if isinstance(one, str)]
            numbers = [self.number(seed, at[i]) for i in todo]
            for i, number, one in zip(todo, numbers, train.read(numbers) if numbers else ()):
                found[i] = one
                if isinstance(one, str):
                    lost[at[i]] = f"image {number}: {one}"
                    at[i] += 1
            if not any(isinstance(one, str) for one in found):
                return found, list(lost.values())
        why = next(one for one in found if isinstance(one, str))
        raise ValueError(f"{TRIES} images in turn cannot be read ({why}): see `transfusion data check images` of them")

    def number(self, seed: int, turn: int) -> int:
        """Which image of training has its turn."""
        epoch, i = divmod(turn, len(self.splits["train"]))
        return shuffled(i, len(self.splits["train"]), seed, 1, epoch)

    def centres(self, split: str, n: int) -> np.ndarray:
        """[n or fewer, image_size, image_size, 3] uint8: the middle of images spread evenly over a split, of those that
        can be read."""
        images, side = self.splits[split], self.config.image_size
        found = images.read(np.linspace(0, len(images) - 1, min(n, len(images))).round().astype(int).tolist())
        chosen = [image for image in found if not isinstance(image, str)]
        if not chosen:
            return np.zeros((0, side, side, 3), np.uint8)
        edge = (len(chosen[0]) - side) // 2
        return np.stack(chosen)[:, edge : edge + side, edge : edge + side]


def build_crops(config: CropConfig) -> tuple[Crops, dict[str, Report]]:
    """(the images, what was skipped of each source); ValueError where none is left to train on."""
    splits: dict[str, list[Sequence[np.ndarray]]] = {"train": []}
    reports, side = {}, config.load_size or config.image_size
    for path in config.images:
        if is_built(path):
            by_split = images_by_split(path, [(side, side)])
            reports[f"images {path}"] = Report(sum(map(len, by_split.values())))
        else:
            found, reports[f"images {path}"] = load_images(path, side, captioned=False)
            by_split = {split: Held(found.images[found.split == split]) for split in np.unique(found.split).tolist()}
        for split, images in by_split.items():
            if len(images):
                splits.setdefault(split, []).append(images)
    if not splits["train"]:
        raise ValueError(f"no image to train on in {', '.join(config.images)}: all of them are held out")
    return Crops(config, {split: Joined(parts) for split, parts in splits.items()}), reports
