"""Contact sheets: captions with pictures side by side, as one PNG."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

CELL, GAP, LINE = 128, 6, 15  # pixels: a picture, the space around it, a line of text
FONT = 12


def contact_sheet(
    items: Sequence[tuple[str, Sequence[PIL.Image.Image | np.ndarray]]], columns: int = 4, title: str = ""
) -> PIL.Image.Image:
    """One picture of all items, each its pictures in a row over its caption."""
    font = ImageFont.load_default(FONT)
    per_item = max(len(pictures) for _, pictures in items)
    width, height = per_item * CELL + 2 * GAP, CELL + 2 * LINE + 2 * GAP
    rows, top = -(-len(items) // columns), 2 * LINE if title else 0
    sheet = PIL.Image.new("RGB", (columns * width, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font)
    for i, (caption, pictures) in enumerate(items):
        x, y = i % columns * width + GAP, top + i // columns * height + GAP
        for j, picture in enumerate(pictures):
            picture = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            sheet.paste(picture.resize((CELL, CELL), PIL.Image.Resampling.BICUBIC), (x + j * CELL, y))
        for k, line in enumerate(wrap(caption, per_item * CELL, font)[:2]):
            draw.text((x, y + CELL + k * LINE), line, "black", font)
    return sheet


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of a text that are at most `width` pixels wide, cut at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
