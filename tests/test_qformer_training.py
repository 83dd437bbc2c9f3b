"""The Q-Former frozen, or trained by adapters (LoRA): what is trained, saved, resumed, loaded and merged."""

from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError
from lavis_lite.convert.folders import write_checkpoint, write_folder
from lavis_lite.models import load_model

LORA = {"r": 2, "lora_alpha": 4}
QFORMER = ("Qformer.", "query_tokens")


def tiny(arch: str = "blip2_opt", kind: str = "tiny", **settings: Any) -> Any:
    torch.manual_seed(0)
    return load_model(arch, kind, is_eval=True, **settings)


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def spread(model: Any) -> Any:
    """The model with adapters far from their start."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.3)
    return model


def batch(count: int = 2) -> dict[str, Any]:
    image = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    return {"image": image, "text_input": ["a red circle", "two blue squares"][:count], "prompt": "{}"}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    if model.llm_prefix:
        return model.class_losses(batch(), ["red", "a blue square"])
    return model.extract_features(batch()).multimodal_embeds


@pytest.mark.parametrize("arch", ["blip2", "blip2_opt", "blip2_vicuna_instruct"])
def test_a_frozen_qformer_is_not_trained_and_has_no_dropout(arch: str):
    model, free = tiny(arch, freeze_qformer=True).train(), tiny(arch)
    assert trained_names(model) == {name for name in trained_names(free) if not name.startswith(QFORMER)}
    assert trained_names(model) >= {"ln_vision.weight"}
    assert not any(part.training for part in model.Qformer.modules())
    assert {name for name in model.checkpoint_state_dict() if name.startswith(QFORMER)}  # which has no other source
    loss = model({**batch(), "text_output": ["red", "blue"]})["loss"]
    loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.ln_vision.parameters())
    assert model.query_tokens.grad is None


@pytest.mark.parametrize("arch", ["blip2", "blip2_opt", "blip2_vicuna_instruct"])
def test_adapters_alone_are_trained_in_the_qformer(arch: str):
    plain, model = tiny(arch), tiny(arch, qformer_lora=LORA)
    in_qformer = {name for name in trained_names(model) if name.startswith("Qformer.")}
    assert in_qformer
    assert all(".lora_" in name and name.split(".lora_")[0].endswith((".query", ".value")) for name in in_qformer)
    rest = {name for name in trained_names(plain) if not name.startswith("Qformer.")}
    assert trained_names(model) == in_qformer | rest
    assert len(in_qformer) == 2 * 2 * (4 + 2)  # A and B of queries and values, of 4 self- and 2 cross-attentions


def test_a_checkpoint_without_adapters_is_the_start_and_one_with_them_comes_back(tmp_path: Path):
    plain = tiny()
    checkpoint.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    start = tiny(qformer_lora=LORA, pretrained=str(tmp_path / "plain.pth"), load_pretrained=True)
    assert torch.equal(outputs(start), outputs(plain))  # B is zero at the start
    trained = spread(start)
    assert not torch.allclose(outputs(trained), outputs(plain), rtol=1e-3)
    checkpoint.save({"model": trained.checkpoint_state_dict()}, tmp_path / "lora.pth")
    frozen = {"vit_weights": "random", "opt_model": "tiny_opt"}
    again = tiny(qformer_lora=LORA, checkpoint=str(tmp_path / "lora.pth"), **frozen)
    assert torch.equal(outputs(again), outputs(trained))
    with pytest.raises(InputError, match="qformer_lora"):
        tiny(checkpoint=str(tmp_path / "lora.pth"))


def test_a_trained_qformer_goes_into_the_layers_that_adapters_wrap(tmp_path: Path):
    source = tiny("blip2")
    checkpoint.save({"model": source.state_dict()}, tmp_path / "stage1.pth")
    model = tiny("blip2", qformer_lora=LORA, init_text=str(tmp_path / "stage1.pth"))
    layer = "Qformer.bert.encoder.layer.0.attention.self.query"
    assert torch.equal(model.get_parameter(f"{layer}.base_layer.weight"), source.get_parameter(f"{layer}.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip2", "blip2_opt"])
def test_a_file_has_the_merged_weights(arch: str, tmp_path: Path):
    model = spread(tiny(arch, qformer_lora=LORA))
    path = write_checkpoint(model, tmp_path / "merged.pth")
    merged = tiny(arch, checkpoint=str(path))
    assert (outputs(merged) - outputs(model)).abs().max() < 1e-5 * outputs(model).abs().max()


@pytest.mark.slow
def test_both_adapters_and_the_folder_of_the_language_models(tmp_path: Path):
    settings = {"qformer_lora": LORA, "llm_lora": {"r": 2}, "vit": {"patch_size": 8}}
    model = spread(tiny(**settings))
    with pytest.raises(InputError, match="without llm_lora"):
        write_folder(tiny(qformer_lora=LORA), tmp_path / "a", arch="blip2_opt", adapter=tmp_path / "b")
    folder = write_folder(model, tmp_path / "hf", arch="blip2_opt", adapter=tmp_path / "adapter")
    state = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert not any("lora_" in name for name in state)
    name = "encoder.layer.0.attention.self.query"
    layer = model.get_submodule(f"Qformer.bert.{name}")
    wanted = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    stored = state["qformer." + name.replace(".self.", ".attention.") + ".weight"]
    assert torch.allclose(stored, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"qformer_lora": LORA, "freeze_qformer": True}, "model.qformer_lora"),
        ({"qformer_lora": {"rank": 2}}, "model.qformer_lora.rank"),
        ({"qformer_lora": {"target_modules": ["q_proj"]}}, r"model.qformer_lora.*query"),
        ({"qformer_lora": {"init_lora_weights": "pissa"}}, "model.qformer_lora.init_lora_weights"),
    ],
)
def test_mistakes_name_the_key(settings: dict[str, Any], key: str):
    with pytest.raises(ValueError, match=key):
        tiny(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["freeze_qformer", "qformer_lora"])
def test_a_run_is_resumed_to_the_bit(key: str, tmp_path: Path, shapes_data: Path):
    value = {"freeze_qformer": True, "qformer_lora": LORA}[key]
    run = {
        **cli_helpers.RUN,
        **cli_helpers.CAPTIONING,
        "max_iters": None,
        "test_splits": [],
        "valid_splits": [],
        "lr_sched": "constant_lr",
    }
    recipe = {
        "model": {"arch": "blip2_opt", "model_type": "tiny", key: value},
        "datasets": {"shapes_caption": {**cli_helpers.SHAPES, "num_train": 2}},
        "run": {**run, "output_dir": str(tmp_path)},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli_helpers.train(path, job="whole") == 0
    assert cli_helpers.train(path, "run.max_epoch=1", job="cut") == 0
    assert cli_helpers.train(path, job="cut", flags=["--resume", "auto"]) == 0
    whole, resumed = (cli_helpers.weights(tmp_path / job / "checkpoint_last.pth") for job in ("whole", "cut"))
    cli_helpers.assert_same_state(whole, resumed)
