"""The pixel test of colour: what is painted is read, through noise and blur, and shapes are told apart."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from transfusion.data.images import load_images
from transfusion.evals.colour import APART, BACKGROUND, PALETTE, colour_of, foreground, oklab, overlap

SIZE, FINE = 64, 4  # pixels; parts of a pixel
POINT = st.tuples(st.integers(4, 60), st.integers(4, 60))
NAMES = st.sampled_from(list(PALETTE))
WHITE = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)


def covered(draw) -> np.ndarray:
    """[h, w] share of each pixel that is covered by what draw(ImageDraw, scale) draws."""
    fine = Image.new("L", (SIZE * FINE, SIZE * FINE))
    draw(ImageDraw.Draw(fine), FINE)
    return np.asarray(fine, np.float64).reshape(SIZE, FINE, SIZE, FINE).mean((1, 3)) / 255


def paint(cover, colour, background=BACKGROUND) -> np.ndarray:
    c = cover[..., None]
    return np.rint(c * np.array(colour) + (1 - c) * np.array(background)).astype(np.uint8)


@st.composite
def shapes(draw):
    """Coverage of a few discs, polygons and lines, none thinner than three pixels, and enough of them."""
    discs = draw(st.lists(st.tuples(POINT, st.integers(3, 20)), max_size=3))
    polygons = draw(st.lists(st.lists(POINT, min_size=3, max_size=5), max_size=2))
    lines = draw(st.lists(st.tuples(POINT, POINT, st.integers(3, 8)), max_size=3))

    def picture(pen, k):
        for (x, y), r in discs:
            pen.ellipse([k * (x - r), k * (y - r), k * (x + r), k * (y + r)], fill=255)
        for points in polygons:
            pen.polygon([(k * x, k * y) for x, y in points], fill=255)
        for a, b, width in lines:
            pen.line([k * v for v in (*a, *b)], fill=255, width=k * width)

    cover = covered(picture)
    assume((cover > 0.99).mean() > 0.02)  # not all edge
    return cover


def degraded(image, noise, blur, seed) -> np.ndarray:
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)), np.float64)
    return np.rint(soft + np.random.default_rng(seed).normal(0, noise, soft.shape)).clip(0, 255).astype(np.uint8)


@given(shapes(), NAMES, st.floats(0, 8), st.floats(0, 0.8), st.integers(0, 99))
def test_the_colour_painted_is_the_colour_read_through_small_noise_and_blur(cover, name, noise, blur, seed):
    clean = paint(cover, PALETTE[name])
    assert colour_of(clean) == name
    assert colour_of(degraded(clean, noise, blur, seed)) == name


@given(shapes(), NAMES, NAMES)
def test_a_shape_is_the_same_in_every_colour(cover, one, other):
    a, b = paint(cover, PALETTE[one]), paint(cover, PALETTE[other])
    assert overlap(a, a) == 1 and overlap(a, b) == overlap(b, a) > 0.85
    sure = (cover == 0) | (cover == 1)  # the edges are a matter of taste
    assert (foreground(a)[sure] == (cover == 1)[sure]).all()


@pytest.mark.parametrize("name", PALETTE)
def test_a_soft_edge_is_cut_where_it_is_half_covered_in_every_colour(name):
    square = paint(np.pad(np.ones((20, 20)), 22), PALETTE[name])
    assert foreground(square).sum() == 400
    assert foreground(degraded(square, 0, 2, 0)).sum() == pytest.approx(400, rel=0.12)


@given(NAMES, NAMES, st.integers(0, 99))
def test_specks_of_another_colour_do_not_change_what_is_read(name, other, seed):
    image = paint(np.pad(np.ones((20, 20)), 22), PALETTE[name])
    image[22:42, 22:42][np.random.default_rng(seed).random((20, 20)) < 0.15] = PALETTE[other]
    assert colour_of(image) == name


@pytest.mark.parametrize("name", PALETTE)
def test_every_colour_is_read_in_every_shipped_drawing_s_outline(name):
    drawings, _ = load_images("emoji:base", SIZE)
    for image in drawings.images[::40]:
        cover = (image < 250).any(-1).astype(float)  # the whole of a drawing
        assert colour_of(paint(cover, PALETTE[name])) == name


@given(st.floats(0, 8), st.integers(0, 99), st.integers(0, 20))
def test_an_empty_canvas_has_no_colour_and_no_shape(noise, seed, n_specks):
    canvas = degraded(WHITE, noise, 0, seed)
    canvas.reshape(-1, 3)[:n_specks] = PALETTE["red"]  # fewer than LEAST
    assert colour_of(canvas) == "none" and not foreground(canvas).any()
    assert overlap(canvas, WHITE) == 1


def test_the_background_is_an_argument_and_any_palette_is_one():
    square = np.pad(np.ones((20, 20)), 22)
    white_on_red = paint(square, (255, 255, 255), (255, 0, 0))
    assert colour_of(white_on_red, {"white": (255, 255, 255), "red": (255, 0, 0)}, (255, 0, 0)) == "white"
    assert foreground(white_on_red, (255, 0, 0)).sum() == 400
    assert colour_of(np.full_like(WHITE, 0), PALETTE, (0, 0, 0)) == "none"


@pytest.mark.parametrize("shift", [0, 1, 5, 10, 20])
def test_overlap_is_intersection_over_union(shift):
    a, b = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    a[10:30, 10:30], b[10:30, 10 + shift : 30 + shift] = 1, 1
    both = 20 * (20 - shift)
    assert overlap(paint(a, PALETTE["blue"]), paint(b, PALETTE["yellow"])) == both / (800 - both)


def test_the_palette_is_well_apart_and_apart_from_the_background():
    points = oklab(np.array([*PALETTE.values(), BACKGROUND]))
    away = np.linalg.norm(points[:, None] - points, axis=-1)
    assert away[~np.eye(len(points), dtype=bool)].min() > 1.7 * APART


def test_oklab_is_the_published_one():
    published = {  # CSS Color Module Level 4 and the space's author
        (255, 255, 255): (1, 0, 0),
        (255, 0, 0): (0.62796, 0.22486, 0.12585),
        (0, 255, 0): (0.86644, -0.23389, 0.17950),
        (0, 0, 255): (0.45201, -0.03246, -0.31153),
        (0, 0, 0): (0, 0, 0),
        (10, 10, 10): ((10 / 255 / 12.92) ** (1 / 3), 0, 0),  # sRGB is linear near black
    }
    for rgb, lab in published.items():
        assert oklab(np.array(rgb)) == pytest.approx(lab, abs=2e-5)
