"""BLIP's and BLIP-2's tokenizer: BERT's WordPiece, with `[DEC]` to start generated and, in BLIP, `[ENC]` to start
image-grounded texts.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lavis_lite.errors import InputError, MissingFileError
from lavis_lite.hub import from_hub

PACKAGED = Path(__file__).parents[1] / "configs" / "tokenizers"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder, the package (`shapes`) or the hub (`bert-base-uncased`), without BLIP's extra
    tokens.
    """
    folder = PACKAGED / name if name in {path.name for path in PACKAGED.iterdir()} else Path(name)
    looks_local = folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.expanduser().is_dir():
        raise MissingFileError(
            f"tokenizer folder {name} does not exist; give a folder with vocab.txt or tokenizer.json, or a hub id"
        )
    source = str(folder.expanduser()) if folder.expanduser().is_dir() else name
    try:
        return from_hub(AutoTokenizer.from_pretrained, source)
    except MissingFileError as error:
        raise MissingFileError(
            f"tokenizer {name!r} could not be loaded from {source!r} ({error}). "
            "Without a network, set model.tokenizer to a folder that holds its vocab.txt or tokenizer.json."
        ) from error


def blip_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer with `[DEC]` as its bos token and then `[ENC]`, whose id is `enc_token_id`."""
    tokenizer = load_tokenizer(name)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def blip2_tokenizer(name: str, *, truncation_side: str = "right") -> PreTrainedTokenizerBase:
    """The tokenizer with `[DEC]` as its bos token; long texts lose their end, or with "left" their beginning."""
    tokenizer = load_tokenizer(name)
    tokenizer.truncation_side = truncation_side
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts as a list; raise ValueError for one that is not text or cannot be written as UTF-8."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {number} of the batch: expected a string, got {type(text).__name__}: {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} of the batch has half a character (a lone surrogate) at position {error.start}: "
                f"{text[max(0, error.start - 10) : error.start + 10]!r}"
            ) from None
    return list(texts)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    start: int | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B,T), padded to the longest; `start` replaces [CLS]; `max_length` truncates.

    Raises ValueError for what is not text, and for text with half a character.
    """
    tokens = tokenizer(
        checked_texts(texts),
        padding="longest",
        truncation=max_length is not None,
        max_length=max_length,
        return_tensors="pt",
    ).to(device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    if start is not None:
        ids[:, 0] = start
    return ids, mask
