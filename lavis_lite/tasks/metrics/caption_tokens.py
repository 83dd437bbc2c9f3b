"""Tokens of captions without Java: an approximation of Stanford's PTB tokenizer, and characters for texts without
spaces.

The approximation lowers the case, drops punctuation as the COCO caption code does, and splits contractions ("isn't" ->
"is n't"). It does not handle abbreviations, fractions and URLs, so scores of such captions differ a little.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from lavis_lite.common.prompts import IDEOGRAPHS, KANA

# A number, a word (perhaps with apostrophes, dots, slashes and hyphens), or a symbol that counts as a word
WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W_]+(?:['./&_-][^\W_]+)*|[$£€%#&+=*@<>()\[\]{}]")
ENDING = re.compile(r"^(.+?)(n't|'(?:s|m|d|re|ve|ll))$")
SPECIAL = {
    **{"cannot": ["can", "not"], "gonna": ["gon", "na"], "wanna": ["wan", "na"], "gotta": ["got", "ta"]},
    **{"(": ["-lrb-"], ")": ["-rrb-"], "[": ["-lsb-"], "]": ["-rsb-"], "{": ["-lcb-"], "}": ["-rcb-"]},
}
UNSPACED = re.compile(f"[{IDEOGRAPHS}{KANA}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""A character of Chinese, Japanese, Thai, Lao, Burmese or Khmer, which put no spaces between words."""
COMPOUND = re.compile(r"\w+(?:[-'’]\w+)+")


def ptb_like_tokens(text: str) -> list[str]:
    """Return the caption's words as the PTB tokenizer splits them, without punctuation."""
    tokens: list[str] = []
    for word in WORD.findall(text.lower().replace("’", "'")):
        ending = ENDING.match(word)
        tokens += list(ending.groups()) if ending else SPECIAL.get(word, [word])
    return tokens


def character_tokens(text: str) -> list[str]:
    """Return each character of a language without spaces, with its combining marks, and each word of the others, in
    lower case, without punctuation and symbols.
    """
    tokens: list[str] = []
    in_word = False
    for char in text.lower():
        kind = unicodedata.category(char)[0]
        if kind == "M" and tokens:
            tokens[-1] += char
        elif kind not in "LN":
            in_word = False
        elif in_word and not UNSPACED.match(char):
            tokens[-1] += char
        else:
            tokens.append(char)
            in_word = not UNSPACED.match(char)
    return tokens


def are_unspaced(texts: Iterable[str]) -> bool:
    """Return whether most letters of the texts are of languages without spaces."""
    letters = [char for text in texts for char in text if char.isalpha()]
    return 2 * sum(UNSPACED.match(char) is not None for char in letters) > len(letters)


def joined_as(caption: str, references: Sequence[str]) -> str:
    """Return the caption with hyphens and apostrophes written as in a reference: "well - known" as "well-known" where a
    reference has that word.
    """
    words = {word for text in references for word in COMPOUND.findall(text)}
    for word in sorted(words, key=len, reverse=True):
        apart = r"\s*".join(map(re.escape, re.split(r"([-'’])", word)))
        caption = re.sub(rf"(?<!\w){apart}(?!\w)", lambda match: re.sub(r"\s+", "", match[0]), caption, flags=re.I)
    return caption
