"""The zoos against the reference manifests, and the library's door at tiny size."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_lite.common.config.files import resolve
from lavis_lite.common.config.schema import Checker
from lavis_lite.common.config.sections import model_arguments
from lavis_lite.common.config.zoo import Zoo, dataset_zoo, model_layers
from lavis_lite.models import load_model, load_model_and_preprocess, load_preprocess, model_zoo

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
MANIFESTS = sorted(REFERENCE.glob("manifests/blip*.json.gz"))
ARCHITECTURES = [
    "blip2",
    "blip2_feature_extractor",
    "blip2_image_text_matching",
    "blip2_llm",
    "blip2_opt",
    "blip2_t5",
    "blip2_t5_instruct",
    "blip2_vicuna",
    "blip2_vicuna_instruct",
    "blip_caption",
    "blip_classification",
    "blip_feature_extractor",
    "blip_image_text_matching",
    "blip_nlvr",
    "blip_pretrain",
    "blip_retrieval",
    "blip_vqa",
]
# what our types say otherwise: fp16 only where there is a GPU, Vicuna from the hub instead of a folder made by hand
OTHERWISE = {
    ("vit_precision", "fp16"): "auto",
    ("llm_model", "./llm/vicuna-7b"): "lmsys/vicuna-7b-v1.1",
    ("llm_model", "./llm/vicuna-13b"): "lmsys/vicuna-13b-v1.1",
}
EVERY_TYPE = [(arch, kind) for arch, kinds in model_zoo for kind in kinds]


def test_zoo_iterates_counts_contains_and_prints():
    assert [arch for arch, _ in model_zoo if arch.startswith("blip")] == ARCHITECTURES
    assert len(model_zoo) == sum(len(types) for _, types in model_zoo)
    assert "blip_vqa" in model_zoo
    assert "blip_nothing" not in model_zoo
    row = next(line for line in str(model_zoo).splitlines() if line.startswith("blip_vqa"))
    assert row.split(maxsplit=1)[1] == "aokvqa, okvqa, tiny, vqav2, vqav2_base"
    assert "coco_caption" in dataset_zoo


def test_empty_zoo_prints(tmp_path: Path):
    assert "types" in str(Zoo(tmp_path, heading="architecture"))
    assert len(Zoo(tmp_path, heading="architecture")) == 0


def test_unknown_architecture_and_type_suggest():
    with pytest.raises(KeyError, match="Did you mean 'blip_caption'"):
        model_zoo.path("blip_captions", "base_coco")
    with pytest.raises(KeyError, match=r"'blip_caption' has no type 'base'. Did you mean 'base_coco'"):
        model_zoo.path("blip_caption", "base")
    with pytest.raises(KeyError, match="Known: aokvqa, okvqa, tiny, vqav2, vqav2_base"):
        load_model("blip_vqa", "xyz")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_types_have_the_settings_and_weights_of_the_original(manifest: Path):
    arch, kind = manifest.name.removesuffix(".json.gz").split("__")
    expected = json.loads(gzip.decompress(manifest.read_bytes()))["model_config"]
    for key in ("arch", "model_type", "med_config_path"):  # the path is the name; med_config_path: our defaults
        expected.pop(key, None)
    expected = {key: OTHERWISE.get((key, value), value) for key, value in expected.items() if value != ""}
    ours = OmegaConf.to_container(OmegaConf.load(model_zoo.path(arch, kind)))["model"]
    assert {key: ours.get(key) for key in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind"), EVERY_TYPE, ids=map("/".join, EVERY_TYPE))
def test_every_type_fits_its_constructor(arch: str, kind: str):
    layers = model_layers(arch, kind)
    arguments = model_arguments(resolve(layers)["model"], Checker(layers))
    assert (arguments["arch"], arguments["model_type"]) == (arch, kind)
    assert model_zoo.path(arch, kind).read_text().count(f"arch: {arch}\n") == 1


@pytest.mark.parametrize(("arch", "kind"), EVERY_TYPE, ids=map("/".join, EVERY_TYPE))
def test_every_type_has_processors_of_the_models_image_size(arch: str, kind: str):
    config = OmegaConf.load(model_zoo.path(arch, kind))
    vis, text = load_preprocess(config.preprocess)
    for split in ("train", "eval"):
        if config.model.get("vit_model") == "features":  # of which any number of tokens is read, as they are
            assert vis[split](torch.ones(5, config.model.vit.width)).shape == (5, config.model.vit.width)
        else:
            size = config.model.image_size
            assert vis[split](Image.new("RGB", (70, 50))).shape == (3, size, size)
        assert text[split]("A red square!").endswith("a red square")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_type_loads_in_the_mode_that_was_asked_for(arch: str):
    model, vis, _text = load_model_and_preprocess(arch, "tiny", is_eval=True)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 10_000_000
    assert vis["eval"](Image.new("RGB", (48, 48))).shape == (3, 48, 48)
    assert load_model(arch, "tiny").training


def test_checkpoint_replaces_the_types_own_weights(tmp_path: Path):

    source = load_model("blip_caption", "tiny")
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    loaded = load_model("blip_caption", "tiny", checkpoint=tmp_path / "weights.pth")
    other = load_model("blip_caption", "tiny")
    name, tensor = next(iter(source.state_dict().items()))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())
    assert not torch.equal(tensor, other.state_dict()[name])


def test_preprocess_falls_back_only_from_train_to_eval():
    vis, text = load_preprocess({"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": 32}}})
    assert vis["train"] is vis["eval"]
    marker = object()
    assert text["eval"](marker) is marker
    vis, _ = load_preprocess({"vis_processor": {"train": {"name": "blip_image_train", "image_size": 32}}})
    assert list(vis) == ["train"]


def test_preprocess_errors_name_the_key():
    with pytest.raises(ValueError, match=r"vis_processor.eval.name: unknown processor 'blip_image_evl'. Did you mean"):
        load_preprocess({"vis_processor": {"eval": {"name": "blip_image_evl"}}})
    with pytest.raises(ValueError, match=r"vis_processor.eval.img_size: unknown key. Did you mean 'image_size'"):
        load_preprocess({"vis_processor": {"eval": {"name": "blip_image_eval", "img_size": 32}}})
