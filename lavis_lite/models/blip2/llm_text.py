"""Texts as ids for a language model, and ids as texts: what each family puts around a text, cuts and pads.

Surprising: a text is tokenised bare and the special tokens are put around it here, because tokenizers of different
versions disagree about them. A causal model's output that is cut loses its end token (it has not ended); an
encoder-decoder's keeps it; both as in LAVIS.

Letters: B texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavis_lite.common.errors import InputError
from lavis_lite.models.tokenizers import checked_texts

Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class TextCoder:
    """Text to ids and back.

    `before` and `after` stand around every input; `end_id` ends an output. With `keeps_end` (encoder-decoders) outputs
    are inputs of the decoder, with `before` and `after` of their own. `truncation_side` says where inputs are cut.
    """

    tokenizer: PreTrainedTokenizerBase
    before: tuple[int, ...]
    after: tuple[int, ...]
    end_id: int
    keeps_end: bool
    truncation_side: str = "right"

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.tokenizer.pad_token_id

    def inputs(self, texts: Sequence[str], *, max_length: int | None = None) -> Rows:
        """Ids of what the model reads, cut to `max_length` tokens."""
        return [self._around(row, max_length, side=self.truncation_side) for row in self._bare(texts)]

    def outputs(self, texts: Sequence[str], *, max_length: int | None = None, end: bool = True) -> Rows:
        """Ids of what the model writes, with its end token (for a causal model only if asked), cut to `max_length`."""
        rows = self._bare(texts)
        if self.keeps_end:
            return [self._around(row, max_length, side="right") for row in rows]
        return [([*row, self.end_id] if end else row)[:max_length] for row in rows]

    def continuations(self, texts: Sequence[str], *, max_length: int | None = None, end: bool = True) -> Rows:
        """`outputs` that follow a prompt in a causal model: byte-level vocabularies write the space between them."""
        if not self.keeps_end and not self._adds_space():
            texts = [text if text[:1].isspace() else f" {text}" for text in texts]
        return self.outputs(texts, max_length=max_length, end=end)

    def pad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Ids and mask (B,T), padded to the longest."""
        ids = torch.full((len(rows), max(map(len, rows))), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated ids (B,T) that begin with the start token, up to the end token, stripped."""
        rows = [row[: row.index(self.end_id)] if self.end_id in row else row for row in ids[:, 1:].tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def _bare(self, texts: Sequence[str]) -> Rows:
        return self.tokenizer(checked_texts(texts), add_special_tokens=False, verbose=False).input_ids

    def _around(self, row: list[int], max_length: int | None, *, side: str) -> list[int]:
        if max_length is not None:
            room = max(max_length - len(self.before) - len(self.after), 0)
            row = row[:room] if side == "right" else row[max(len(row) - room, 0) :]
        return [*self.before, *row, *self.after]

    def _adds_space(self) -> bool:
        """Whether the tokenizer begins a text as it begins a word."""
        (row,) = self._bare(["a"])
        return self.tokenizer.convert_ids_to_tokens(row)[0].startswith("\N{LOWER ONE EIGHTH BLOCK}")


def text_coder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_encoder_decoder: bool,
    end: str | None = None,
    start_with_end: bool = False,
    truncation_side: str = "right",
) -> TextCoder:
    """The coder of a language model: what its tokenizer puts around a text, or other rules.

    `end` is a text whose token ends an output, for instance a newline; `start_with_end`: the tokenizer's end token
    begins every input.
    """
    (bare,) = tokenizer(["a"], add_special_tokens=False).input_ids
    (whole,) = tokenizer(["a"]).input_ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = tuple(whole[:at]), tuple(whole[at + len(bare) :])
    if start_with_end:
        before = (tokenizer.eos_token_id,)
    end_id = tokenizer.eos_token_id
    if end is not None:
        end_id = tokenizer(end, add_special_tokens=False).input_ids[-1]
    if end_id is None:
        raise InputError(f"the language model's tokenizer ({type(tokenizer).__name__}) has no end token to write")
    return TextCoder(
        tokenizer=tokenizer,
        before=before,
        after=after if is_encoder_decoder else (),
        end_id=end_id,
        keeps_end=is_encoder_decoder,
        truncation_side=truncation_side,
    )
