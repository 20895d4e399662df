"""Data on disk: how fast it is built, and read in any order, by one core.

    python bench/shards.py --images 5000 --out bench/results/2026-11-23-shards.json

emoji     the shipped drawings as PNGs in tars, read at 64 pixels
photos    so many synthetic JPEGs of 256 pixels in tars, of about the bytes of photos, read at 256 pixels
text      the shipped texts as JSON lines, again and again, read in windows of 2048 tokens

A figure is things a second of the processor, which is what one core does; `wall` beside it is by the clock. Files were
written just before, so they are in the system's cache: this measures decoding, not the disk.
"""

import argparse
import io
import json
import os
import tempfile
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import numpy as np
from clock import now
from machine import commit, hardware, versions
from PIL import Image

from transfusion.data.build import build
from transfusion.data.built import load_built_images, load_built_text
from transfusion.data.images import load_images
from transfusion.data.tars import TarWriter
from transfusion.data.text import load_text
from transfusion.data.windows import Stream
from transfusion.tokenizer import load_tokenizer

SHARD = 1000  # images
TOGETHER = 32  # images read by one call, as a batch does
WINDOW = 2048  # tokens


def photo(rng: np.random.Generator, side: int) -> Image.Image:
    """Soft colours under fine noise: its JPEG has about the bytes of a photo's."""
    soft = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8)).resize((side, side), 3)
    return Image.fromarray(
        (np.asarray(soft, np.int16) + rng.normal(0, 6, (side, side, 3))).clip(0, 255).astype(np.uint8)
    )


def encoded(picture: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, quality=90)
    return file.getvalue()


def write_tars(folder: Path, files, captions) -> int:
    """Tars of SHARD images each; the bytes of all."""
    folder.mkdir()
    total, files = 0, iter(zip(files, captions))
    for shard in range(10**6):
        some = [pair for _, pair in zip(range(SHARD), files)]
        if not some:
            return total
        with TarWriter(folder / f"{shard:05}.tar") as tar:
            for data, caption in some:
                total += len(data)
                tar.add(data, caption)
    raise AssertionError("more shards than names")


def seconds(work) -> tuple[float, float]:
    """Of the clock and of the processor, while `work` is done."""
    start = now()
    work()
    return tuple(b - a for a, b in zip(start, now()))


def rates(count: int, wall: float, cpu: float) -> dict[str, float]:
    """Things a second, of so many."""
    return {"count": count, "a core": round(count / cpu), "wall": round(count / wall)}


def quietly(*arguments) -> None:
    with redirect_stdout(io.StringIO()):
        build(*arguments)


def images(folder: Path, name: str, files, captions, side: int) -> dict:
    """Of one set of images: how fast its tars are built, and read in random order."""
    total = write_tars(folder / name, files, captions)
    out = folder / f"built-{name}"
    n = len(captions)
    built = seconds(lambda: quietly("images", [str(folder / name)], out))
    train = load_built_images(out, [(side, side)], load_tokenizer())["train"].images
    order = np.random.default_rng(0).permutation(len(train))

    def read():
        for i in range(0, len(order), TOGETHER):
            assert not any(isinstance(one, str) for one in train.read(order[i : i + TOGETHER]))

    return {"bytes an image": total // n, "built": rates(n, *built), "read": rates(len(train), *seconds(read))}


def text(folder: Path, documents: list[str], copies: int) -> dict:
    """How fast texts are tokenised and written, and windows read in random order."""
    (folder / "text").mkdir()
    lines = [json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(copies) for text in documents]
    (folder / "text" / "a.jsonl").write_text("".join(lines))
    out = folder / "built-text"
    built = seconds(lambda: quietly("text", [str(folder / "text")], out))
    ids, *_ = load_built_text(out, load_tokenizer())
    stream, starts = Stream("text", ids, 0), np.random.default_rng(0).integers(0, len(ids), 20_000).tolist()
    read = seconds(lambda: [stream.cut(s, WINDOW) for s in starts])
    return {"built": rates(len(ids), *built), "read": rates(len(starts) * WINDOW, *read)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000, help="synthetic JPEGs")
    parser.add_argument("--copies", type=int, default=4, help="of the shipped texts")
    parser.add_argument("--out", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    shipped, _ = load_images("emoji", 64)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawings = (encoded(Image.fromarray(image), "PNG") for image in shipped.images)
        photos = (encoded(photo(rng, 256), "JPEG") for _ in range(args.images))
        found = {
            "emoji": images(folder, "emoji", drawings, shipped.captions, 64),
            "photos": images(folder, "photos", photos, [[f"photo {i}"] for i in range(args.images)], 256),
            "text": text(folder, load_text("shakespeare")[0].train, args.copies),
        }
    for what, numbers in found.items():
        unit = "tokens" if what == "text" else "images"
        for step in ("built", "read"):
            rates = numbers[step]
            print(f"{what}, {step}: {rates['a core']:,} {unit}/s a core, {rates['wall']:,} by the clock")
    if args.out:
        about = {"date": date.today().isoformat(), "commit": commit(), **hardware(), "versions": versions()}
        args.out.write_text(
            json.dumps({**about, "images": args.images, "copies": args.copies, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
