"""Features of another encoder in the place of images: files, batches, masks, and every kind of run."""

import json
import re
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.feature_io import read_features
from lavis_lite.convert.folders import write_folder
from lavis_lite.models import load_model
from lavis_lite.models.base import BaseModel
from lavis_lite.processors import load_processor
from lavis_lite.runners.mixing import join_batches

WIDTH = 16
LLM_ARCHS = ("blip2_opt", "blip2_t5", "blip2_vicuna", "blip2_vicuna_instruct", "blip2_t5_instruct")


def features(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], *, filler: float = 7.0, extra: int = 2) -> dict[str, torch.Tensor]:
    """A batch whose padding is not zero, and longer than need be."""
    longest = max(map(len, rows)) + extra
    image = torch.full((len(rows), longest, WIDTH), filler)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        image[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"image": image, "image_mask": mask}


def tiny(arch: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    return load_model(arch, "tiny_features", is_eval=True, **settings)


# Files


def test_both_kinds_of_files_give_float32(tmp_path: Path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    save_file({"x": torch.tensor(values), "y": torch.ones(1, 3)}, tmp_path / "b.safetensors")
    save_file({"only": torch.tensor(values).bfloat16()}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors#x", "c.safetensors"):
        found = read_features(tmp_path / name)
        assert found.dtype == torch.float32
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_features(tmp_path / "b.safetensors#y").tolist() == [[1, 1, 1]]


BAD = {
    "object": np.array([[1, None]], dtype=object),
    "integers": np.ones((2, 3), dtype=np.int64),
    "flat": np.ones(3, dtype=np.float32),
    "cube": np.ones((1, 2, 3), dtype=np.float32),
    "empty": np.ones((0, 3), dtype=np.float32),
    "nan": np.array([[1, np.nan, 1]], dtype=np.float32),
    "overflow": np.array([[1e300, 0, 0]]),
    "wide": np.ones((2, 4), dtype=np.float32),
    "text": np.array([["a", "b", "c"]]),
    "record": np.zeros(2, dtype=[("x", np.float32)]),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arrays_name_their_file(name: str, tmp_path: Path):
    path = tmp_path / f"{name}.npy"
    np.save(path, BAD[name], allow_pickle=True)
    with pytest.raises(UnreadableSample, match=rf"{name}\.npy"):
        read_features(path, width=3)


@pytest.mark.parametrize("name", ["a.npy", "b.safetensors"])
def test_broken_and_missing_files_name_themselves(name: str, tmp_path: Path):
    for content in (None, b"", b"nonsense that is long enough to hold a header" * 4):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableSample, match=name):
            read_features(tmp_path / name)


def test_a_tensor_of_a_file_is_named(tmp_path: Path):
    save_file({"x": torch.ones(1, 3), "y": torch.ones(1, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(UnreadableSample, match="2 tensors"):
        read_features(tmp_path / "b.safetensors")
    with pytest.raises(UnreadableSample, match=r"'z'.*x, y"):
        read_features(tmp_path / "b.safetensors#z")


def test_the_processor_takes_arrays_of_its_width_only():
    processor = load_processor("features", {"width": 3})
    assert processor(np.ones((2, 3))).dtype == torch.float32
    with pytest.raises(InputError, match=r"width 4.*takes 3"):
        processor(torch.ones(2, 4))
    with pytest.raises(TypeError, match="list"):
        processor([[1.0, 2.0, 3.0]])


# Models


def first_scores(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Numbers that depend on the batch's first sample alone."""
    text = {"text_input": ["a red circle"] * len(batch["image"]), "prompt": "{}"}
    if isinstance(model, BaseModel) and model.llm_prefix:
        return model.class_losses({**batch, **text}, ["red", "a blue square"])[0]
    states = model.extract_features(batch, mode="image").image_embeds[0]
    return torch.cat([states.flatten(), model.extract_features({**batch, **text}).multimodal_embeds[0].flatten()])


@pytest.mark.parametrize("arch", ["blip2", "blip2_image_text_matching", "blip2_feature_extractor", *LLM_ARCHS])
def test_padding_changes_nothing(arch: str):
    model, (short, long) = tiny(arch), features(3, 8)
    alone = first_scores(model, {"image": short[None]})
    assert torch.allclose(alone, first_scores(model, padded([short, long])), atol=1e-5)
    moved = first_scores(model, padded([short + 1.5 * torch.randn(3, WIDTH), long]))
    assert not torch.allclose(alone, moved, atol=1e-3)


def test_training_losses_do_not_depend_on_padding():
    model, rows = tiny("blip2"), features(3, 8, 5)
    texts = {"text_input": ["a red circle", "two blue squares", "a cross"]}
    found = []
    for extra in (0, 6):
        torch.manual_seed(0)
        found.append(model({**padded(rows, extra=extra), **texts}))
    for name in ("loss_itc", "loss_itm", "loss_lm"):
        assert torch.allclose(found[0][name], found[1][name], atol=1e-5)
    found[0]["loss"].backward()
    assert model.ln_vision.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"image": torch.randn(2, 3, 8, 8)}, r"\(B,N,16\)"),
        ({"image": torch.randn(2, 5, 8)}, "model.vit.width"),
        ({"image": torch.randn(2, 5, WIDTH), "image_mask": torch.ones(2, 4)}, r"image_mask.*\(2, 5\)"),
        ({"image": torch.randn(2, 5, WIDTH), "image_mask": torch.zeros(2, 5)}, "no token"),
        ({"image": torch.full((2, 5, WIDTH), torch.inf)}, "nan or inf"),
    ],
)
def test_wrong_batches_are_refused(batch: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        tiny("blip2").generate(batch)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"vit": None}, "model.vit"),
        ({"vit": {"width": 16, "depth": 2}}, "model.vit"),
        ({"vit": {"width": 0}}, "model.vit.width"),
        ({"vit_weights": "x.pth"}, "model.vit_weights"),
        ({"freeze_vit": False}, "model.freeze_vit"),
        ({"use_grad_checkpoint": True}, "model.use_grad_checkpoint"),
    ],
)
def test_settings_of_an_image_encoder_are_refused(settings: dict[str, Any], key: str):
    with pytest.raises(InputError, match=key):
        tiny("blip2", **settings)


