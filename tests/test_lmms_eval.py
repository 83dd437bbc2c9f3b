"""Our models in lmms-eval: what its evaluator gets is what evaluate.py gets, for the same items.

The models are tiny and random, with weights scaled up, so that answers and losses differ from item to item. Without
lmms-eval (`pip install "lavis-lite[lmms-eval]"`) only the tests of settings and imports run.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.registry import registry
from lavis_lite.integrations.lmms_eval_settings import Generation
from lavis_lite.models import load_model, model_zoo

ADAPTER = "lavis_lite.integrations.lmms_eval"
TEMPLATE = "Question: {} Short answer:"
SCALE = 6.0
needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


# Settings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_new_tokens": 16, "num_beams": 1, "temperature": 0, "top_p": 1.0, "do_sample": False},
         {"max_new_tokens": 16, "num_beams": 1}),
        ({"temperature": 0, "top_p": 0, "top_k": 5, "num_beams": None}, {}),
        ({"temperature": 0.2}, {"use_nucleus_sampling": True, "temperature": 0.2}),
        ({"temperature": 0.2, "do_sample": False}, {}),
        ({"temperature": 0.0, "do_sample": True}, {}),
        ({"do_sample": True, "top_p": 0.5}, {"use_nucleus_sampling": True, "temperature": 1.0, "top_p": 0.5}),
        ({"min_new_tokens": 2, "length_penalty": -1.0, "repetition_penalty": 1.5, "image_aspect_ratio": "pad"},
         {"min_new_tokens": 2, "length_penalty": -1.0, "repetition_penalty": 1.5}),
    ],
)  # fmt: skip
def test_generation_kwargs_are_settings_of_generate(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert dict(Generation.of(given).settings) == expected


def test_an_output_ends_before_the_first_stop_text() -> None:
    generation = Generation.of({"until": ["\n\n", "", "Q:"], "stop_sequences": "</s>"})
    assert generation.stops == ("\n\n", "Q:", "</s>")
    assert generation.cut("red Q: why?\n\nblue") == "red"
    assert generation.cut(" red\nblue ") == "red\nblue"
    assert Generation.of({"until": None}).cut("a Q: b") == "a Q: b"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"num_beam": 5}, ["generation_kwargs.num_beam:", "'num_beams'"]),
        ({"do_sample": True, "top_k": 5}, ["generation_kwargs.top_k:", "5"]),
        ({"until": 3}, ["generation_kwargs.until:", "3"]),
        ({"until": ["a", None]}, ["generation_kwargs.until:", "None"]),
    ],
)
def test_wrong_generation_kwargs_are_named(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Generation.of(given)
    assert all(part in str(caught.value) for part in parts)


# Imports


@pytest.mark.slow
def test_the_package_does_not_import_lmms_eval() -> None:
    code = (
        "import sys, lavis_lite, lavis_lite.integrations.lmms_eval_plugin\n"
        "assert not {'torch', 'lmms_eval'} & set(sys.modules)\n"
        "import lavis_lite.cli.main\n"
        "assert 'lmms_eval' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(cli_helpers.ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_without_lmms_eval_the_adapter_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(MissingPackageError, match=r"lavis-lite\[lmms-eval\]"):
        importlib.import_module(ADAPTER)


# Models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes checkpoints of tiny models with seeded random weights, of which the matrices are scaled; one per model."""
    folder = tmp_path_factory.mktemp("weights")

    def save(arch: str) -> Path:
        path = folder / f"{arch}.pth"
        if not path.exists():
            torch.manual_seed(0)
            model = load_model(arch, "tiny")
            matrices = [parameter.data for parameter in model.parameters() if parameter.dim() > 1]
            torch._foreach_mul_(matrices, SCALE)
            torch.save({"model": model.state_dict()}, path)
        return path

    return save


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, saved: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Makes lmms-eval's model of a tiny model, with Hugging Face's caches in a folder of the tests."""

    def make(arch: str, **arguments: Any) -> Any:
        given = {"model_type": "tiny", "checkpoint": str(saved(arch)), "device": "cpu", **arguments}
        return importlib.import_module(ADAPTER).LavisLite(arch=arch, **given)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in caches(tmp_path_factory.mktemp("huggingface")).items():
            patch.setenv(name, value)
        yield make


def caches(folder: Path) -> dict[str, str]:
    """The environment in which lmms-eval keeps its files in a folder, and fetches none."""
    return {"HF_HOME": str(folder), "LMMS_EVAL_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write a task of lmms-eval, and its rows (`image` is a path) as a parquet file."""
    import datasets

    data = folder / f"{name}.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(data)
    config = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_visual": "image",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def write_questions(folder: Path) -> list[Any]:
    """Write the task `shapes_questions`, to answer generated questions; return their ids in order."""
    data = registry.get_builder_class("shapes_vqa")(**cli_helpers.SHAPES).build(["test"])["test"]
    rows = [
        {"image": str(data.vis_root / r["image"]), "question": r["question"], "answer": r["answers"][0]}
        for r in data.annotation
    ]
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 5, "num_beams": 2, "length_penalty": 1.0, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, "shapes_questions", rows, **settings)
    return [r["question_id"] for r in data.annotation]


