"""Batches of texts and of image tokens: pad, cut, trim, gather and generate them, for BLIP and BLIP-2."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavis_lite.common import dist
from lavis_lite.common.wording import without_false_spaces
from lavis_lite.nn.decoding import DecodingConfig, ScoredText, Step, decode

logger = logging.getLogger(__name__)

T = TypeVar("T")

Texts = tuple[Tensor, Tensor]
"""Ids and mask (B,T)."""


class TextReader(Protocol):
    """A model with a tokenizer, which reads texts of up to `max_txt_len` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_txt_len: int
    has_warned_of_cut_texts: bool

    def tokenize(
        self, texts: Sequence[str], *, start: int | None = None, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ids and mask, cut to `max_length` tokens."""


def stack_texts(*texts: Texts) -> Texts:
    """Concatenate batches, padded (with masked zeros) to the longest."""
    longest = max(ids.shape[1] for ids, _ in texts)
    ids, mask = zip(*(padded(text, longest) for text in texts), strict=True)
    return torch.cat(ids), torch.cat(mask)


def padded(texts: Texts, length: int) -> Texts:
    """Pad the batch with masked zeros to a length."""
    ids, mask = (F.pad(part, (0, length - part.shape[1])) for part in texts)
    return ids, mask


def cut_texts(model: TextReader, texts: Sequence[str]) -> Texts:
    """Return ids and mask, cut to `max_txt_len` tokens; log a warning once per model if a text was cut."""
    ids, mask = model.tokenize(texts, max_length=model.max_txt_len)
    if ids.shape[1] >= model.max_txt_len:  # otherwise none was cut
        warn_of_cut_texts(model, texts)
    return ids, mask


def warn_of_cut_texts(model: TextReader, texts: Sequence[str]) -> None:
    """Log once per model how many of the texts are longer than `max_txt_len` tokens."""
    if model.has_warned_of_cut_texts:
        return
    lengths = [len(row) for row in model.tokenizer(list(texts), verbose=False).input_ids]
    num_cut = sum(length > model.max_txt_len for length in lengths)
    if num_cut:
        model.has_warned_of_cut_texts = True
        logger.warning(
            f"{num_cut} of {len(texts)} texts are longer than max_txt_len={model.max_txt_len} tokens (the longest has "
            f"{max(lengths)}): only their first {model.max_txt_len} are read. Set model.max_txt_len to read more, up "
            "to the text transformer's positions. Later batches are cut without a warning."
        )


def trimmed(texts: Texts) -> Texts:
    """Remove the columns in which all texts are padded. Waits for the device."""
    ids, mask = texts
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def fetch_texts(texts: Texts, index: Tensor, *, max_length: int) -> Texts:
    """Return these rows of all ranks' batches, which may be of different lengths up to `max_length`."""
    if dist.world_size() == 1:
        return texts[0][index], texts[1][index]
    rows = dist.fetch_rows(torch.stack(padded(texts, max_length), dim=1), index)
    return trimmed((rows[:, 0], rows[:, 1]))


def in_compute_type(x: Tensor) -> Tensor:
    """Cast to the type in which a linear layer computes: under autocast half the bytes to keep or send, with the same
    results.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def group_by_prompt(prompts: Sequence[str], answer: Callable[[str, list[int]], list[T]]) -> list[T]:
    """Return answers to all prompts in their order; `answer` is called once per distinct prompt, with the rows of the
    samples that have it, and returns the same number of answers for each.
    """
    answers: dict[int, list[T]] = {}
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        texts = answer(prompt, rows)
        each = len(texts) // len(rows)
        answers |= {row: texts[i * each : (i + 1) * each] for i, row in enumerate(rows)}
    return [text for row in range(len(prompts)) for text in answers[row]]


def generate_continuations(
    prompts: Sequence[str], model: Any, step_of: Callable[[list[int]], Step], config: DecodingConfig
) -> list[str | ScoredText]:
    """Generate continuations of each prompt, returned without it, with the tokenizer of BLIP's captioner or the
    Q-Former; `step_of` returns the decoding step of the samples with these rows.
    """

    def captions(prompt: str, rows: list[int]) -> list[str | ScoredText]:
        ids = model.tokenize([prompt] * len(rows), start=model.decoder_start)[0][:, :-1]
        start = model.tokenizer.decode(ids[0], skip_special_tokens=True)  # as it appears in the decoded texts
        decoded = decode(step_of(rows), ids, config)
        texts = model.tokenizer.batch_decode(decoded.ids, skip_special_tokens=True)
        return decoded.with_scores([without_false_spaces(text.removeprefix(start).strip()) for text in texts])

    return group_by_prompt(prompts, captions)
