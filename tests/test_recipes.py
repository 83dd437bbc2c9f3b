"""Every YAML resolves and builds, recipes say what their sources say, and every architecture's tiny type answers."""

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import full_size
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lavis_lite.cli.verdict import check_expected
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import load_with_bases
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.config.zoo import dataset_zoo, model_zoo
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model_and_preprocess
from lavis_lite.models.base import chosen_weights
from lavis_lite.tasks.base import check_splits, make_builder, wanted_splits

ROOT = Path(__file__).parents[1]
PROJECTS = ROOT / "projects"
RECIPES_PAGE = ROOT / "docs" / "recipes.md"

YAMLS = sorted(PROJECTS.rglob("*.yaml"))
RECIPES = [path for path in YAMLS if not path.name.startswith("_")]
TRAIN = [path for path in RECIPES if path.parent.name == "train"]
EVAL = [path for path in RECIPES if path.parent.name == "eval"]
MODEL_TYPES = [(arch, kind) for arch, kinds in model_zoo for kind in kinds]
DATASET_TYPES = [(name, kind) for name, kinds in dataset_zoo for kind in kinds]
WITHOUT_RESULT = {"blip/train/snli_ve_ft", "blip/eval/vqav2"} | {f"blip2/train/pretrain_stage{i}" for i in (1, 2)}
WITHOUT_RESULT |= {f"instructblip/{name}" for name in ("train/lora", "train/own_data")}
WITHOUT_RESULT |= {f"instructblip/eval/{name}" for name in ("aokvqa", "aokvqa_mc", "ocr_vqa")}
OWN_FILES = {"caption", "classification", "instruct", "pairs", "retrieval", "vqa"}
OWN_FILES |= {f"{name}_instruct" for name in ("caption", "classification", "vqa")}


def name_of(path: Path) -> str:
    return path.relative_to(PROJECTS).with_suffix("").as_posix()


def of_family(paths: list[Path], family: str) -> list[Path]:
    return [path for path in paths if name_of(path).startswith(f"{family}/")]


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


@pytest.mark.slow
@recipes
def test_recipe_resolves_to_a_config_that_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    cfg = config(path)
    again = from_text(tmp_path, **cfg.to_dict())
    assert again.to_dict() == cfg.to_dict()


def test_every_shared_file_is_used() -> None:
    used = {Path(layer.source).resolve() for path in RECIPES for layer in load_with_bases(path)}
    scripts = "".join(path.read_text() for path in (ROOT / "run_scripts").glob("*.sh"))
    assert {path.resolve() for path in YAMLS if path.name not in scripts} <= used


@pytest.mark.parametrize(("arch", "kind"), MODEL_TYPES, ids=map("/".join, MODEL_TYPES))
def test_model_type_resolves(arch: str, kind: str, tmp_path: Path) -> None:
    cfg = from_text(tmp_path, model={"arch": arch, "model_type": kind}, run={"task": "captioning"})
    assert (cfg.model["arch"], cfg.model["model_type"]) == (arch, kind)
    assert {"vis_processor", "text_processor"} == cfg.preprocess.keys()


@pytest.mark.slow
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
@pytest.mark.slow
def test_recipe_builds_its_parts(path: Path) -> None:
    cfg = config(path)
    registry.get_task_class(cfg.run.task)(**cfg.task)
    registry.get_runner_class(cfg.run.runner)
    builders = {name: make_builder(cfg, name) for name in cfg.datasets}
    check_splits(wanted_splits(cfg.run), {name: builder.splits() for name, builder in builders.items()})
    for section in cfg.datasets.values():
        build_processors(section)


