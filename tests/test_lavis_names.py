"""LAVIS's Python names, and classes written after its tutorials, with only the package's name changed."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from lavis_lite.common.config.config import Config
from lavis_lite.common.lavis_names import MODULES
from lavis_lite.common.registry import registry
from lavis_lite.models import model_zoo


@pytest.mark.parametrize("module", MODULES)
def test_every_name_leads_somewhere(module: str) -> None:
    found = importlib.import_module(f"lavis_lite.{module}")
    assert found.__all__ == sorted(MODULES[module])
    for name in MODULES[module]:
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = found.Nothing


def test_names_are_those_of_the_registered_classes() -> None:
    from lavis_lite.models.blip_models.blip_caption import BlipCaption as SameCaption
    from lavis_lite.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor

    from lavis_lite.models import Blip2Qformer, Blip2T5Instruct, BlipCaption, BlipITM

    own = {"blip_caption": BlipCaption, "blip2": Blip2Qformer, "blip2_t5_instruct": Blip2T5Instruct}
    own |= {"blip_image_text_matching": BlipITM}
    assert {name: registry.get_model_class(name) for name in own} == own
    assert SameCaption is BlipCaption
    assert registry.get_processor_class("blip_caption") is BlipCaptionProcessor
    assert registry.get_processor_class("blip_image_eval") is BlipImageEvalProcessor


def test_importing_the_modules_loads_no_torch() -> None:
    code = (
        "import sys, lavis_lite.datasets.builders, lavis_lite.models.blip_models.blip_vqa, lavis_lite.tasks.base_task\n"
        "import lavis_lite.processors.blip_processors, lavis_lite.tasks, lavis_lite.datasets.datasets.base_dataset\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_zoos_count_and_name_as_in_lavis() -> None:
    from lavis_lite.datasets.builders import dataset_zoo

    assert len(model_zoo) == sum(len(types) for _, types in model_zoo) > len(model_zoo.names())
    assert "coco_caption" in dataset_zoo.get_names()


def test_load_dataset_takes_lavis_s_arguments(tmp_path: Path) -> None:
    from lavis_lite.datasets.builders import load_dataset

    (path,) = cli_helpers.pictures(tmp_path / "images", 1)
    (tmp_path / "all.json").write_text(json.dumps([{"image": Path(path).name, "caption": "a dog"}]))
    info = {"annotations": {"train": {"storage": str(tmp_path / "all.json")}}, "images": {"storage": "coco/images"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"datasets": {"caption": {"build_info": info}}}))
    found = load_dataset("caption", cfg_path=tmp_path / "own.yaml", vis_path=str(tmp_path / "images"))
    assert list(found) == ["train"]
    assert isinstance(found["train"][0]["image"], Image.Image)
    assert found["train"][0]["text_input"] == "a dog"
    with pytest.raises(ValueError, match="data_type: must be one of images, videos, got 'sounds'"):
        load_dataset("caption", tmp_path / "own.yaml", vis_path="x", data_type="sounds")
    assert list(inspect.signature(load_dataset).parameters) == ["name", "cfg_path", "vis_path", "data_type"]


def test_a_processor_builds_one_of_another_size() -> None:
    from lavis_lite.processors import load_processor

    image = Image.new("RGB", (40, 30))
    assert load_processor("blip_image_eval").build(image_size=24)(image).shape == (3, 24, 24)


def test_dist_utils_work_in_a_single_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lavis_lite.common.dist_utils import (
        download_cached_file,
        get_rank,
        get_world_size,
        init_distributed_mode,
        is_main_process,
        main_process,
    )

    args = OmegaConf.create({"device": "cpu", "dist_url": "env://"})
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size) == (False, 0, 1)
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
    assert main_process(lambda number: number + 1)(1) == 2
    (tmp_path / "file.txt").write_text("content")
    assert Path(download_cached_file((tmp_path / "file.txt").as_uri())).read_text() == "content"


def test_the_overlay_is_red_where_attention_is_and_the_image_where_it_is_not() -> None:
    from lavis_lite.common.gradcam import getAttMap

    image = np.full((40, 60, 3), 0.5)
    attention = np.zeros((4, 6))
    attention[:, 3:] = 2.0
    drawn = getAttMap(image, attention, blur=False)
    assert drawn.shape == image.shape
    np.testing.assert_allclose(drawn[20, 5], [0.5, 0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(drawn[20, 55], [0.5, 0.0, 0.0], atol=0.02)  # the dark red at the scale's end
    colours = getAttMap(image, attention, overlap=False)
    np.testing.assert_allclose(colours[20, 5], [0.0, 0.0, 0.5], atol=0.05)
    assert np.abs(np.diff(getAttMap(image, attention)[20], axis=0)).max() < np.abs(np.diff(drawn[20], axis=0)).max()


# Classes after LAVIS's tutorials


TUTORIAL = """
import json, os
import torch
from PIL import Image
from lavis_lite.common.dist_utils import main_process
from lavis_lite.common.registry import registry
from lavis_lite.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis_lite.datasets.datasets.base_dataset import BaseDataset
from lavis_lite.models.base_model import BaseModel
from lavis_lite.processors.base_processor import BaseProcessor
from lavis_lite.tasks.base_task import BaseTask


