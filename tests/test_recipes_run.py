"""Every recipe of BLIP and BLIP-2 runs with a tiny model on generated data: evaluations with --limit, BLIP's trainings
for two steps. (BLIP-2's trainings are in test_blip2_recipes.py, all of InstructBLIP in test_instructblip_recipes.py.)
"""

import json
from pathlib import Path

import cli_helpers
import pytest
from test_recipes import EVAL, TRAIN, config, name_of, of_family

from lavis_lite.common.config.config import Config

DATA = {
    "captioning": "shapes_caption",
    "vqa": "shapes_vqa",
    "gqa": "shapes_vqa",
    "aok_vqa": "shapes_vqa",
    "retrieval": "shapes_retrieval",
    "image_text_pretrain": "shapes_pairs",
    "multimodal_classification": "shapes_nlvr",
}
SHAPES = "{num_train: 8, num_val: 3, num_test: 3, colors: 3, shapes: 3, max_objects: 2, gallery_size: 3}"
FEW = {"batch_size_train": 4, "batch_size_eval": 2, "num_workers": 0, "log_freq": 1, "precision": "fp32"}


def tiny(cfg: Config, folder: Path) -> list[str]:
    """Options that take the tiny type of the recipe's architecture and generated data, all else as it is."""
    model = {"model_type": "tiny", "image_size": 48, "pretrained": "null", "init_vit": "null", "init_text": "null"}
    model |= {"load_pretrained": "false"} | ({"apply_lemmatizer": "false"} if "apply_lemmatizer" in cfg.model else {})
    options = [f"model.{key}={value}" for key, value in model.items()]
    options += [f"run.{key}={value}" for key, value in {**FEW, "output_dir": folder}.items()]
    options += ["run.metrics=[bleu]", "run.annotation_file=null"] * (cfg.run.task == "captioning")
    if cfg.model["arch"] == "blip_visdial":
        section = cli_helpers.dialog_set(folder)
        return [*options, "datasets.visdial_options=false", f"datasets.visual_dialog={json.dumps(section)}"]
    if "classification" in cfg.run.task and "nlvr" not in cfg.datasets:
        section = cli_helpers.classification_set(folder)
        section["build_info"]["images"] = {"storage": str(folder)}
        options += ["datasets.snli_ve=false"] * ("snli_ve" in cfg.datasets)
        return [*options, f"datasets.classification={json.dumps(section)}"]
    return [*options, *(f"datasets.{name}=false" for name in cfg.datasets), f"datasets.{DATA[cfg.run.task]}={SHAPES}"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*of_family(EVAL, "blip"), *of_family(EVAL, "blip2")], ids=name_of)
def test_every_evaluation_runs_with_a_limit(path: Path, tmp_path: Path) -> None:
    cfg = config(path)
    assert cli_helpers.evaluate(path, *tiny(cfg, tmp_path), flags=["--limit", "2", "--check"]) == 3
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert set(found["num_samples"].values()) == {2}
    assert {row["verdict"] for row in found["verdict"]} <= {"not comparable", "by server"}
    splits = {entry.split for entry in cfg.expected if entry.recipe is None}
    assert {row["split"] for row in found["verdict"]} == splits


@pytest.mark.slow
@pytest.mark.parametrize("path", of_family(TRAIN, "blip"), ids=name_of)
def test_blips_trainings_take_two_steps(path: Path, tmp_path: Path) -> None:
    options = [*tiny(config(path), tmp_path), "run.max_epoch=1", "model.queue_size=16"]
    if config(path).model["arch"] not in ("blip_pretrain", "blip_retrieval"):
        options.remove("model.queue_size=16")
    assert cli_helpers.train(path, *options) == 0
    assert len(cli_helpers.steps(tmp_path / "job")) >= 2
    assert (tmp_path / "job/checkpoint_best.pth").is_file()
