"""`model.cache_features` through train.py: losses with and without it, kills, several processes, damage, refusals."""

import contextlib
import errno
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import shard_helpers
import test_distributed
import torch
import yaml
from host_waits import DEVICE, simulated

from lavis_lite.common.config.config import Config
from lavis_lite.common.token_store import ENTRY, INDEX, ROWS
from lavis_lite.models.base import BaseModel
from lavis_lite.models.blip.vision import BlipVision
from lavis_lite.models.blip2.base import Blip2Base
from lavis_lite.nn.fingerprint import weights_digest
from lavis_lite.runners import encoded, train_loop
from lavis_lite.tasks.base import setup_task

pytestmark = pytest.mark.usefixtures("shapes_data")

EPOCHS = 3
EYE = {split: {"name": "blip_image_eval"} for split in ("train", "eval")}
SHAPES = {"num_train": 8, "num_val": 4, "num_test": 4, "colors": 4, "shapes": 3, "max_objects": 2, "gallery_size": 4}
SHAPES |= {"questions_per_image": 2, "vis_processor": EYE}
PICTURES = SHAPES["num_train"]
RUN = {
    "max_epoch": EPOCHS,
    "batch_size_train": 4,
    "init_lr": 1e-3,
    "num_workers": 0,
    "log_freq": 1,
    "tensorboard": False,
}
STAGE1 = ({"arch": "blip2"}, "shapes_pairs", "image_text_pretrain")
LOW = {"arch": "blip2_opt", "vit_precision": "bf16"}
TRAININGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "stage 1": STAGE1,
    "stage 2 in bf16": (LOW, "shapes_pairs", "captioning"),
    "InstructBLIP": ({"arch": "blip2_vicuna_instruct"}, "shapes_instruct_color", "instruct"),
    "BLIP captioning": ({"arch": "blip_caption", "freeze_vit": True}, "shapes_pairs", "captioning"),
    "BLIP VQA": ({"arch": "blip_vqa", "freeze_vit": True}, "shapes_vqa", "vqa"),
}
FILES: dict[str, tuple[str, Callable[[Path], dict[str, Any]], dict[str, Any], str]] = {
    "BLIP dialog": ("visual_dialog", cli_helpers.dialog_set, {"arch": "blip_visdial"}, "instruct"),
    "BLIP classes": (
        "classification",
        cli_helpers.classification_set,
        {"arch": "blip_image_classification", "num_classes": 3},
        "multimodal_classification",
    ),
}
QUICK = ("stage 1", "BLIP VQA")
MANY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*TRAININGS, *FILES)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def num_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each pass through the image encoder of a training, in this process."""
    passes: list[int] = []
    for kind in (Blip2Base, BlipVision):

        def counting(
            self: BaseModel, image: torch.Tensor, encode: Callable[..., torch.Tensor] = kind.encoder_tokens
        ) -> torch.Tensor:
            if image.any() and not image.is_meta:  # not the zeros that tell the shape
                passes.append(len(image))
            return encode(self, image)

        monkeypatch.setattr(kind, "encoder_tokens", counting)
    return passes


def recipe(
    folder: Path,
    model: dict[str, Any],
    datasets: str | dict[str, Any],
    task: str,
    **run: Any,
) -> Path:
    """Write the YAML of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "model": {"model_type": "tiny", **model},
        "datasets": {datasets: SHAPES} if isinstance(datasets, str) else datasets,
        "run": {"task": task, "output_dir": str(folder / "output"), **RUN, **run},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def stage1(folder: Path, **run: Any) -> Path:
    return recipe(folder, *STAGE1, **run)


def num_pictures(path: Path) -> int:
    """The number of pictures that the training samples are of, by their annotations."""
    cfg = Config.from_file(path)
    (splits,) = setup_task(cfg).build_datasets(cfg).values()
    dataset = splits["train"]
    return len({file for record in dataset.annotation for file in dataset.files_of(record)})


def losses(folder: Path, job: str) -> list[dict[str, float]]:
    """All losses of each step; of a step that was taken twice the last."""
    rows = {row["step"]: row for row in cli_helpers.steps(folder / "output" / job)}
    return [{key: value for key, value in rows[step].items() if key.startswith("loss")} for step in sorted(rows)]


