"""Candidates between which a language model chooses: checks, ids, and the lengths that losses are divided by.

Note: a candidate that is too long is an error; LAVIS never cut one.

Letters: B samples (or 1, if all have the same candidates), C candidates of a sample at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.models.blip2.llm_tokenizer import LLMTokenizer, Rows
from lavis_lite.models.inputs import shown


def candidate_rows(
    tokenizer: LLMTokenizer, lists: Sequence[Sequence[str]], *, max_length: int, end: bool
) -> list[Rows]:
    """Return the ids of every candidate, a causal model's with the end token if `end`.

    InputError for a candidate without tokens, or with more than `max_length`, start token included.
    """
    texts = list(dict.fromkeys(text for own in lists for text in own))
    rows = dict(zip(texts, tokenizer.continuations(texts, end=end), strict=True))
    space = max_length - (0 if tokenizer.is_encoder_decoder else len(tokenizer.prefix_ids))
    for text, row in rows.items():
        if not row:
            raise InputError(f"candidate {shown(text)} has no token in the language model's vocabulary")
        if len(row) > space:
            found = f"candidate {shown(text)} has {len(row)} tokens, max_output_txt_len={max_length} allows {space}"
            raise InputError(f"{found}: shorten it, or raise model.max_output_txt_len")
    return [[rows[text] for text in own] for own in lists]


def stacked(rows: Sequence[Rows]) -> Rows:
    """Return the candidates of all samples as BxC rows, shorter lists filled up with candidates without tokens."""
    longest = max(map(len, rows))
    return [row for own in rows for row in [*own, *[[]] * (longest - len(own))]]


def segment_lengths(rows: Sequence[Rows], n_segments: int) -> Tensor:
    """Return the number of tokens of the longest candidate in each one's segment, (B,C); 1 where there is none.

    Each list is cut into `n_segments` of the same length; the last also takes the rest. InputError if a list has fewer
    candidates than that.
    """
    lengths = torch.ones(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, own in enumerate(rows):
        check_number("n_segments", n_segments, 1, len(own))
        size = len(own) // n_segments
        for number in range(n_segments):
            segment = slice(number * size, len(own) if number == n_segments - 1 else (number + 1) * size)
            lengths[i, segment] = max(map(len, own[segment]))
    return lengths


def check_template(template: str) -> str:
    """Return the template of candidates; raise InputError unless it has one `{}`."""
    if template.count("{}") != 1:
        raise InputError(f"model.format_candidates_prompt: must have one '{{}}' for the candidate, got {template!r}")
    return template


def named_in(texts: Sequence[str], lists: Sequence[Sequence[str]]) -> Tensor:
    """Return (B,C): 0 for the first candidate of each sample that its text contains, in any case, -inf elsewhere."""
    lists = lists if len(lists) == len(texts) else list(lists) * len(texts)
    named = torch.full((len(texts), max(map(len, lists))), float("-inf"))
    for row, (text, own) in enumerate(zip(texts, lists, strict=True)):
        found = next((number for number, name in enumerate(own) if name.lower() in text.lower()), None)
        if found is not None:
            named[row, found] = 0.0
    return named
