"""Texts to ids of a language model and back: special tokens, cuts and padding.

Note: a text is tokenised without special tokens, which are put around it here, because tokenizers of different versions
disagree about them. A causal model's output that is cut loses its end token (it has not ended); an encoder-decoder's
keeps it; both as in LAVIS.

Letters: B texts, T tokens.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lavis_lite.common.errors import InputError
from lavis_lite.models.blip2.families import LLMFamily
from lavis_lite.models.blip2.prompts import split_caption, without_prompt
from lavis_lite.models.inputs import require_labels
from lavis_lite.models.tokenizers import checked_texts
from lavis_lite.nn.losses import IGNORED

Rows = list[list[int]]


class Batch(NamedTuple):
    """Training texts: ids and mask that the language model reads after the queries, and the labels (B,T).

    An encoder-decoder writes the labels; a causal model's are those of the ids.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class LLMTokenizer:
    """Text to ids and back.

    `prefix_ids` and `suffix_ids` are put around every input, and with `is_encoder_decoder` around outputs too: the
    special tokens that the tokenizer puts around a text, or those of the family. `end_id` ends an output. In training
    inputs are cut to `max_length` tokens and outputs to `max_output_length`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        family: LLMFamily,
        *,
        is_encoder_decoder: bool,
        max_length: int,
        max_output_length: int,
    ) -> None:
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.max_length, self.max_output_length = max_length, max_output_length
        self.truncation_side = family.truncation_side
        if family.starts_with_end:  # for folders written from it: the flag makes transformers rebuild its template
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.add_bos_token = True
        (bare,) = tokenizer(["a"], add_special_tokens=False).input_ids
        (whole,) = tokenizer(["a"]).input_ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix_ids = (tokenizer.eos_token_id,) if family.starts_with_end else tuple(whole[:at])
        self.suffix_ids = tuple(whole[at + len(bare) :]) if is_encoder_decoder else ()
        self.end_id: int = tokenizer.eos_token_id
        if family.end_text is not None:
            self.end_id = tokenizer(family.end_text, add_special_tokens=False).input_ids[-1]

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def inputs(self, texts: Sequence[str], *, max_length: int | None = None) -> Rows:
        """Return ids of texts that the model reads, cut to `max_length` tokens."""
        return [self._with_special(row, max_length, side=self.truncation_side) for row in self._bare(texts)]

    def are_equally_long(self, texts: Sequence[str], max_length: int | None = None) -> bool:
        """Return whether texts that the model reads, cut to `max_length` tokens, need no padding."""
        return len(set(map(len, self.inputs(texts, max_length=max_length)))) == 1

    def outputs(self, texts: Sequence[str], *, max_length: int | None = None, end: bool = True) -> Rows:
        """Return ids of texts that the model writes, cut to `max_length`; a causal model's end token needs `end`."""
        rows = self._bare(texts)
        if self.is_encoder_decoder:
            return [self._with_special(row, max_length, side="right") for row in rows]
        return [([*row, self.end_id] if end else row)[:max_length] for row in rows]

    def continuations(self, texts: Sequence[str], *, max_length: int | None = None, end: bool = True) -> Rows:
        """Return ids as `outputs`, of texts after a causal model's prompt: byte-level vocabularies need the space."""
        (word,) = self._bare(["a"])
        adds_space = self.tokenizer.convert_ids_to_tokens(word)[0].startswith("\N{LOWER ONE EIGHTH BLOCK}")
        if not self.is_encoder_decoder and not adds_space:
            texts = [text if text[:1].isspace() else f" {text}" for text in texts]
        return self.outputs(texts, max_length=max_length, end=end)

    def pad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B,T), padded to the longest."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
        return pad_sequence(tensors, batch_first=True, padding_value=self.pad_id), mask

    def answer_batch(self, prompts: list[str], answers: list[str]) -> Batch:
        """Return prompts to read and answers to learn."""
        read = self.inputs(prompts, max_length=self.max_length)
        if self.is_encoder_decoder:
            written = self.outputs(answers, max_length=self.max_output_length)
            return Batch(*self.pad(read), _labels(*self.pad(written)))
        space = max(self.max_output_length - len(self.prefix_ids), 0)
        written = self.continuations(answers, max_length=space)
        require_labels(list(map(len, written)), answers)
        return self._causal_batch([r + w for r, w in zip(read, written, strict=True)], list(map(len, read)))

    def caption_batch(self, captions: list[str], prompt: str = "") -> Batch:
        """Return captions to learn after their beginning: the prompt or, for an encoder-decoder without one, a few
        words.
        """
        bare = [without_prompt(caption, prompt) for caption in captions]
        if self.is_encoder_decoder:
            parts = [(prompt, caption) if prompt else split_caption(caption) for caption in bare]
            return self.answer_batch([beginning for beginning, _ in parts], [rest for _, rest in parts])
        prefix, prompt = list(self.prefix_ids), prompt.strip()
        given = self.inputs([prompt])[0] if prompt else []
        if len(given) >= self.max_length:
            raise InputError(f"model.prompt: {prompt!r} takes all of max_txt_len={self.max_length} tokens: shorten it")
        texts = [f"{prompt} {caption}".strip() for caption in bare]
        rows = [prefix + row for row in self.outputs(texts, max_length=self.max_length - len(prefix))]
        pairs = (zip(row, given, strict=False) for row in rows)  # they differ where the tokenizer joins the next word
        num_given = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], own)) for own in pairs]
        require_labels([len(row) - number for row, number in zip(rows, num_given, strict=True)], captions)
        return self._causal_batch(rows, num_given)

    def _causal_batch(self, rows: Rows, num_given: list[int]) -> Batch:
        """Return whole texts, of which the first tokens are given and have no labels."""
        ids, mask = self.pad(rows)
        given = torch.arange(ids.shape[1]) < torch.tensor(num_given)[:, None]
        return Batch(ids, mask, _labels(ids, mask).masked_fill(given, IGNORED))

    def decode(self, ids: Tensor) -> list[str]:
        """Return the stripped texts of ids (B,T), from after the start token up to the end token."""
        rows = [row[: row.index(self.end_id)] if self.end_id in row else row for row in ids[:, 1:].tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def _bare(self, texts: Sequence[str]) -> Rows:
        return self.tokenizer(checked_texts(texts), add_special_tokens=False, verbose=False).input_ids

    def _with_special(self, row: list[int], max_length: int | None, *, side: str) -> list[int]:
        if max_length is not None:
            space = max(max_length - len(self.prefix_ids) - len(self.suffix_ids), 0)
            row = row[:space] if side == "right" else row[max(len(row) - space, 0) :]
        return [*self.prefix_ids, *row, *self.suffix_ids]


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Return the ids as labels; padding has none."""
    return ids.masked_fill(mask == 0, IGNORED)
