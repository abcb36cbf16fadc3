"""One labelled sheet of many pictures: a row of pictures for each label, each scaled into the same cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_WIDTH, HEADER = 12, 150, 34
INK, PAPER = (30, 30, 34), (250, 250, 248)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], cell: int = 200
) -> Image.Image:
    """Rows of (label, pictures) under column titles. Pictures keep their aspect and are fitted into `cell` pixels."""
    width = LABEL_WIDTH + len(columns) * (cell + MARGIN) + MARGIN
    heights = [max(_fitted(picture, cell).height for picture in pictures) for _, pictures in rows]
    sheet = Image.new("RGB", (width, HEADER + sum(heights) + MARGIN * (len(rows) + 1)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, title in enumerate(columns):
        draw.text((LABEL_WIDTH + index * (cell + MARGIN) + cell // 2, HEADER // 2), title, INK, font, anchor="mm")
    top = HEADER
    for (label, pictures), height in zip(rows, heights):
        draw.multiline_text((MARGIN, top + height // 2), label, INK, font, anchor="lm", spacing=6)
        for index, picture in enumerate(pictures):
            small = _fitted(picture, cell)
            left = LABEL_WIDTH + index * (cell + MARGIN) + (cell - small.width) // 2
            sheet.paste(small, (left, top + (height - small.height) // 2))
        top += height + MARGIN
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, optimised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    share = cell / max(picture.size)
    return picture.convert("RGB").resize(
        (round(picture.width * share), round(picture.height * share)), Image.Resampling.LANCZOS
    )
