"""The contact sheet of `data preview`: a PNG that Pillow draws, or one HTML page without references to elsewhere."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lavis_lite.common.tiles import FONT_SIZE, LINE, MAX_FRAMES, Tile, draw

COLUMNS = 4
MARGIN = 12
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
    cards = [draw(tile) for tile in tiles]
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
