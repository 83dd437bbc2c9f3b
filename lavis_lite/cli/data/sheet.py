"""The contact sheet of `data preview`: a PNG that Pillow draws, or one HTML page without references to elsewhere."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
MARGIN, LINE = 12, 18
FONT_SIZE = 14
MAX_LINES = 8
MAX_FRAMES = 8
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.4 sans-serif; margin: 1.5em; background: #fff; color: #111 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1em }}
figure {{ margin: 0; padding: 8px; border: 1px solid #ddd; border-radius: 4px; overflow-wrap: anywhere }}
img {{ max-width: 224px; margin-right: 4px }} h2 {{ font-size: 13px; margin: 0 0 6px; color: #666 }}
p {{ margin: 4px 0 }} b {{ color: #666; font-weight: normal }} .error {{ color: #b00020 }}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""


class Tile(Protocol):
    """One sample: its title, images, `key: value` texts, and the error if it cannot be read."""

    @property
    def title(self) -> str: ...
    @property
    def images(self) -> list[Image.Image]: ...
    @property
    def texts(self) -> list[str]: ...
    @property
    def error(self) -> str: ...


def write_html(tiles: Sequence[Tile], path: Path, *, title: str) -> None:
    """Write the page; images are JPEGs in it."""
    figures = "\n".join(map(_figure, tiles))
    path.write_text(PAGE.format(title=html.escape(title), figures=figures), encoding="utf-8", errors="backslashreplace")


def _figure(tile: Tile) -> str:
    parts = [f"<h2>{html.escape(tile.title)}</h2>"]
    parts += [f'<img alt="" src="data:image/jpeg;base64,{_jpeg(image)}">' for image in tile.images[:MAX_FRAMES]]
    for text in tile.texts:
        key, _, value = text.partition(": ")
        parts.append(f"<p><b>{html.escape(key)}</b> {html.escape(value)}</p>")
    if tile.error:
        parts.append(f'<p class="error">{html.escape(tile.error)}</p>')
    return f"<figure>{''.join(parts)}</figure>"


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def write_png(tiles: Sequence[Tile], path: Path, *, title: str) -> None:
    """Write the image: four samples per row, long texts cut. Pillow's font lacks many scripts; a page has them all."""
    cards = [_card(tile) for tile in tiles]
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    width = max(sum(card.width + MARGIN for card in row) for row in rows) + MARGIN
    height = sum(max(card.height for card in row) + MARGIN for row in rows) + MARGIN + LINE + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, fill="black", font=ImageFont.load_default(FONT_SIZE + 2))
    y = MARGIN + LINE + MARGIN
    for row in rows:
        x = MARGIN
        for card in row:
            sheet.paste(card, (x, y))
            x += card.width + MARGIN
        y += max(card.height for card in row) + MARGIN
    sheet.save(path, "PNG")


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text that is drawn `width` pixels wide; a longer word is broken."""
    font, lines, line = ImageFont.load_default(FONT_SIZE), [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        line = ""
        for character in word:
            if font.getlength(line + character) > width and line:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line] if line or not lines else lines


def _card(tile: Tile) -> Image.Image:
    """Return the image of one sample: its images beside each other, and the lines of its texts below."""
    images = tile.images[:MAX_FRAMES]
    side = max((image.width for image in images), default=224)
    columns = max(1, len(images))
    lines = [(tile.title, "#888888")]
    for text, color in (*((text, "black") for text in tile.texts), *([(tile.error, "#b00020")] if tile.error else [])):
        wrapped = wrap(text, side * columns - 4)
        lines += [(line, color) for line in wrapped[:MAX_LINES]]
        if len(wrapped) > MAX_LINES:
            lines[-1] = (f"{lines[-1][0]} ...", color)
    top = max((image.height for image in images), default=0)
    card = Image.new("RGB", (side * columns, top + LINE * len(lines) + 4), "white")
    for number, image in enumerate(images):
        card.paste(image, (side * number, 0))
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(FONT_SIZE)
    for number, (line, color) in enumerate(lines):
        draw.text((2, top + 2 + LINE * number), line, fill=color, font=font)
    return card
