"""Full-size models, built on the meta device, have the original's parameter names, shapes and trainable flags."""

import gzip
import json

import full_size
import pytest
from omegaconf import OmegaConf

from lavis_lite.common.config.zoo import model_zoo

FOLDER = full_size.REFERENCE / "manifests"
MANIFESTS = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("blip*.json.gz"))


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.slow
def test_state_dict(name: str) -> None:
    manifest = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    model = full_size.meta_model(OmegaConf.to_container(OmegaConf.load(model_zoo.path(*name.split("__"))))["model"])
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters(remove_duplicate=False)}
    actual = {key: [list(tensor.shape), int(trainable.get(key, 2))] for key, tensor in model.state_dict().items()}
    # transformers has long stopped to save these, which follow from the config
    expected = {key: entry for key, entry in manifest["keys"].items() if not key.endswith("rotary_emb.inv_freq")}
    assert actual == expected
    assert sum(p.numel() for p in model.parameters()) == manifest["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["n_trainable"]
