"""Adapters (LoRA) in a language model: trained, saved, loaded, merged for transformers, and exchanged with peft.

Tolerance: 1e-5 relative to the largest value, float32.
"""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_blip2_llm import QUESTIONS, TINY, build, config_of, pictures, same_encoder
from test_hf_blip2 import compare_language_model
from torch import Tensor

from lavis_lite.common import checkpoint
from lavis_lite.common.config.schema import Checker
from lavis_lite.common.config.sections import model_arguments
from lavis_lite.common.config.zoo import model_layers
from lavis_lite.common.registry import registry
from lavis_lite.convert.__main__ import run
from lavis_lite.convert.folders import write_checkpoint, write_folder
from lavis_lite.models import from_pretrained, load_model
from lavis_lite.nn.llm_loading import load_language_model

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "dora": {"r": 2, "use_dora": True, "target_modules": "all-linear"},
    "head": {"r": 2, "modules_to_save": ["lm_head"]},
    "embeddings": {"r": 2, "modules_to_save": ["embed_tokens"]},
    "bias": {"r": 2, "bias": "all"},
    "lora_bias": {"r": 2, "bias": "lora_only"},
    "vocabulary": {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"r": 2, "trainable_token_indices": [5, 6]},
}


def trained(arch: str = "blip2_opt", **lora: Any) -> Any:
    """A model whose adapters, and what else is trained in the language model, are far from their start."""
    model = build(arch, llm_lora=lora)
    spread(model.lm.model)
    return model


@torch.no_grad()
def spread(language: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in language.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def names(model: Any) -> set[str]:
    """Of what is trained in the language model."""
    return {name for name, parameter in model.lm.model.named_parameters() if parameter.requires_grad}


LABELS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def read_inputs(model: Any) -> dict[str, Tensor]:
    """What the language model reads of pictures and questions, and of the labels if it is a causal one."""
    embeds, mask = model.prompt_embeds({"image": pictures(2)}, QUESTIONS[:2])
    if not model.lm.is_encoder_decoder:
        embeds, mask = torch.cat([embeds, model.lm.embed(LABELS)], dim=1), torch.cat([mask, mask[:, :3]], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.lm.logits(*read_inputs(model).values(), LABELS)


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.slow
def test_what_peft_trains_is_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    lora = KINDS[kind]
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY / "opt")
    twin = peft.get_peft_model(reference, peft.LoraConfig(**lora))
    expected = {name.removeprefix("base_model.model.") for name, p in twin.named_parameters() if p.requires_grad}
    model = trained(**lora)
    assert names(model) == expected
    saved = model.checkpoint_state_dict()
    assert {name.removeprefix("opt_model.") for name in saved if name.startswith("opt_model.")} == expected
    checkpoint.save({"model": saved}, tmp_path / "lora.pth")
    again = same_encoder(
        config_of("blip2_opt", llm_lora=lora, checkpoint=str(tmp_path / "lora.pth")), "blip2_opt", model
    )
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(build("blip2_opt")), logits(model), rtol=1e-2)


