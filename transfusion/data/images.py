"""Captioned images in memory, all of one size: the shipped OpenMoji drawings, or a folder of the user's own.

    folder/metadata.jsonl    {"file_name": "a/cat.png", "text": "a cat"}    text: one caption or a list of them
    folder/a/cat.txt         beside a/cat.png: one caption a line

Held-out images never enter training: fixed in the shipped file, drawn by a hash of the file name in a folder.
"""

import hashlib
import os
import unicodedata
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from transfusion.data.jsonl import read_jsonl
from transfusion.data.report import Report

OPENMOJI = Path(__file__).resolve().parent.parent / "assets" / "openmoji.npz"
SHIPPED = ("emoji", "emoji:base")
METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
HELD_OUT_SHARE = 0.02
MIN_FOR_HELD_OUT = 20  # a folder smaller than this is trained on whole


@dataclass(frozen=True, eq=False)
class ImageSet:
    """n images with their captions; `split` is train, held_out_image or held_out_combination."""

    name: str  # the path it was loaded by
    images: np.ndarray  # [n, S, S, 3] uint8
    captions: list[list[str]]  # of each image: the main one first; other languages carry a prefix, 'de: '
    split: np.ndarray  # [n] str
    ids: list[str]  # code points, or file names

    def __len__(self) -> int:
        return len(self.ids)


def load_images(path: str, size: int) -> tuple[ImageSet, Report]:
    """(images at `size` pixels, what was skipped); ValueError where nothing usable is found."""
    return load_openmoji(path, size) if path in SHIPPED else load_folder(str(path), size)


def load_openmoji(name: str, size: int) -> tuple[ImageSet, Report]:
    """The shipped drawings; 'emoji:base' leaves out the skin-tone variants and with them the held-out combinations."""
    with np.load(OPENMOJI) as file:
        keep = np.ones(len(file["code"]), bool) if name == "emoji" else file["tone"] == ""
        images, captions, split, codes = (file[k][keep] for k in ("images", "captions", "split", "code"))
        prefixes = ["" if lang == "en" else f"{lang}: " for lang in file["languages"].tolist()]
    if size != images.shape[1]:
        exact = images.shape[1] % size == 0  # whole pixels averaged: no ringing beside the black outlines
        method = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
        images = np.stack([np.asarray(Image.fromarray(image).resize((size, size), method)) for image in images])
    named = [[prefix + text for prefix, text in zip(prefixes, row)] for row in captions.tolist()]
    return ImageSet(name, images, named, split, codes.tolist()), Report(len(images))


def load_folder(path: str, size: int) -> tuple[ImageSet, Report]:
    """A folder's captioned images, sub-folders included, in the order of their names."""
    files = list_files(path)
    skipped: dict[str, list[str]] = defaultdict(list)
    captions = read_captions(files, skipped)
    wanted = [name for name in files if name in captions or Path(name).suffix.lower() in SUFFIXES]
    images = np.empty((len(wanted), size, size, 3), np.uint8)
    ids: list[str] = []
    for name in wanted:
        image = None
        if captions.get(name):
            image = decode(files[name], size)
        if isinstance(image, np.ndarray):
            images[len(ids)] = image
            ids.append(name)
        else:
            skipped[image or "no caption"].append(name)
    report = Report(len(ids), dict(skipped))
    if not ids:
        found = f"{len(files)} files, {len(wanted)} images"
        raise ValueError(
            f"no captioned image in {path} ({found}): give {' or '.join(map(repr, SHIPPED))}, or a folder of images "
            f'({" ".join(SUFFIXES)}) with captions in {METADATA} (lines of {{"file_name": ..., "text": ...}}) or in a '
            f".txt of the same name beside each image\n{report.summary()}"
        )
    split = np.where(held_out(ids), "held_out_image", "train")
    return ImageSet(path, images[: len(ids)], [captions[name] for name in ids], split, ids), report


def list_files(path: str) -> dict[str, Path]:
    """Name within the folder (NFC, '/') -> file, sorted; hidden ones are left out; ValueError if there is no folder."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"no folder {path}: give {' or '.join(map(repr, SHIPPED))}, or a folder of captioned images")
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                found[plain(file.relative_to(root).as_posix())] = file
    return dict(sorted(found.items()))


def plain(name: str) -> str:
    """A file name as printable text: macOS stores accents apart from their letters, old disks store broken UTF-8."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def read_captions(files: dict[str, Path], skipped: dict[str, list[str]]) -> dict[str, list[str]]:
    """Image name -> its captions: those of metadata.jsonl, then those of its .txt; problems go into `skipped`."""
    captions: dict[str, list[str]] = defaultdict(list)
    stems = defaultdict(list)  # a/cat -> [a/cat.png, ...]
    for name in files:
        if Path(name).suffix.lower() in SUFFIXES:
            stems[os.path.splitext(name)[0]].append(name)
    for name, file in files.items():
        if Path(name).name != METADATA:
            continue
        for number, record in read_jsonl(file):
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
                else:
                    target = plain(os.path.normpath(os.path.join(os.path.dirname(name), target)).replace(os.sep, "/"))
                    if target not in files:
                        problem = "metadata line that names a missing file"
            if problem:
                skipped[problem].append(f"{name}:{number}")
            else:
                captions[target] += [t.strip() for t in texts if t.strip()]
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
    return captions


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats in SUFFIXES that it has a decoder for: no PostScript under a false name."""
    known = Image.registered_extensions()
    return tuple(sorted({known[s] for s in SUFFIXES if s in known}))


def decode(file: Path, size: int) -> np.ndarray | str:
    """uint8 [size, size, 3] of an image file's first frame, upright, on white; or why it cannot be had."""
    try:
        if not file.stat().st_size:
            return "empty file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and the like; but a bomb is an error already at the warning
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats()) as picture:
                picture.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
                return to_square(picture, size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception:  # decoders of broken files raise anything; one file must not end a run
        return "broken or unknown image"


def to_square(picture: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: upright, eight bits a channel, on white, its centre square at that size."""
    return np.asarray(square(eight_bit(ImageOps.exif_transpose(picture)), size))


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


def square(picture: Image.Image, size: int) -> Image.Image:
    """RGB, size x size: the centre square, resized (colours weighted by alpha), then laid on white."""
    w, h = picture.size
    side = min(w, h)
    left, top = (w - side) // 2, (h - side) // 2
    centre = picture.crop((left, top, left + side, top + side))  # not resize's box, which mixes in what lies around it
    small = centre.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if small.mode == "RGB":
        return small
    white = Image.new("RGBA", small.size, (255, 255, 255, 255))
    white.alpha_composite(small)
    return white.convert("RGB")


def held_out(names: list[str]) -> np.ndarray:
    """bool [n]: about 2 % by a hash of the name, so that new files move no old one; one at least, none of a few."""
    hashes = np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names], np.uint64)
    if len(names) < MIN_FOR_HELD_OUT:
        return np.zeros(len(names), bool)
    return hashes <= max(int(HELD_OUT_SHARE * 2**64), int(hashes.min()))
