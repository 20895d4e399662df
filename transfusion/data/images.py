"""Captioned images in memory: the shipped OpenMoji drawings, or a folder of the user's own.

    folder/metadata.jsonl    {"file_name": "a/cat.png", "text": "a cat"}    text: one caption or a list of them
    folder/a/cat.txt         beside a/cat.png: one caption a line

Every image takes one of a few sizes, (height, width) in pixels: the one whose aspect ratio is closest to its own.
Held-out images never enter training. A line of metadata.jsonl may say the "split" of its image, one of SPLITS; in a
file where some line does, a line without is train. Of all other images of a folder about 2 % are held out by a hash of
the file name. In the shipped file all is fixed.
"""

import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from transfusion.data.jsonl import read_jsonl
from transfusion.data.report import Report
from transfusion.data.split import default_split, hash_of, lowest
from transfusion.data.storage import names_below

OPENMOJI = Path(__file__).resolve().parent.parent / "assets" / "openmoji.npz"
SHIPPED = ("emoji", "emoji:base")
METADATA = "metadata.jsonl"
SPLITS = ("train", "held_out_image", "held_out_combination")  # the last: its parts were seen, not together
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
HELD_OUT_SHARE = 0.02
MIN_FOR_HELD_OUT = 20  # a folder smaller than this is trained on whole
Size = tuple[int, int]  # height, width in pixels
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """n images with their captions; `split` is train, held_out_image or held_out_combination."""

    name: str  # the path it was loaded by
    images: Sequence[np.ndarray]  # n of [h, w, 3] uint8: one array where all are of one size, a list where not
    captions: list[list[str]]  # of each image: the main one first; other languages carry a prefix, 'de: '
    split: np.ndarray  # [n] str
    ids: list[str]  # code points, or file names

    def __len__(self) -> int:
        return len(self.ids)


def load_images(path: str, sizes: int | Sequence[Size], captioned: bool = True) -> tuple[ImageSet, Report]:
    """(images of these sizes, what was skipped); a number is a square; ValueError where nothing usable is found."""
    sizes = [(sizes, sizes)] if isinstance(sizes, int) else sizes
    return load_openmoji(path, sizes) if path in SHIPPED else load_folder(str(path), sizes, captioned)


def load_openmoji(name: str, sizes: Sequence[Size]) -> tuple[ImageSet, Report]:
    """The shipped drawings; 'emoji:base' leaves out the skin-tone variants and with them the held-out combinations."""
    with np.load(OPENMOJI) as file:
        keep = np.ones(len(file["code"]), bool) if name == "emoji" else file["tone"] == ""
        images, captions, split, codes = (file[k][keep] for k in ("images", "captions", "split", "code"))
        prefixes = ["" if lang == "en" else f"{lang}: " for lang in file["languages"].tolist()]
    height, width = bucket_of(images.shape[2], images.shape[1], sizes)
    if (height, width) != images.shape[1:3]:
        cut = [crop(Image.fromarray(image), (height, width)) for image in images]
        exact = cut[0].width % width == 0 == cut[0].height % height
        # whole pixels averaged, where that is possible: no ringing beside the black outlines
        method = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
        images = np.stack([np.asarray(picture.resize((width, height), method)) for picture in cut])
    named = [[prefix + text for prefix, text in zip(prefixes, row)] for row in captions.tolist()]
    return ImageSet(name, images, named, split, codes.tolist()), Report(len(images))


