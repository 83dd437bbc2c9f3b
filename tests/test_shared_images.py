"""Samples of an evaluation that share an image: it is read, copied and encoded once, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
from PIL import Image
from test_loaders import run_config

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.models import load_model
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import IS_ENCODED
from lavis_lite.models.shared_images import SAME_IMAGE, encoded_once, with_repeats, without_repeats
from lavis_lite.processors.image import BlipImageEvalProcessor
from lavis_lite.runners.loaders import EvalLoader
from lavis_lite.tasks.base import BaseTask
from lavis_lite.tasks.instruct import InstructTask
from lavis_lite.tasks.matching import MatchingTask
from lavis_lite.tasks.multimodal_classification import MultimodalClassificationTask
from lavis_lite.tasks.vqa import VQATask

ORDER = [0, 0, 1, 0, 2, 1]
SAME = [0, 0, 2, 0, 4, 2]
TEXTS = ["what is it", "a red circle", "how many?", "what colour is it", "yes or no", "a cross"]


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 2, 4, 4)])
def test_equal_images_are_left_out_and_come_back(shape: tuple[int, ...]) -> None:
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    images[1, 0, ..., 1] += 1e-6  # one column, which few compared values would miss
    batch = {"image": images[ORDER], "text_input": TEXTS}
    packed = without_repeats(batch)
    assert torch.equal(packed["image"], images)
    assert packed[SAME_IMAGE] == SAME
    restored = with_repeats(packed)
    assert torch.equal(restored["image"], batch["image"])
    assert restored["text_input"] == TEXTS
    assert without_repeats({"image": images}).keys() == {"image"}


@pytest.mark.parametrize("image", [torch.zeros(2, 5, 8), [1, 1], None])
def test_batches_without_pixels_stay_as_they_are(image: Any) -> None:
    batch = {"image": image, "text_input": TEXTS[:2]}
    assert without_repeats(batch) is batch
    assert with_repeats(batch) is batch


def test_an_image_that_is_not_a_number_equals_none() -> None:
    assert SAME_IMAGE not in without_repeats({"image": torch.full((2, 3, 4, 4), float("nan"))})


LOSSES = {"candidates": [["red", "a blue circle"]] * 3 + [["two", "no", "yes"]] * 3}
GENERATE = {"inference_method": "generate", "max_len": 4, "save_scores": True}
CASES: dict[str, tuple[BaseTask, dict[str, Any], dict[str, Any]]] = {
    "blip_vqa": (VQATask(**GENERATE), {}, {}),
    "blip2_opt": (VQATask(**GENERATE), {}, {}),
    "blip2_t5_instruct": (InstructTask(), LOSSES, {}),
    "blip_visdial": (InstructTask(), LOSSES | {"caption": TEXTS}, {}),
    "blip_image_text_matching": (MatchingTask(shuffle_images=True), {}, {}),
    "blip2_image_text_matching": (MatchingTask(), {}, {}),
    "blip_classification": (MultimodalClassificationTask(), {"label": torch.arange(6) % 3}, {"num_classes": 3}),
}
QUICK = ("blip_vqa", "blip2_opt")


@pytest.fixture
def num_encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseModel], list[int]]:
    """A function that lets a model note how many images each pass through its encoder has."""

    def counting(model: BaseModel) -> list[int]:
        passes: list[int] = []
        encode = model.encoder_tokens
        monkeypatch.setattr(model, "encoder_tokens", lambda image: passes.append(len(image)) or encode(image))
        return passes

    return counting


@pytest.mark.parametrize(
    "arch", [arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in CASES]
)
def test_results_are_those_of_images_that_are_encoded_one_by_one(
    arch: str, num_encoded: Callable[[BaseModel], list[int]]
) -> None:
    task, own, settings = CASES[arch]
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True, device="cpu", **settings)
    assert isinstance(model, BaseModel)
    size = model.visual_encoder.image_size
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))[ORDER]
    names = [str(number) for number in range(len(ORDER))]
    batch = {"image": image, "text_input": TEXTS, "question_id": names, "instance_id": names, **own}
    passes = num_encoded(model)
    with torch.no_grad():
        plain = task.valid_step(model, batch)
        shared = task.valid_step(model, batch | {SAME_IMAGE: SAME})
        tokens = encoded_once(model, batch | {SAME_IMAGE: SAME})["image"]
    assert passes == [6, 3, 3]
    torch.testing.assert_close(tokens, model.encoder_tokens(image))
    assert not torch.allclose(tokens[0], tokens[2])
    for before, after in zip(plain, shared, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert after[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), key


def test_a_model_that_reads_pixels_gets_them() -> None:
    batch = {"image": torch.zeros(2, 3, 32, 32), SAME_IMAGE: [0, 0]}
    assert encoded_once(object(), batch) is batch
    model = load_model("blip_nlvr", "tiny", is_eval=True, device="cpu")
    assert encoded_once(model, batch) is batch


@pytest.mark.slow
def test_a_classifier_trains_on_tokens_where_no_momentum_encoder_reads_pixels() -> None:
    settings = {"num_classes": 3, "freeze_vit": True}
    model = load_model("blip_classification", "tiny", is_eval=True, device="cpu", use_distill=False, **settings)
    assert isinstance(model, BaseModel)
    size = model.visual_encoder.image_size
    image = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))
    batch = {"image": image, "text_input": TEXTS, "label": torch.arange(6) % 3}
    tokens = model.frozen_encoder()(image)
    assert model(batch | {"image": tokens, IS_ENCODED: True})["loss"].equal(model(batch)["loss"])
    distilled = load_model("blip_classification", "tiny", is_eval=True, device="cpu", **settings)
    with pytest.raises(InputError, match=r"model\.cache_features.*use_distill"):
        distilled.frozen_encoder()


Questions = tuple[BaseDataset, list[Image.Image]]


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Questions:
    """Three questions about each of six pictures, and the list of the pictures that are processed from now on."""
    paths = cli_helpers.pictures(tmp_path, 6)
    records = [{"image": path, "question": f"question {n} of {path}"} for path in paths for n in range(3)]
    section = cli_helpers.user_set(tmp_path, {"val": records})
    dataset = registry.get_builder_class("vqa")(**section).build(["val"])["val"]
    processed: list[Image.Image] = []
    process = BlipImageEvalProcessor.__call__

    def counting(self: BlipImageEvalProcessor, image: Image.Image) -> torch.Tensor:
        processed.append(image)
        return process(self, image)

    monkeypatch.setattr(BlipImageEvalProcessor, "__call__", counting)
    return dataset, processed


def test_the_loader_processes_an_image_once_per_batch(questions: Questions) -> None:
    dataset, processed = questions
    plain = [dataset[index] for index in range(len(dataset))]
    assert len(plain) == len(processed) == 18
    processed.clear()
    batches = list(EvalLoader(dataset, run_config(batch_size_eval=8)))
    assert len(processed) == 3 + 4 + 1  # of the samples 0 to 7, 8 to 15, 16 and 17: pictures 0 to 2, 2 to 5, 5
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([one["image"] for one in plain]))
    assert [text for batch in batches for text in batch["text_input"]] == [one["text_input"] for one in plain]
    assert [batch[SAME_IMAGE] for batch in batches] == [[0, 0, 0, 3, 3, 3, 6, 6], [0, 1, 1, 1, 4, 4, 4, 7], [0, 0]]


def test_a_random_processor_draws_for_every_sample(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, processed = questions
    monkeypatch.setattr(BlipImageEvalProcessor, "is_deterministic", False)
    list(EvalLoader(dataset, run_config(batch_size_eval=8)))
    assert len(processed) == 18


def test_a_sample_that_is_changed_in_place_changes_no_other(
    questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, processed = questions
    read = dataset.visual
    monkeypatch.setattr(dataset, "visual", lambda record: read(record).add_(1.0))
    batch = next(iter(EvalLoader(dataset, run_config(batch_size_eval=3))))
    assert len(processed) == 1
    assert torch.equal(batch["image"], torch.stack([dataset[index]["image"] for index in range(3)]))
