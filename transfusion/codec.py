"""Images to latents and back: what the diffusion works on. A codec is two functions and what must be known of them.

pixels: latents = image / 127.5 - 1, in [-1, 1], C = 3, one cell a pixel
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Codec:
    """`encode`: uint8 [H, W, 3] -> float32 [C, h, w]; `decode`: the inverse. H = factor * h."""

    name: str
    channels: int
    factor: int
    limit: float | None  # latents of real images lie in [-limit, limit]; None = unbounded
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]

    def grid(self, image_size: int, patch_size: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of image_size pixels a side; ValueError if they do not divide it."""
        patch = self.factor * patch_size  # pixels
        if image_size < 1 or image_size % patch:
            raise ValueError(
                f"data.image_size = {image_size} does not divide into patches of {patch} pixels (model.patch_size = "
                f"{patch_size} cells of {self.factor}): choose a multiple of {patch}"
            )
        return image_size // patch, image_size // patch


def encode_pixels(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 127.5 - 1.0


def decode_pixels(latents: np.ndarray) -> np.ndarray:
    return ((latents.transpose(1, 2, 0) + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)


CODECS = {"pixels": Codec("pixels", channels=3, factor=1, limit=1.0, encode=encode_pixels, decode=decode_pixels)}