@pytest.mark.slow
@recipes
def test_recipe_builds_its_model_and_its_images_fit(path: Path) -> None:
    cfg = config(path)
    weights = MODEL_KEYS.keys() - {"arch"}
    model = meta_model(json.dumps({key: value for key, value in cfg.model.items() if key not in weights}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 1e5
    for section in cfg.datasets.values():
        sizes = {block["image_size"] for block in section["vis_processor"].values()}
        assert sizes == {model.visual_encoder.image_size}


@cache
def meta_model(section: str) -> nn.Module:
    """The model of a `model` section, as JSON: many recipes share theirs."""
    return full_size.meta_model(json.loads(section))


@published
def test_finetuning_starts_from_pretrained_weights_and_evaluation_from_finetuned(path: Path) -> None:
    model = config(path).model
    chosen = chosen_weights(model)
    if path.stem == "pretrain_14m" or path.stem.startswith("pretrain_stage1"):
        assert chosen is None
        assert ("init_vit" in model, "init_text" in model) == (model["arch"] == "blip_pretrain", True)
    else:
        assert chosen is not None
        zeroshot = "zeroshot" in path.stem or name_of(path).startswith("instructblip/")
        assert chosen[0] == ("pretrained" if path in TRAIN or zeroshot else "finetuned")
        assert chosen[1].startswith("https://storage.googleapis.com/sfr-vision-language-research/")
    assert config(path).run.evaluate is (path in EVAL)


def test_several_training_sets_are_mixed_as_in_the_papers() -> None:
    """BLIP and BLIP-2 (and LAVIS) concatenate their sets; InstructBLIP draws one for each step (section 2.4)."""
    mixed = {name_of(path): config(path) for path in TRAIN}
    found = {name: cfg.run.mixing for name, cfg in mixed.items() if len(cfg.datasets) > 1}
    stages = ["stage1", "stage1_paper", "stage2", "stage2_paper", "stage2_flant5xl"]
    concat = ["blip/train/pretrain_14m", "blip/train/vqav2_ft", "blip2/train/vqav2_ft"]
    concat += [f"blip2/train/pretrain_{stage}" for stage in stages]
    models = ["instruct_flant5xl", "instruct_flant5xxl", "instruct_vicuna7b", "instruct_vicuna13b", "lora"]
    assert found == dict.fromkeys(concat, "concat") | {f"instructblip/train/{name}": "per_step" for name in models}


STAGE1 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained.pth"


@pytest.mark.parametrize("path", of_family(TRAIN, "blip2"), ids=name_of)
def test_blip2_trains_what_the_paper_trains(path: Path) -> None:
    """The image encoder in finetuning only (sections 4.2 to 4.4); stage 2, and what VQA's Q-Former reads text with, go
    on from stage 1.
    """
    model = config(path).model
    finetunes = path.stem.endswith("_ft") or "_ft_" in path.stem
    assert model["freeze_vit"] is not finetunes
    assert model["vit_precision"] == ("fp32" if finetunes else "auto")
    assert (model.get("pretrained") == STAGE1) == path.stem.startswith(("pretrain_stage", "retrieval"))
    bert = "bert-base-uncased" if path.stem.startswith("pretrain_stage1") else None
    assert model.get("init_text") == (STAGE1 if path.stem == "vqav2_ft" else bert)
    assert model.get("qformer_text_input", False) == (path.stem == "vqav2_ft")


# What the sources say: BLIP's section 4.1 and table 14; LAVIS's YAMLs for the two that the paper has not.
# BLIP-2's section 3.4 and tables 7 to 9; LAVIS's YAMLs for its own two stages.
# recipe: batch, learning rate, last learning rate, weight decay, epochs or steps, pixels
SETTINGS = {
    "blip/train/pretrain_14m": (2880, 3e-4, 1e-6, 0.05, 20, 224),
    "blip/train/caption_coco_ft": (256, 1e-5, 0, 0.05, 5, 384),
    "blip/train/caption_coco_large_ft": (256, 2e-6, 0, 0.05, 5, 384),
    "blip/train/vqav2_ft": (256, 2e-5, 0, 0.05, 10, 480),
    "blip/train/okvqa_ft": (256, 3e-5, 1e-5, 0.02, 7, 480),
    "blip/train/aokvqa_ft": (128, 2e-5, 1e-5, 0.02, 7, 480),
    "blip/train/retrieval_coco_ft": (256, 1e-5, 0, 0.05, 6, 384),
    "blip/train/retrieval_flickr_ft": (256, 1e-5, 0, 0.05, 6, 384),
    "blip/train/nlvr_ft": (256, 3e-5, 0, 0.05, 15, 384),
    "blip/train/snli_ve_ft": (256, 2e-5, 0, 0.05, 10, 384),
    "blip2/train/pretrain_stage1": (1600, 1e-4, 1e-5, 0.05, 10, 224),
    "blip2/train/pretrain_stage1_paper": (1680, 1e-4, 1e-5, 0.05, 250_000, 224),
    "blip2/train/pretrain_stage2": (1024, 1e-4, 1e-5, 0.05, 10, 224),
    "blip2/train/pretrain_stage2_paper": (1920, 1e-4, 5e-5, 0.05, 80_000, 224),
    "blip2/train/pretrain_stage2_flant5xl": (1520, 1e-4, 5e-5, 0.05, 80_000, 224),
    "blip2/train/caption_coco_ft": (256, 1e-5, 0, 0.05, 5, 364),
    "blip2/train/caption_coco_ft_flant5xl": (256, 1e-5, 0, 0.05, 5, 364),
    "blip2/train/vqav2_ft": (128, 1e-5, 0, 0.05, 5, 490),
    "blip2/train/retrieval_coco_ft": (224, 1e-5, 0, 0.05, 5, 364),
}
# recipe: first learning rate, steps of warm-up, beta2, layer-wise decay
BLIP2_SETTINGS = {
    "pretrain_stage1": (1e-6, 5000, 0.999, 1.0),
    "pretrain_stage1_paper": (1e-6, 2000, 0.98, 1.0),
    "pretrain_stage2": (1e-6, 2000, 0.999, 1.0),
    "pretrain_stage2_paper": (1e-6, 2000, 0.98, 1.0),
    "pretrain_stage2_flant5xl": (1e-6, 2000, 0.98, 1.0),
    "caption_coco_ft": (1e-8, 1000, 0.999, 1.0),
    "caption_coco_ft_flant5xl": (1e-8, 1000, 0.999, 1.0),
    "vqav2_ft": (1e-8, 1000, 0.999, 0.95),
    "retrieval_coco_ft": (1e-8, 1000, 0.999, 0.95),
}


@pytest.mark.parametrize("path", of_family(TRAIN, "blip") + of_family(TRAIN, "blip2"), ids=name_of)
def test_training_has_its_sources_settings(path: Path) -> None:
    cfg = config(path)
    processes, per_process = map(int, re.search(r"(\d+) processes x (\d+)", path.read_text()).groups())
    assert per_process == cfg.run.batch_size_train * cfg.run.accum_grad_iters
    run = cfg.run
    values = (run.init_lr, run.min_lr, run.weight_decay, run.max_iters or run.max_epoch, cfg.model["image_size"])
    assert (processes * per_process, *values) == SETTINGS[name_of(path)]
    assert cfg.model.get("queue_size", 0) % (processes * per_process) == 0
    if cfg.model["arch"].startswith("blip2"):
        more = (run.warmup_lr, run.warmup_steps, run.beta2, run.lr_layer_decay)
        assert more == BLIP2_SETTINGS[path.stem]
        assert {block["name"] for block in processors(cfg, "vis_processor", "train")} == {"blip2_image_train"}


def processors(cfg: Config, kind: str, split: str) -> list[dict[str, Any]]:
    """The processor blocks that the datasets of a recipe use."""
    return [section[kind][split] for section in cfg.datasets.values()]


@pytest.mark.parametrize("path", of_family(EVAL, "blip"), ids=name_of)
def test_evaluation_follows_blips_protocol(path: Path) -> None:
    task = config(path).task
    if config(path).run.task == "captioning":
        assert (task["num_beams"], task["max_len"], task["min_len"]) == (3, 20, 5)
        assert task.get("repetition_penalty", 1.0) == (1.1 if path.stem == "nocaps" else 1.0)
    if config(path).run.task in ("vqa", "aok_vqa"):
        assert (task["inference_method"], task["num_ans_candidates"]) == ("rank", 128)
    if config(path).run.task == "retrieval":
        assert task["k_test"] == (256 if path.stem == "ret_coco" else 128)
    assert config(path).run.precision == "fp32"


@pytest.mark.parametrize("path", of_family(TRAIN + EVAL, "blip2"), ids=name_of)
def test_decoding_follows_blip2s_protocol(path: Path) -> None:
    """Section 4.1 and tables 7, 8; every setting stands in the YAML, so that no default is inherited by accident."""
    cfg = config(path)
    if cfg.run.task == "captioning":
        penalties = {"length_penalty": 1.0, "repetition_penalty": 1.0}
        assert cfg.task.keys() - {"metrics", "annotation_file"} == {"num_beams", "max_len", "min_len", *penalties}
        assert cfg.task.items() >= {"num_beams": 5, "max_len": 30, "min_len": 8, **penalties}.items()
        assert cfg.model["prompt"] == "a photo of"
    if cfg.run.task in ("vqa", "gqa"):
        short = cfg.model["arch"] == "blip2_t5" and path in EVAL
        prompt = "Question: {} Short answer:" if short else "Question: {} Answer:"
        lengths = {"num_beams": 5, "max_len": 10, "min_len": 1, "length_penalty": -1.0}
        assert cfg.task == {"inference_method": "generate", "prompt": prompt, **lengths}
        assert {block["name"] for block in processors(cfg, "text_processor", "eval")} == {"blip_question"}
    if cfg.run.task == "retrieval":
        assert cfg.task == {"k_test": 128}


def test_blip2s_captions_are_trained_behind_their_prompt() -> None:
    for path in of_family(TRAIN, "blip2"):
        prompts = {block.get("prompt") for block in processors(config(path), "text_processor", "train")}
        assert prompts == ({"a photo of "} if path.stem.startswith("caption") else {None})


# Published results, as data and in the documentation


@pytest.mark.slow
@published
def test_expected_values_are_what_a_recipe_can_measure(path: Path) -> None:
    cfg = config(path)
    assert bool(cfg.expected) == (name_of(path) not in WITHOUT_RESULT)
    check_expected(cfg)
    own = {(str(entry), entry.recipe, entry.source, str(entry.changes())) for entry in cfg.expected}
    assert len(own) == len(cfg.expected)
    assert path in TRAIN or all(entry.num_samples for entry in cfg.expected)
    for entry in cfg.expected:
        assert 1 < entry.value < 200  # percent
        assert re.match(r"(BLIP|BLIP-2|InstructBLIP), tables? \d|LAVIS, (docs|issue|projects)", entry.source)
        if entry.recipe is not None:  # `check_expected` reads the settings of the others
            Config.from_layers([*load_with_bases(path), entry.layer()], source=str(path))
            other = config(path.parents[1] / f"{entry.recipe}.yaml")
            assert str(entry) in {str(own) for own in other.expected}


@published
def test_a_recipe_does_not_inherit_its_bases_results(path: Path) -> None:
    layers = load_with_bases(path)
    if any("expected" in layer.tree for layer in layers):
        assert "expected" in layers[-1].tree


def rows_of_folder(folder: Path) -> list[str]:
    """The page's table rows below the heading that names the recipes' folder."""
    start = re.escape(f"`{folder.relative_to(ROOT).as_posix()}/`")
    (section,) = re.findall(rf"^## .*{start}.*\n((?:(?!## ).*\n)*)", RECIPES_PAGE.read_text(), re.M)
    return re.findall(r"^\| `.*", section, re.M)


@published
def test_the_page_lists_the_recipe_with_its_results(path: Path) -> None:
    rows = [row for row in rows_of_folder(path.parent) if row.startswith(f"| `{path.stem}` |")]
    assert len(rows) == 1
    assert not [entry for entry in config(path).expected or [] if f"{entry.value:g}" not in rows[0]]
    if path in TRAIN:
        processes, per_process = re.search(r"(\d+) processes x (\d+)", path.read_text()).groups()
        assert f"| {processes} x {per_process} |" in rows[0]


@pytest.mark.slow
def test_the_pages_commands_are_valid_and_it_lists_nothing_else() -> None:
    text = RECIPES_PAGE.read_text()
    folders = {path.parent for path in TRAIN + EVAL}
    listed = {(folder, re.match(r"\| `(\w+)` \|", row)[1]) for folder in folders for row in rows_of_folder(folder)}
    assert listed == {(path.parent, path.stem) for path in TRAIN + EVAL}
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


def writes_and_ranks(model: nn.Module, samples: dict[str, Any]) -> None:
    captions(model, samples)
    ranks(model, samples)


def query_features(model: nn.Module, samples: dict[str, Any]) -> None:
    image, both = model.extract_features(samples, mode="image"), model.extract_features(samples)
    assert image["image_embeds"].shape == both["multimodal_embeds"].shape == (2, 8, 128)
    assert image["image_embeds_proj"].shape == (2, 8, 64)
    assert model.extract_features(samples, mode="text")["text_embeds_proj"].shape[::2] == (2, 64)


def writes_and_answers(model: nn.Module, samples: dict[str, Any]) -> None:
    captions(model, samples)
    answers(model, samples)


def answers_and_chooses(model: nn.Module, samples: dict[str, Any]) -> None:
    writes_and_answers(model, samples)
    order = model.predict_class({**samples, "prompt": "{}"}, ["yes", "no", "a blue square"])
    assert [sorted(row) for row in order.tolist()] == [[0, 1, 2]] * 2


Answer = Callable[[nn.Module, dict[str, Any]], None]
PAIR = ("image", "text_input")
# architecture: keys of the samples it trains (or answers) on, whether it trains, how it answers
TINY: dict[str, tuple[tuple[str, ...], bool, Answer | None]] = {
    "blip2": ((*PAIR, "image_id"), True, writes_and_ranks),
    "blip2_feature_extractor": (PAIR, False, query_features),
    "blip2_image_text_matching": (PAIR, False, match),
    "blip2_llm": (PAIR, True, writes_and_answers),
    "blip2_opt": (PAIR, True, writes_and_answers),
    "blip2_t5": (PAIR, True, writes_and_answers),
    "blip2_t5_instruct": ((*PAIR, "text_output"), True, answers_and_chooses),
    "blip2_vicuna": (PAIR, True, writes_and_answers),
    "blip2_vicuna_instruct": ((*PAIR, "text_output"), True, answers_and_chooses),
    "blip_caption": (PAIR, True, captions),
    "blip_classification": ((*PAIR, "label"), True, classes),
    "blip_feature_extractor": (PAIR, False, features),
    "blip_image_text_matching": (PAIR, False, match),
    "blip_nlvr": (("image0", "image1", "text_input", "label"), True, classes),
    "blip_pretrain": (PAIR, True, None),
    "blip_retrieval": ((*PAIR, "image_id"), True, ranks),
    "blip_vqa": ((*PAIR, "answer", "weight", "n_answers"), True, answers),
}
ANSWERING = ("generate", "predict", "predict_answers", "compute_sim_matrix", "extract_features")


def batch(vis: Callable[[Any], Tensor], text: Callable[[str], str]) -> dict[str, Any]:
    """Two synthetic samples with every key that a model may read."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), dtype=np.uint8)
    image = torch.stack([vis(Image.fromarray(pixels)) for pixels in noise])
    texts = [text("A red circle."), text("Two blue squares above a green triangle!")]
    columns = {"text_input": texts, "image_id": torch.tensor([0, 1]), "label": torch.tensor([1, 0])}
    columns |= {"answer": ["red", "a circle", "two"], "weight": torch.tensor([0.6, 0.4, 1])}
    columns |= {"n_answers": torch.tensor([2, 1]), "text_output": ["a circle", "two"]}
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
    if any(hasattr(model, method) for method in ANSWERING) and model.__class__.__name__ != "BlipPretrain":
        assert answer is not None or not trains
    if answer is not None:
        with torch.no_grad():
            answer(model.eval(), samples)
