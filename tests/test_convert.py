"""Weights between LAVIS's files and Hugging Face's folders: nothing is lost; the command; models from folders; keyword
arguments that replace keys of a model section.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from full_size import TINY_HF
from torch import Tensor

from lavis_lite.common import checkpoint
from lavis_lite.common.registry import registry
from lavis_lite.convert.__main__ import main
from lavis_lite.convert.folders import write_folder
from lavis_lite.models import from_pretrained, load_model, load_model_and_preprocess
from lavis_lite.models.base import BaseModel
from lavis_lite.models.loading import ADAPTERS
from lavis_lite.nn.llm_sources import PACKAGED

ARCHS = sorted({arch for adapter in ADAPTERS for archs in adapter.classes.values() for arch in archs})


def spread(model: Any) -> Any:
    """No two tensors alike, buffers (queues, counters) included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("position_ids"):
                continue
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            else:
                tensor.copy_(torch.randint(0, 50, tensor.shape, generator=generator))
    return model


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def run(*argv: str | Path) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in argv])
    return ended.value.code


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "blip2_feature_extractor"])
def test_nothing_is_lost(arch: str, tmp_path: Path) -> None:
    """File -> folder -> file: the same tensors, bit by bit, and transformers loads the folder without complaint."""
    model = spread(load_model(arch, "tiny"))
    before = tmp_path / "before.pth"
    checkpoint.save({"model": model.state_dict()}, before)
    folder = tmp_path / "sub" / "hf"
    assert run("to-hf", arch, "tiny", folder, "--checkpoint", before, "--max-shard-size", "1MB") == 0
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config = json.loads((folder / "config.json").read_text())
    twin = getattr(transformers, config["architectures"][0])
    _, report = twin.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert transformers.AutoProcessor.from_pretrained(folder).image_processor.size["height"] == 48
    after = tmp_path / "after.pth"
    assert run("to-lavis", folder, after) == 0
    same(checkpoint.load(after)["model"], model.state_dict())
    assert run("to-lavis", folder, after, "--trainable-only", "--overwrite") == 0
    kept = checkpoint.load(after)["model"]
    frozen = {name.split(".")[0] for name in model.state_dict().keys() - kept.keys()}
    part = model.llm_prefix
    assert frozen == ({"visual_encoder"} if hasattr(model, "Qformer") else set()) | (
        {f"{part}_model"} if part else set()
    )


def test_a_folder_keeps_settings_and_processors(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    options = ["--options", "model.prompt=a drawing of", "max_txt_len=12"]
    assert run("to-hf", "blip2_opt", "tiny", folder, *options) == 0
    model, images, texts = from_pretrained(folder, processors=True, is_eval=True)
    assert (model.prompt, model.max_txt_len, model.training) == ("a drawing of", 12, False)
    assert images["eval"].geometry.transforms[0].size == (48, 48)
    assert texts["eval"]("A  dog!") == "a dog"
    assert from_pretrained(folder, prompt="").prompt == ""


@pytest.mark.parametrize("arch", ["blip_vqa", "blip_image_text_matching", "blip2_opt"])
def test_buffers_that_no_folder_holds_are_not_reported(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(load_model(arch, "tiny"), tmp_path / "hf", arch=arch)
    caplog.set_level(logging.INFO)
    from_pretrained(tmp_path / "hf", arch=arch)
    assert "missing in the file" not in caplog.text


def test_bf16_is_for_the_frozen_parts(tmp_path: Path) -> None:
    assert run("to-hf", "blip2_t5", "tiny", tmp_path / "hf", "--precision", "bf16") == 0
    state = checkpoint.load(tmp_path / "hf" / "model.safetensors")
    low = {name.split(".")[0] for name, tensor in state.items() if tensor.dtype == torch.bfloat16}
    full = {name.split(".")[0] for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert "language_model" in low - full
    assert {"qformer", "query_tokens", "language_projection"} <= full - low


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["to-hf", "blip2_opt", "tniy", "{new}"], "Did you mean 'tiny'"),
        (["to-hf", "blip2_otp", "tiny", "{new}"], "Did you mean 'blip2_opt'"),
        (["to-hf", "blip_nlvr", "tiny", "{new}"], "transformers has no class for blip_nlvr"),
        (["to-hf", "blip_caption", "tiny", "{old}"], "--overwrite"),
        (["to-hf", "blip_caption", "tiny", "{new}", "--checkpoint", "absent.pth"], "absent.pth"),
        (["to-hf", "blip_caption", "tiny", "{new}", "--options", "promt=x"], "Did you mean 'prompt'"),
        (["to-lavis", "{old}", "{new}"], "config.json"),
        (["to-lavis", "owner/absent", "{new}"], "neither a folder here nor in the hub's cache"),
        (["to-lavis", "{hf}", "{old}"], "--overwrite"),
        (["to-lavis", "{hf}", "{new}", "--arch", "blip_vqa"], "blip_caption"),
    ],
)
def test_mistakes(
    argv: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    places = {"new": tmp_path / "new", "old": tmp_path, "hf": tmp_path / "hf"}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"architectures": ["BlipForConditionalGeneration"]}')
    assert run(*(arg.format(**places) for arg in argv)) == 2
    assert text in capsys.readouterr().err
    assert not places["new"].exists()


def test_help_and_overwriting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "to-hf blip2_opt pretrain_opt2.7b" in capsys.readouterr().out
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "old").touch()
    assert run("to-hf", "blip_caption", "tiny", folder, "--overwrite") == 0
    assert not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Models from folders, files and keyword arguments


