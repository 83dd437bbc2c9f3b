"""Images with lines of text below them, drawn by Pillow."""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

LINE = 18
FONT_SIZE = 14
MAX_LINES = 8
MAX_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One sample: its title, images, `key: value` texts, and the error if it cannot be read."""

    title: str
    images: list[Image.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    error: str = ""


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


def draw(tile: Tile) -> Image.Image:
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
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(FONT_SIZE)
    for number, (line, color) in enumerate(lines):
        pen.text((2, top + 2 + LINE * number), line, fill=color, font=font)
    return card
