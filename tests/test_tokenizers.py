"""BERT's tokenizer from what a folder holds: whole, vocab.txt or tokenizer.json alone, or with a token missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer

from lavis_lite.common.sources import download
from lavis_lite.models.tokenizers import PACKAGED, blip2_tokenizer, blip_tokenizer, load_tokenizer, tokenize
from lavis_lite.nn.llm_sources import PACKAGED as LLMS
from lavis_lite.nn.llm_sources import load_llm_tokenizer, locate

SHAPES = PACKAGED / "shapes"
TEXTS = ["A red circle, left of 2 stars!", "yes", "éclair unheard-of"]


def folder_with(place: Path, *names: str) -> Path:
    """A folder with some of the packaged tokenizer's files."""
    place.mkdir()
    for name in names:
        shutil.copy(SHAPES / name, place)
    return place


@pytest.mark.parametrize(
    "names",
    [("vocab.txt",), ("tokenizer.json",), ("vocab.txt", "tokenizer_config.json"), ("tokenizer.json", "vocab.txt")],
)
def test_any_of_its_files_makes_the_tokenizer(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = folder_with(tmp_path / "t", *names)
    for build in (blip_tokenizer, blip2_tokenizer):
        mine, whole = build(str(folder)), build("shapes")
        assert torch.equal(tokenize(mine, TEXTS)[0], tokenize(whole, TEXTS)[0])
        for role in ("pad", "unk", "cls", "sep", "bos"):
            assert getattr(mine, f"{role}_token_id") == getattr(whole, f"{role}_token_id")
        assert len(mine) == len(whole)
        ids = tokenize(mine, TEXTS, start=mine.bos_token_id)[0]
        assert mine.batch_decode(ids, skip_special_tokens=True)[:2] == ["a red circle, left of 2 stars!", "yes"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("vocab.txt",), ("tokenizer.json",)])
def test_models_write_with_it(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Training is no proof: generation needs [SEP] and [CLS]."""
    folder = folder_with(tmp_path / "t", *names)
    model = cli_helpers.build("blip_caption", tokenizer=str(folder)).eval()
    image = torch.randn(2, 3, 48, 48)
    assert len(model.generate({"image": image}, num_beams=1, max_length=8, min_length=1)) == 2


def test_a_vocabulary_with_capitals_keeps_them(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "a", "cat", "Cat"]
    (tmp_path / "vocab.txt").write_text("\r\n".join(tokens) + "\r\n")
    assert load_tokenizer(str(tmp_path))("A Cat a cat").input_ids == [2, 5, 8, 6, 7, 3]
    (tmp_path / "vocab.txt").write_text("\n".join(token for token in tokens if token not in ("A", "Cat")))
    assert load_tokenizer(str(tmp_path))("A Cat a cat").input_ids == [2, 5, 6, 5, 6, 3]


@pytest.mark.parametrize("lost", [["[PAD]"], ["[UNK]"], ["[CLS]", "[SEP]"]])
@pytest.mark.parametrize("extra", ["", "tokenizer_config.json"])
def test_missing_special_tokens_are_named(tmp_path: Path, lost: list[str], extra: str) -> None:
    tokens = (SHAPES / "vocab.txt").read_text().split("\n")
    (tmp_path / "vocab.txt").write_text("\n".join(token for token in tokens if token not in lost))
    if extra:
        shutil.copy(SHAPES / extra, tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} .*{', '.join(lost)}".replace("[", r"\[")):
        blip2_tokenizer(str(tmp_path))


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    shutil.copy(LLMS / "tiny_opt" / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=r"\[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        load_tokenizer(str(tmp_path))
    stored = json.loads((SHAPES / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**stored, "post_processor": None}))
    with pytest.raises(ValueError, match=r"\[CLS\] .*\[SEP\]"):
        load_tokenizer(str(tmp_path))
    for broken in ("{", '{"model": {}}', "[]"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises((ValueError, FileNotFoundError), match="tokenizer"):
            load_tokenizer(str(tmp_path))


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    """transformers makes a tokenizer of five tokens out of a config.json."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text('{"model_type": "bert"}')
        with pytest.raises(FileNotFoundError, match=f"vocab.txt .*tokenizer.json.*{name}"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines[:7], "", *lines[7:]], r"vocab\.txt, line 8:"),
        (lambda lines: [*lines, lines[9]], r"vocab\.txt, line \d+: .*repeated"),
        (lambda lines: [], r"vocab\.txt"),
    ],
)
def test_each_line_of_a_vocabulary_has_a_token_of_its_own(change: Any, words: str, tmp_path: Path) -> None:
    """An id is a line: with a token less than lines, texts would have ids beyond the embeddings."""
    lines = (SHAPES / "vocab.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join(change(lines)))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(str(tmp_path))


def test_a_language_model_that_never_ends_is_an_error(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLMS / "tiny_opt")
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        config.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="eos_token"):
        load_llm_tokenizer(tmp_path)


MISSPELT = ("/nowhere/bert", "./bert", "../bert", "~/no_such_bert", "a/b/bert", "models/brt", "models/brt.pth", "")


@pytest.mark.parametrize("source", MISSPELT)
def test_a_misspelt_path_is_no_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked for it, whatever it was to be."""

    def asked(*args: object, **settings: object) -> None:
        raise AssertionError(f"the hub was asked: {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    for look_up in (download.local_folder, download.fetch_folder, load_tokenizer, locate, load_llm_tokenizer):
        with pytest.raises(FileNotFoundError, match="folder") as error:
            look_up(source)
        assert source in str(error.value)


def test_hub_ids_stay_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("bert-base-uncased", "owner/some-model-2.7b", "google/flan-t5-xl"):
        assert download.local_folder(source) is None
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert download.local_folder("owner/here") == Path("owner/here")
    (tmp_path / "a_file").touch()
    with pytest.raises(FileNotFoundError, match="a_file"):
        download.local_folder("a_file")


def test_the_class_is_berts(tmp_path: Path) -> None:
    assert type(load_tokenizer(str(folder_with(tmp_path / "t", "vocab.txt")))) is BertTokenizer
