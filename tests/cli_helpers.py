"""Tiny recipes of every task on `shapes`, and train.py / evaluate.py as functions of this process or as processes.

Everything is as small as it can be (32 wide, two layers, ten image tokens, some dozens of pictures): what is tested is
that the parts fit, not that they learn.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from ports import free_port

from lavis_lite.cli import main as cli
from lavis_lite.common import checkpoint
from lavis_lite.common.config.files import Layer, resolve
from lavis_lite.common.config.schema import Checker, schema_of
from lavis_lite.common.config.sections import model_arguments
from lavis_lite.common.config.zoo import model_layers
from lavis_lite.common.registry import registry

ROOT = Path(__file__).parents[1]

SIZES: dict[str, Any] = {
    "model_type": "tiny",
    "vit": {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
    "med": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64},
}
NO_DROPOUT = {"model": {"med": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}}
SHAPES: dict[str, Any] = {
    "num_train": 24,
    "num_val": 6,
    "num_test": 7,
    "colors": 4,
    "shapes": 3,
    "max_objects": 2,
    "gallery_size": 7,
    "questions_per_image": 2,
}
RUN: dict[str, Any] = {
    "batch_size_train": 4,
    "batch_size_eval": 3,
    "max_epoch": 2,
    "max_iters": 6,
    "init_lr": 1e-3,
    "num_workers": 0,
    "log_freq": 1,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "tensorboard": False,
}
MOMENTUM = {"embed_dim": 16, "queue_size": 48}
CAPTIONING = {"task": "captioning", "metrics": ["bleu", "cider"], "max_len": 16}
RETRIEVAL = {"task": "retrieval", "k_test": 4}

RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": {
        "model": {"arch": "blip_pretrain", **MOMENTUM},
        "datasets": {"shapes_pairs": SHAPES},
        "run": {"task": "image_text_pretrain"},
    },
    "caption": {
        "model": {"arch": "blip_caption"},
        "datasets": {
            "shapes_caption": {
                **SHAPES,
                "text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}},
            }
        },
        "run": CAPTIONING,
    },
    "vqa_rank": {
        "model": {"arch": "blip_vqa"},
        "datasets": {"shapes_vqa": SHAPES},
        "run": {"task": "vqa", "inference_method": "rank", "num_ans_candidates": 6},
    },
    "vqa_generate": {
        "model": {"arch": "blip_vqa"},
        "datasets": {"shapes_vqa": SHAPES},
        "run": {"task": "vqa", "inference_method": "generate", "max_len": 5},
    },
    "retrieval": {
        "model": {"arch": "blip_retrieval", "negative_all_rank": True, **MOMENTUM},
        "datasets": {"shapes_retrieval": SHAPES},
        "run": RETRIEVAL,
    },
    "nlvr": {
        "model": {"arch": "blip_nlvr"},
        "datasets": {"shapes_nlvr": SHAPES},
        "run": {"task": "multimodal_classification"},
    },
    "classification": {
        "model": {"arch": "blip_classification", "num_classes": 3},
        "datasets": {"classification": "generated"},  # `project` fills it in
        "run": {"task": "multimodal_classification"},
    },
}
RESULT_FILES = {
    "pretrain": [],
    "caption": ["{}_captions.json"],
    "vqa_rank": ["{}_vqa.json"],
    "vqa_generate": ["{}_vqa.json"],
    "retrieval": ["{}_retrieval.json"],
    "nlvr": ["{}_predictions.json"],
    "classification": ["{}_predictions.json"],
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, dictionaries merged."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def project(folder: Path, name: str, *changes: Mapping[str, Any]) -> Path:
    """Writes the YAML of a recipe with some changes (None takes a dataset out); its runs go to `folder/output`."""
    recipe = merged(RECIPES[name], {"model": merged(SIZES, RECIPES[name]["model"])})
    recipe["run"] = {**RUN, "output_dir": str(folder / "output"), **recipe["run"]}
    if recipe["datasets"] == {"classification": "generated"}:
        recipe["datasets"] = {"classification": classification_set(folder)}
    for change in changes:
        recipe = merged(recipe, change)
    recipe["datasets"] = {name: body for name, body in recipe["datasets"].items() if body is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def user_set(folder: Path, records: Mapping[str, Sequence[Mapping[str, Any]]], **more: Any) -> dict[str, Any]:
    """The section of a dataset of the user's own: one annotation file a split, absolute image paths."""
    annotations = {}
    for split, entries in records.items():
        path = folder / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(entries), ensure_ascii=False), encoding="utf-8")
        annotations[split] = {"storage": str(path)}
    eye = {"name": "blip_image_eval", "image_size": 48}
    return {"build_info": {"annotations": annotations}, "vis_processor": {"train": eye, "eval": eye}, **more}


