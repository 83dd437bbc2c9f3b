"""How lists are written inside a prompt; datasets and models word them alike."""

import string
from collections.abc import Sequence

from lavis_lite.errors import InputError

MAX_OCR_TOKENS = 30


def letters(count: int) -> list[str]:
    """The marks of that many choices: "(a)", "(b)" ... ValueError for more than there are letters."""
    if count > len(string.ascii_lowercase):
        raise InputError(f"at most {len(string.ascii_lowercase)} choices can be lettered, got {count}")
    return [f"({letter})" for letter in string.ascii_lowercase[:count]]


def lettered(choices: Sequence[str]) -> str:
    """Choices behind letters: "(a) red (b) blue". ValueError for one text, which would be taken for its letters."""
    refuse_text(choices)
    return " ".join(f"{letter} {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True))


def joined_words(words: Sequence[str]) -> str:
    """The first words read in an image, joined by commas; InstructBLIP takes thirty. ValueError as `lettered`."""
    refuse_text(words)
    return ", ".join(words[:MAX_OCR_TOKENS])


def refuse_text(texts: Sequence[str]) -> None:
    """Raise ValueError if this is one text in place of a list of them."""
    if isinstance(texts, str):
        raise InputError(f"expected a list of texts for each image, got the text {texts!r}")
