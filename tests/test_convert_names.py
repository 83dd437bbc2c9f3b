"""Parameter names in both layouts, against those that the original recorded and transformers' classes at full size, all
without memory.
"""

import gzip
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from full_size import REFERENCE, meta_model
from omegaconf import OmegaConf
from torch import Tensor

from lavis_lite.common.config.zoo import model_zoo
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.convert import blip2_from_hf, blip2_to_hf, blip_from_hf, blip_to_hf
from lavis_lite.convert.folders import adapter_of, hf_model
from lavis_lite.models.blip2.hf import fit_vocabularies

OPT = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240}
FLAN_T5 = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}
VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def blip_config(image_size: int, **sizes: Any) -> Any:
    return transformers.BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": image_size}, **sizes
    )


def blip2_config(kind: str = "Blip2", image_size: int = 224, text: Any = None, **qformer: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(
        vision_config={"image_size": image_size}, qformer_config=qformer, **({"text_config": text} if text else {})
    )


def opt() -> Any:
    return transformers.OPTConfig(vocab_size=50272, word_embed_proj_dim=2560, **OPT)


def flan_t5() -> Any:
    return transformers.T5Config(vocab_size=32128, d_kv=64, **FLAN_T5)


def vicuna() -> Any:
    return transformers.LlamaConfig(vocab_size=32001, **VICUNA)


READS = {"vocab_size": 30523, "use_qformer_text_input": True}
FULL_SIZE: dict[str, tuple[str, Any]] = {
    "blip_caption__base_coco": ("BlipForConditionalGeneration", lambda: blip_config(384)),
    "blip_vqa__vqav2": ("BlipForQuestionAnswering", lambda: blip_config(480)),
    "blip_image_text_matching__base": ("BlipForImageTextRetrieval", lambda: blip_config(384)),
    "blip2__coco": ("Blip2ForImageTextRetrieval", lambda: blip2_config(image_size=364, **READS)),
    "blip2_opt__pretrain_opt2.7b": ("Blip2ForConditionalGeneration", lambda: blip2_config(text=opt())),
    "blip2_t5__pretrain_flant5xl": ("Blip2ForConditionalGeneration", lambda: blip2_config(text=flan_t5())),
    "blip2_t5_instruct__flant5xl": (
        "InstructBlipForConditionalGeneration",
        lambda: blip2_config("InstructBlip", text=flan_t5(), vocab_size=30523),
    ),
    "blip2_vicuna_instruct__vicuna7b": (
        "InstructBlipForConditionalGeneration",
        lambda: blip2_config("InstructBlip", text=vicuna(), vocab_size=30523),
    ),
}
PARTS = {"opt": "opt", "t5": "t5", "t5_instruct": "t5", "vicuna_instruct": "llm"}


def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size(name: str) -> None:
    """Every tensor of transformers' class comes from one that the original recorded, and the other way round."""
    manifest = json.loads(gzip.decompress((REFERENCE / "manifests" / f"{name}.json.gz").read_bytes()))
    hf_class, config = FULL_SIZE[name]
    with torch.device("meta"):
        their_model = getattr(transformers, hf_class)(config())
        recorded = {key: torch.empty(shape) for key, (shape, _) in manifest["keys"].items()}
    arch = name.split("__")[0].removeprefix("blip2_")
    if name.startswith("blip2"):
        layout = "instructblip" if "instruct" in name else "blip-2"
        theirs = blip2_to_hf(recorded, PARTS.get(arch), layout)
        ours = blip2_from_hf(
            {key: torch.zeros(1).expand(t.shape) for key, t in their_model.state_dict().items()}, PARTS.get(arch)
        )
    else:
        theirs, ours = blip_to_hf(recorded), blip_from_hf(their_model.state_dict())
    theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith("rotary_emb.inv_freq")}
    assert shapes(theirs) == shapes(their_model.state_dict())
    assert ours.keys() <= recorded.keys()
    assert all(list(tensor.shape) == manifest["keys"][key][0] for key, tensor in ours.items())
    left = recorded.keys() - ours.keys()
    assert all(key.startswith(("Qformer.cls.", "temp")) or key.endswith(("position_ids", "inv_freq")) for key in left)


@pytest.mark.parametrize(
    ("arch", "model_type"),
    [("blip_retrieval", "coco"), ("blip2_opt", "caption_coco_opt6.7b"), ("blip2_vicuna_instruct", "vicuna13b")],
)
def test_our_full_size_models_fit_the_class_of_their_config(arch: str, model_type: str) -> None:
    """transformers' class has the same parameters, and biases of keys; and lacks the momentum encoder."""
    section = OmegaConf.to_container(OmegaConf.load(model_zoo.path(arch, model_type)))["model"]
    model = meta_model({**section, "arch": arch})
    with torch.device("meta"):
        config = adapter_of(model, arch=arch).config(model, arch=arch)
        their_model = hf_model(model, config, model.state_dict(keep_vars=True), arch=arch)
    ours = sum(p.numel() for name, p in model.named_parameters() if "_m." not in name and name != "temp")
    key_biases = 39 * 1408 if arch.startswith("blip2") else 0
    assert sum(p.numel() for p in their_model.parameters()) == ours + key_biases


def test_there_is_no_class_for_another_image_encoder() -> None:
    section = OmegaConf.to_container(OmegaConf.load(model_zoo.path("blip2", "pretrain_vitL")))["model"]
    model = meta_model({**section, "arch": "blip2"})
    with pytest.raises(ValueError, match=r"EvaViT.*ClipViT"):
        adapter_of(model, arch="blip2").config(model, arch="blip2")


def test_biases_of_queries_and_values() -> None:
    """By hand: one block, width 2."""
    state = {
        "visual_encoder.blocks.0.attn.q_bias": torch.tensor([1.0, 2.0]),
        "visual_encoder.blocks.0.attn.v_bias": torch.tensor([3.0, 4.0]),
    }
    theirs = blip2_to_hf(state)
    assert list(theirs) == ["vision_model.encoder.layers.0.self_attn.qkv.bias"]
    assert theirs["vision_model.encoder.layers.0.self_attn.qkv.bias"].tolist() == [1, 2, 0, 0, 3, 4]
    ours = blip2_from_hf(theirs)
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {n: t.tolist() for n, t in state.items()}


def test_a_bias_of_keys_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    name = "vision_model.encoder.layers.3.self_attn.qkv.bias"
    assert len(dict(blip2_from_hf({name: torch.ones(6)}))) == 2
    assert "visual_encoder.blocks.3" in caplog.text
    assert "no effect" in caplog.text


def test_rows_added_to_a_vocabulary() -> None:
    """Theirs go, ours stay; a vocabulary of quite another length is left to the check of shapes."""
    name = "llm_model.lm_head.weight"
    for rows, expected in ((5, [1, 1, 1, 0, 0]), (2, [1, 1]), (3, [1, 1, 1]), (100, [1, 1, 1])):
        state = LazyState.of({name: torch.ones(3, 1)})
        fit_vocabularies(state, {name: torch.zeros(rows, 1)})
        assert state[name].flatten().tolist() == expected
