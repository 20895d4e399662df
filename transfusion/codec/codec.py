"""Images to latents and back: what the diffusion works on. A codec is two functions and what must be known of them.

pixels     latents = image / 127.5 - 1, in [-1, 1], C = 3, one cell a pixel
learned    latents = (E(image) - mean) / std, factor x factor pixels a cell, mean and std of the run's own images
discrete   codes = the nearest of the codebook's vectors at every cell; a codebook's latents are those vectors
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Encode = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Codec:
    """`encode`: uint8 [n, H, W, 3] -> float32 [n, C, H / factor, W / factor]; `decode`: the inverse, as far as it goes.

    One with a codebook also has `quantize`: latents [n, C, h, w] -> int64 [n, h, w], and `lookup`, back to latents.
    """

    name: str
    channels: int
    factor: int
    limit: float | None  # latents of real images lie in [-limit, limit]; None = unbounded
    encode: Encode
    decode: Encode
    codes: int = 0  # size of the codebook; 0 = none
    quantize: Encode | None = None
    lookup: Encode | None = None
    key: str = ""  # changes with whatever changes the latents, so that kept ones are known to be stale; "" = cheap

    def grid(self, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels; ValueError if they do not divide it."""
        return patch_grid(size, self.factor, patch_size)

    def standardised(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Codec":
        """The codec whose latents are (encode - mean) / std, channel by channel; itself where both are empty."""
        if not mean and not std:
            return self
        if not len(mean) == len(std) == self.channels or min(std) <= 0:
            raise ValueError(
                f"data.latent_mean and data.latent_std want {self.channels} numbers each for {self.name}, the latter "
                "above 0: leave both out, and they are measured"
            )
        m, s = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))
        quantize, lookup = self.quantize, self.lookup
        return replace(
            self,
            limit=None,
            encode=lambda images: (self.encode(images) - m) / s,
            decode=lambda latents: self.decode(latents * s + m),
            quantize=quantize and (lambda latents: quantize(latents * s + m)),
            lookup=lookup and (lambda codes: (lookup(codes) - m) / s),
        )


def patch_grid(size: tuple[int, int], factor: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of patch_size x patch_size cells, each factor x factor pixels, of (height, width)."""
    patch = factor * patch_size  # pixels
    if any(side < 1 or side % patch for side in size):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels (data.image_size) does not divide into patches of {patch} "
            f"pixels (model.patch_size = {patch_size} cells of {factor}): choose multiples of {patch}"
        )
    return size[0] // patch, size[1] // patch


def encode_pixels(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1.0


def decode_pixels(latents: np.ndarray) -> np.ndarray:
    return ((latents.transpose(0, 2, 3, 1) + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)


PIXELS = Codec("pixels", channels=3, factor=1, limit=1.0, encode=encode_pixels, decode=decode_pixels)
