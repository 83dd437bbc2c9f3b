"""A contact sheet of images with texts, of `data preview` and `explain`: a PNG drawn by Pillow, or a page (HTML)."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lavis_lite.common.checkpoint import atomic_write, write_text
from lavis_lite.common.page.render import data_address, render
from lavis_lite.common.tiles import FONT_SIZE, LINE, MAX_FRAMES, Tile, draw

COLUMNS = 4
MARGIN = 12
PIXELS = 448
"""Width and height that images in the page have at most; they are shown half as large."""


def write_html(tiles: Sequence[Tile], path: Path, *, title: str, lead: str = "") -> None:
    """Write the page, with `lead` below its title; images are JPEGs in it."""
    shown = [
        {
            "title": tile.title,
            "pictures": [data_address(image, PIXELS) for image in tile.images[:MAX_FRAMES]],
            "texts": [text.partition(": ")[::2] for text in tile.texts],
            "alt": ", ".join([tile.title, *tile.texts[:1]]),
            "error": tile.error,
        }
        for tile in tiles
    ]
    page = render("sheet.html", package="lavis_lite.common.page", title=title, lead=lead, tiles=shown)
    write_text(path, page.encode("utf-8", errors="backslashreplace").decode("utf-8"))


def write_png(tiles: Sequence[Tile], path: Path, *, title: str, lead: str = "") -> None:
    """Write the image: four samples per row, long texts cut. Pillow's font lacks many scripts; a page has them all."""
    cards = [draw(tile) for tile in tiles]
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    width = max(sum(card.width + MARGIN for card in row) for row in rows) + MARGIN
    heads = [text for text in (title, lead) if text]
    top = MARGIN + LINE * len(heads) + MARGIN
    height = sum(max(card.height for card in row) + MARGIN for row in rows) + top
    sheet = Image.new("RGB", (width, height), "white")
    for number, text in enumerate(heads):
        place = (MARGIN, MARGIN + LINE * number)
        ImageDraw.Draw(sheet).text(place, text, fill="black", font=ImageFont.load_default(FONT_SIZE + 2))
    y = top
    for row in rows:
        x = MARGIN
        for card in row:
            sheet.paste(card, (x, y))
            x += card.width + MARGIN
        y += max(card.height for card in row) + MARGIN
    atomic_write(path, lambda file: sheet.save(file, "PNG"))