def stored(cache: Path) -> dict[str, int]:
    """The folders of tokens, and their numbers of rows."""
    counts = {}
    for folder in (cache / "tokens").iterdir():
        counts[folder.name] = sum(path.stat().st_size // ENTRY.itemsize for path in folder.glob(f"*{INDEX}"))
    return counts


def about(cache: Path) -> dict[str, Any]:
    (path,) = cache.glob("tokens/*/about.json")
    return json.loads(path.read_text())


ON = "model.cache_features=true"


@pytest.mark.parametrize("name", MANY)
def test_losses_of_three_epochs_are_the_same(name: str, tmp_path: Path, cache: Path, num_encoded: list[int]) -> None:
    """Bit for bit in one process, although images that a batch shows twice, or that are stored, are not encoded."""
    if name in TRAININGS:
        path = recipe(tmp_path, *TRAININGS[name])
    else:
        kind, write, model, task = FILES[name]
        path = recipe(tmp_path, {**model, "freeze_vit": True}, {kind: {**write(tmp_path)}}, task)
    count = num_pictures(path)
    assert cli_helpers.train(path, job="without") == 0
    plain, num_encoded[:] = sum(num_encoded), []
    assert cli_helpers.train(path, ON, job="with") == 0
    assert sum(num_encoded) == count
    assert plain >= EPOCHS * count
    num_encoded.clear()
    assert cli_helpers.train(path, ON, "run.num_workers=2", job="again") == 0
    assert num_encoded == []
    assert losses(tmp_path, "with") == losses(tmp_path, "without") == losses(tmp_path, "again")
    assert len(losses(tmp_path, "with")) >= 2 * EPOCHS
    assert list(stored(cache).values()) == [count]
    kept = about(cache)
    assert kept["dtype"] == ("torch.bfloat16" if "bf16" in name else "torch.float32")
    size = torch.Size(kept["tokens"]).numel() * (2 if "bf16" in name else 4)
    assert sum(path.stat().st_size for path in cache.glob(f"tokens/*/*{ROWS}")) == count * size


def test_a_batch_that_repeats_an_image_encodes_it_once(tmp_path: Path, num_encoded: list[int]) -> None:
    path = recipe(tmp_path, {"arch": "blip2_opt"}, "shapes_caption", "captioning", max_iters=1, batch_size_train=24)
    assert cli_helpers.train(path, job="without") == 0
    assert cli_helpers.train(path, ON, job="with") == 0
    assert num_encoded[0] == 24
    assert num_encoded[1:] == [PICTURES]
    ours, theirs = losses(tmp_path, "with")[0]["loss"], losses(tmp_path, "without")[0]["loss"]
    assert ours == pytest.approx(theirs, rel=1e-6)  # products of another number of rows may round otherwise


@pytest.mark.slow
def test_streams_and_mixtures_are_stored_alike(tmp_path: Path, cache: Path, num_encoded: list[int]) -> None:
    sets = {"caption": shard_helpers.stream_section(tmp_path) | {"vis_processor": EYE}, "shapes_caption": SHAPES}
    run = {"train_dataset_mixing": "per_step", "max_iters": 14}
    path = recipe(tmp_path, {"arch": "blip2_opt"}, sets, "captioning", **run)
    assert cli_helpers.train(path, job="without") == 0
    num_encoded.clear()
    assert cli_helpers.train(path, ON, job="with") == 0
    assert losses(tmp_path, "with") == losses(tmp_path, "without")
    assert sum(num_encoded) == sum(stored(cache).values()) <= PICTURES + 31  # of the five shards


@pytest.mark.slow
def test_another_encoder_precision_or_transform_has_another_folder(tmp_path: Path, cache: Path) -> None:
    path = stage1(tmp_path, max_epoch=1)
    changes: list[list[str]] = [
        [],
        ["run.seed=7"],  # other random weights
        ["run.precision=bf16"],
        ["model.vit={depth: 1}"],
        ["model.image_size=36"],
        ["datasets.shapes_pairs.vis_processor.train.background=black"],
    ]
    for number, options in enumerate(changes, start=1):
        assert cli_helpers.train(path, ON, *options, job=f"run{number}") == 0
        assert len(stored(cache)) == number, options
    opt = recipe(tmp_path / "opt", {"arch": "blip2_opt"}, "shapes_pairs", "captioning", max_epoch=1)
    weights = tmp_path / "encoder.pth"
    torch.save(encoder_of(tmp_path / "output" / "run1"), weights)
    assert cli_helpers.train(opt, ON, f"model.vit_weights={weights}") == 0
    assert list(stored(cache).values()) == [PICTURES] * len(changes)  # the second stage shares the first's


def test_the_digest_of_weights_sees_every_value_name_and_type() -> None:
    def digest(**changes: torch.Tensor) -> str:
        layer = torch.nn.Module()
        for name, value in ({"weight": torch.zeros(70, 3)} | changes).items():
            layer.register_buffer(name, value)
        return weights_digest(layer.state_dict())

    one = torch.zeros(70, 3)
    one[-1, -1] = 1e-7
    others = [digest(weight=one), digest(weight=one.half()), digest(weight=one.view(3, 70)), digest(bias=one)]
    assert digest() == digest(weight=torch.zeros(70, 3))
    assert len({digest(), *others}) == 5


def encoder_of(job: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's image encoder."""
    state, prefix = cli_helpers.weights(job / "checkpoint_best.pth"), "visual_encoder."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def test_a_file_that_was_cut_off_is_completed(tmp_path: Path, cache: Path, num_encoded: list[int]) -> None:
    path = stage1(tmp_path)
    assert cli_helpers.train(path, ON, job="whole") == 0
    (rows,) = cache.glob(f"tokens/*/*{ROWS}")
    os.truncate(rows, rows.stat().st_size // 2 + 5)
    num_encoded.clear()
    assert cli_helpers.train(path, ON, job="cut") == 0
    assert sum(num_encoded) == PICTURES // 2
    for ours, theirs in zip(losses(tmp_path, "cut"), losses(tmp_path, "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_full_disk_is_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(ROWS):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert cli_helpers.train(stage1(tmp_path), f"model.cache_features={tmp_path}/mine") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: .*model\.cache_features: .*{tmp_path}/mine/.*disk is full.*", last)


@pytest.mark.slow
def test_nothing_waits_for_the_device(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs on the simulated device: one that stores, and one that finds most images and encodes the others."""
    for module in (train_loop, encoded):
        monkeypatch.setattr(module, "autocast", lambda *_: contextlib.nullcontext())  # the device has none
    device = f"run.device={DEVICE.type}"
    path = stage1(tmp_path, max_epoch=2, log_freq=100)
    fill, during = encoded.EncoderCache.fill, []

    def watched(self: encoded.EncoderCache, samples: dict[str, Any]) -> dict[str, Any]:
        before = len(waits.found)
        try:
            return fill(self, samples)
        finally:
            during.extend(waits.found[before:])

    monkeypatch.setattr(encoded.EncoderCache, "fill", watched)
    for job in ("first", "second"):
        with simulated(monkeypatch) as waits:
            assert cli_helpers.train(path, ON, device, job=job) == 0
        rows = next(cache.glob(f"tokens/*/*{ROWS}"))
        os.truncate(rows, rows.stat().st_size * 5 // 8)
    assert during == []
    assert list(stored(cache).values()) == [PICTURES + 3]


# Refusals

ORIGINAL = {"train": {"name": "blip2_image_train"}, "eval": {"name": "blip_image_eval"}}
AUGMENTED = {"train": {"name": "blip_image_train"}, "eval": {"name": "blip_image_eval"}}
LORA = {"arch": "blip_caption", "vit_lora": {"r": 2, "target_modules": ["qkv"]}}
MOMENTUM = {"arch": "blip_retrieval", "embed_dim": 16, "queue_size": 48, "freeze_vit": True}
WRONG: dict[str, tuple[dict[str, Any], str, str, dict[str, Any], str]] = {
    "crops": (*STAGE1, ORIGINAL, r"datasets\.shapes_pairs\.vis_processor\.train: blip2_image_train .*blip_image_eval"),
    "augments": (*STAGE1, AUGMENTED, r"datasets\.shapes_pairs\.vis_processor\.train: blip_image_train .*"),
    "trained": ({**STAGE1[0], "freeze_vit": False}, *STAGE1[1:], EYE, r"model\.cache_features: .*freeze_vit: true.*"),
    "LoRA": (LORA, "shapes_pairs", "captioning", EYE, r"model\.cache_features: .*lora_.*model\.vit_lora.*"),
    "pairs": ({"arch": "blip_nlvr", "freeze_vit": True}, "shapes_nlvr", "multimodal_classification", EYE, "one image"),
    "momentum": (MOMENTUM, "shapes_retrieval", "retrieval", EYE, r"model\.cache_features: BlipRetrieval .*"),
}


@pytest.mark.parametrize("flags", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_stored_is_refused(
    name: str, flags: list[str], tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, dataset, task, eye, message = WRONG[name]
    path = recipe(tmp_path, model, {dataset: SHAPES | {"vis_processor": eye}}, task)
    assert cli_helpers.train(path, ON, flags=flags) == 2
    assert re.search(message, capfd.readouterr().err.splitlines()[-1])
    assert not (cache / "tokens").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.parallel=fsdp"], r"model\.cache_features: .*run\.parallel: ddp"),
        (["model.cache_features=''"], r"model\.cache_features: must name a folder.*''"),
        (["model.cache_features=[3]"], r"model\.cache_features.*\[3\]"),
        ([f"model.cache_features={__file__}/tokens"], rf"model\.cache_features: {__file__} is not a folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, {"arch": "blip2_opt"}, "shapes_pairs", "captioning")
    assert cli_helpers.train(path, ON, *options, flags=["--dry-run"]) == 2
    assert re.search(message, capfd.readouterr().err.splitlines()[-1])


def test_a_random_stream_is_refused_and_a_plain_one_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    section = shard_helpers.stream_section(tmp_path)
    for eye, code in ((section["vis_processor"], 2), (EYE, 0)):
        path = recipe(tmp_path, {"arch": "blip2_opt"}, {"caption": section | {"vis_processor": eye}}, "captioning")
        assert cli_helpers.train(path, ON, flags=["--dry-run"]) == code
    captured = capfd.readouterr()
    assert re.search(r"datasets\.caption\.vis_processor\.train: blip_image_train ", captured.err)
    assert re.search(r"^tokens      17 x 64 of float32, 4,352 bytes per image; at most 0\.00 GiB", captured.out, re.M)


def test_drop_path_of_a_frozen_encoder_is_off(tmp_path: Path, num_encoded: list[int]) -> None:
    path = stage1(tmp_path, max_epoch=1)
    drop = "model.drop_path_rate=0.5"
    assert cli_helpers.train(path, drop, job="without") == 0
    assert cli_helpers.train(path, drop, ON, job="with") == 0
    assert losses(tmp_path, "with") == losses(tmp_path, "without")


# Processes


@pytest.mark.slow
def test_a_killed_run_resumes_with_what_it_stored(tmp_path: Path, cache: Path) -> None:
    path = recipe(tmp_path, LOW, "shapes_pairs", "captioning", batch_size_train=1, checkpoint_every=1, max_epoch=99)
    command = ["--cfg-path", str(path), "--job-id", "killed", "--options", ON, "run.lr_sched=constant_lr"]
    process = cli_helpers.process("train.py", *command)
    log = tmp_path / "output" / "killed" / "log.txt"
    deadline = time.monotonic() + test_distributed.LIMIT
    while time.monotonic() < deadline and not (log.is_file() and '"step": 3' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    taken = len(losses(tmp_path, "killed"))
    assert 3 <= taken < 99
    options = ["run.lr_sched=constant_lr", "run.max_epoch=999", f"run.max_iters={max(3 * PICTURES, taken + 2)}"]
    for job, more, flags in (("killed", [ON], ["--resume", "auto"]), ("without", [], [])):
        assert cli_helpers.train(path, *options, *more, job=job, flags=flags) == 0
    assert losses(tmp_path, "killed") == losses(tmp_path, "without")
    assert list(stored(cache).values()) == [PICTURES]


@pytest.mark.slow
def test_runs_of_one_and_of_two_processes_share_a_folder(tmp_path: Path, cache: Path) -> None:
    """Two runs at once; each has the losses of a run without a cache, which the number of processes does not change."""
    model, dataset, task = TRAININGS["BLIP VQA"]
    path = recipe(tmp_path, model | cli_helpers.NO_DROPOUT["model"], dataset, task)
    command = ["--cfg-path", str(path), "--job-id", "two", "--options", ON, "run.batch_size_train=2"]
    process = cli_helpers.process("train.py", *command, world=2)
    assert cli_helpers.train(path, ON, job="one") == 0
    code, output = test_distributed.ended(process, limit=4 * test_distributed.LIMIT)
    assert code == 0, output
    (count,) = stored(cache).values()
    assert PICTURES <= count <= 2 * PICTURES  # an image that two processes encoded at the same moment is there twice
    assert cli_helpers.train(path, job="without") == 0
    for job in ("one", "two"):
        for ours, theirs in zip(losses(tmp_path, job), losses(tmp_path, "without"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
