"""Text clean-up of BLIP for captions and questions (answers are never touched).

Note: captions replace the listed punctuation by a space and questions delete it; both keep "?" and ",",
newlines and tabs. Equal to LAVIS's processors of the same names, string for string.
"""

import re

from lavis_lite.common.bounds import MAX_TOKENS, check_number
from lavis_lite.common.errors import InputTypeError
from lavis_lite.common.registry import registry
from lavis_lite.processors.base import BaseProcessor

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def first_words(text: str, max_words: int) -> str:
    """Return `text` cut after `max_words` words; words are separated by single spaces, as BLIP counts them."""
    return " ".join(text.split(" ")[:max_words])


class TextProcessor(BaseProcessor):
    """Shared argument check of the two text processors."""

    def __init__(self, *, max_words: int = 50) -> None:
        self.max_words = check_number("max_words", max_words, 1, MAX_TOKENS)

    def check(self, text: str) -> str:
        """Return `text`; raise TypeError if it is not a string (a missing caption, a number)."""
        if not isinstance(text, str):
            raise InputTypeError(f"{type(self).__name__} takes one string, got {type(text).__name__}: {text!r}")
        return text


@registry.register_processor("blip_caption")
class BlipCaptionProcessor(TextProcessor):
    """Caption clean-up: lower case, punctuation to spaces, single spaces, at most `max_words` words after `prompt`.

    The prompt is prepended as it is, with its own trailing space, and does not count as words.
    """

    def __init__(self, *, prompt: str = "", max_words: int = 50) -> None:
        super().__init__(max_words=max_words)
        self.prompt = prompt

    def __call__(self, text: str) -> str:
        text = PUNCTUATION.sub(" ", self.check(text).lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return self.prompt + first_words(text, self.max_words)


@registry.register_processor("blip_question")
class BlipQuestionProcessor(TextProcessor):
    """Question clean-up: lower case, punctuation deleted, trailing spaces off, at most `max_words` words."""

    def __call__(self, text: str) -> str:
        text = PUNCTUATION.sub("", self.check(text).lower()).rstrip(" ")
        return first_words(text, self.max_words)
