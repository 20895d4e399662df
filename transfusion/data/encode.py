"""Latents of the images of a built folder, encoded once, kept beside it, read in place.

    FOLDER/latents/KEY/starts.npy     where the latents of each image begin; KEY = sha256(codec, sizes, dataset.json)
                       000000.bin     float32 [C, h, w] of 1024 images, one behind the other; NaN where one is broken
                       000000.json    sums over those of training, for the mean and deviation of each channel
                       latents.json   written last: mean and deviation over all; with it the latents are whole

A block is there whole or not, so a call after a kill encodes those that are missing.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.built import DATASET, TarImages
from transfusion.data.images import Size
from transfusion.data.mapped import Mapped
from transfusion.data.storage import Span, read_spans

BLOCK = 1024  # images
BATCH = 32  # images that are decoded and encoded together
WHOLE = "latents.json"
BROKEN = "image that could not be encoded"


def latents_folder(folder: Path, codec: Codec, sizes: Sequence[Size]) -> Path:
    """Where the latents of a built folder lie: of another codec, other sizes or other data elsewhere."""
    key = hashlib.sha256(f"{codec.key} {[tuple(size) for size in sizes]}".encode() + (folder / DATASET).read_bytes())
    return folder / "latents" / key.hexdigest()[:20]


def every_image(folder: str | Path, sizes: Sequence[Size]) -> tuple[TarImages, np.ndarray]:
    """(all images of a built folder, bool [n]: which are of training); ValueError where it has none."""
    folder = Path(folder).expanduser().absolute()
    dataset = json.loads((folder / DATASET).read_text())
    if "tars" not in dataset:
        raise ValueError(f"{folder} holds {dataset['kind']}, which has no images: encode none of it")
    records = Mapped(folder / "images.npy")
    images = TarImages(folder, tuple(url for url, _ in dataset["tars"]), records, 0, len(records), tuple(sizes))
    trained, (first, stop) = np.zeros(len(images), bool), dataset["splits"]["train"]
    if dataset["kind"] == "images":
        trained[first:stop] = True
    else:
        segments, documents = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("segments", "documents"))
        of_training = np.zeros(len(segments) + 1, np.int64)
        begins = documents["first"][first:stop].astype(np.int64)
        np.add.at(of_training, begins, 1)
        np.add.at(of_training, begins + documents["segments"][first:stop], -1)
        chosen = segments[(np.cumsum(of_training)[:-1] > 0) & (segments["image"] == 1)]
        trained[chosen["number"].astype(np.int64)] = True
    return images, trained


def encode_built(folder: str | Path, codec: Codec, sizes: Sequence[Size]) -> Path:
    """The folder of all latents of a built folder, encoded now as far as they are not there yet."""
    if not codec.key:
        raise ValueError(
            f"{codec.name} encodes as fast as latents are read: name another data.codec, or encode nothing"
        )
    images, trained = every_image(folder, sizes)
    out = latents_folder(images.folder, codec, sizes)
    if (out / WHOLE).is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    shapes = latent_shapes(images.shapes(), codec)
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])
    save(out / "starts.npy", lambda file: np.save(file, starts))
    blocks = range(-(-len(images) // BLOCK))
    for b in blocks:
        if not (out / f"{b:06}.json").is_file():
            numbers = np.arange(b * BLOCK, min((b + 1) * BLOCK, len(images)))
            encode_block(images, numbers, shapes, starts, trained, codec, out / f"{b:06}")
        print(f"encoded {min((b + 1) * BLOCK, len(images))} of {len(images)} images", flush=True)
    sums = [json.loads((out / f"{b:06}.json").read_text()) for b in blocks]
    cells = sum(s["cells"] for s in sums)
    mean = sum(np.array(s["sum"]) for s in sums) / max(cells, 1)
    spread = np.maximum(sum(np.array(s["squares"]) for s in sums) / max(cells, 1) - mean**2, 0)
    found = {"codec": codec.name, "cells": cells, "mean": mean.tolist(), "std": np.sqrt(spread).tolist()}
    found["broken"] = [line for s in sums for line in s["broken"]]
    save(out / WHOLE, lambda file: file.write(json.dumps(found, indent=1).encode()))
    return out


def latent_shapes(sizes: np.ndarray, codec: Codec) -> np.ndarray:
    """int64 [n, 3]: C, h, w of the latents of images of these (height, width); ValueError where one does not divide."""
    for size in np.unique(sizes, axis=0).tolist():
        codec.grid(size, 1)
    return np.concatenate([np.full((len(sizes), 1), codec.channels), sizes // codec.factor], 1)


def encode_block(
    images: TarImages,
    numbers: np.ndarray,
    shapes: np.ndarray,
    starts: np.ndarray,
    trained: np.ndarray,
    codec: Codec,
    name: Path,
):
    """Writes the .bin and the .json of these images."""
    first = int(starts[numbers[0]])
    block = np.full(int(starts[numbers[-1] + 1]) - first, np.nan, np.float32)
    cells, total, squares, broken = 0, np.zeros(codec.channels), np.zeros(codec.channels), []
    for batch, found in read_ahead(images, list(batches(numbers, shapes))):
        good = [i for i, pixels in zip(batch, found) if not isinstance(pixels, str)]
        broken += [[int(i), pixels] for i, pixels in zip(batch, found) if isinstance(pixels, str)]
        if not good:
            continue
        latents = codec.encode(np.stack([pixels for pixels in found if not isinstance(pixels, str)]))
        for i, one in zip(good, latents):
            block[starts[i] - first : starts[i + 1] - first] = one.ravel()
            if trained[i]:
                cells += one[0].size
                total += one.sum((1, 2), dtype=np.float64)
                squares += np.square(one, dtype=np.float64).sum((1, 2))
    save(name.with_suffix(".bin"), lambda file: file.write(block.astype("<f4").tobytes()))
    sums = {"cells": cells, "sum": total.tolist(), "squares": squares.tolist(), "broken": sorted(broken)}
    save(name.with_suffix(".json"), lambda file: file.write(json.dumps(sums).encode()))


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


@dataclass(frozen=True, eq=False)
class BuiltLatents(Sequence):
    """The latents of the images of a `TarImages`."""

    images: TarImages
    folder: Path
    starts: Mapped
    channels: int
    factor: int

    def __len__(self) -> int:
        return len(self.images)

    def shape(self, i: int) -> tuple[int, int, int]:
        """(C, h, w)."""
        height, width = self.images.shape(i)
        return self.channels, height // self.factor, width // self.factor

    def read(self, numbers: Sequence[int]) -> list[np.ndarray | str]:
        """float32 [C, h, w] of each of these images, or why it cannot be had."""
        spans = []
        for number in numbers:
            i = self.images.first + number % len(self)
            block, start, stop = i // BLOCK, *(int(x) for x in self.starts.array[i : i + 2])
            first = int(self.starts.array[block * BLOCK])
            spans.append(Span(str(self.folder / f"{block:06}.bin"), (start - first) * 4, (stop - start) * 4))
        return [self.latent(data, number) for data, number in zip(read_spans(spans), numbers)]

    def latent(self, data: bytes | str, number: int) -> np.ndarray | str:
        if isinstance(data, str):
            return data
        latent = np.frombuffer(data, "<f4").reshape(self.shape(number))
        return BROKEN if np.isnan(latent).all() else latent

    def __getitem__(self, i: int) -> np.ndarray:
        """float32 [C, h, w]; ValueError where it cannot be had."""
        (latent,) = self.read([i])
        if isinstance(latent, str):
            raise ValueError(f"latents of image {i} of {self.images.folder}: {latent}")
        return latent


def load_latents(images: TarImages, codec: Codec) -> tuple[BuiltLatents, dict[str, Any]]:
    """(latents of these images, latents.json); ValueError where they were not encoded yet."""
    folder = latents_folder(images.folder, codec, images.sizes)
    if not (folder / WHOLE).is_file():
        raise ValueError(
            f"the images of {images.folder} are not encoded with {codec.name}: transfusion data encode CONFIG"
        )
    latents = BuiltLatents(images, folder, Mapped(folder / "starts.npy"), codec.channels, codec.factor)
    return latents, json.loads((folder / WHOLE).read_text())