@pytest.fixture(scope="module")
def caption_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = spread(load_model("blip_caption", "tiny"))
    return write_folder(model, tmp_path_factory.mktemp("hf") / "caption", arch="blip_caption")


def test_a_folder_is_a_checkpoint_too(caption_folder: Path) -> None:
    expected = from_pretrained(caption_folder).state_dict()
    model = load_model("blip_caption", "tiny", checkpoint=caption_folder, prompt="see ")
    assert model.prompt == "see "
    same(model.state_dict(), expected)
    model = load_model("blip_caption", "tiny", pretrained=str(caption_folder))
    same(model.state_dict(), expected)
    larger = load_model("blip_caption", "tiny", checkpoint=caption_folder, image_size=64)
    assert larger.state_dict()["visual_encoder.pos_embed"].shape[1] == 65
    with pytest.raises(ValueError, match="trainable"):
        load_model("blip_vqa", "tiny", checkpoint=caption_folder)


def test_the_class_may_be_given(caption_folder: Path, tmp_path: Path) -> None:
    caption = registry.get_model_class("blip_caption")
    assert type(BaseModel.from_pretrained(str(caption_folder))) is caption
    assert type(caption.from_pretrained(str(caption_folder))) is caption
    with pytest.raises(ValueError, match=r"BlipForConditionalGeneration.*blip_vqa.*blip_caption"):
        registry.get_model_class("blip_vqa").from_pretrained(str(caption_folder))
    folder = write_folder(load_model("blip2", "tiny"), tmp_path / "hf", arch="blip2")
    assert type(from_pretrained(folder)) is registry.get_model_class("blip2")
    (folder / "lavis_lite.json").unlink()
    assert type(from_pretrained(folder)) is registry.get_model_class("blip2_image_text_matching")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for text, error, words in (
        (
            '{"architectures": ["LlavaForConditionalGeneration"]}',
            ValueError,
            "LlavaForConditionalGeneration.*can be read",
        ),
        ("[1]", ValueError, "expected a mapping"),
        ("{", ValueError, "not valid JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(error, match=words):
            from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        from_pretrained(tmp_path / "absent")


def test_overrides_are_checked_like_a_yaml(tmp_path: Path) -> None:
    tokenizer = TINY_HF / "bert"
    model, images, _ = load_model_and_preprocess(
        "blip_caption", "tiny", True, tokenizer=tokenizer, med={"num_layers": 1}
    )
    assert len(model.text_decoder.bert.encoder.layer) == 1
    assert model.text_config().hidden_size == 128
    assert len(model.tokenizer) == 219
    assert not model.training
    assert callable(images["eval"])
    for overrides, words in (
        ({"promt": "x"}, "keyword argument: model.promt: unknown key. Did you mean 'prompt'"),
        ({"max_txt_len": "long"}, "keyword argument: model.max_txt_len: expected a whole number"),
        ({"arch": "blip_vqa"}, "arch cannot be overridden"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model("blip_caption", "tiny", **overrides)


def test_frozen_parts_are_taken_out_of_a_folder(tmp_path: Path) -> None:
    """Language model and image encoder of one folder, without what was trained."""
    source = spread(load_model("blip2_opt", "tiny"))
    folder = write_folder(source, tmp_path / "hf", arch="blip2_opt")
    model = load_model("blip2_opt", "tiny", opt_model=folder, vit_weights=folder)
    for part in ("opt_model", "visual_encoder"):
        same(getattr(model, part).state_dict(), getattr(source, part).state_dict())
    assert not torch.equal(model.query_tokens, source.query_tokens)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_language_models_with_names_of_their_own(family: str, tmp_path: Path) -> None:
    """GPT-2's vocabulary is full and gets its row for images; of BART transformers' BLIP-2 would take half."""
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=159, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    else:
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        config = transformers.BartConfig(vocab_size=159, d_model=32, max_position_embeddings=64, **sizes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGED / "tiny_opt")
    config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    model = load_model("blip2_llm", "tiny", llm_model=str(tmp_path / "llm"))
    if family == "bart":
        with pytest.raises(ValueError, match=r"bart.*\.pth"):
            write_folder(model, tmp_path / "hf", arch="blip2_llm")
        return
    again = from_pretrained(write_folder(model, tmp_path / "hf", arch="blip2_llm")).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name][: len(tensor)] if tensor.dim() else again[name], tensor), name


def test_the_code_of_a_model_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arch, model_class, command in (
        ("blip_caption", "BlipForConditionalGeneration", "lavis-lite caption photos/ --model hf"),
        ("blip_retrieval", "BlipForImageTextRetrieval", None),
    ):
        assert run("to-hf", arch, "tiny", "hf", "--overwrite") == 0
        text = (tmp_path / "hf" / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front)["tags"] == ["lavis_lite", arch]
        assert yaml.safe_load(front).get("pipeline_tag") == ("image-to-text" if command else None)
        assert (command or "from_pretrained") in body
        names: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
            exec(block, names)
        assert model_class in names


def test_push_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, **how: Any) -> None:
            calls.append((repository, how["private"]))

        def upload_folder(self, *, folder_path: Path, repo_id: str) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    argv = ("to-hf", "blip_caption", "tiny", tmp_path / "hf", "--push")
    assert run(*argv, "owner/name") == 2  # no terminal
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run(*argv, "a bad/name/here") == 2
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert run(*argv, "owner/name") == 0
    assert "not uploaded" in capsys.readouterr().out
    assert calls == []
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run(*argv, "owner/name", "--overwrite") == 0
    assert calls[0] == ("owner/name", True)
    assert {"README.md", "config.json", "model.safetensors"} < set(calls[1][1])