def write_choices(folder: Path) -> list[int]:
    """Write the task `shapes_options`, to choose among each instruction's candidates; return the right ones."""
    blocks = {"text_processor": {"eval": {"name": "blip_question"}}}
    builder = registry.get_builder_class("shapes_instruct_options")
    data = builder(**cli_helpers.SHAPES, **blocks).build(["test"])["test"]
    rows = [
        {
            "image": str(data.vis_root / r["image"]),
            "instruction": data.templates.instruction(data.values(r), training=False),
            "candidates": r["candidates"],
            "label": r["label"],
        }
        for r in data.annotation
    ]
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "instruction",
        "doc_to_choice": "candidates",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, "shapes_options", rows, **settings)
    return [r["label"] for r in data.annotation]


def outputs(samples: list[dict[str, Any]]) -> list[Any]:
    """What the model gave, in order of the documents."""
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def run(model: Any, folder: Path, task: str) -> tuple[list[Any], dict[str, Any]]:
    """The outputs of a model for a task of a folder in lmms-eval's evaluator, and the metrics."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=[task], task_manager=manager, device="cpu")
    return outputs(results["samples"][task]), results["results"][task]


def evaluated(folder: Path, arch: str, checkpoint: Path, dataset: str, file: str, **run: Any) -> list[dict[str, Any]]:
    """The result file that evaluate.py writes about the test split of a generated dataset."""
    fixed = {"test_splits": ["test"], "num_workers": 0, "batch_size_eval": 3, "output_dir": str(folder / "output")}
    tree = {
        "model": {"arch": arch, "model_type": "tiny"},
        "datasets": {dataset: cli_helpers.SHAPES},
        "run": {"evaluate": True, **fixed, **run},
    }
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert cli_helpers.evaluate(path, weights=checkpoint) == 0
    return json.loads((folder / "output" / "evaluation" / "result" / file).read_text())


# Same items, same outputs


VQA = {"task": "vqa", "inference_method": "generate", "num_beams": 2, "length_penalty": 1.0}


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "max_len", "arguments"),  # for five new tokens: `blip_vqa` counts its start token too
    [("blip_vqa", 6, {}), ("blip2_t5_instruct", 5, {"prompt": TEMPLATE, "text_processor": "blip_question"})],
)
def test_answers_are_those_of_evaluate(
    adapter: Callable[..., Any],
    saved: Callable[[str], Path],
    arch: str,
    max_len: int,
    arguments: dict[str, Any],
    shapes_data: Path,
    tmp_path: Path,
) -> None:
    ids = write_questions(tmp_path)
    settings = {**VQA, "max_len": max_len, "prompt": arguments.get("prompt", "")}
    ours = evaluated(tmp_path, arch, saved(arch), "shapes_vqa", "test_vqa.json", **settings)
    expected = {entry["question_id"]: entry["answer"] for entry in ours}
    assert len(set(expected.values())) > 3, "answers depend on the item"
    for batch_size in (4, 1):
        answers, _ = run(adapter(arch, **arguments, batch_size=batch_size), tmp_path, "shapes_questions")
        assert [answer for (answer,) in answers] == [expected[key] for key in ids]


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct"])
def test_candidates_are_ranked_as_by_evaluate(
    adapter: Callable[..., Any],
    saved: Callable[[str], Path],
    arch: str,
    shapes_data: Path,
    tmp_path: Path,
) -> None:
    labels = write_choices(tmp_path)
    ours = evaluated(tmp_path, arch, saved(arch), "shapes_instruct_options", "test_predictions.json", task="instruct")
    expected = [entry["losses"] for entry in sorted(ours, key=lambda entry: int(entry["instance_id"]))]
    chosen = [int(np.argmin(losses)) for losses in expected]
    assert len(set(chosen)) > 1, "choices depend on the item"
    for batch_size in (4, 1):
        found, metrics = run(adapter(arch, batch_size=batch_size), tmp_path, "shapes_options")
        losses = [[loss for loss, _ in candidates] for candidates in found]
        assert [int(np.argmin(own)) for own in losses] == chosen
        for own, other in zip(losses, expected, strict=True):
            assert own == pytest.approx(other, rel=1e-4)
        assert metrics["acc,none"] == pytest.approx(np.mean([a == b for a, b in zip(chosen, labels, strict=True)]))


@needs_lmms_eval
@pytest.mark.slow
def test_the_command_finds_the_model_by_its_entry_point(
    adapter: Callable[..., Any], saved: Callable[[str], Path], shapes_data: Path, tmp_path: Path
) -> None:
    ids = write_questions(tmp_path)
    arguments = f"arch=blip2_opt,model_type=tiny,checkpoint={saved('blip2_opt')},prompt={TEMPLATE}"
    command = ["--model", "lavis_lite", "--model_args", f"{arguments},text_processor=blip_question"]
    command += ["--tasks", "shapes_questions", "--include_path", str(tmp_path), "--batch_size", "4", "--device", "cpu"]
    command += ["--log_samples", "--output_path", str(tmp_path / "theirs")]
    environment = {**os.environ, "PYTHONPATH": str(cli_helpers.ROOT), **caches(tmp_path / "huggingface")}
    subprocess.run([sys.executable, "-m", "lmms_eval", *command], env=environment, cwd=tmp_path, check=True)
    (file,) = (tmp_path / "theirs").rglob("*_samples_shapes_questions.jsonl")
    answers = outputs([json.loads(line) for line in file.read_text().splitlines()])
    asked = {"max_len": 5, "prompt": TEMPLATE}
    ours = evaluated(tmp_path, "blip2_opt", saved("blip2_opt"), "shapes_vqa", "test_vqa.json", **VQA, **asked)
    expected = {entry["question_id"]: entry["answer"] for entry in ours}
    assert answers == [expected[key] for key in ids]


# Requests


PICTURES = [Image.new("RGB", (60, 40), color) for color in ("red", "blue", "yellow")]


def requests(model: Any, *documents: Any, kind: str = "", **generation_kwargs: Any) -> list[Any]:
    """Requests as lmms-eval makes them: each document is its images, its context, and perhaps its continuation."""
    model.task_dict = {"made_up": {"test": list(documents)}}
    found = []
    for number, (_, context, *continuation) in enumerate(documents):
        second = continuation[0] if continuation else dict(generation_kwargs)
        found.append(SimpleNamespace(args=(context, second, lambda document: document[0], number, "made_up", "test")))
    return found


@needs_lmms_eval
def test_several_images_are_read_one_after_the_other(adapter: Callable[..., Any]) -> None:
    model = adapter("blip2_opt", batch_size=2)
    documents = [(PICTURES[:1], text) for text in ("one", "of the same image")]
    documents += [(PICTURES[:2], "two"), (PICTURES[1:], "two"), (PICTURES, "three")]
    texts = model.generate_until(requests(model, *documents, max_new_tokens=6, num_beams=2))
    for (images, context), text in zip(documents, texts, strict=True):
        frames = torch.stack([model.process_image(image) for image in images], dim=1)[None]
        frames = frames[:, :, 0] if len(images) == 1 else frames
        sample = {"image": frames, "prompt": context}
        assert [text] == model.model.generate(sample, max_new_tokens=6, num_beams=2)
    assert len(set(texts)) == 5


@needs_lmms_eval
def test_a_video_is_read_by_its_path(adapter: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    PICTURES[0].save(path, save_all=True, append_images=PICTURES[1:], loop=0)
    model = adapter("blip2_opt", num_frames=2)
    asked = requests(model, ([str(path)], "what"), (PICTURES[:2], "what"), max_new_tokens=6, num_beams=1)
    video, images = model.generate_until(asked)
    assert video == images, "frames 0 and 1 of 3"
    assert [video] != model.generate_until(requests(model, (PICTURES[1:], "what"), max_new_tokens=6, num_beams=1))


@needs_lmms_eval
def test_candidates_of_one_document_are_one_choice(
    adapter: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter("blip2_opt", batch_size=2)
    documents = [(PICTURES[:1], "what", " red"), (PICTURES[:1], "what", " blue"), (PICTURES[1:2], "why", " zebra")]
    made = requests(model, *documents)
    made[1].args = (*made[0].args[:1], " blue", *made[0].args[2:])  # of the first document too
    images = [model.process_image(image) for image in PICTURES[:2]]
    expected = [
        *model.model.class_losses({"image": images[0][None], "prompt": "what"}, ["red", "blue"], divided=False)[0],
        *model.model.class_losses({"image": images[1][None], "prompt": "why"}, ["zebra"], divided=False)[0],
    ]
    settings: dict[str, Any] = {}
    monkeypatch.setattr(model.model, "generate", lambda _, **given: settings.update(given) or ["blue", "zebra x"])
    pairs = [result.text for result in model.loglikelihood(made)]
    assert [loss for loss, _ in pairs] == pytest.approx([float(loss) for loss in expected], rel=1e-4)
    assert [is_greedy for _, is_greedy in pairs] == [False, True, False]
    assert (settings["num_beams"], settings["max_new_tokens"]) == (1, len("zebra") + 1)


@needs_lmms_eval
def test_a_captioner_reads_its_own_prompt_or_the_one_given(adapter: Callable[..., Any]) -> None:
    settings = {"max_new_tokens": 12, "num_beams": 1}
    image = adapter("blip_caption").process_image(PICTURES[0])[None]
    for arguments, prompt in (({}, "a picture of "), ({"prompt": "red {}"}, "red circle"), ({"prompt": "a"}, "a")):
        model = adapter("blip_caption", **arguments)
        texts = model.generate_until(requests(model, (PICTURES[:1], "<image>\ncircle"), **settings))
        assert texts == model.model.generate({"image": image, "prompt": prompt}, **settings)


@needs_lmms_eval
@pytest.mark.parametrize(
    ("arch", "document", "settings", "parts"),
    [
        ("blip2_opt", ([], "x"), {}, ["task made_up, test document 0:", "no image"]),
        ("blip2_opt", (None, "x"), {}, ["no image"]),
        ("blip2_opt", ([{"array": []}], "x"), {}, ["dict"]),
        ("blip2_opt", (PICTURES[:1], "x"), {"num_beam": 2}, ["test document 0:", "generation_kwargs.num_beam"]),
        ("blip2_opt", (PICTURES[:1], "x"), {"max_new_tokens": 49152}, ["test document 0:", "context"]),
        ("blip_vqa", (PICTURES[:2], "x"), {}, ["BlipVQA reads one image", "2 images"]),
        ("blip_vqa", (["video.mp4"], "x"), {}, ["BlipVQA reads one image", "a video"]),
    ],
)
def test_what_a_model_cannot_read_is_an_error_with_its_document(
    adapter: Callable[..., Any], arch: str, document: Any, settings: dict[str, Any], parts: list[str]
) -> None:
    model = adapter(arch)
    with pytest.raises(InputError) as caught:
        model.generate_until(requests(model, document, **settings))
    assert all(part in str(caught.value) for part in parts), caught.value


@needs_lmms_eval
def test_what_a_model_cannot_do_is_an_error(adapter: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="arch=blip_retrieval: BlipRetrieval writes no text"):
        adapter("blip_retrieval")
    with pytest.raises(InputError, match="batch_size"):
        adapter("blip_vqa", batch_size="auto")
    with pytest.raises(InputError, match="name the weights"):
        adapter("blip_vqa", model_type=None, checkpoint=None)
    answers, ranks = adapter("blip_vqa"), adapter("blip2_opt")
    with pytest.raises(InputError, match="BlipVQA cannot rank candidates"):
        answers.loglikelihood(requests(answers, (PICTURES[:1], "x", " red")))
    with pytest.raises(InputError, match="acc_mutual_info"):
        ranks.loglikelihood([SimpleNamespace(args=("", "red"))])
    with pytest.raises(InputError, match="several rounds"):
        ranks.generate_until_multi_round([])


# Documentation


def test_documented_commands_name_models_and_settings_that_exist() -> None:
    page = (cli_helpers.ROOT / "docs" / "lmms_eval.md").read_text(encoding="utf-8")
    found = re.findall(r'--model_args "([^"]+)"', page)
    assert len(found) == 3
    for text in found:
        given = dict(part.split("=", 1) for part in text.split(","))
        if "arch" in given:
            assert given["model_type"] in model_zoo.types(given["arch"])
            own = {"arch", "model_type", "checkpoint", "prompt", "text_processor", "num_frames", "precision"}
            assert given.keys() - own <= set(signature(registry.get_model_class(given["arch"])).parameters)
    for text in re.findall(r"--gen_kwargs ([\w.=,-]+)", page):
        Generation.of({name: float(value) for name, value in (part.split("=") for part in text.split(","))})
