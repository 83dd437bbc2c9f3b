"""A stand-in for Stanford's PTB tokenizer on captions, for machines without Java.

Lower case; punctuation off, as the COCO caption code drops it; contractions split ("isn't" -> "is n't"). It knows
no abbreviations, fractions or URLs, so scores of such captions differ a little from the real tokenizer's.
"""

import re

# A number, a word that may hold apostrophes, dots, slashes and hyphens, or a symbol that counts as a word
WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W_]+(?:['./&_-][^\W_]+)*|[$£€%#&+=*@<>()\[\]{}]")
ENDING = re.compile(r"^(.+?)(n't|'(?:s|m|d|re|ve|ll))$")
SPECIAL = {
    **{"cannot": ["can", "not"], "gonna": ["gon", "na"], "wanna": ["wan", "na"], "gotta": ["got", "ta"]},
    **{"(": ["-lrb-"], ")": ["-rrb-"], "[": ["-lsb-"], "]": ["-rsb-"], "{": ["-lcb-"], "}": ["-rcb-"]},
}


def ptb_like_tokens(text: str) -> list[str]:
    """The caption's words in the tokenizer's manner, punctuation left out."""
    tokens: list[str] = []
    for word in WORD.findall(text.lower().replace("’", "'")):
        ending = ENDING.match(word)
        tokens += list(ending.groups()) if ending else SPECIAL.get(word, [word])
    return tokens
