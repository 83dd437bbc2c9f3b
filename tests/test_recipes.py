"""Every YAML resolves and builds, recipes say what their sources say, and every architecture's tiny type answers."""

import json
import os
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lavis_lite.config import Config
from lavis_lite.config_files import load_with_bases
from lavis_lite.config_sections import MODEL_KEYS
from lavis_lite.models import load_model_and_preprocess
from lavis_lite.models.base import chosen_weights
from lavis_lite.registry import registry
from lavis_lite.tasks.base import check_splits, wanted_splits
from lavis_lite.tasks.metrics.caption import LABELS
from lavis_lite.tasks.metrics.retrieval import recall_metrics
from lavis_lite.tasks.metrics.vqa_accuracy import vqa_metrics
from lavis_lite.tasks.multimodal_classification import MultimodalClassificationTask
from lavis_lite.zoo import dataset_zoo, model_zoo

ROOT = Path(__file__).parents[1]
PROJECTS = ROOT / "projects"
REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
TOKENIZER = REFERENCE / "tiny_hf" / "bert"
RECIPES_PAGE = ROOT / "docs" / "recipes.md"
BERT_VOCABULARY = 30524

YAMLS = sorted(PROJECTS.rglob("*.yaml"))
RECIPES = [path for path in YAMLS if not path.name.startswith("_")]
TRAIN = [path for path in RECIPES if path.parent.name == "train"]
EVAL = [path for path in RECIPES if path.parent.name == "eval"]
MODEL_TYPES = [(arch, kind) for arch, kinds in model_zoo for kind in kinds]
DATASET_TYPES = [(name, kind) for name, kinds in dataset_zoo for kind in kinds]
WITHOUT_RESULT = {"snli_ve_ft", "vqav2"}
OWN_FILES = {"caption", "classification", "pairs", "retrieval", "vqa"}


def name_of(path: Path) -> str:
    return path.relative_to(PROJECTS).with_suffix("").as_posix()


recipes = pytest.mark.parametrize("path", RECIPES, ids=name_of)
published = pytest.mark.parametrize("path", TRAIN + EVAL, ids=name_of)


@cache
def config(path: Path) -> Config:
    return Config.from_file(path)


def from_text(folder: Path, **sections: Any) -> Config:
    path = folder / "project.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    return Config.from_file(path)


# Every YAML resolves


@recipes
def test_recipe_resolves_to_a_config_that_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    cfg = config(path)
    again = from_text(tmp_path, **cfg.to_dict())
    assert again.to_dict() == cfg.to_dict()


def test_every_shared_base_has_a_recipe() -> None:
    used = {Path(layer.source).resolve() for path in RECIPES for layer in load_with_bases(path)}
    assert {path.resolve() for path in YAMLS} == used


@pytest.mark.parametrize(("arch", "kind"), MODEL_TYPES, ids=map("/".join, MODEL_TYPES))
def test_model_type_resolves(arch: str, kind: str, tmp_path: Path) -> None:
    cfg = from_text(tmp_path, model={"arch": arch, "model_type": kind}, run={"task": "captioning"})
    assert (cfg.model["arch"], cfg.model["model_type"]) == (arch, kind)
    assert {"vis_processor", "text_processor"} == cfg.preprocess.keys()


@pytest.mark.parametrize(("name", "kind"), DATASET_TYPES, ids=map("/".join, DATASET_TYPES))
def test_dataset_type_resolves_and_its_builder_takes_it(name: str, kind: str, tmp_path: Path) -> None:
    model = {"arch": "blip_caption", "model_type": "tiny"}
    cfg = from_text(tmp_path, model=model, datasets={name: {"type": kind}}, run={"task": "captioning"})
    builder = registry.get_builder_class(name)(**cfg.datasets[name])
    assert bool(builder.splits()) == (name not in OWN_FILES)
    build_processors(cfg.datasets[name])


def build_processors(section: dict[str, Any]) -> None:
    """Build both kinds of a dataset's processors and apply each once."""
    image = Image.new("RGB", (31, 17), "teal")
    for block in section.get("vis_processor", {}).values():
        assert registry.get_processor_class(block["name"]).from_config(block)(image).ndim == 3
    for block in section.get("text_processor", {}).values():
        processor = registry.get_processor_class(block["name"]).from_config(block)
        assert processor("A dog!") == getattr(processor, "prompt", "") + "a dog"


