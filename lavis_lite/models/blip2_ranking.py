"""Candidates between which a language model chooses: what is refused, their tokens, and what their losses are divided
by.

Surprising: a candidate that is too long is an error, although LAVIS, which never cut one, gave it what room it took.

Letters: B samples (or 1, if all have the same candidates), C candidates of a sample at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_lite.errors import InputError
from lavis_lite.models.inputs import candidate_texts
from lavis_lite.models.llm_text import Rows, TextCoder

Candidates = Sequence[str] | Sequence[Sequence[str]]
SHOWN = 60
"""Characters of a candidate in a message."""


def candidate_lists(candidates: Candidates, count: int) -> list[list[str]]:
    """The candidates of all samples (one list), or of each of `count` samples. ValueError if there are none, if one is
    no text or an empty one, and for another number of lists.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise InputError(f"candidates must be a list of texts, or one such list for each image; got {candidates!r}")
    if not candidates:
        raise InputError("there are no candidates to choose between: give a list of texts, or one for each image")
    if isinstance(candidates[0], str):
        return [candidate_texts(candidates)]
    if len(candidates) != count:
        raise InputError(f"{len(candidates)} lists of candidates were given for {count} images")
    return [candidate_texts(own, f" of sample {row}") for row, own in enumerate(candidates)]


def candidate_rows(coder: TextCoder, lists: Sequence[Sequence[str]], *, limit: int, end: bool) -> list[Rows]:
    """Ids of every candidate; a text that comes up several times is tokenised once. `end`: also for a causal model the
    end token belongs to it.

    ValueError for a candidate that takes more than `limit` tokens, start token included, or none at all.
    """
    texts = list(dict.fromkeys(text for own in lists for text in own))
    rows = dict(zip(texts, coder.continuations(texts, end=end), strict=True))
    room = limit - (0 if coder.keeps_end else len(coder.before))
    for text, row in rows.items():
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        if not row:
            raise InputError(f"candidate {shown!r} has no token in the language model's vocabulary")
        if len(row) > room:
            raise InputError(
                f"candidate {shown!r} takes {len(row)} tokens, but max_output_txt_len={limit} has room for {room}: "
                "candidates are not cut; shorten it or raise model.max_output_txt_len"
            )
    return [[rows[text] for text in own] for own in lists]


def stacked(rows: Sequence[Rows]) -> Rows:
    """Lists of candidates one below the other (BxC rows), the shorter ones filled up with candidates of no tokens."""
    longest = max(map(len, rows))
    return [row for own in rows for row in [*own, *[[]] * (longest - len(own))]]


def segment_widths(rows: Sequence[Rows], n_segments: int) -> Tensor:
    """Tokens of the longest candidate in each one's segment, (B,C); 1 where there is no candidate.

    Each list is cut into `n_segments` of the same length, of which the last also takes the rest. ValueError if a list
    has fewer candidates than that.
    """
    widths = torch.ones(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, own in enumerate(rows):
        if not 1 <= n_segments <= len(own):
            raise InputError(f"n_segments {n_segments} must be from 1 to the number of candidates, {len(own)}")
        size = len(own) // n_segments
        for number in range(n_segments):
            segment = slice(number * size, len(own) if number == n_segments - 1 else (number + 1) * size)
            widths[i, segment] = max(map(len, own[segment]))
    return widths