def load_folder(path: str, sizes: Sequence[Size], captioned: bool = True) -> tuple[ImageSet, Report]:
    """A folder's images, sub-folders included, in the order of their names; `captioned`: only those with a caption."""
    files = list_files(path, f"{' or '.join(map(repr, SHIPPED))}, or a folder of captioned images")
    skipped: dict[str, list[str]] = defaultdict(list)
    captions, splits = read_captions(files, skipped)
    wanted = [name for name in files if name in captions or Path(name).suffix.lower() in SUFFIXES]
    n, one_size = len(wanted), len(sizes) == 1  # images of one size are decoded into their array, never held twice
    images = np.empty((n, *sizes[0], 3), np.uint8) if one_size else [np.empty(0)] * n
    ids: list[str] = []
    for name in wanted:
        image = None
        if captions.get(name) or not captioned:
            image = decode(files[name], sizes)
        if isinstance(image, np.ndarray):
            images[len(ids)] = image
            ids.append(name)
        else:
            skipped[image or "no caption"].append(name)
    report = Report(len(ids), dict(skipped))
    if not ids:
        found = f"{len(files)} files, {len(wanted)} images"
        if not captioned:
            raise ValueError(
                f"no image in {path} ({found}): give {' or '.join(map(repr, SHIPPED))}, or a folder of images "
                f"({' '.join(SUFFIXES)})\n{report.summary()}"
            )
        raise ValueError(
            f"no captioned image in {path} ({found}): give {' or '.join(map(repr, SHIPPED))}, or a folder of images "
            f'({" ".join(SUFFIXES)}) with captions in {METADATA} (lines of {{"file_name": ..., "text": ...}}) or in a '
            f".txt of the same name beside each image\n{report.summary()}"
        )
    free = [name for name in ids if name not in splits]
    splits |= {name: "held_out_image" if apart else "train" for name, apart in zip(free, held_out(free))}
    split = np.array([splits[name] for name in ids], f"<U{max(map(len, SPLITS))}")
    return ImageSet(path, images[: len(ids)], [captions.get(name, []) for name in ids], split, ids), report


def list_files(path: str, remedy: str) -> dict[str, Path]:
    """Name within the folder (NFC, '/') -> file, sorted; hidden ones are left out; ValueError if there is no folder."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"no folder {path}: give {remedy}")
    return dict(sorted((plain(name), root / name) for name in names_below(root)))


def plain(name: str) -> str:
    """A file name as printable text: macOS stores accents apart from their letters, old disks store broken UTF-8."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def beside(name: str, target: str) -> str:
    """The plain name within the folder of a file that is named from where `name` lies."""
    return plain(os.path.normpath(os.path.join(os.path.dirname(name), target)).replace(os.sep, "/"))


