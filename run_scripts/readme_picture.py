"""Draw README's picture: the first test images with the caption and two answers of the quickstart's tiny BLIP.

`python run_scripts/readme_picture.py output/quickstart docs/figures/quickstart.png`, after run_scripts/quickstart.sh.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from lavis_lite.report.jobs import find_jobs
from lavis_lite.tasks.predictions import Prediction, read_predictions

NUM_IMAGES, COLUMNS = 6, 3
WIDTH, IMAGE, MARGIN, LINE = 380, 144, 16, 19
INK, GREY, GREEN, RED = "#1c2330", "#5b6579", "#1f7a46", "#b02c2c"


class Card(NamedTuple):
    """A test image with the model's text, and the question that it answers."""

    image: Path
    text: str
    right: bool
    note: str


def cards(job: Path) -> Iterator[Card]:
    """Yield every test prediction of a job; right if its accuracy is above 50 percent."""
    (found,) = find_jobs(job)
    rows: list[Prediction] = read_predictions(found.predictions()["test"])
    for row in rows:
        right = row["metrics"]["accuracy"] > 50
        yield Card(Path(row["images"][0]), row["prediction"], right, row.get("input", ""))


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return the text in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    """Draw the picture that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the quickstart's output folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    captions = list(cards(args.quickstart / "caption"))[:NUM_IMAGES]
    answers = list(cards(args.quickstart / "vqa"))
    rows = -(-NUM_IMAGES // COLUMNS)
    height = IMAGE + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, card in enumerate(captions):
        left, top = number % COLUMNS * WIDTH + MARGIN, number // COLUMNS * height + MARGIN
        sheet.paste(Image.open(card.image).resize((IMAGE, IMAGE), Image.Resampling.LANCZOS), (left, top))
        x, y, room = left + IMAGE + 12, top, WIDTH - IMAGE - 2 * MARGIN - 12
        for text, colour in described(card, answers):
            for line in wrapped(text, font, room):
                draw.text((x, y), line, fill=colour, font=font)
                y += LINE
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(args.picture, optimize=True)
    print(f"wrote {args.picture}")


def described(card: Card, answers: list[Card]) -> Iterator[tuple[str, str]]:
    """Yield the caption, and the image's first two questions with their answers, each with its colour."""
    yield card.text, GREEN if card.right else RED
    for answer in [one for one in answers if one.image == card.image][:2]:
        yield answer.note, GREY
        yield answer.text, GREEN if answer.right else RED


if __name__ == "__main__":
    main()
