"""BLIP-2's training recipes one after another, at tiny size on `shapes`: each starts from what the one before it left.

As with the published weights, the frozen image encoder and language model lie in files of their own and are in no
checkpoint; finetuning then trains the encoder.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import cli_helpers
import full_size
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_lite.nn.encoders import build_encoder
from lavis_lite.nn.llm_loading import load_language_model

RECIPES = cli_helpers.ROOT / "projects" / "blip2" / "train"
SHAPES = "{num_train: 12, num_val: 4, num_test: 4, colors: 3, shapes: 3, max_objects: 2, gallery_size: 4}"
WEB_DATA = ("conceptual_caption_3m", "conceptual_caption_12m", "sbu_caption")
OTHER_DATA = ("coco_caption", "vg_caption", "coco_vqa", "vg_vqa", "gqa", "coco_retrieval", "flickr30k", *WEB_DATA)
MODEL = {"model_type": "tiny", "image_size": 48, "init_text": "null"}
RUN = {"max_iters": 2, "max_epoch": 1, "batch_size_train": 4, "batch_size_eval": 4, "num_workers": 0, "log_freq": 1}
# recipe: its language model, its data at tiny size, and the recipe whose weights it goes on with
CHAIN = {
    "pretrain_stage1": (None, "shapes_pairs", None),
    "pretrain_stage1_paper": (None, "shapes_pairs", None),
    "pretrain_stage2": ("opt", "shapes_pairs", "pretrain_stage1"),
    "pretrain_stage2_paper": ("opt", "shapes_pairs", "pretrain_stage1_paper"),
    "pretrain_stage2_flant5xl": ("t5", "shapes_pairs", "pretrain_stage1"),
    "caption_coco_ft": ("opt", "shapes_caption", "pretrain_stage2"),
    "caption_coco_ft_flant5xl": ("t5", "shapes_caption", "pretrain_stage2_flant5xl"),
    "vqav2_ft": ("opt", "shapes_vqa", "pretrain_stage2"),
    "retrieval_coco_ft": (None, "shapes_retrieval", "pretrain_stage1"),
}
pytestmark = pytest.mark.usefixtures("shapes_data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs go, with the weights of the parts that are frozen."""
    folder = tmp_path_factory.mktemp("blip2")
    torch.manual_seed(0)
    save_file(build_encoder("eva_tiny", image_size=48).state_dict(), folder / "encoder.safetensors")
    for name in ("opt", "t5"):
        model, tokenizer = load_language_model(f"tiny_{name}", dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def options(name: str, folder: Path) -> list[str]:
    """What makes the recipe tiny."""
    language_model, dataset, before = CHAIN[name]
    model: dict[str, Any] = {**MODEL, "vit_weights": folder / "encoder.safetensors"}
    run: dict[str, Any] = {**RUN, "output_dir": folder / name}
    if finetunes(name):
        model["freeze_vit"] = "false"  # as the published types say
    if name.startswith("caption"):
        model["prompt"], run["metrics"] = "a photo of", "[bleu]"
    if language_model:
        model[f"{language_model}_model"] = folder / language_model
    if before:
        model["pretrained"] = folder / before / "job" / "checkpoint_last.pth"
    if name == "vqav2_ft":
        model["init_text"] = folder / "pretrain_stage1" / "job" / "checkpoint_last.pth"
    own = [f"model.{key}={value}" for key, value in model.items()] + [
        f"run.{key}={value}" for key, value in run.items()
    ]
    return [*own, *(f"datasets.{other}=false" for other in OTHER_DATA), f"datasets.{dataset}={SHAPES}"]


def finetunes(name: str) -> bool:
    return "_ft" in name


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_recipe_trains_from_what_the_one_before_it_left(name: str, folder: Path) -> None:
    assert cli_helpers.train(RECIPES / f"{name}.yaml", *options(name, folder)) == 0
    job = folder / name / "job"
    assert [row["step"] for row in cli_helpers.steps(job)] == [1, 2]
    saved = cli_helpers.weights(job / "checkpoint_last.pth")
    assert not [key for key in saved if key.startswith(("opt_model.", "t5_model."))]
    encoder = {key.removeprefix("visual_encoder."): t for key, t in saved.items() if key.startswith("visual_encoder.")}
    if not finetunes(name):
        assert not encoder
        return
    start = load_file(folder / "encoder.safetensors")
    assert encoder.keys() == start.keys()
    moved = {key: float((tensor - start[key]).abs().max()) for key, tensor in encoder.items()}
    assert 0 < max(moved.values()) < 1e-4  # two steps of warm-up away from the file's weights


@pytest.mark.parametrize(
    ("name", "dataset", "metric"),
    [
        ("caption_coco", "shapes_caption", "Bleu_4"),
        ("vqav2_zeroshot_opt", "shapes_vqa", "overall"),
        ("gqa_zeroshot_flant5xl", "shapes_vqa", "overall"),
        ("ret_flickr", "shapes_retrieval", "txt_r1"),
    ],
)
@pytest.mark.slow
def test_evaluation_recipe_evaluates(name: str, dataset: str, metric: str, tmp_path: Path) -> None:
    """With random weights; the settings of all recipes of a task are the same kind."""
    settings = [f"model.{key}={value}" for key, value in MODEL.items()]
    settings += [f"run.output_dir={tmp_path}", "run.num_workers=0", "run.precision=auto"]  # OPT's is fp16, on a GPU
    settings += ["run.metrics=[bleu]"] * (metric == "Bleu_4")
    settings += [f"datasets.{other}=false" for other in OTHER_DATA] + [f"datasets.{dataset}={SHAPES}"]
    assert cli_helpers.evaluate(RECIPES.parent / "eval" / f"{name}.yaml", *settings) == 0
    (row,) = [row for row in cli_helpers.log(tmp_path / "evaluation") if "metrics" in row]
    assert 0 <= row["metrics"][metric] <= 100


def test_every_training_recipe_is_in_the_chain() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(CHAIN)


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("pretrain_stage1", "blip2__pretrain"),
        ("pretrain_stage2_flant5xl", "blip2_t5__pretrain_flant5xl"),
        ("caption_coco_ft", "blip2_opt__caption_coco_opt2.7b"),
        ("retrieval_coco_ft", "blip2__coco"),
    ],
)
@pytest.mark.slow
def test_dry_run_counts_what_the_original_had(
    name: str, manifest: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bert = [f"model.tokenizer={full_size.TINY_HF / 'bert'}", "model.qformer={vocab_size: 30523}"]
    shapes = f"datasets.{CHAIN[name][1]}"
    data = [f"datasets.{other}=false" for other in OTHER_DATA] + [f"{shapes}={SHAPES}"]
    data += [f"{shapes}.vis_processor.{split}.image_size=${{model.image_size}}" for split in ("train", "eval")]
    run = ["run.batch_size_train=4", "run.num_workers=0", f"run.output_dir={tmp_path}"]
    with full_size.hub_stand_ins():
        assert cli_helpers.train(RECIPES / f"{name}.yaml", *bert, *data, *run, job=None, flags=["--dry-run"]) == 0
    found = json.loads(gzip.decompress((full_size.REFERENCE / "manifests" / f"{manifest}.json.gz").read_bytes()))
    out = capsys.readouterr().out
    assert f"parameters  {found['n_params']:,} in all, {found['n_trainable']:,} trainable" in out
    assert not list(tmp_path.iterdir())
