import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transfusion.data.images import ImageSet, bucket_of, crop, fit, held_out, load_images, parse_size

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def put(folder, name, color=RED, size=(8, 8), mode="RGB", caption="a colour", **options):
    """Writes a plain image, and its caption unless that is None."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def load(folder, size=8) -> tuple[ImageSet, dict[str, list[str]]]:
    images, report = load_images(str(folder), size)
    assert report.kept == len(images) == len(images.images) == len(images.captions) == len(images.split)
    return images, report.skipped


def png(width, height, depth, color_type, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_captions_come_from_text_files_and_from_metadata_in_that_folder(tmp_path):
    put(tmp_path, "a.png", RED, caption="first\n\n  second  \n")
    put(tmp_path, "deep/er/b.jpg", GREEN, caption=None)
    put(tmp_path, "deep/er/c.webp", BLUE, caption=None, lossless=True)
    lines = [{"file_name": "er/b.jpg", "text": "green"}, {"file_name": "er/c.webp", "text": ["blue", "de: blau"]}]
    (tmp_path / "deep" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    images, skipped = load(tmp_path)
    assert images.ids == ["a.png", "deep/er/b.jpg", "deep/er/c.webp"]
    assert images.captions == [["first", "second"], ["green"], ["blue", "de: blau"]]
    assert skipped == {} and images.name == str(tmp_path)
    assert (images.images[0] == RED).all() and (images.images[2] == BLUE).all()


def test_bad_files_are_named_under_their_reason_and_the_good_one_is_kept(tmp_path):
    put(tmp_path, "good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.tif"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    noise.save(tmp_path / "disguised.jpg", format="PCX")  # Pillow could, but only the formats named are opened
    (tmp_path / "zero.png").touch()
    os.symlink(tmp_path / "gone.png", tmp_path / "dangling.png")
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text("a caption")
    put(tmp_path, "silent.png", caption=None)
    put(tmp_path, "blank.png", caption=" \n\t\n")
    (tmp_path / "orphan.txt").write_text("of nothing")
    put(tmp_path, "latin.png", caption=None)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    images, skipped = load(tmp_path)
    assert images.ids == ["good.png"]
    broken = {
        "cut.gif",
        "cut.jpg",
        "cut.png",
        "cut.tif",
        "cut.webp",
        "dangling.png",
        "disguised.jpg",
        "script.jpg",
        "text.png",
    }
    assert set(skipped.pop("broken or unknown image")) == broken
    assert skipped == {
        "empty file": ["zero.png"],
        "no caption": ["blank.png", "latin.png", "silent.png"],
        "caption file without an image": ["orphan.txt"],
        "caption file that is not UTF-8": ["latin.txt"],
    }


def test_metadata_says_what_is_held_out_and_then_nothing_is_drawn(tmp_path):
    names = [f"{i:02}.png" for i in range(30)]
    lines = [{"file_name": name, "text": name} for name in names]
    for name in names:
        put(tmp_path, name, caption=None)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (load(tmp_path)[0].split == "held_out_image").sum() == 1  # drawn by a hash
    lines[3]["split"], lines[4]["split"], lines[5]["split"] = "held_out_image", "train", "held_out_combination"
    lines.append({"file_name": "03.png", "text": "another caption", "split": "train"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images, skipped = load(tmp_path)
    apart = {i: split for i, split in zip(images.ids, images.split) if split != "train"}
    assert apart == {"03.png": "held_out_image", "05.png": "held_out_combination"}
    assert skipped == {"metadata line whose split contradicts an earlier one": ["metadata.jsonl:31"]}
    for i in range(30):  # a file without splits beside it: of its images some are drawn
        put(tmp_path, f"free/{i:02}.png", caption="free")
    split = dict(zip((images := load(tmp_path)[0]).ids, images.split))
    assert sum(split[f"free/{i:02}.png"] == "held_out_image" for i in range(30)) == 1
    assert sum(kind != "train" for kind in split.values()) == 3


def test_bad_metadata_lines_are_named_by_number(tmp_path):
    put(tmp_path, "a.png", caption=None)
    put(tmp_path, "b.png", caption=None)
    lines = [
        b'{"file_name": "a.png", "text": "kept"}',
        b'{"file_name": "a.png", "text": ',
        b'{"file_name": "gone.png", "text": "x"}',
        b'{"file_name": "../a.png", "text": "x"}',
        b'{"file_name": "b.png"}',
        b'{"file_name": "b.png", "text": 3}',
        b'{"text": "x"}',
        b"[1, 2]",
        b'{"file_name": "b.png", "text": "\xff"}',
        b'{"file_name": "b.png", "text": "\\ud800"}',
        b"[" * 100_000,
        b'{"file_name": "b.png", "text": []}',
        b'{"file_name": "b.png", "text": "x", "split": "test"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    images, skipped = load(tmp_path)
    assert images.ids == ["a.png"] and images.captions == [["kept"]]
    assert skipped == {
        "metadata line that is not JSON": ["metadata.jsonl:2", "metadata.jsonl:11"],
        "metadata line that names a missing file": ["metadata.jsonl:3", "metadata.jsonl:4"],
        'metadata line without "text"': ["metadata.jsonl:5", "metadata.jsonl:6"],
        'metadata line without "file_name"': ["metadata.jsonl:7"],
        "metadata line that is not a JSON object": ["metadata.jsonl:8"],
        "metadata line that is not UTF-8 text": ["metadata.jsonl:9", "metadata.jsonl:10"],
        "metadata line whose split is not train, held_out_image, held_out_combination": ["metadata.jsonl:13"],
        "no caption": ["b.png"],
    }


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    put(tmp_path, "good.png")
    for name, side in (("warned.png", 10_000), ("forbidden.png", 60_000)):
        (tmp_path / name).write_bytes(png(side, side, 1, 0, b""))
        (tmp_path / name).with_suffix(".txt").write_text("huge")
    images, skipped = load(tmp_path)
    assert images.ids == ["good.png"]
    assert skipped == {f"more than {Image.MAX_IMAGE_PIXELS:,} pixels": ["forbidden.png", "warned.png"]}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = RED, GREEN, BLUE  # black in the last corner
    undo = {  # how the camera stored it: the inverse of what the tag asks the viewer to do
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: np.rot90(a, 2),
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("four corners")
    images, _ = load(tmp_path, size=16)
    assert (images.images[0] == upright).all()


def test_transparency_becomes_white_in_every_mode(tmp_path):
    put(tmp_path, "rgba.png", (0, 0, 0, 0), mode="RGBA")
    put(tmp_path, "la.png", (0, 0), mode="LA")
    put(tmp_path, "half.png", (0, 0, 0, 128), mode="RGBA")
    put(tmp_path, "rgb_key.png", RED, transparency=RED)
    put(tmp_path, "gray_key.png", 7, mode="L", transparency=7)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLACK, *RED])
    palette.paste(0, (0, 0, 8, 4))
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    (tmp_path / "palette.txt").write_text("red below")
    images, skipped = load(tmp_path)
    pixels = dict(zip(images.ids, images.images))
    assert skipped == {}
    for name in ("rgba.png", "la.png", "rgb_key.png", "gray_key.png"):
        assert (pixels[name] == 255).all(), name
    assert (pixels["half.png"] == 127).all()
    assert (pixels["palette.png"][:3] == WHITE).all() and (pixels["palette.png"][5:] == RED).all()


def test_hidden_colours_of_transparent_pixels_do_not_bleed_when_resized(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[...] = (255, 0, 0, 0)  # red, but invisible
    pixels[:, 32:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("blue on the right")
    images, _ = load(tmp_path, size=7)
    edge = images.images[0].astype(int)
    assert (edge[..., 0] <= edge[..., 2]).all()  # white to blue, never redder than white
    assert (edge[..., 0] == edge[..., 1]).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024 + 512).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "gray.png")
    Image.fromarray(ramp).save(tmp_path / "gray.tif")
    color = np.stack([ramp, ramp[::-1], ramp.T], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in color)
    (tmp_path / "color.png").write_bytes(png(8, 8, 16, 2, rows))
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    for stem in ("gray", "color", "float"):
        (tmp_path / f"{stem}.txt").write_text("a ramp")
    images, skipped = load(tmp_path)
    pixels = dict(zip(images.ids, images.images))
    assert skipped == {"broken or unknown image": ["float.tif"]}
    assert (pixels["gray.png"] == (ramp >> 8)[..., None]).all() and (pixels["gray.tif"] == pixels["gray.png"]).all()
    assert (pixels["color.png"] == color >> 8).all()


def test_cmyk_palette_gray_and_one_bit_images_are_converted(tmp_path):
    put(tmp_path, "cmyk.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    put(tmp_path, "gray.png", 100, mode="L")
    put(tmp_path, "bit.png", 1, mode="1")
    Image.new("RGB", (8, 8), GREEN).quantize(4).save(tmp_path / "palette.png")
    (tmp_path / "palette.txt").write_text("green")
    images, skipped = load(tmp_path)
    pixels = dict(zip(images.ids, images.images.astype(int)))
    assert skipped == {}
    assert np.abs(pixels["cmyk.jpg"] - RED).max() < 8
    assert (
        (pixels["gray.png"] == 100).all()
        and (pixels["bit.png"] == 255).all()
        and (pixels["palette.png"] == GREEN).all()
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options)
    (tmp_path / "a.txt").write_text("red first")
    images, _ = load(tmp_path)
    assert (images.images[0] == RED).all()


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
def test_the_centre_square_is_cut_out(tmp_path, shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[...] = BLUE
    top, left = (shape[0] - 24) // 2, (shape[1] - 24) // 2
    pixels[top : top + 24, left : left + 24] = GREEN
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a green centre")
    images, _ = load(tmp_path, size=8)
    assert (images.images[0] == GREEN).all()


def test_names_in_any_script_are_found_however_their_accents_are_stored(tmp_path):
    put(tmp_path, "\u732b \U0001f408.png", caption="\u732b")
    put(tmp_path, "cafe\u0301.png", caption=None)  # decomposed on disk, composed in the metadata
    line = json.dumps({"file_name": "caf\u00e9.png", "text": "\u00e9t\u00e9"})
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "png")
    images, skipped = load(tmp_path)
    assert dict(zip(images.ids, images.captions)) == {
        "\u732b \U0001f408.png": ["\u732b"],
        "caf\u00e9.png": ["\u00e9t\u00e9"],
    }
    assert skipped == {"no caption": ["bad\ufffd.png"]}


def test_hidden_files_and_folders_are_left_alone(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "._a.png")
    put(tmp_path, ".cache/b.png")
    images, skipped = load(tmp_path)
    assert images.ids == ["a.png"] and skipped == {}


def test_a_folder_of_nothing_usable_says_what_was_found_and_what_is_expected(tmp_path):
    put(tmp_path, "a.png", caption=None)
    with pytest.raises(ValueError, match=r"1 files, 1 images.*metadata\.jsonl") as error:
        load_images(str(tmp_path), 8)
    assert "1 x no caption: a.png" in str(error.value)
    for path in (tmp_path / "nowhere", tmp_path / "a.png", "emoji:all"):
        with pytest.raises(ValueError, match=r"'emoji' or"):
            load_images(str(path), 8)


def test_held_out_images_are_a_stable_share_by_name():
    names = [f"photo {i}.jpg" for i in range(5000)]
    out = held_out(names)
    assert 60 < out.sum() < 140
    assert (held_out(names[::-1])[::-1] == out).all()
    assert (held_out([*names, "new.jpg"])[:5000] == out).all()
    assert all(held_out(names[i : i + 20]).any() for i in range(0, 400, 20))
    assert not held_out(names[:19]).any()


def test_a_folder_of_twenty_holds_an_image_out(tmp_path):
    for i in range(20):
        put(tmp_path, f"{i}.png")
    images, _ = load(tmp_path)
    assert 1 <= (images.split == "held_out_image").sum() <= 3
    assert set(images.split) == {"train", "held_out_image"}


def test_a_report_counts_everything_and_names_the_first_few(tmp_path):
    put(tmp_path, "good.png")
    for i in range(5):
        put(tmp_path, f"{i}.png", caption=None)
    _, report = load_images(str(tmp_path), 8)
    assert report.summary() == "kept 1, skipped 5\n  5 x no caption: 0.png, 1.png, 2.png, and 2 more"
    later = report.skip("too long", "good.png")
    assert later.kept == 0 and later.skipped["too long"] == ["good.png"] and "too long" not in report.skipped


@pytest.mark.parametrize(("size", "cut"), [((8, 16), (24, 48)), ((16, 8), (48, 24)), ((8, 8), (48, 48))])
def test_the_centre_is_cut_out_in_the_shape_of_the_target(tmp_path, size, cut):
    pixels = np.full((48, 48, 3), BLUE, np.uint8)
    top, left = (48 - cut[0]) // 2, (48 - cut[1]) // 2
    pixels[top : top + cut[0], left : left + cut[1]] = GREEN
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a green centre")
    images, _ = load_images(str(tmp_path), [size])
    assert images.images.shape == (1, *size, 3) and (images.images[0] == GREEN).all()


SIDE = st.integers(1, 300)
SIZES = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=6)


@given(SIDE, SIDE, st.tuples(SIDE, SIDE))
def test_a_crop_is_as_large_as_its_shape_allows_and_in_the_middle(width, height, size):
    x, y = np.meshgrid(np.arange(width), np.arange(height))  # each pixel says where it was
    picture = Image.fromarray(np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], -1).astype(np.uint8))
    cut = np.asarray(crop(picture, size)).astype(int)
    h, w = cut.shape[:2]
    assert h == height or w == width
    assert abs(w - h * size[1] / size[0]) <= 0.5 or abs(h - w * size[0] / size[1]) <= 0.5 or 1 in (h, w)
    red, green, blue = cut[0, 0]
    assert (red + 256 * (blue % 2), green + 256 * (blue // 2)) == ((width - w) // 2, (height - h) // 2)
    assert fit(picture, size).size == size[::-1]


@given(SIDE, SIDE, SIZES)
def test_a_bucket_is_the_closest_in_log_aspect_ratio(width, height, sizes):
    found = bucket_of(width, height, sizes)
    distance = [abs(np.log(width / height) - np.log(w / h)) for h, w in sizes]
    assert distance[sizes.index(found)] <= min(distance) + 1e-12
    turned = bucket_of(height, width, [size[::-1] for size in sizes])
    assert turned == found[::-1]


@given(SIDE, SIDE, SIDE)
def test_of_two_buckets_equally_close_the_earlier_is_taken(side, a, b):
    assert bucket_of(side, side, [(a, b), (b, a)]) == (a, b)
    assert bucket_of(side, side, [(2 * a, 2 * a), (a, a)]) == (2 * a, 2 * a)


@given(SIDE, SIDE)
def test_a_size_is_written_height_x_width(height, width):
    assert parse_size(f"{height}x{width}") == (height, width)


NO_SIZES = ("", "64", "64x", "x64", "0x64", "64x064", "-1x64", "64X64", "64x64x3", "6.5x8")


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match='height x width in pixels, as in "64x64"'):
        parse_size(text)


def test_of_several_sizes_each_image_takes_the_one_closest_to_its_shape_turned_upright(tmp_path):
    put(tmp_path, "square.png", RED, size=(20, 18))
    put(tmp_path, "wide.png", GREEN, size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    put(tmp_path, "turned.png", BLUE, size=(40, 20), exif=exif)
    put(tmp_path, "silent.png", caption=None)
    images, skipped = load(tmp_path, [(8, 8), (6, 12), (12, 6)])
    shapes = {name: image.shape for name, image in zip(images.ids, images.images)}
    assert shapes == {"square.png": (8, 8, 3), "wide.png": (6, 12, 3), "turned.png": (12, 6, 3)}
    assert all((image == image[0, 0]).all() for image in images.images) and skipped == {"no caption": ["silent.png"]}


def test_the_shipped_drawings_take_their_closest_bucket_too():
    square, _ = load_images("emoji:base", 32)
    several, _ = load_images("emoji:base", [(16, 48), (32, 32), (48, 16)])
    assert (several.images == square.images).all()
    wide, _ = load_images("emoji:base", [(16, 32)])
    assert (wide.images == square.images[:, 8:24]).all()