def read_captions(files: dict[str, Path], skipped: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(image name -> its captions, those of metadata.jsonl, then those of its .txt; image name -> its split, where a
    metadata.jsonl with splits names it); problems go into `skipped`."""
    captions: dict[str, list[str]] = defaultdict(list)
    splits: dict[str, str] = {}
    stems = defaultdict(list)  # a/cat -> [a/cat.png, ...]
    for name in files:
        if Path(name).suffix.lower() in SUFFIXES:
            stems[os.path.splitext(name)[0]].append(name)
    for name, file in files.items():
        if Path(name).name != METADATA:
            continue
        records = list(read_jsonl(file))
        default = default_split(record for _, record in records)
        for number, record in records:
            problem, target = "", ""
            if isinstance(record, str):
                problem = f"metadata {record}"
            else:
                target, text = record.get("file_name"), record.get("text")
                texts = [text] if isinstance(text, str) else text
                if not isinstance(target, str):
                    problem = 'metadata line without "file_name"'
                elif not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                    problem = 'metadata line without "text"'
                elif record.get("split", "train") not in SPLITS:
                    problem = f"metadata line whose split is not {', '.join(SPLITS)}"
                else:
                    target, split = beside(name, target), record.get("split", default)
                    if target not in files:
                        problem = "metadata line that names a missing file"
                    elif splits.get(target, split) != split:
                        problem = "metadata line whose split contradicts an earlier one"
            if problem:
                skipped[problem].append(f"{name}:{number}")
            else:
                captions[target] += [t.strip() for t in texts if t.strip()]
                if split:
                    splits[target] = split
    for name, file in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() != ".txt":
            continue
        if not stems[stem]:
            skipped["caption file without an image"].append(name)
            continue
        try:
            lines = [line.strip() for line in file.read_bytes().decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            skipped["caption file that is not UTF-8"].append(name)
            continue
        except OSError:
            skipped["caption file that cannot be read"].append(name)
            continue
        for image in stems[stem]:
            captions[image] += [line for line in lines if line]
    return captions, splits


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats in SUFFIXES that it has a decoder for: no PostScript under a false name."""
    known = Image.registered_extensions()
    return tuple(sorted({known[s] for s in SUFFIXES if s in known}))


def decode(file: Path | bytes, sizes: Sequence[Size]) -> np.ndarray | str:
    """uint8 [h, w, 3] of an image file's first frame, upright, on white; or why it cannot be had."""

    def pixels(picture: Image.Image) -> np.ndarray:
        height, width = upright_size(picture)
        size = bucket_of(width, height, sizes)  # before the draft, which rounds
        side = 2 * max(map(max, sizes))  # both sides, as it may yet be turned
        picture.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
        return to_pixels(picture, [size])

    return examine(file, pixels)


def measure(file: Path | bytes) -> Size | str:
    """(height, width) of an image file's first frame, upright, mostly from its header; or why it cannot be had."""
    return examine(file, upright_size)


def examine(file: Path | bytes, see: Callable[[Image.Image], T]) -> T | str:
    """What `see` makes of the picture in a file, or in the bytes of one; or why it cannot be had."""
    try:
        if not (len(file) if isinstance(file, bytes) else file.stat().st_size):
            return "empty file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and the like; but a bomb is an error already at the warning
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=formats()) as picture:
                return see(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception:  # decoders of broken files raise anything; one file must not end a run
        return "broken or unknown image"


def upright_size(picture: Image.Image) -> Size:
    """(height, width) of a picture once it is turned as its EXIF says."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return picture.size if turned else picture.size[::-1]


def to_pixels(picture: Image.Image, sizes: Sequence[Size]) -> np.ndarray:
    """uint8 [h, w, 3]: upright, eight bits a channel, on white, its centre at the closest of the sizes."""
    upright = eight_bit(ImageOps.exif_transpose(picture))
    return np.asarray(fit(upright, bucket_of(*upright.size, sizes)))


def bucket_of(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The one of the sizes whose aspect ratio is closest on a log scale; of two equally close ones the earlier."""

    def stretch(size: Size) -> float:  # exp of the distance; of whole numbers, so that ties are ties
        a, b = width * size[0], height * size[1]
        return max(a, b) / min(a, b)

    return min(sizes, key=stretch)


def parse_size(text: str) -> Size:
    """(height, width) of "64x96"."""
    sides = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not sides:
        raise ValueError(f'{text!r} is no image size: give height x width in pixels, as in "64x64" or "48x80"')
    return int(sides[1]), int(sides[2])


def eight_bit(picture: Image.Image) -> Image.Image:
    """RGB, or RGBA where anything is transparent; ValueError for float and 32-bit pixels, of unknown range."""
    if picture.mode == "F":
        raise ValueError("float pixels")
    if picture.mode.startswith("I"):  # 16 bits, in the old way within 32: Pillow's own conversion clips at 255
        values = np.asarray(picture).astype(np.int64)
        if not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError("32-bit pixels")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    transparent = picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def crop(picture: Image.Image, size: Size) -> Image.Image:
    """The largest part around the centre that has the aspect ratio of `size`."""
    height, width = size
    w, h = picture.size
    cut_w = min(w, max(1, round(h * width / height)))
    cut_h = min(h, max(1, round(w * height / width)))
    left, top = (w - cut_w) // 2, (h - cut_h) // 2
    return picture.crop((left, top, left + cut_w, top + cut_h))  # not resize's box, which mixes in what lies around it


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """RGB, of that height and width: the centre, resized (colours weighted by alpha), then laid on white."""
    small = crop(picture, size).resize(size[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
    if small.mode == "RGB":
        return small
    white = Image.new("RGBA", small.size, (255, 255, 255, 255))
    white.alpha_composite(small)
    return white.convert("RGB")


def held_out(names: Sequence[str]) -> np.ndarray:
    """bool [n]: about 2 % by a hash of the name; one at least, none of a few."""
    return lowest(np.array(list(map(hash_of, names)), np.uint64), HELD_OUT_SHARE, MIN_FOR_HELD_OUT)