def test_whole_parts_are_trained_in_float32() -> None:
    model = build("blip2_opt", llm_lora=KINDS["head"], llm_precision="auto", llm={"dtype": "bfloat16"})
    assert {parameter.dtype for parameter in model.lm.model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"llm_precision: bf16"):
        build("blip2_opt", llm_lora=KINDS["bias"], llm_precision="bf16")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["query"]}, r"llm_lora: .*query.* some of .*fc1, .*k_proj, .*v_proj"),
        (
            {"target_modules": ["q_proj", "w_proj"]},
            r"llm_lora.target_modules: .* has no w_proj; it has .*fc1, .*v_proj",
        ),
        ({"target_modules": r".*\.query"}, r"llm_lora: .* some of .*fc1, .*v_proj"),
        ({"modules_to_save": ["head"]}, r"llm_lora.modules_to_save: .* has no head; it has .*lm_head"),
        ({"bias": "some"}, r"llm_lora\.bias: expected 'none' or 'all' or 'lora_only', got 'some'"),
        ({"ranks": 2}, r"llm_lora\.ranks: unknown key"),
        ({"r": -1}, r"llm_lora\.r: must be a whole number from 1 to 65,536, got -1"),
        ({"r": "many"}, r"model\.llm_lora\.r: must be a whole number from 1 to 65,536, got '"),
        ({"rank_pattern": {"q_proj": "a"}}, r"model\.llm_lora\.rank_pattern\.q_proj: must be a whole .* got 'a'"),
        ({"rank_pattern": "q_proj"}, r"llm_lora\.rank_pattern: .*mapping.* got 'q_proj'"),
        ({"alpha_pattern": {"fc1": []}}, r"llm_lora\.alpha_pattern\.fc1: must be a number .* got \[\]"),
        ({"use_dora": "no"}, r"llm_lora\.use_dora: .*true or false.* got 'no'"),
        ({"target_modules": 5}, r"llm_lora\.target_modules: expected .*list of text.* got 5"),
        ({"modules_to_save": "lm_head"}, r"llm_lora\.modules_to_save: .*list of text.* got 'lm_head'"),
        ({"layers_to_transform": ["a"]}, r"llm_lora\.layers_to_transform.*: .*whole number.* got 'a'"),
        ({"megatron_config": "a"}, r"model\.llm_lora\.megatron_config: does not apply"),
        ({"runtime_config": 3}, r"model\.llm_lora\.runtime_config: does not apply"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(
    lora: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=message):
        load_language_model(TINY / "opt", dtype=torch.float32, lora=lora)


def test_a_row_that_the_vocabulary_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.llm_lora: index 1000000 is out of bounds"):
        load_language_model(TINY / "opt", dtype=torch.float32, lora={"trainable_token_indices": [10**6]})


@torch.no_grad()
def their_logits(folder: Path, model: Any, adapter: Path | None = None) -> Tensor:
    """What transformers' BLIP-2 of the folder predicts for `logits`' input, with peft's adapter if there is one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    twin, report = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    language = twin.eval().language_model
    if adapter is not None:
        language = peft.PeftModel.from_pretrained(language, adapter).eval()
    inputs = read_inputs(model)
    if config.text_config.is_encoder_decoder:
        found = language(**inputs, labels=LABELS).logits
    else:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found = language(**inputs, position_ids=positions).logits[:, -4:-1]
    return found[..., : model.lm.model.config.vocab_size]  # the rest is their image token


CASES = [*(("blip2_opt", kind) for kind in sorted(KINDS)), ("blip2_t5", "dora"), ("blip2_vicuna_instruct", "lora")]


@pytest.mark.parametrize(("arch", "kind"), CASES)
@pytest.mark.slow
def test_transformers_loads_the_merged_model(arch: str, kind: str, tmp_path: Path) -> None:
    model = trained(arch, **KINDS[kind])
    before, still_trained = logits(model), names(model)
    write_folder(model, tmp_path / "hf", arch=arch)
    assert torch.equal(logits(model), before)
    assert names(model) == still_trained
    close(their_logits(tmp_path / "hf", model), before)
    again = from_pretrained(tmp_path / "hf", arch=arch, is_eval=True, tokenizer=str(TINY / "bert"))
    close(logits(again)[..., : before.shape[-1]], before)


@pytest.mark.parametrize(("arch", "kind"), [("blip2_opt", "dora"), ("blip2_t5", "lora")])
def test_transformers_answers_as_the_trained_model(arch: str, kind: str, tmp_path: Path) -> None:
    """From images to texts, with its own processor."""
    model = trained(arch, **KINDS[kind])
    model.ln_vision.eps = model.visual_encoder.blocks[0].norm1.eps  # transformers has one for both
    compare_language_model(model, arch, tmp_path / "hf")


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.slow
def test_peft_loads_our_adapters(kind: str, tmp_path: Path) -> None:
    model = trained(**KINDS[kind])
    write_folder(model, tmp_path / "hf", arch="blip2_opt", adapter=tmp_path / "adapter")
    close(their_logits(tmp_path / "hf", model, tmp_path / "adapter"), logits(model))
    again = build("blip2_opt", llm_lora=str(tmp_path / "adapter"))
    again.load_frozen({name for name in again.state_dict() if "lora_" not in name})
    state, own = again.lm.model.state_dict(), model.lm.model.state_dict()
    assert names(again) == names(model)
    assert all(torch.equal(state[name], own[name]) for name in names(model))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_of_peft_are_loaded(kind: str, tmp_path: Path) -> None:
    language = transformers.AutoModelForCausalLM.from_pretrained(TINY / "opt")
    twin = peft.get_peft_model(language, peft.LoraConfig(**KINDS[kind])).eval()
    spread(twin)
    twin.save_pretrained(tmp_path / "theirs")
    model = (
        registry.get_model_class("blip2_opt")
        .from_config(config_of("blip2_opt", llm_lora=str(tmp_path / "theirs")))
        .eval()
    )
    inputs = read_inputs(model)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        close(logits(model), twin(**inputs, position_ids=positions).logits[:, -4:-1])


def test_a_run_that_starts_from_a_folder_of_peft(tmp_path: Path) -> None:
    """Its settings and weights are the folder's; what is trained on is the checkpoint's, which needs no folder."""
    start = trained(r=2, lora_alpha=16)
    write_folder(start, tmp_path / "hf", arch="blip2_opt", adapter=tmp_path / "adapter")
    section = model_arguments(
        {"arch": "blip2_opt", **config_of("blip2_opt", llm_lora=str(tmp_path / "adapter"))}, Checker([])
    )
    assert section["llm_lora"] == {
        **{"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "adapter": str(tmp_path / "adapter")}
    }
    model = registry.get_model_class("blip2_opt").from_config(section)
    name = max(names(start))
    assert torch.equal(model.lm.model.state_dict()[name], start.lm.model.state_dict()[name])
    spread(model.lm.model)
    saved = {"model": model.checkpoint_state_dict(), "config": {"model": section}}
    path = str(checkpoint.save(saved, tmp_path / "checkpoint_best.pth"))
    again = registry.get_model_class("blip2_opt").from_config(section | {"checkpoint": path})
    assert torch.equal(again.lm.model.state_dict()[name], model.lm.model.state_dict()[name])
    shutil.rmtree(tmp_path / "adapter")
    again = from_pretrained(path)
    assert torch.equal(again.lm.model.state_dict()[name], model.lm.model.state_dict()[name])


def damage(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    if how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "adapter_config.json").unlink()
    elif how == "other kind":
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    elif how == "rank":
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    elif how == "fewer":
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    elif how == "more":
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"target_modules": ["q_proj", "v_proj", "fc1"]})
        )
    else:
        (folder / "adapter_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no weights", FileNotFoundError, "holds no adapter_model.safetensors or adapter_model.bin"),
        ("no config", FileNotFoundError, "has no adapter_config.json"),
        ("other kind", ValueError, "is of IA3 adapters"),
        ("rank", ValueError, "does not fit the language model: size mismatch"),
        ("fewer", ValueError, "has tensors that have no place"),
        ("more", ValueError, "lacks tensors of the language model's adapters: .*fc1"),
        ("no mapping", ValueError, "expected a mapping"),
    ],
)
def test_damaged_folders_of_peft(how: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_folder(trained(r=2), tmp_path / "hf", arch="blip2_opt", adapter=tmp_path / "adapter")
    damage(tmp_path / "adapter", how)
    with pytest.raises(error, match=message):
        registry.get_model_class("blip2_opt").from_config(config_of("blip2_opt", llm_lora=str(tmp_path / "adapter")))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of train.py with `llm_lora`, whose adapters are far from zero."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = load_model("blip2_opt", "tiny", llm_lora=lora)
    with torch.no_grad():
        for parameter in model.lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    section = model_layers("blip2_opt", "tiny")[-1].tree["model"] | {"llm_lora": lora, "prompt": "a drawing of"}
    path = tmp_path_factory.mktemp("lora") / "checkpoint_best.pth"
    return checkpoint.save({"model": model.checkpoint_state_dict(), "config": {"model": section}}, path)


def test_a_lora_run_comes_back_trained(lora_run: Path) -> None:
    model = load_model("blip2_opt", "tiny", is_eval=True, checkpoint=lora_run)
    state = checkpoint.load(lora_run)["model"]
    assert sum("lora_" in name for name in state) > 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"tensors of adapters \(LoRA\) that have no place .* Set model.llm_lora"):
        load_model("blip2_opt", "tiny", checkpoint=lora_run, llm_lora=None)
    with pytest.raises(ValueError, match=r"Set model\.llm_lora"):
        load_model("blip2_opt", "tiny", pretrained=str(lora_run))


def test_the_command_merges_or_writes_the_adapter(lora_run: Path, tmp_path: Path, capsys: Any) -> None:
    model = load_model("blip2_opt", "tiny", is_eval=True, checkpoint=lora_run)
    samples = {"image": torch.randn(2, 3, 48, 48)}
    own, expected = model.generate(samples, max_length=8), model.lm.model
    hf, adapter = tmp_path / "hf", tmp_path / "adapter"
    common = ["to-hf", "blip2_opt", "tiny"]
    assert run([*common, str(hf), "--checkpoint", str(lora_run)]) == 0
    assert "the adapters (LoRA) were merged into the language model" in capsys.readouterr().err
    merged = from_pretrained(hf, is_eval=True)
    assert merged.prompt == model.prompt == "a drawing of"
    assert merged.generate(samples, max_length=8) == own
    assert "llm_lora" not in json.loads((hf / "lavis_lite.json").read_text())["settings"]
    assert run([*common, str(tmp_path / "base"), "--checkpoint", str(lora_run), "--adapter", str(adapter)]) == 0
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert run([*common, str(tmp_path / "other"), "--adapter", str(adapter)]) == 2
    assert "exists: choose another target" in capsys.readouterr().err
    assert run([*common, str(tmp_path / "other"), "--adapter", str(tmp_path / "none")]) == 2
    assert "was trained without llm_lora" in capsys.readouterr().err
    assert expected is model.lm.model


def test_a_checkpoint_becomes_a_merged_file(lora_run: Path, tmp_path: Path, capsys: Any) -> None:
    whole = tmp_path / "merged.pth"
    assert run(["to-lavis", str(lora_run), str(whole)]) == 0
    model = load_model("blip2_opt", "tiny", is_eval=True, checkpoint=lora_run)
    again = load_model("blip2_opt", "tiny", is_eval=True, checkpoint=whole)
    image = torch.randn(2, 3, 48, 48)
    embeds, mask = model.prompt_embeds({"image": image}, ["a cat", "a dog"])
    labels = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        close(again.lm.logits(embeds, mask, labels), model.lm.logits(embeds, mask, labels))
    described = from_pretrained(whole, is_eval=True)
    assert (described.prompt, type(described)) == (model.prompt, type(model))
    assert "llm_lora" not in checkpoint.load(whole)["config"]["model"]
    assert run(["to-lavis", str(lora_run), str(tmp_path / "part.pth"), "--trainable-only"]) == 2
    assert "has no adapters (LoRA): write the whole model" in capsys.readouterr().err
    assert write_checkpoint(again, tmp_path / "plain.pth").is_file()


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_folder(trained(r=2), tmp_path / "hf", arch="blip2_opt", adapter=tmp_path / "adapter")
        write_folder(trained(r=2), tmp_path / "merged", arch="blip2_opt")
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors", "lavis_lite.json"} <= {path.name for path in files}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
