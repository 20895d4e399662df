"""Contact sheets: captions with pictures side by side, as one PNG; several sheets one below the other."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

CELL, GAP, LINE = 128, 6, 15  # pixels: a picture, the space around it, a line of text
FONT, TITLE = 12, 18
MAX_LINES = 4  # of a caption


def contact_sheet(
    items: Sequence[tuple[str, Sequence[PIL.Image.Image | np.ndarray]]], columns: int = 4, title: str = ""
) -> PIL.Image.Image:
    """One picture of all items, each its pictures in a row over its caption."""
    font, large = ImageFont.load_default(FONT), ImageFont.load_default(TITLE)
    per_item = max(len(pictures) for _, pictures in items)
    captions = [wrap(caption, per_item * CELL, font)[:MAX_LINES] for caption, _ in items]
    width, height = per_item * CELL + 2 * GAP, CELL + LINE * max(map(len, captions)) + 3 * GAP
    rows, top = -(-len(items) // columns), TITLE + 3 * GAP if title else 0
    sheet = PIL.Image.new("RGB", (columns * width, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", large)
    for i, (lines, (_, pictures)) in enumerate(zip(captions, items)):
        x, y = i % columns * width + GAP, top + i // columns * height + GAP
        for j, picture in enumerate(pictures):
            picture = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            sheet.paste(picture.resize((CELL, CELL), PIL.Image.Resampling.BICUBIC), (x + j * CELL, y))
        for k, line in enumerate(lines):
            draw.text((x, y + CELL + k * LINE), line, "black", font)
    return sheet


def stack(sheets: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """The sheets one below the other, as wide as the widest."""
    whole = PIL.Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels: a text is cut at its line breaks, at spaces, and within longer words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and font.getlength(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
    return lines