@registry.register_processor("tutorial_pixels")
class PixelsProcessor(BaseProcessor):
    def __init__(self, size=4):
        self.size = size

    def __call__(self, item):
        pixels = item.resize((self.size, self.size)).convert("L").tobytes()
        return torch.tensor(list(pixels), dtype=torch.float32) / 255

    @classmethod
    def from_config(cls, cfg=None):
        return cls(size=cfg.get("image_size", 8))


class BrightnessDataset(BaseDataset):
    def __init__(self, vis_processor, text_processor, vis_root, ann_paths):
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)

    def __getitem__(self, index):
        ann = self.annotation[index]
        image = self.vis_processor(Image.open(os.path.join(self.vis_root, ann["image"])))
        return {"image": image, "target": ann["brightness"], "instance_id": ann["instance_id"]}


@registry.register_builder("tutorial_brightness")
class BrightnessBuilder(BaseDatasetBuilder):
    train_dataset_cls = BrightnessDataset
    eval_dataset_cls = BrightnessDataset
    DATASET_CONFIG_DICT = {"default": "tutorial_dataset.yaml"}


@registry.register_model("tutorial_linear")
class Linear(BaseModel):
    PRETRAINED_MODEL_CONFIG_DICT = {"base": "tutorial_model.yaml"}

    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def forward(self, samples):
        error = self.layer(samples["image"]).squeeze(1) - samples["target"].float()
        return {"loss": (error**2).mean()}

    @classmethod
    def from_config(cls, cfg):
        model = cls(width=cfg.num_pixels)
        model.load_checkpoint_from_config(cfg)
        return model


@registry.register_task("tutorial_regression")
class RegressionTask(BaseTask):
    def __init__(self, scale, report_metric=True):
        super().__init__()
        self.scale = scale
        self.report_metric = report_metric

    @classmethod
    def setup_task(cls, cfg):
        run_cfg = cfg.run_cfg
        return cls(scale=run_cfg.scale, report_metric=run_cfg.get("report_metric", True))

    def valid_step(self, model, samples):
        return [model(samples)["loss"].item()]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        losses = [{"loss": loss} for loss in val_result]
        self.save_result(result=losses, result_dir=registry.get_path("result_dir"), filename=f"{split_name}_losses")
        return self._report_metrics(val_result)

    @main_process
    def _report_metrics(self, val_result):
        return {"agg_metrics": -self.scale * sum(val_result) / len(val_result), "num": len(val_result)}
"""


def test_classes_after_lavis_s_tutorials_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor, dataset, builder, model and task, whose YAMLs their classes name."""
    for table in registry.tables.values():
        table.names()  # everything of the package is imported before the copy
        monkeypatch.setattr(table, "items", dict(table.items))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lavis_tutorial.py").write_text(TUTORIAL)
    names = cli_helpers.pictures(tmp_path / "images", 6)
    records = [{"image": Path(name).name, "brightness": i / 6} for i, name in enumerate(names)]
    (tmp_path / "all.json").write_text(json.dumps(records))
    annotations = {split: {"storage": str(tmp_path / "all.json")} for split in ("train", "val")}
    info = {"annotations": annotations, "images": {"storage": str(tmp_path / "images")}}
    files = {
        "tutorial_dataset": {"datasets": {"tutorial_brightness": {"data_type": "images", "build_info": info}}},
        "tutorial_model": {"model": {"arch": "tutorial_linear", "num_pixels": 16, "load_pretrained": False}},
    }
    pixels = {"name": "tutorial_pixels", "image_size": 4}
    run = {**cli_helpers.RUN, "task": "tutorial_regression", "runner": "runner_base", "scale": 100, "max_epoch": 1}
    run |= {"batch_size_train": 3, "max_iters": 2, "test_splits": [], "output_dir": str(tmp_path / "output")}
    files["recipe"] = {
        "imports": ["lavis_tutorial"],
        "model": {"arch": "tutorial_linear", "model_type": "base"},
        "datasets": {"tutorial_brightness": {"vis_processor": {"train": pixels, "eval": pixels}}},
        "run": {**run, "valid_splits": ["val"], "train_splits": ["train"]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "recipe.yaml"
    assert cli_helpers.train(path, flags=["--dry-run"], job=None) == 0
    assert cli_helpers.train(path, "run.device=cpu") == 0
    job = tmp_path / "output" / "job"
    assert [row["step"] for row in cli_helpers.steps(job)] == [1, 2]
    metrics = cli_helpers.metrics(job, "val")
    losses = [entry["loss"] for entry in json.loads((job / "result" / "val_losses.json").read_text())]
    assert metrics["num"] == len(losses) == 2  # six samples, three per batch
    assert metrics["agg_metrics"] == pytest.approx(-100 * sum(losses) / 2)
    assert set(cli_helpers.weights(job / "checkpoint_best.pth")) == {"layer.weight", "layer.bias"}


def test_setup_task_is_a_function_too(tmp_path: Path, shapes_data: Path) -> None:
    from lavis_lite import tasks

    cfg = Config.from_file(cli_helpers.project(tmp_path, "caption"))
    task: Any = tasks.setup_task(cfg)
    assert (type(task).__name__, task.max_len) == ("CaptionTask", 16)
    assert cfg.run_cfg.max_len == 16
    assert cfg.run_cfg.get("top_k", 7) == 7
    assert cfg.model_cfg.arch == "blip_caption"
    assert torch.is_tensor(task.build_datasets(cfg)["shapes_caption"]["val"][0]["image"])
