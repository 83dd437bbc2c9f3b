"""How lists are written inside a prompt; datasets and models word them alike."""

import string
from collections.abc import Sequence

MAX_OCR_TOKENS = 30


def lettered(choices: Sequence[str]) -> str:
    """Choices behind letters: "(a) red (b) blue". ValueError for more than there are letters."""
    if len(choices) > len(string.ascii_lowercase):
        raise ValueError(f"at most {len(string.ascii_lowercase)} choices can be lettered, got {len(choices)}")
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(string.ascii_lowercase, choices, strict=False))


def joined_words(words: Sequence[str]) -> str:
    """The first words read in an image, joined by commas; InstructBLIP's code takes thirty."""
    return ", ".join(words[:MAX_OCR_TOKENS])
