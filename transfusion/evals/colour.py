"""Of what colour is the shape on a plain background, and is it the same shape? Decided by the pixels, without a model.

    distance     of each pixel to the background, in OKLab
    foreground   where it is above half of what most of the shape has, so that the shape is the same in every colour
    colour       the median of the foreground, and of the palette the nearest to it; "none" where too little is shown
    overlap      |A and B| / |A or B| of two foregrounds

OKLab (Bjorn Ottosson, 2020) is the colour space in which equal distances look about equally large.
"""

from collections.abc import Mapping

import numpy as np

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {  # what the icons of scripts/edit_data.py are drawn in: far apart, and far from BACKGROUND
    "red": (222, 30, 38),
    "orange": (248, 125, 0),
    "yellow": (250, 222, 40),
    "green": (30, 150, 60),
    "turquoise": (60, 205, 205),
    "blue": (30, 80, 220),
    "pink": (255, 120, 190),
    "black": (25, 25, 25),
}
BACKGROUND: RGB = (255, 255, 255)
APART = 0.1  # what nobody would take for the background; from black to white it is 1
TYPICAL = 75  # percentile of the distances: below it lie the edges
LEAST = 0.005  # share of the image that must be foreground


def oklab(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] lightness, green-red and blue-yellow, of sRGB [..., 3] in 0 .. 255."""
    s = np.asarray(rgb, np.float64) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def distance(image: np.ndarray, background: RGB) -> np.ndarray:
    """[h, w] of each pixel to the background, in OKLab."""
    return np.linalg.norm(oklab(image) - oklab(np.array(background)), axis=-1)


def foreground(image: np.ndarray, background: RGB = BACKGROUND) -> np.ndarray:
    """bool [h, w]: where uint8 [h, w, 3] shows a shape of one colour; nowhere, if too little stands out."""
    away = distance(image, background)
    shown = away > APART
    if shown.mean() < LEAST:
        return np.zeros_like(shown)
    return away > max(APART, np.percentile(away[shown], TYPICAL) / 2)  # of an edge, the pixels more than half covered


def colour_of(image: np.ndarray, palette: Mapping[str, RGB] = PALETTE, background: RGB = BACKGROUND) -> str:
    """The palette's name for the colour of the shape in uint8 [h, w, 3], or "none" where there is too little of one."""
    shape = foreground(image, background)
    if not shape.any():
        return "none"
    colour = np.median(oklab(image[shape]), axis=0)
    away = np.linalg.norm(oklab(np.array(list(palette.values()))) - colour, axis=1)
    return list(palette)[away.argmin()]


def overlap(a: np.ndarray, b: np.ndarray, background: RGB = BACKGROUND) -> float:
    """Intersection over union of the foregrounds of two images of one size; 1 where both are empty."""
    in_a, in_b = foreground(a, background), foreground(b, background)
    union = (in_a | in_b).sum()
    return float((in_a & in_b).sum() / union) if union else 1.0