def test_there_is_no_hugging_face_class(tmp_path: Path):
    with pytest.raises(InputError, match="FeatureEncoder"):
        write_folder(tiny("blip2_opt"), tmp_path / "hf", arch="blip2_opt")


def test_datasets_of_other_lengths_share_a_batch():
    parts = [("a", padded(features(3), extra=0)), ("b", padded(features(5), extra=0))]
    batch = join_batches(parts, keys=["image", "image_mask"])
    assert batch["image"].shape == (2, 5, WIDTH)
    assert batch["image_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


# Runs

WORDS = ("red", "blue", "green", "black")
RUN = {**cli_helpers.RUN, "max_iters": 3, "max_epoch": 1, "test_splits": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of features: captions, questions and instructions."""
    root = tmp_path_factory.mktemp("features")
    for split, count in (("train", 8), ("val", 4)):
        records = []
        for i, row in enumerate(features(*(3 + i % 4 for i in range(count)), seed=len(split))):
            np.save(root / f"{split}{i}.npy", row.numpy())
            word = WORDS[i % len(WORDS)]
            records.append(
                {
                    **{"image": f"{split}{i}.npy", "image_id": i, "caption": f"a {word} circle", "question_id": i},
                    **{"question": "what color?", "answer": word, "instruction": "what color?", "output": word},
                    **({"candidates": list(WORDS)} if split == "val" else {}),
                }
            )
        (root / f"{split}.json").write_text(json.dumps(records))
    return root


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stage1": ("blip2", "pairs", {"task": "image_text_pretrain", "valid_splits": []}),
    "retrieval": ("blip2", "retrieval", {"task": "retrieval", "k_test": 2}),
    "caption_qformer": ("blip2", "caption", {"task": "captioning", "metrics": ["bleu"], "shuffle_images": True}),
    "caption_opt": ("blip2_opt", "caption", {"task": "captioning", "metrics": ["bleu"]}),
    "vqa_t5": ("blip2_t5", "vqa", {"task": "vqa", "inference_method": "generate", "accuracy": "normalised"}),
    "instruct": ("blip2_vicuna_instruct", "instruct", {"task": "instruct", "blank_images": True}),
}


def project(case: str, data: Path, folder: Path, **model: Any) -> Path:
    arch, layout, run = CASES[case]
    reads = {"train": {"name": "features"}, "eval": {"name": "features"}}
    storage = {split: {"storage": str(data / f"{split}.json")} for split in ("train", "val")}
    section = {"vis_processor": reads, "build_info": {"annotations": storage, "images": {"storage": str(data)}}}
    content = {
        "model": {"arch": arch, "model_type": "tiny_features", **model},
        "datasets": {layout: section},
        "run": {**RUN, "output_dir": str(folder), **run},
    }
    path = folder / "project.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c != "caption_opt" else c for c in CASES])
def test_every_run_takes_features(case: str, data: Path, tmp_path: Path):
    assert cli_helpers.train(project(case, data, tmp_path)) == 0
    rows = cli_helpers.steps(tmp_path / "job")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    if CASES[case][2].get("valid_splits") != []:
        assert cli_helpers.metrics(tmp_path / "job", "val")


def test_the_width_is_the_datas_unless_given(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = project("caption_opt", data, tmp_path, vit=None)
    assert cli_helpers.train(path, flags=["--dry-run"]) == 0
    path = project("caption_opt", data, tmp_path, vit={"width": 12})
    capsys.readouterr()
    assert cli_helpers.train(path, flags=["--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "width 16" in error
    assert "model.vit.width=16" in error


def test_images_for_features_and_features_for_images(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = project("caption_opt", data, tmp_path, vit_model="eva_tiny", vit_weights="random", vit=None, image_size=48)
    assert cli_helpers.train(path, flags=["--dry-run"]) == 2
    assert "vis_processor {name: features}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (cli_helpers.ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```(?:python|yaml)\n# (tones\.\w+)\n(.*?)```", page, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    exec(
        compile(
            files["tones.py"].replace('(("train", 600), ("val", 90))', '(("train", 48), ("val", 4))'), "tones", "exec"
        ),
        {},
    )
    (tmp_path / "tones.yaml").write_text(files["tones.yaml"])
    assert (
        cli_helpers.train(tmp_path / "tones.yaml", "run.max_iters=4", "run.log_freq=1", "run.batch_size_train=12") == 0
    )
    job = tmp_path / "output" / "tones" / "job"
    losses = [row["loss"] for row in cli_helpers.steps(job)]
    assert losses[-1] < losses[0]
    assert cli_helpers.metrics(job, "val")["CIDEr"] >= 0
