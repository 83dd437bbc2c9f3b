"""What the checks of recorded cases build: language models of other sizes than the reference folder's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_blip2 import language_model, language_model_folder
from reference_case import REFERENCE, Case, close
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "blip2_opt": (
        "opt_model.",
        {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_attention_heads": 3, "num_hidden_layers": 3},
        24,
    ),
    "blip2_t5": (
        "t5_model.",
        {"d_model": 24, "d_ff": 40, "num_heads": 3, "num_layers": 3, "num_decoder_layers": 1},
        24,
    ),
    "blip2_t5_instruct": ("t5_model.", {"d_model": 40, "relative_attention_num_buckets": 12}, 40),
    "blip2_vicuna_instruct": (
        "llm_model.",
        {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2},
        48,
    ),
}


def language_model_of(folder: str) -> PreTrainedModel:
    """transformers' model of a folder without weights, as the original had it: T5 with the exact GELU and a head of its
    own.
    """
    config = AutoConfig.from_pretrained(folder)
    if not config.is_encoder_decoder:
        model = AutoModelForCausalLM.from_config(config)
        if config.model_type == "llama":
            model.resize_token_embeddings(config.vocab_size + 1)  # [PAD]
    else:
        config.dense_act_fn = "gelu"
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    return model.eval()


@pytest.fixture(params=sorted(SIZES))
def resized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, PreTrainedModel]:
    """A case folder whose language model is of other sizes and random, and that model."""
    arch = request.param
    prefix, overrides, width = SIZES[arch]
    folder = tmp_path / "cases" / "resized"
    shutil.copytree(REFERENCE / "cases" / f"{arch}__a", folder)
    config = json.loads((folder / "config.json").read_text())
    config["llm_overrides"] = config["_explicit"]["llm"]["config_overrides"] = overrides
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with language_model_folder(config["_explicit"]["llm"]) as source:
            theirs = language_model_of(source)
        old = load_file(folder / "weights.safetensors")
        weights = {name: tensor for name, tensor in old.items() if not name.startswith(prefix)}
        projection = prefix.replace("_model.", "_proj.")
        for name in ("weight", "bias"):
            shape = old[projection + name].shape
            weights[projection + name] = torch.randn(width, *shape[1:])
        weights |= {f"{prefix}{name}": tensor.clone() for name, tensor in theirs.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
    return Case("resized", tmp_path), theirs


def test_a_case_with_a_language_model_of_other_sizes(resized: tuple[Case, PreTrainedModel]) -> None:
    """It is built in these sizes, has the case's weights, and answers as transformers' own model with them."""
    case, theirs = resized
    ours = language_model(case, prompt="a photo of")
    overrides = case.config["llm_overrides"]
    assert {key: getattr(ours.lm.model.config, key) for key in overrides} == overrides
    assert ours.proj.out_features == ours.lm.width == theirs.get_input_embeddings().embedding_dim
    generator = torch.Generator().manual_seed(1)
    embeds, labels = torch.randn(2, 6, ours.lm.width, generator=generator), torch.tensor([[5, 6, 7], [9, 8, 4]])
    mask = torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        if ours.lm.is_encoder_decoder:
            expected = theirs(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits
        else:
            expected = theirs(inputs_embeds=embeds, attention_mask=mask).logits[:, -4:-1]
        close(ours.lm.logits(embeds, mask, labels), expected)
    image = case.inputs["image"]
    assert len(ours.generate({"image": image}, max_length=6)) == len(image)


@pytest.mark.parametrize("arch", sorted(SIZES))
def test_a_case_of_the_folder_s_sizes_uses_the_folder(arch: str) -> None:
    llm = Case(f"{arch}__a").config["_explicit"]["llm"]
    with language_model_folder(llm) as folder:
        assert folder == str(REFERENCE / llm["folder"])
