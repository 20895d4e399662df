"""The latents of all images of a run, encoded once and kept on disk.

    CACHE/latents/KEY.npy        [n, C, h, w] float32, KEY = sha256(codec, images), CACHE as `cachedir.py` says

The name follows from the codec's weights and from every pixel, so a change of either makes another file, and a file
that is there is right. It is there whole or not at all.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.mapped import save


def encode(images: Sequence[np.ndarray], codec: Codec, folder: Path) -> list[np.ndarray]:
    """[C, h, w] of each image [H, W, 3] uint8, from the files in `folder` where they are there, else into them."""
    latents: list[np.ndarray] = [np.zeros(0)] * len(images)
    for shape in sorted({image.shape for image in images}):
        numbers = [i for i, image in enumerate(images) if image.shape == shape]
        of_size = kept(np.stack([images[i] for i in numbers]), codec, folder)
        for i, one in zip(numbers, of_size):
            latents[i] = one
    return latents


def kept(images: np.ndarray, codec: Codec, folder: Path) -> np.ndarray:
    """[n, C, h, w] of images [n, H, W, 3] of one size."""
    assert codec.key, f"{codec.name} says nothing by which its latents could be known again"
    key = hashlib.sha256(f"{codec.key} {images.shape}".encode())
    key.update(np.ascontiguousarray(images))
    file = folder / f"{key.hexdigest()}.npy"
    if file.is_file():
        return np.load(file)
    print(f"encoding {len(images)} images with {codec.name} into {file}")
    latents = codec.encode(images)  # in parts, where it is a network (codec/learned.py)
    folder.mkdir(parents=True, exist_ok=True)
    save(file, lambda out: np.save(out, latents))
    return latents


def statistics(latents: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel over all cells of all latents [C, h, w]."""
    n = sum(x[0].size for x in latents)
    mean = sum(x.sum((1, 2), dtype=np.float64) for x in latents) / n
    spread = sum(np.square(x - mean[:, None, None]).sum((1, 2)) for x in latents) / n
    return tuple(mean.tolist()), tuple(np.sqrt(spread).tolist())
