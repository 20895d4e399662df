"""The latents of the images of a built folder, or their codes, encoded once and kept as `encoded.py` says.

1024 images  ->  NAME.bin, then NAME.json        there whole or not: a call after a kill encodes what is missing

    block     0  1  2  3  4  5  6 ...            of several processes each takes every so many-th; they need not know of
    rank      0  1  2  0  1  2  0                each other, and whoever finds all blocks there says that all are
"""

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from transfusion.codec.codec import Codec
from transfusion.data.built import CHANGED, TarImages, images_of, read_dataset
from transfusion.data.encoded import BLOCK, WHOLE, Kept, described, kept_at
from transfusion.data.images import Size
from transfusion.data.mapped import Growing, draft, fingerprint, has_length, publish, save
from transfusion.data.storage import SHORT, UNREADABLE, has_size

BATCH = 32  # images that are decoded and encoded together


def every_image(folder: str | Path, sizes: Sequence[Size]) -> TarImages:
    """All images of a built folder; ValueError where it has none, or where a tar of it is gone or has changed."""
    folder, dataset = read_dataset(folder)
    if "tars" not in dataset:
        raise ValueError(f"{folder} holds {dataset['kind']}, which has no images: encode none of it")
    return images_of(folder, dataset, sizes)


def encode_built(
    folder: str | Path, codec: Codec, sizes: Sequence[Size], codes: bool = False, rank: int = 0, ranks: int = 1
) -> tuple[Path, int]:
    """(the folder of the latents of a built folder, or of their `codes`; how many blocks other ranks have yet to make).

    Those of this rank's blocks that are missing, or of another size than was written, are encoded now. ValueError where
    files could not be read: their blocks are not kept, and the next call encodes them."""
    if not codec.key:
        raise ValueError(
            f"{codec.name} encodes as fast as latents are read: name another data.codec, or encode nothing"
        )
    images = every_image(folder, sizes)
    kept = kept_at(images, codec, codes)
    if is_whole(kept.folder):
        return kept.folder, 0
    kept.folder.mkdir(parents=True, exist_ok=True)
    write_starts(images, kept, codec)
    blocks, unread = -(-len(images) // BLOCK), []
    for b in range(rank, blocks, ranks):
        numbers, name = np.arange(b * BLOCK, min((b + 1) * BLOCK, len(images))), kept.folder / f"{b:06}"
        if not is_encoded(name):
            unread += encode_block(images, numbers, kept, codec, name)
        print(f"encoded block {b + 1} of {blocks}, of {BLOCK} images each", flush=True)
    if unread:
        number, problem = unread[0]
        remedy = (
            "build it anew, and call this again"
            if any(problem.startswith(CHANGED) for _, problem in unread)
            else "see that their tars can be, and call this again; what could be read is kept"
        )
        raise ValueError(
            f"{len(unread)} images of {images.folder} could not be read (image {number}: {problem}): {remedy}"
        )
    done = [kept.folder / f"{b:06}" for b in range(blocks)]
    if missing := sum(not is_encoded(name) for name in done):
        return kept.folder, missing
    said = [json.loads(name.with_suffix(".json").read_text()) for name in done]
    files = {f"{name.name}.bin": [one["bytes"], one["crc32"]] for name, one in zip(done, said)}
    files[kept.starts.path.name] = fingerprint(kept.starts.path)
    broken = [one for block in said for one in block["broken"]]
    found = {"codec": codec.name, "codes": codes, "images": len(images), "broken": broken, "files": files}
    save(kept.folder / WHOLE, lambda file: file.write(json.dumps(found, indent=1).encode()))
    return kept.folder, 0


def is_whole(folder: Path) -> bool:
    """Whether all is there, in the sizes that were written."""
    return (folder / WHOLE).is_file() and all(
        has_size(folder, name, size) for name, (size, _) in described(folder)["files"].items()
    )


def is_encoded(name: Path) -> bool:
    """Whether both files of a block are there, the one as large as the other says."""
    said = name.with_suffix(".json")
    return said.is_file() and has_size(name.parent, f"{name.name}.bin", json.loads(said.read_text())["bytes"])


def write_starts(images: TarImages, kept: Kept, codec: Codec):
    """Where what is kept of each image begins, and, last, where it ends; ValueError where a size does not divide."""
    for size in images.sizes:
        codec.grid(size, 1)
    if has_length(kept.starts.path, len(images) + 1):
        return  # each process and each call would write the same, 8 bytes an image
    numbers_of = np.array([math.prod(kept.shape_of(size)) for size in images.sizes])
    new, end = draft(kept.starts.path), 0
    with Growing(new, "<i8") as starts:
        starts.append([0])
        for _, records in images.blocks():
            ends = end + np.cumsum(numbers_of[images.closest(records)])
            starts.append(ends)
            end = ends[-1]
    publish(new, kept.starts.path)


def encode_block(images: TarImages, numbers: np.ndarray, kept: Kept, codec: Codec, name: Path) -> list[list]:
    """Writes the .bin and the .json of these images; or neither, and [number, why] of each that could not be read."""
    starts = np.array(kept.starts[numbers[0] : numbers[-1] + 2])
    starts -= starts[0]
    block = np.full(int(starts[-1]), kept.missing, kept.dtype)
    broken = []
    for batch, found in read_ahead(images, list(batches(images, numbers))):
        good = [i for i, pixels in zip(batch, found) if not isinstance(pixels, str)]
        broken += [[int(i), pixels] for i, pixels in zip(batch, found) if isinstance(pixels, str)]
        if not good:
            continue
        latents = codec.encode(np.stack([pixels for pixels in found if not isinstance(pixels, str)]))
        for i, one in zip(good, codec.quantize(latents) if kept.codes else latents):
            at = i - numbers[0]
            block[starts[at] : starts[at + 1]] = one.ravel()
    unread = [[i, why] for i, why in sorted(broken) if why.startswith((UNREADABLE, SHORT, CHANGED))]
    if unread:  # what a store did not give is asked for again, what does not decode never will
        return unread
    data = block.tobytes()
    said = {"bytes": len(data), "crc32": zlib.crc32(data), "broken": sorted(broken)}
    save(name.with_suffix(".bin"), lambda file: file.write(data))
    save(name.with_suffix(".json"), lambda file: file.write(json.dumps(said).encode()))
    return []


def batches(images: TarImages, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers, those of one size together."""
    closest = images.closest(images.records[numbers])
    for which in np.unique(closest):
        same = numbers[closest == which]
        yield from (same[i : i + BATCH] for i in range(0, len(same), BATCH))


def read_ahead(images: TarImages, todo: list[np.ndarray]) -> Iterator[tuple[np.ndarray, list[np.ndarray | str]]]:
    """Each batch with its images, of which the next are decoded while the codec is busy."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(images.read, batch) for batch in todo[:1]]
        for i, batch in enumerate(todo):
            found = coming.pop().result()
            coming = [thread.submit(images.read, after) for after in todo[i + 1 : i + 2]]
            yield batch, found
