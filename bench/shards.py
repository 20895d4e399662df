"""Data on disk: how fast it is built, read in any order, and fed to a training, by one core; what its workers hold.

    python bench/shards.py --images 20000 --copies 1 --out FILE.json

emoji     the shipped drawings as PNGs in tars, read at 64 pixels
photos    so many synthetic JPEGs of 256 pixels in tars, of about the bytes of photos, read at 256 pixels
remote    the first of these tars over HTTP, from a server on this machine
text      the shipped texts as JSON lines, again and again, read in windows of 2048 tokens

built     indexed, checked, captions tokenised          read      decoded, some images a call
fed       read, packed with text, collated, by worker processes (feeding.py); beside it what a GPU wants

A figure is things a second of the processor, which is what one core does; `wall` beside it is by the clock. Files were
written just before, so they are in the system's cache: this measures decoding, not the disk.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import numpy as np
from clock import now
from feeding import epoch, feed, growth, packer_of_images
from machine import ROOT, commit, hardware, versions
from PIL import Image
from serving import serve

from transfusion.cluster import Cluster
from transfusion.config import load_config
from transfusion.data.build import build
from transfusion.data.built import load_built_images, load_built_text
from transfusion.data.images import load_images
from transfusion.data.storage import filesystem
from transfusion.data.tars import TarWriter
from transfusion.data.text import load_text
from transfusion.data.windows import Stream
from transfusion.plan import scale
from transfusion.run import RunConfig
from transfusion.tokenizer import load_tokenizer

SHARD = 1000  # images
TOGETHER = 32  # images read by one call, as a batch does
WINDOW = 2048  # tokens
REMOTE = 2  # tars that are read over HTTP
GPU, MFU = "h100", 0.4
WANTED = "configs/paper-0.16b-linear.toml"  # the one that wants most images a second


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


def images(folder: Path, name: str, files, captions, side: int, workers: int, least: int) -> dict:
    """Of one set of images: how fast its tars are built, read in random order, and fed to a training."""
    total = write_tars(folder / name, files, captions)
    found = {"bytes an image": total // len(captions), **indexed(folder / f"built-{name}", str(folder / name), side)}
    packer = packer_of_images(folder / f"built-{name}", side)
    fed: dict = {}
    took = seconds(lambda: fed.update(feed(packer, max(least, epoch(packer)), workers)))
    found["fed"] = rates(fed["images"], *took) | {"positions": rates(fed["positions"], *took), "MiB": fed["MiB"]}
    return found


def indexed(out: Path, source: str, side: int) -> dict:
    """How fast a source is built, and read in random order."""
    built = seconds(lambda: quietly("images", [source], out))
    found = load_built_images(out, [(side, side)], load_tokenizer())
    train = found["train"].images
    order = np.random.default_rng(0).permutation(len(train))

    def read():
        for i in range(0, len(order), TOGETHER):
            assert not any(isinstance(one, str) for one in train.read(order[i : i + TOGETHER]))

    count = sum(len(of_split.images) for of_split in found.values())
    return {"built": rates(count, *built), "read": rates(len(train), *seconds(read))}


def remote(folder: Path, name: str, side: int) -> dict:
    """The same of the first tars over HTTP."""
    last = min(REMOTE, len([*(folder / name).glob("*.tar")])) - 1
    with serve(folder / name) as url:
        return indexed(folder / f"built-remote-{name}", f"{url}/{{00000..{last:05}}}.tar", side)


def wanted() -> dict[str, float]:
    """Images and positions a second of a GPU that trains WANTED."""
    s = scale(load_config(RunConfig, ROOT / WANTED), Cluster(), GPU, MFU)
    return {"images": round(s.images), "positions": round(s.tokens)}


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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000, help="synthetic JPEGs")
    parser.add_argument("--copies", type=int, default=4, help="of the shipped texts")
    parser.add_argument("--workers", type=int, default=2, help="that feed a training")
    parser.add_argument("--steps", type=int, default=200, help="that they feed at least; more where an epoch has more")
    parser.add_argument("--out", type=Path, help="write the numbers here too")
    args = parser.parse_args(argv)
    filesystem("http://127.0.0.1")  # what `remote` wants is missed now, not in minutes
    shipped, _ = load_images("emoji", 64)
    rng, how = np.random.default_rng(0), (args.workers, args.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawings = (encoded(Image.fromarray(image), "PNG") for image in shipped.images)
        photos = (encoded(photo(rng, 256), "JPEG") for _ in range(args.images))
        found = {
            "emoji": images(folder, "emoji", drawings, shipped.captions, 64, *how),
            "photos": images(folder, "photos", photos, [[f"photo {i}"] for i in range(args.images)], 256, *how),
            "remote": remote(folder, "photos", 256),
            "text": text(folder, load_text("shakespeare")[0].train, args.copies),
        }
    found["wanted"] = wanted()
    for line in told(found):
        print(line)
    if args.out:
        about = {"date": date.today().isoformat(), "commit": commit(), **hardware(), "versions": versions()}
        about |= {name: getattr(args, name) for name in ("images", "copies", "workers", "steps")}
        args.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")


def told(found: dict) -> Iterator[str]:
    """What was found, in words."""
    want = found["wanted"]
    yield f"an {GPU} at {MFU:.0%} MFU with {WANTED}: {want['images']:,} images/s, {want['positions']:,} positions/s"
    for what in ("emoji", "photos", "remote", "text"):
        unit, fed = "tokens" if what == "text" else "images", found[what].get("fed")
        for step in ("built", "read", "fed"):
            if rate := found[what].get(step):
                yield f"{what}, {step}: {rate['a core']:,} {unit}/s a core, {rate['wall']:,} by the clock"
        if what == "photos":  # images of the size that is wanted
            cores = max(want["images"] / fed["a core"], want["positions"] / fed["positions"]["a core"])
            yield f"  {fed['positions']['a core']:,} positions/s a core; what is wanted takes {cores:.2f} cores"
        for process, held in fed["MiB"].items() if fed else ():
            yield f"  {process}, MiB: {' '.join(f'{x:.0f}' for x in held)}; second half {growth(held):+.1f}"


if __name__ == "__main__":
    main()
