"""Full-size models, built on the meta device, have the original's parameter names, shapes and trainable flags."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lavis_lite.config_sections import MODEL_KEYS
from lavis_lite.registry import registry
from lavis_lite.zoo import model_config_path

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
MANIFESTS = sorted(path.name.removesuffix(".json.gz") for path in (REFERENCE / "manifests").glob("blip_*.json.gz"))
BERT_VOCABULARY = 30524


def build(arch: str, model_type: str) -> Any:
    """The model on the meta device; the small tokenizer stands in for bert-base-uncased, which is not at hand."""
    section = OmegaConf.to_container(OmegaConf.load(model_config_path(arch, model_type)))["model"]
    settings = {key: value for key, value in section.items() if key not in MODEL_KEYS}
    settings |= {"tokenizer": str(REFERENCE / "tiny_hf" / "bert"), "med": {"vocab_size": BERT_VOCABULARY}}
    with torch.device("meta"):
        return registry.get_model_class(arch)(**settings)


@pytest.mark.parametrize("name", MANIFESTS)
def test_state_dict(name: str) -> None:
    manifest = json.loads(gzip.decompress((REFERENCE / "manifests" / f"{name}.json.gz").read_bytes()))
    model = build(*name.split("__"))
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters(remove_duplicate=False)}
    actual = {key: [list(tensor.shape), int(trainable.get(key, 2))] for key, tensor in model.state_dict().items()}
    assert actual == manifest["keys"]
    assert sum(p.numel() for p in model.parameters()) == manifest["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["n_trainable"]