# Every recipe builds


@recipes
def test_recipe_builds_its_parts(path: Path) -> None:
    cfg = config(path)
    registry.get_task_class(cfg.run.task)(**cfg.task)
    registry.get_runner_class(cfg.run.runner)
    builders = {name: registry.get_builder_class(name)(**section) for name, section in cfg.datasets.items()}
    check_splits(wanted_splits(cfg.run), {name: builder.splits() for name, builder in builders.items()})
    for section in cfg.datasets.values():
        build_processors(section)


@recipes
def test_recipe_builds_its_model_and_its_images_fit(path: Path) -> None:
    cfg = config(path)
    arguments = {key: value for key, value in cfg.model.items() if key not in MODEL_KEYS}
    model = meta_model(cfg.model["arch"], json.dumps(arguments, sort_keys=True))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 1e5
    for section in cfg.datasets.values():
        sizes = {block["image_size"] for block in section["vis_processor"].values()}
        assert sizes == {model.visual_encoder.config.image_size}


@cache
def meta_model(arch: str, arguments: str) -> nn.Module:
    """The model without memory; the small tokenizer stands in for bert-base-uncased, which is not at hand."""
    settings = json.loads(arguments)
    if settings.get("tokenizer", "bert-base-uncased") == "bert-base-uncased":
        med = {"vocab_size": BERT_VOCABULARY, **settings.get("med", {})}
        settings |= {"tokenizer": str(TOKENIZER), "med": med}
    with torch.device("meta"):
        return registry.get_model_class(arch)(**settings)


@published
def test_finetuning_starts_from_pretrained_weights_and_evaluation_from_finetuned(path: Path) -> None:
    chosen = chosen_weights(config(path).model)
    if path.stem == "pretrain_14m":
        assert chosen is None
        assert {"init_vit", "init_text"} <= config(path).model.keys()
    else:
        assert chosen is not None
        assert chosen[0] == ("pretrained" if path in TRAIN else "finetuned")
        assert chosen[1].startswith("https://storage.googleapis.com/sfr-vision-language-research/")
    assert config(path).run.evaluate is (path in EVAL)


# What the sources say: BLIP's section 4.1 and table 14; LAVIS's YAMLs for the two that the paper has not.
# recipe: batch, learning rate, last learning rate, weight decay, epochs, pixels
SETTINGS = {
    "pretrain_14m": (2880, 3e-4, 1e-6, 0.05, 20, 224),
    "caption_coco_ft": (256, 1e-5, 0, 0.05, 5, 384),
    "caption_coco_large_ft": (256, 2e-6, 0, 0.05, 5, 384),
    "vqav2_ft": (256, 2e-5, 0, 0.05, 10, 480),
    "okvqa_ft": (256, 3e-5, 1e-5, 0.02, 7, 480),
    "aokvqa_ft": (128, 2e-5, 1e-5, 0.02, 7, 480),
    "retrieval_coco_ft": (256, 1e-5, 0, 0.05, 6, 384),
    "retrieval_flickr_ft": (256, 1e-5, 0, 0.05, 6, 384),
    "nlvr_ft": (256, 3e-5, 0, 0.05, 15, 384),
    "snli_ve_ft": (256, 2e-5, 0, 0.05, 10, 384),
}


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_training_has_its_sources_settings(path: Path) -> None:
    cfg = config(path)
    processes, per_process = map(int, re.search(r"(\d+) processes x (\d+)", path.read_text()).groups())
    assert per_process == cfg.run.batch_size_train * cfg.run.accum_grad_iters
    run = cfg.run
    values = (run.init_lr, run.min_lr, run.weight_decay, run.max_epoch, cfg.model["image_size"])
    assert (processes * per_process, *values) == SETTINGS[path.stem]
    assert cfg.model.get("queue_size", 57600) % (processes * per_process) == 0


@pytest.mark.parametrize("path", EVAL, ids=name_of)
def test_evaluation_follows_blips_protocol(path: Path) -> None:
    task = config(path).task
    if config(path).run.task == "captioning":
        assert (task["num_beams"], task["max_len"], task["min_len"]) == (3, 20, 5)
        assert task.get("repetition_penalty", 1.0) == (1.1 if path.stem == "nocaps" else 1.0)
    if config(path).run.task in ("vqa", "aok_vqa"):
        assert (task["inference_method"], task["num_ans_candidates"]) == ("rank", 128)
    if config(path).run.task == "retrieval":
        assert task["k_test"] == {"ret_coco": 256, "ret_flickr": 128}[path.stem]


