"""The latents of the images of a built folder, or their codes, encoded once and kept as `encoded.py` says.

1024 images  ->  NAME.bin, then NAME.json        there whole or not: a call after a kill encodes what is missing
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.built import CHANGED, Rows, TarImages, read_dataset
from transfusion.data.encoded import BLOCK, WHOLE, Kept, kept_at
from transfusion.data.images import Size
from transfusion.data.mapped import Mapped
from transfusion.data.storage import SHORT, UNREADABLE

BATCH = 32  # images that are decoded and encoded together


def every_image(folder: str | Path, sizes: Sequence[Size]) -> TarImages:
    """All images of a built folder; ValueError where it has none, or where a tar of it is gone or has changed."""
    folder, dataset = read_dataset(folder)
    if "tars" not in dataset:
        raise ValueError(f"{folder} holds {dataset['kind']}, which has no images: encode none of it")
    records = Mapped(folder / "images.npy")
    return TarImages(folder, tuple(url for url, _ in dataset["tars"]), records, Rows(0, len(records)), tuple(sizes))


def encode_built(folder: str | Path, codec: Codec, sizes: Sequence[Size], codes: bool = False) -> Path:
    """The folder of the latents of a built folder, or of their `codes`; those that are missing are encoded now.

    ValueError where files could not be read: their blocks are not kept, and the next call encodes them."""
    if not codec.key:
        raise ValueError(
            f"{codec.name} encodes as fast as latents are read: name another data.codec, or encode nothing"
        )
    images = every_image(folder, sizes)
    kept = kept_at(images, codec, codes)
    if (kept.folder / WHOLE).is_file():
        return kept.folder
    kept.folder.mkdir(parents=True, exist_ok=True)
    shapes = latent_shapes(images, kept, codec)
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])
    save(kept.folder / "starts.npy", lambda file: np.save(file, starts))
    broken, unread = [], []
    for b in range(-(-len(images) // BLOCK)):
        numbers, name = np.arange(b * BLOCK, min((b + 1) * BLOCK, len(images))), kept.folder / f"{b:06}"
        if not name.with_suffix(".json").is_file():
            if failed := encode_block(images, numbers, shapes, starts, kept, codec, name):
                unread += failed
                continue
        broken += json.loads(name.with_suffix(".json").read_text())
        print(f"encoded {numbers[-1] + 1} of {len(images)} images, {len(broken)} of them broken", flush=True)
    if unread:
        raise ValueError(
            f"{len(unread)} images of {images.folder} could not be read (image {unread[0][0]}: {unread[0][1]}): see "
            "that their tars can be, and call this again; what could be read is kept"
        )
    found = {"codec": codec.name, "codes": codes, "images": len(images), "broken": broken}
    save(kept.folder / WHOLE, lambda file: file.write(json.dumps(found, indent=1).encode()))
    return kept.folder


def latent_shapes(images: TarImages, kept: Kept, codec: Codec) -> np.ndarray:
    """int64 [n, 2 or 3]: the shape of what is kept of each image; ValueError where a size does not divide."""
    for size in images.sizes:
        codec.grid(size, 1)
    return np.array([kept.shape_of(size) for size in images.sizes])[images.closest()]


def encode_block(
    images: TarImages, numbers: np.ndarray, shapes: np.ndarray, starts: np.ndarray, kept: Kept, codec: Codec, name: Path
) -> list[list]:
    """Writes the .bin and the .json of these images; or neither, and [number, why] of each that could not be read."""
    first = int(starts[numbers[0]])
    block = np.full(int(starts[numbers[-1] + 1]) - first, kept.missing, kept.dtype)
    broken = []
    for batch, found in read_ahead(images, list(batches(numbers, shapes))):
        good = [i for i, pixels in zip(batch, found) if not isinstance(pixels, str)]
        broken += [[int(i), pixels] for i, pixels in zip(batch, found) if isinstance(pixels, str)]
        if not good:
            continue
        latents = codec.encode(np.stack([pixels for pixels in found if not isinstance(pixels, str)]))
        for i, one in zip(good, codec.quantize(latents) if kept.codes else latents):
            block[starts[i] - first : starts[i + 1] - first] = one.ravel()
    unread = [[i, why] for i, why in sorted(broken) if why.startswith((UNREADABLE, SHORT, CHANGED))]
    if unread:  # what a store did not give is asked for again, what does not decode never will
        return unread
    save(name.with_suffix(".bin"), lambda file: file.write(block.tobytes()))
    save(name.with_suffix(".json"), lambda file: file.write(json.dumps(sorted(broken)).encode()))
    return []


def batches(numbers: np.ndarray, shapes: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers, those of one size together."""
    for shape in np.unique(shapes[numbers], axis=0):
        same = numbers[(shapes[numbers] == shape).all(1)]
        yield from (same[i : i + BATCH] for i in range(0, len(same), BATCH))


def read_ahead(images: TarImages, todo: list[np.ndarray]) -> Iterator[tuple[np.ndarray, list[np.ndarray | str]]]:
    """Each batch with its images, of which the next are decoded while the codec is busy."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(images.read, batch) for batch in todo[:1]]
        for i, batch in enumerate(todo):
            found = coming.pop().result()
            coming = [thread.submit(images.read, after) for after in todo[i + 1 : i + 2]]
            yield batch, found


def save(file: Path, write):
    """Writes a file that is there whole or not at all."""
    new = file.with_name(f".{os.getpid()}-{file.name}")
    with new.open("wb") as out:
        write(out)
    os.replace(new, file)