def pictures(folder: Path, count: int) -> list[str]:
    """Paths of `count` little one-coloured pictures."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"picture{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (48, 48), (40 * i % 256, 90 * i % 256, 255 - 10 * i)).save(path)
    return [str(path) for path in paths]


def classification_set(folder: Path) -> dict[str, Any]:
    """Twelve pictures with one of three named classes, for training and evaluation alike."""
    classes = ["contradiction", "neutral", "entailment"]
    paths = pictures(folder / "classes", 12)
    records = [
        {"image": path, "sentence": f"a {'red' if i % 2 else 'blue'} circle", "label": classes[i % 3]}
        for i, path in enumerate(paths)
    ]
    splits = {"train": records, "val": records[:5], "test": records[5:]}
    return user_set(folder / "classes", splits, classes=classes)


def dialog_set(folder: Path) -> dict[str, Any]:
    """Eight questions about pictures, each with three candidates, for training and evaluation alike."""
    records = [
        {"image": path, "caption": "a picture", "history": "", "question": "is it red", "question_id": f"{i}_1"}
        | {"candidates": ["yes", "no", "two"], "label": i % 3}
        for i, path in enumerate(pictures(folder / "dialogs", 8))
    ]
    return user_set(folder / "dialogs", {"train": records, "val": records})


def section(name: str, **changes: Any) -> dict[str, Any]:
    """The checked `model` section of a recipe, or of the architecture `name`, at the tests' sizes."""
    own = RECIPES[name]["model"] if name in RECIPES else {"arch": name}
    layers = model_layers(own["arch"], "tiny")
    takes = schema_of(registry.get_model_class(own["arch"]))[0]
    sizes = {key: value for key, value in SIZES.items() if key == "model_type" or key in takes}
    tree = resolve([*layers, Layer("test", {"model": merged(merged(sizes, own), changes)})])
    return model_arguments(tree["model"], Checker(layers))


def build(name: str, **changes: Any) -> Any:
    """The model of `section(name, **changes)` with seeded random weights, or those that it names."""
    arguments = section(name, **changes)
    torch.manual_seed(0)
    return registry.get_model_class(arguments["arch"]).from_config(arguments)


def train(path: Path, *options: str, job: str | None = "job", flags: Sequence[str] = ()) -> int:
    """train.py in this process; the exit code."""
    named = ["--job-id", job] if job else []
    return _enter(cli.train_main, ["--cfg-path", str(path), *named, *flags], options)


def evaluate(
    path: Path,
    *options: str,
    job: str | None = "evaluation",
    weights: Path | None = None,
    flags: Sequence[str] = (),
) -> int:
    """evaluate.py in this process; the exit code."""
    named = [*(["--checkpoint", str(weights)] if weights else []), *(["--job-id", job] if job else [])]
    return _enter(cli.evaluate_main, ["--cfg-path", str(path), *named, *flags], options)


def _enter(main: Any, argv: list[str], options: Sequence[str]) -> int:
    try:
        main([*argv, "--options", *options] if options else argv)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the entry point did not end the process")


def process(script: str, *argv: str, world: int = 0, **environment: str) -> subprocess.Popen[str]:
    """`script` in a process of its own, or under torchrun in `world` of them; stdout and stderr are one pipe."""
    start = [sys.executable, str(script)]
    if world:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={free_port()}"]
        start = [sys.executable, *launcher, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [*start, *argv], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def log(job_dir: Path) -> list[dict[str, Any]]:
    """The lines of a job's log.txt."""
    return [json.loads(line) for line in (job_dir / "log.txt").read_text(encoding="utf-8").splitlines()]


def steps(job_dir: Path) -> list[dict[str, Any]]:
    """The log's lines of training steps."""
    return [row for row in log(job_dir) if "loss" in row]


def metrics(job_dir: Path, split: str) -> dict[str, Any]:
    """The last metrics of a split in a job's log."""
    return [row["metrics"] for row in log(job_dir) if row.get("split") == split][-1]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's state_dict."""
    return checkpoint.find_state_dict(checkpoint.load(path))


def assert_same_state(first: Any, second: Any, *, where: str = "") -> None:
    """Every tensor bit for bit and every other value equal, in nested containers."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same_state(first[key], second[key], where=f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_state(a, b, where=f"{where}[{i}]")
    else:
        assert first == second, where
