"""What models write, against the texts that went into the tokenizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from lavis_lite.common.prompts import without_false_spaces
from lavis_lite.models import captions
from lavis_lite.nn.decoding import Decoded

TEXTS = (
    "一只黄色的猫看着镜头！",
    "赤い丸と、青い四角。",
    "他说“你好”，然后走了……",
    "日本語のテキスト",
    "a man's cat, isn't it. yes!",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """WordPiece over single characters, as BERT's for Chinese."""
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = sorted({char for text in TEXTS for char in text} - {" "})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *characters, *(f"##{char}" for char in characters)]))
    made = BertTokenizer(str(folder / "vocab.txt"), strip_accents=False)
    made.add_special_tokens({"bos_token": "[DEC]"})
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_wordpiece_gives_the_text_back(tokenizer: Any, text: str) -> None:
    spaced = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert spaced != text
    assert without_false_spaces(spaced) == text


@pytest.mark.parametrize(
    "text", ["用 iphone 拍的 3 只猫", "きょう は いい", "a well - known 'so - called' man", "한국어 글", ""]
)
def test_spaces_that_the_text_may_have_had_stay(text: str) -> None:
    assert without_false_spaces(text) == text


def test_generated_captions_have_no_false_spaces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the captioners' own way, behind a prompt that is cut off again."""
    model = SimpleNamespace(tokenizer=tokenizer, decoder_start=tokenizer.bos_token_id, step=lambda context: None)
    model.device = torch.device("cpu")
    written = tokenizer([f"一只 {TEXTS[0]}", f"一只 {TEXTS[4]}"], padding=True, return_tensors="pt").input_ids
    monkeypatch.setattr(captions, "decode", lambda step, ids, config: Decoded(written))
    told = captions.CaptionModel._continuations(model, "一只", None, 2, None)  # type: ignore[arg-type]
    assert told == [TEXTS[0], TEXTS[4]]