# Published results, as data and in the documentation


def reported_metrics(task: str, folder: Path) -> set[str]:
    """The names that a task's metrics have."""
    if task == "captioning":
        return set(LABELS.values()) | {"Bleu_4"}
    if task in ("vqa", "aok_vqa"):
        return set(vqa_metrics({1: {"answers": ["yes"] * 10}}, {1: "yes"}))
    if task == "retrieval":
        return set(recall_metrics(np.ones((1, 1)), np.ones((1, 1)), [0], [[0]]))
    if task == "multimodal_classification":
        results = [{"instance_id": "0", "prediction": 1, "target": 1}]
        return set(MultimodalClassificationTask().score(results, dataset=None, split="val", result_dir=folder))
    return {"CIDEr", "txt_r1", "img_r1"}  # pretraining: of the models finetuned from it


@published
def test_expected_results_are_the_tasks_metrics_of_its_splits(path: Path, tmp_path: Path) -> None:
    cfg = config(path)
    entries = cfg.expected or []
    assert bool(entries) == (path.stem not in WITHOUT_RESULT)
    assert len({(entry["split"], entry["metric"]) for entry in entries}) == len(entries)
    own_splits = {*cfg.run.valid_splits, *cfg.run.test_splits}
    for entry in entries:
        assert entry.keys() == {"split", "metric", "value", "source"}
        assert entry["metric"] in reported_metrics(cfg.run.task, tmp_path)
        assert 1 < entry["value"] < 200  # percent
        assert entry["source"].startswith(("BLIP, table", "LAVIS, docs"))
        on_a_server = entry["split"] in ("test-dev", "test-std")
        assert cfg.run.task == "image_text_pretrain" or ("test" if on_a_server else entry["split"]) in own_splits


@published
def test_a_recipe_does_not_inherit_its_bases_results(path: Path) -> None:
    layers = load_with_bases(path)
    if any("expected" in layer.tree for layer in layers):
        assert "expected" in layers[-1].tree


@published
def test_the_page_lists_the_recipe_with_its_results(path: Path) -> None:
    rows = [line for line in RECIPES_PAGE.read_text().splitlines() if line.startswith(f"| `{path.stem}` |")]
    assert len(rows) == 1
    assert not [entry for entry in config(path).expected or [] if str(entry["value"]) not in rows[0]]
    if path in TRAIN:
        processes, per_process = re.search(r"(\d+) processes x (\d+)", path.read_text()).groups()
        assert f"| {processes} x {per_process} |" in rows[0]


def test_the_pages_commands_are_valid_and_it_lists_nothing_else() -> None:
    text = RECIPES_PAGE.read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == {path.stem for path in TRAIN + EVAL}
    commands = [shlex.split(line) for line in re.findall(r"--cfg-path (.+)", text)]
    assert len(commands) > 5
    for yaml, *rest in commands:
        cfg = Config.from_file(ROOT / yaml, rest[1:] if rest and rest[0] == "--options" else ())
        assert cfg.run.task
    inline = re.findall(r"`(run\.\w+=\S+)`", text)
    tasks = {"accuracy": "vqav2", "annotation_file": "nocaps"}
    for option in inline:
        recipe = tasks.get(option[4:].split("=")[0], "caption_coco")
        Config.from_file(PROJECTS / "blip" / "eval" / f"{recipe}.yaml", [option])


# The zoo's tiny types


def captions(model: nn.Module, samples: dict[str, Any]) -> None:
    texts = model.generate(samples, num_beams=2, max_length=9, min_length=2)
    assert [type(text) for text in texts] == [str, str]


def answers(model: nn.Module, samples: dict[str, Any]) -> None:
    choices = ["red", "a blue square", "yes"]
    ranked = model.predict_answers(samples, inference_method="rank", answer_list=choices)
    assert len(ranked) == 2
    assert set(ranked) <= set(choices)
    assert len(model.predict_answers(samples, inference_method="generate", num_beams=2, max_len=5)) == 2


def classes(model: nn.Module, samples: dict[str, Any]) -> None:
    output = model.predict(samples)
    assert output["predictions"].shape == (2, model.cls_head[-1].out_features)
    assert output["targets"].tolist() == [1, 0]


