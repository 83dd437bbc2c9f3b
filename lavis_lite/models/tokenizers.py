"""BLIP's and BLIP-2's tokenizer: BERT's WordPiece, with `[DEC]` to start generated and, in BLIP, `[ENC]` to start
image-grounded texts.
"""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.prompts import without_false_spaces
from lavis_lite.common.sources import download
from lavis_lite.models.inputs import checked_text
from lavis_lite.nn.llm_sources import fetch

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parents[1] / "configs" / "tokenizers"
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
"""The tokens for padding, for unknown characters, and for the beginning and the end of a text."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, the package (`shapes`) or the hub (`bert-base-uncased`), without BLIP's
    extra tokens.

    Raises:
        FileNotFoundError: the folder does not exist, or it holds no tokenizer.
        ValueError: it lacks a token that BLIP needs: [PAD], [UNK], [CLS] or [SEP].
    """
    folder: Path | None
    if name in {path.name for path in PACKAGED.iterdir()}:  # an untrusted name may contain ".."
        folder = PACKAGED / name
    else:
        give = "give a folder with vocab.txt or tokenizer.json, or a hub id"
        folder = download.local_folder(name, what="tokenizer folder", give=give)
    known = {} if folder is None else vocabulary(folder)
    if folder is not None and not known and not any(folder.glob("*.model")):
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise MissingFileError(f"tokenizer folder {folder}: holds no vocab.txt or tokenizer.json; it has {content}")
    files = ("tokenizer.json", "tokenizer_config.json")
    tokenizer: PreTrainedTokenizerBase
    if folder is not None and known and not any((folder / file).is_file() for file in files):
        is_cased = any(token != token.lower() for token in known if not token.startswith("["))
        logger.info(f"{folder / 'vocab.txt'}: {len(known)} tokens, {'cased' if is_cased else 'texts are lower-cased'}")
        tokenizer = BertTokenizer(vocab=known, do_lower_case=not is_cased)
    else:
        tokenizer = fetch(AutoTokenizer.from_pretrained, str(folder or name), f"tokenizer {name!r}")
    complete_special_tokens(tokenizer, folder or name, known or tokenizer.get_vocab())
    return tokenizer


def vocabulary(folder: Path) -> dict[str, int]:
    """Return the ids by token of the folder's `tokenizer.json` or `vocab.txt`; empty if it has neither. ValueError for
    a damaged file, and for an empty line or a repeated token of `vocab.txt`.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in stored["added_tokens"]}
            known = stored["model"]["vocab"]
            return (known if isinstance(known, dict) else {token: i for i, (token, _) in enumerate(known)}) | added
        path = folder / "vocab.txt"
        if not path.is_file():
            return {}
        lines = path.read_text(encoding="utf-8").rstrip("\r\n").split("\n")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is not of a tokenizer ({type(error).__name__}: {error})") from error
    tokens: dict[str, int] = {}
    for index, token in enumerate(line.rstrip("\r") for line in lines):  # a token's id is its line
        if not token or token in tokens:
            raise InputError(f"{path}, line {index + 1}: empty or repeated token {token!r}: write one token per line")
        tokens[token] = index
    return tokens


def complete_special_tokens(tokenizer: PreTrainedTokenizerBase, source: str | Path, known: Collection[str]) -> None:
    """Assign those of BERT's special tokens that the tokenizer's files hold (`known`) without naming their role.

    Raises:
        ValueError: the files lack one, or a text does not begin with [CLS] and end with [SEP].
    """
    for role, usual in SPECIAL_TOKENS.items():
        if tokenizer.special_tokens_map.get(role) is None and usual in known:
            tokenizer.add_special_tokens({role: usual})
    named = tokenizer.special_tokens_map
    missing = [named.get(role) or usual for role, usual in SPECIAL_TOKENS.items() if named.get(role) not in known]
    if missing:
        raise InputError(f"the tokenizer of {source} has no {', '.join(missing)}: add them to its vocabulary")
    ids = tokenizer("a").input_ids
    if (ids[0], ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
        wanted = f"{tokenizer.cls_token} before a text and {tokenizer.sep_token} after it"
        raise InputError(f"the tokenizer of {source} does not put {wanted}: use BERT's, or vocab.txt alone")


def blip_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and add `[DEC]` as its bos token and then `[ENC]`, whose id is `enc_token_id`."""
    tokenizer = blip2_tokenizer(name)
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def blip2_tokenizer(name: str, *, truncation_side: str = "right") -> PreTrainedTokenizerBase:
    """Load a tokenizer and add `[DEC]` as its bos token; long texts lose their end, or with "left" their beginning."""
    tokenizer = load_tokenizer(name)
    tokenizer.truncation_side = truncation_side
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts as a list; ValueError if one is not text or cannot be written as UTF-8."""
    return [checked_text(text, f"text {number} of the batch") for number, text in enumerate(texts)]


def written_texts(tokenizer: PreTrainedTokenizerBase, ids_NL: Tensor, num_prompt: int) -> list[str]:
    """Return what WordPiece's tokens say after a prompt of `num_prompt` tokens, which is the same in all rows."""
    start: Any = tokenizer.decode(ids_NL[0, :num_prompt], skip_special_tokens=True)  # as it is in the decoded texts
    texts = tokenizer.batch_decode(ids_NL, skip_special_tokens=True)
    return [without_false_spaces(text.removeprefix(start).strip()) for text in texts]


def unknown_share(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[float, str, str]:
    """Return the share of the texts' tokens that stand for unknown characters, the text with most of them, and how it
    is read. Raises ValueError as `checked_texts`.
    """
    if not texts:
        return 0.0, "", ""
    rows = tokenizer(checked_texts(texts), add_special_tokens=False, verbose=False).input_ids
    counts = [row.count(tokenizer.unk_token_id) for row in rows]
    worst = max(range(len(rows)), key=lambda i: counts[i] / max(len(rows[i]), 1))
    return sum(counts) / max(sum(map(len, rows)), 1), texts[worst], tokenizer.batch_decode([rows[worst]])[0]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    start: int | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B,T) on the CPU, padded to the longest text; `start` replaces [CLS], `max_length` truncates.
    ValueError as `checked_texts`.
    """
    tokens = tokenizer(
        checked_texts(texts),
        padding="longest",
        truncation=max_length is not None,
        max_length=max_length,
        return_tensors="pt",
        verbose=False,  # the warning would be about another model's number of positions
    )
    ids, mask = tokens.input_ids, tokens.attention_mask
    if start is not None:
        ids[:, 0] = start
    return ids, mask
