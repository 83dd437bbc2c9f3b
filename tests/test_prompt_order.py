"""One order of prompts, and never two inside each other: what the language model is asked, word for word."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml
from test_bad_input import complains
from torch.utils.data import default_collate

from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.models import load_model

QUESTION, SHORT = "Question: {} Answer:", "Q: {} Short:"
CAPTION = "a short description"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures, each asked something and captioned."""
    cli_helpers.pictures(tmp_path, 2)
    records = [{"image": f"picture{i}.png", "question": "what is it?", "answer": ["cat"]} for i in range(2)]
    more = {"caption": "a cat", "image_id": "x", "ocr_tokens": ["stop", "go"], "choices": ["cat", "dog"]}
    own = {"instruction": "Name it.", "output": "cat"}
    for number, record in enumerate(records):
        record.update(more, question_id=number, correct_choice_idx=0, image_id=number, **own)
    (tmp_path / "all.json").write_text(json.dumps(records))
    return tmp_path


def section(folder: Path, **fields: Any) -> dict[str, Any]:
    storage = {"storage": str(folder / "all.json"), "url": None, "md5": None}
    info = {"annotations": {"train": storage, "val": storage}, "images": {"storage": str(folder)}}
    return {"build_info": info, **fields}


def project(folder: Path, task: str, name: str, *, model: dict[str, Any], run: dict[str, Any], **fields: Any) -> Path:
    ranked = {"inference_method": "generate"} if task == "vqa" else {}
    recipe = {
        "model": {"arch": "blip2_opt", "model_type": "tiny", **model},
        "datasets": {name: section(folder, **fields)},
        "run": {"task": task, "valid_splits": ["val"], "num_beams": 1, "max_len": 2, "min_len": 1, **ranked, **run},
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


language_model = cache(lambda: load_model("blip2_opt", "tiny"))


def asked(path: Path, *options: str) -> tuple[set[str], str]:
    """What the language model is asked in training and in evaluation, by one step of each."""
    cfg = Config.from_file(path, options)
    task = registry.get_task_class(cfg.run.task)(**cfg.task)
    ((splits),) = task.build_datasets(cfg).values()
    model = language_model()
    model.prompt = cfg.model.get("prompt", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "image_embeds", stop)
        with pytest.raises(Asked) as training:
            task.train_step(model, batch(splits["train"]))
        with pytest.raises(Asked) as evaluation:
            task.valid_step(model, batch(splits["val"]))
    (prompt,) = set(evaluation.value.prompts)
    return set(training.value.prompts), prompt


class Asked(Exception):
    """Ends a step where the model has put its prompts together."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts


def stop(samples: dict[str, Any], prompts: list[str]) -> None:
    raise Asked(prompts)


def batch(dataset: BaseDataset) -> dict[str, Any]:
    samples = [dataset[i] for i in range(2)]
    return {
        key: default_collate([s[key] for s in samples]) if key == "image" else [s[key] for s in samples]
        for key in samples[0]
    }


# Datasets with instructions: gqa_instruct's one template of evaluation is "Question: {question} Short answer:"


CHOICE = {"type": "multiple_choice"}
OWN = {"instructions": {"output": "answer", "train": ["Now: {question}"], "eval": "Then: {question}"}}


@pytest.mark.parametrize(
    ("model", "run", "expected"),
    [
        ({}, {}, "Question: what is it? Short answer:"),
        ({}, {"prompt": QUESTION}, "Question: what is it? Answer:"),
        ({"prompt": QUESTION}, {}, "Question: what is it? Answer:"),
        ({"prompt": QUESTION}, {"prompt": QUESTION}, "Question: what is it? Answer:"),
        ({"prompt": CAPTION}, {}, "Question: what is it? Short answer:"),
        ({"prompt": CAPTION}, {"prompt": SHORT}, "Q: what is it? Short:"),
    ],
)
def test_an_explicit_prompt_replaces_the_template_of_questions(
    model: dict[str, str], run: dict[str, str], expected: str, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lavis_lite.common.config.agreement")
    path = project(files, "vqa", "gqa_instruct", model=model, run=run)
    training, evaluation = asked(path)
    assert evaluation == expected
    assert training == {expected} or not (run or "{}" in model.get("prompt", ""))  # else one of many is drawn
    said = [record.getMessage() for record in caplog.records if "replaces its" in record.getMessage()]
    key = "run.prompt" if run else "model.prompt"
    prompt = {**model, **run}.get("prompt")
    replaced = "{}" in (prompt or "")
    assert said == [f"datasets.gqa_instruct: {key} {prompt!r} replaces its instructions"] * replaced


@pytest.mark.parametrize(
    ("task", "name", "fields", "key", "prompt", "expected"),
    [
        ("captioning", "coco_caption_instruct", {}, "model", CAPTION, CAPTION),
        ("captioning", "coco_caption_instruct", {}, "run", CAPTION, CAPTION),
        ("captioning", "coco_caption_instruct", {}, "model", QUESTION, "A short image description:"),
        ("captioning", "coco_caption_instruct", {}, "run", QUESTION, "A short image description:"),
        ("vqa", "instruct", {}, "run", QUESTION, "Question: Name it. Answer:"),
        ("vqa", "instruct", {"instructions": "vqa"}, "model", QUESTION, None),
        ("instruct", "instruct", {}, "model", QUESTION, "Question: Name it. Answer:"),
        ("instruct", "instruct", {}, "model", CAPTION, "Name it."),
        (
            "instruct",
            "aok_vqa_instruct",
            {"type": "multiple_choice"},
            "model",
            QUESTION,
            "Question: what is it? Answer:",
        ),
        (
            "instruct",
            "aok_vqa_instruct",
            {"type": "multiple_choice"},
            "model",
            "{} Choose: {}",
            "what is it? Choose: (a) cat (b) dog",
        ),
        ("vqa", "vqa", {}, "run", QUESTION, "Question: what is it? Answer:"),
        ("vqa", "vqa", {}, "model", QUESTION, "Question: what is it? Answer:"),
        ("vqa", "vqa", {}, "model", CAPTION, "what is it?"),
    ],
)
def test_what_is_asked(
    task: str, name: str, fields: dict[str, Any], key: str, prompt: str, expected: str | None, files: Path
) -> None:
    """In evaluation; in training the same, where a prompt is in place of the templates."""
    given = {"model": {}, "run": {}, key: {"prompt": prompt}}
    path = project(files, task, name, **given, **fields)
    if expected is None:
        with pytest.raises(ConfigError, match=r"datasets\.instruct\.instructions: model\.prompt is given too, .*one"):
            asked(path)
        return
    training, evaluation = asked(path)
    assert evaluation == expected
    if name in ("instruct", "vqa", "aok_vqa_instruct") or prompt == CAPTION:
        assert training == {expected}


@pytest.mark.parametrize("key", ["model", "run"])
def test_captions_have_no_question_to_put_into_a_prompt(
    key: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The language model would read the braces; this is said before the training, not at its first evaluation."""
    given = {"model": {}, "run": {}, key: {"prompt": QUESTION}}
    path = project(files, "captioning", "coco_caption", **given)
    code = cli_helpers.train(path, job=None, flags=["--dry-run"])
    complains(capsys, code, f"coco_caption/val: the prompt {QUESTION!r} has a '{{}}', and these samples no question")
    samples = {"image": torch.zeros(1, 3, 48, 48), "prompt": QUESTION}
    with pytest.raises(ValueError, match=r"Question: .*text_input"):
        language_model().generate(samples)


def test_two_explicit_prompts_are_an_error_that_names_both(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, name, prompts in (
        ("vqa", "gqa_instruct", (QUESTION, SHORT)),
        ("vqa", "vqa", (QUESTION, SHORT)),
        ("captioning", "coco_caption_instruct", (CAPTION, "a photo of")),
        ("captioning", "caption", (CAPTION, "a photo of")),
    ):
        path = project(files, task, name, run={"prompt": prompts[0]}, model={"prompt": prompts[1]})
        words = [f"run.prompt: {prompts[0]!r} and model.prompt, {prompts[1]!r}, are two prompts: set one of them"]
        complains(capsys, cli_helpers.train(path, job=None, flags=["--dry-run"]), *words)
    path = project(files, "vqa", "gqa_instruct", model={}, run={"prompt": QUESTION}, **OWN)
    with pytest.raises(ConfigError, match=r"datasets\.gqa_instruct\.instructions: run\.prompt is given too, .*set one"):
        Config.from_file(path)


def test_a_types_own_prompt_is_not_explicit(files: Path) -> None:
    """`caption_coco_opt2.7b` has "a photo of": captions of a dataset with instructions are asked by those."""
    published = {"model_type": "caption_coco_opt2.7b"}
    cfg = Config.from_file(project(files, "captioning", "coco_caption_instruct", model=published, run={}))
    assert (cfg.model["prompt"], cfg.prompts) == ("a photo of", {})
    (files / "again.yaml").write_text(cfg.to_yaml())  # where the prompt is written out
    assert Config.from_file(files / "again.yaml").prompts == {}
    given = Config.from_file(files / "again.yaml", ["run.prompt=a picture of"]).prompts["coco_caption_instruct"]
    assert (given["train"], given["eval"]) == (["a picture of"], "a picture of")


@pytest.mark.parametrize("name", ["color", "statement", "caption"])
def test_a_prompt_replaces_templates_that_follow_from_the_class(name: str, files: Path) -> None:
    """`shapes_instruct_*` name none in their YAML: the group has its own."""
    prompt = "tell me" if name == "caption" else "Q: {} A:"
    path = files / "project.yaml"
    text = f"model: {{arch: blip2_t5_instruct, model_type: tiny, prompt: '{prompt}'}}\nrun: {{task: instruct}}\n"
    path.write_text(text + f"datasets: {{shapes_instruct_{name}: {{}}}}\n")
    found = Config.from_file(path).prompts[f"shapes_instruct_{name}"]
    field = {"color": "{question}", "statement": "{statement}", "caption": ""}[name]
    assert found["eval"] == prompt.replace("{}", field)


def test_a_job_s_config_asks_as_the_job_did(files: Path) -> None:
    path = project(files, "vqa", "gqa_instruct", model={}, run={"prompt": QUESTION})
    cfg = Config.from_file(path)
    (files / "config.yaml").write_text(cfg.to_yaml())
    assert asked(files / "config.yaml")[1] == "Question: what is it? Answer:"
    assert asked(files / "config.yaml", f"run.prompt='{SHORT}'")[1] == "Q: what is it? Short:"


def test_more_gaps_than_the_dataset_has_fields(files: Path) -> None:
    path = project(files, "vqa", "gqa_instruct", model={}, run={"prompt": "OCR: {} Q: {} A:"})
    words = r"run\.prompt: 'OCR: .* has 2 '\{\}', and instructions with question fill only some"
    with pytest.raises(ConfigError, match=words):
        Config.from_file(path)


def test_answers_fall_back_on_the_models_prompt_and_samples_may_bring_theirs() -> None:
    model, seen = load_model("blip2_opt", "tiny", prompt=QUESTION, is_eval=True), []
    ask = model.prompt_embeds
    model.prompt_embeds = lambda samples, prompts, **own: seen.extend(prompts) or ask(samples, prompts, **own)
    samples = {"image": torch.zeros(1, 3, 48, 48), "text_input": ["what?"]}
    for more, settings in (({}, {}), ({}, {"prompt": SHORT}), ({"prompt": SHORT}, {}), ({"prompt": ["{}"]}, {})):
        model.predict_answers({**samples, **more}, num_beams=1, max_len=1, **settings)
    assert seen == ["Question: what? Answer:", "Q: what? Short:", "Q: what? Short:", "what?"]