class Gallery(list):
    """Evaluation batches with the dataset they come from: itself, two images and three texts."""

    text = ("a red circle", "a blue square", "two dots")
    dataset = property(lambda self: Pair(text=list(self.text)))


class Pair(SimpleNamespace):
    def __len__(self) -> int:
        return 2


def ranks(model: nn.Module, samples: dict[str, Any]) -> None:
    i2t, t2i = model.compute_sim_matrix(Gallery([{"image": samples["image"], "index": [0, 1]}]), k_test=1)
    assert (i2t.shape, t2i.shape) == ((2, 3), (3, 2))
    assert (i2t > -100).sum(axis=1).tolist() == [1, 1]
    assert (t2i > -100).sum(axis=1).tolist() == [1, 1, 1]


def match(model: nn.Module, samples: dict[str, Any]) -> None:
    assert model(samples).shape == (2, 2)
    assert model(samples, match_head="itc").abs().max() <= 1 + 1e-5


def features(model: nn.Module, samples: dict[str, Any]) -> None:
    width = model.visual_encoder.config.width
    assert model.extract_features(samples)["multimodal_embeds"].shape[::2] == (2, width)
    assert model.extract_features(samples, mode="image")["image_embeds"].shape == (2, 37, width)
    assert model.extract_features(samples, mode="text")["text_embeds"].shape[::2] == (2, width)


Answer = Callable[[nn.Module, dict[str, Any]], None]
# architecture: keys of the samples it trains (or answers) on, whether it trains, how it answers
TINY: dict[str, tuple[tuple[str, ...], bool, Answer | None]] = {
    "blip_caption": (("image", "text_input"), True, captions),
    "blip_classification": (("image", "text_input", "label"), True, classes),
    "blip_feature_extractor": (("image", "text_input"), False, features),
    "blip_image_text_matching": (("image", "text_input"), False, match),
    "blip_nlvr": (("image0", "image1", "text_input", "label"), True, classes),
    "blip_pretrain": (("image", "text_input"), True, None),
    "blip_retrieval": (("image", "text_input", "image_id"), True, ranks),
    "blip_vqa": (("image", "text_input", "answer", "weight", "n_answers"), True, answers),
}
ANSWERING = ("generate", "predict", "predict_answers", "compute_sim_matrix", "extract_features")


def batch(vis: Callable[[Any], Tensor], text: Callable[[str], str]) -> dict[str, Any]:
    """Two synthetic samples with every key that a model may read."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), dtype=np.uint8)
    image = torch.stack([vis(Image.fromarray(pixels)) for pixels in noise])
    texts = [text("A red circle."), text("Two blue squares above a green triangle!")]
    columns = {"text_input": texts, "image_id": torch.tensor([0, 1]), "label": torch.tensor([1, 0])}
    columns |= {"answer": ["red", "a circle", "two"], "weight": torch.tensor([0.6, 0.4, 1])}
    columns |= {"n_answers": torch.tensor([2, 1])}
    return {"image": image, "image0": image, "image1": image.flip(0), **columns}


def own(kind: str) -> list[str]:
    """The registered names whose classes are the package's own (other tests register theirs)."""
    get = getattr(registry, f"get_{kind}_class")
    return [name for name in getattr(registry, f"list_{kind}s")() if get(name).__module__.startswith("lavis_lite.")]


def test_every_model_is_in_the_zoo_and_has_a_tiny_type() -> None:
    assert own("model") == model_zoo.names() == sorted(TINY)
    assert all("tiny" in model_zoo.types(name) for name in TINY)


def test_every_dataset_is_in_the_zoo() -> None:
    assert own("builder") == dataset_zoo.names()


@pytest.mark.parametrize("arch", sorted(TINY))
def test_tiny_type_trains_and_answers(arch: str) -> None:
    torch.manual_seed(0)
    model, vis, text = load_model_and_preprocess(arch, "tiny")
    keys, trains, answer = TINY[arch]
    everything = batch(vis["eval"], text["eval"])
    samples = {key: everything[key] for key in keys}
    if trains:
        loss = model(samples)["loss"]
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert torch.isfinite(loss)
        untouched = [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]
        assert not untouched
    assert (answer is None) == (not any(hasattr(model, method) for method in ANSWERING) and trains)
    if answer is not None:
        with torch.no_grad():
            answer(model.eval(), samples)
