"""Lists written into a prompt, and texts without the spaces of WordPiece; datasets, models and tasks share these."""

import re
import string
from collections.abc import Sequence

from lavis_lite.common.errors import InputError

MAX_OCR_TOKENS = 30
IDEOGRAPHS = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
"""Characters that WordPiece separates: BERT puts spaces around each of them, and around punctuation."""
KANA = "\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\uff66-\uff9f"
_MARKS = "\u3001-\u3004\u3008-\u303f\ufe30-\ufe4f\uff00-\uff65"
_QUOTES = "\u2018\u2019\u201c\u201d\u2014\u2026\u00b7"
_FALSE_SPACE = re.compile(
    f"(?<=[{IDEOGRAPHS}]) (?=[{IDEOGRAPHS}{KANA}{_MARKS}{_QUOTES}])|(?<=[{KANA}{_MARKS}{_QUOTES}]) (?=[{IDEOGRAPHS}])"
    f"|(?<=[{_MARKS}]) (?=[{KANA}{_MARKS}{_QUOTES}])|(?<=[{KANA}{_QUOTES}]) (?=[{_MARKS}])"
    "|(?<=\u2026) (?=\u2026)|(?<=\u2014) (?=\u2014)"
)


def letters(count: int) -> list[str]:
    """Return the labels of `count` choices: "(a)", "(b)" ... InputError for more than the alphabet has."""
    if count > len(string.ascii_lowercase):
        raise InputError(f"at most {len(string.ascii_lowercase)} choices can be lettered, got {count}")
    return [f"({letter})" for letter in string.ascii_lowercase[:count]]


def lettered(choices: Sequence[str]) -> str:
    """Return choices with their labels: "(a) red (b) blue". InputError for one text in place of a list."""
    refuse_text(choices)
    return " ".join(f"{letter} {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True))


def joined_words(words: Sequence[str]) -> str:
    """Return the first 30 words read in an image, as InstructBLIP, joined by commas. InputError for one text."""
    refuse_text(words)
    return ", ".join(words[:MAX_OCR_TOKENS])


def refuse_text(texts: Sequence[str]) -> None:
    """Raise InputError for one text in place of a list of texts: its letters would be taken for the list."""
    if isinstance(texts, str):
        raise InputError(f"expected a list of texts for each image, got the text {texts!r}")


def without_false_spaces(text: str) -> str:
    """Return the text without the spaces that decoding WordPiece adds around apostrophes and between CJK characters.

    transformers 4 removed those around apostrophes for LAVIS; transformers 5 keeps them. Both keep those around
    hyphens. A space between two kana, or next to a Latin letter, stays: WordPiece splits only at ideographs and
    punctuation, so it may be part of the text.
    """
    return _FALSE_SPACE.sub("", text.replace(" ' ", "'"))


def fill_placeholders(template: str, values: Sequence[str]) -> str:
    """Return the template with its placeholders `{}` filled in order; other braces, also in the values, are text.

    InputError for more placeholders than values.
    """
    count = template.count("{}")
    if count > len(values):
        problem = f"prompt {template!r} has {count} placeholders, but there are {len(values)} texts for them"
        raise InputError(f"{problem}: give samples['text_input'], or a prompt without '{{}}'")
    head, *rest = template.split("{}", len(values))
    return head + "".join(value + part for value, part in zip(values, rest, strict=False))
