"""The small BERT WordPiece tokenizer of `shapes`, shipped in `configs/tokenizers/shapes`.

The language is closed, so nothing is estimated: each of its words is one token, and letters, digits and punctuation
are pieces that spell anything else. The same code gives the same bytes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path

from lavis_lite.datasets.shapes.language import vocabulary
from lavis_lite.datasets.shapes.questions import COUNT_WORDS, question_words

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPT_WORDS = ("a", "photo", "picture", "of", "question", "answer", "short", "caption", "true", "false")
FOLDER = Path(__file__).parents[2] / "configs" / "tokenizers" / "shapes"


def token_list() -> list[str]:
    """Return all tokens in the order of their ids."""
    characters = [*string.digits, *string.ascii_lowercase]
    pieces = [*string.punctuation, *characters, *(f"##{character}" for character in characters)]
    words = sorted({*vocabulary(), *question_words(), *COUNT_WORDS, *PROMPT_WORDS})
    return list(dict.fromkeys([*SPECIAL_TOKENS, *pieces, *words]))


def train_tokenizer(folder: str | Path) -> None:
    """Write vocab.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json for AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = token_list()
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    _write(folder / "special_tokens_map.json", named)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512, **named}
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
