"""Contact sheets: pictures in rows, enlarged without blur, with labels that one can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _EMPTY = (20, 20, 20), (255, 255, 255), (235, 235, 235)
_GAP = 8


@dataclass(frozen=True)
class Cell:
    """One place of a sheet: a picture or nothing, and what it says below."""

    picture: Image.Image | None = None
    label: str = ""


def enlarge(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its longer side as near to ``size`` as it gets: whole-number
    nearest-neighbour up, Lanczos down."""
    longer = max(picture.size)
    if longer <= size:
        factor = max(1, size // longer)
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    small = picture.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return small


def contact_sheet(
    rows: Sequence[Sequence[Cell]], *, title: str = "", size: int = 192, font_size: int = 15
) -> Image.Image:
    """Lay out rows of cells, left-aligned, one cell size for all.

    Args:
        rows: may differ in length.
        title: a line above everything.
        size: of a cell's picture, in pixels.

    Raises:
        ValueError: no cell at all.
    """
    if not any(rows):
        raise ValueError("contact_sheet: nothing to show")
    font = ImageFont.load_default(font_size)
    line = font_size + 4
    texts = [[_wrap(cell.label, font, size) for cell in row] for row in rows]
    heights = [size + max((len(t) for t in row), default=0) * line + _GAP for row in texts]
    columns = max(len(row) for row in rows)
    top = _GAP + (line + _GAP if title else 0)
    width = max(_GAP + columns * (size + _GAP), _GAP * 2 + int(font.getlength(title)))
    sheet = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, font)
    y = top
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for i, (cell, text) in enumerate(zip(row, lines, strict=True)):
            x = _GAP + i * (size + _GAP)
            if cell.picture is not None:
                shown = enlarge(cell.picture.convert("RGB"), size)
                draw.rectangle((x, y, x + size - 1, y + size - 1), _EMPTY)
                sheet.paste(shown, (x + (size - shown.width) // 2, y + (size - shown.height) // 2))
            draw.multiline_text((x, y + size + 1), "\n".join(text), _INK, font)
        y += height
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most three lines of at most ``width`` pixels; what does not fit ends in dots."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < 3:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " ..."
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(line) > 4 and font.getlength(line) > width:
        line = line[:-4].rstrip() + "..."
    return line
