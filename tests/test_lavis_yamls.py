"""LAVIS's project YAMLs work unchanged: each resolves, and at tiny size dry-runs, and trains two steps or evaluates."""

import json
import logging
from pathlib import Path
from typing import Any

import cli_helpers
import lavis_yamls
import pytest
import torch
import yaml
from lavis_yamls import YAMLS

from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model
from lavis_lite.tasks.metrics import caption_java


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_java, "find_java", lambda: None)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the YAMLs name."""
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    lavis_yamls.write_files(tmp_path)
    (tmp_path / "answer_list.json").write_text(json.dumps(["dog", "cat"]))
    return tmp_path


def write(folder: Path, content: dict[str, Any]) -> Path:
    content["run"]["output_dir"] = str(folder / "output")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_of_lavis_resolves_as_it_is(name: str, data: Path) -> None:
    path = write(data, lavis_yamls.tree(name, data))
    assert Config.from_file(path).run.task == lavis_yamls.tree(name, data)["run"]["task"]


def test_the_yamls_have_every_key_of_lavis_s() -> None:
    def given(content: Any, path: tuple[str, ...] = ()) -> set[str]:
        if not isinstance(content, dict):
            return {".".join(path)}
        return {key for name, one in content.items() for key in given(one, (*path, str(name)))}

    found: set[str] = set()
    for name in YAMLS:
        content = lavis_yamls.tree(name, Path("/data"))
        found |= given({"model": content["model"], "run": content["run"]})
        found |= {key for one in content["datasets"].values() for key in given(one, ("datasets", "*"))}
    wanted = {f"{section}.{key}" for section, keys in lavis_yamls.KEYS.items() for key in keys.split()}
    assert wanted <= found


@pytest.mark.slow
@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_of_lavis_runs(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = lavis_yamls.tiny(lavis_yamls.tree(name, data))
    ranks = content["run"].get("inference_method") == "rank"
    for dataset in content["datasets"].values() if ranks else ():
        for entry in dataset["build_info"]["annotations"].values():
            entry["storage"].append(str(data / "answer_list.json"))
            entry["url"].append("https://storage.googleapis.com/x/answer_list.json")
            entry["md5"].append("aa31ac474cf6250ebb81d18348a07ed8")
    path = write(data, content)
    assert cli_helpers.train(path, flags=["--dry-run"], job=None) == 0  # device: cuda
    assert "no step was run" in capsys.readouterr().out
    assert cli_helpers.train(path, "run.device=cpu") == 0
    job = data / "output" / "job"
    if content["run"]["evaluate"]:
        metrics = json.loads((job / "evaluation.json").read_text())["metrics"]
        splits = [split for key in ("valid_splits", "test_splits") for split in content["run"].get(key, [])]
        assert list(metrics) == list(dict.fromkeys(splits))
    else:
        assert cli_helpers.steps(job)[-1]["step"] >= 2


def job(path: Path, *options: str) -> dict[str, Any]:
    """Evaluate the recipe; the metrics of its test split."""
    assert cli_helpers.train(path, "run.device=cpu", *options) == 0
    metrics: dict[str, Any] = json.loads((path.parent / "output" / "job" / "evaluation.json").read_text())["metrics"]
    return metrics["test"]


def small(name: str, folder: Path, **run: Any) -> Path:
    content = lavis_yamls.tiny(lavis_yamls.tree(name, folder))
    content["run"] |= run
    return write(folder, content)


def test_keys_of_other_tasks_are_noted_once(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = lavis_yamls.tree("instruct snli_ve", data)
    caplog.set_level(logging.INFO)
    cfg = Config.from_file(write(data, content))
    noted = [text for text in caplog.messages if "no effect" in text and "multimodal_classification" in text]
    assert noted == [
        "run.task: multimodal_classification does not read num_beams, prompt, inference_method: no effect, as in LAVIS"
    ]
    assert cfg.task == {"max_len": 3, "min_len": 1, "length_penalty": 0.0, "segments": 1}
    assert "datasets.snli_ve: text_processor.eval.prompt of LAVIS have no effect" in caplog.messages
    with pytest.raises(ConfigError, match=r"recipe\.yaml: run\.num_beam: unknown key"):
        Config.from_file(write(data, content | {"run": content["run"] | {"num_beam": 3}}))


def test_only_the_named_images_are_captioned(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small("instruct nocaps", data, img_ids=[1, "2", 99])
    job(path, "run.metrics=[bleu]")
    results = json.loads((data / "output" / "job" / "result" / "test_captions.json").read_text())
    assert [result["image_id"] for result in results] == [1, 2]
    assert any("img_ids" in text and "lacks 1 of 3 images, e.g. 99" in text for text in caplog.messages)
    assert cli_helpers.train(path, "run.img_ids=[77]", flags=["--dry-run"], job=None) == 2


def test_references_of_a_file_are_scored(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = type(load_model("blip2_t5_instruct", "tiny"))
    monkeypatch.setattr(model, "generate", lambda self, samples, **_: ["two cats sit here"] * len(samples["image"]))
    truths = [{"vid": i, "said": ["two cats sit here", "cats"]} for i in range(4)]
    (data / "truths.json").write_text(json.dumps(truths))
    own = {"annotation_file": None, "load_gt_from_file": str(data / "truths.json"), "sample_id_key": "vid"}
    path = small("instruct nocaps", data, **own, caption_key="said", metrics=["bleu"])
    assert job(path)["Bleu_4"] == pytest.approx(1.0)
    assert cli_helpers.train(path, "run.caption_key=caption", flags=["--dry-run"], job=None) == 2
    assert "run.load_gt_from_file: " in capsys.readouterr().err


def test_captions_of_a_field_with_another_name_are_read(data: Path) -> None:
    records = [{"image": f"p{i}.png", "said": f"dog {i}", "number": i} for i in range(4)]
    (data / "captions.json").write_text(json.dumps(records))
    path = small("instruct captioning", data, caption_key="said", sample_id_key="number")
    cfg = Config.from_file(path)
    task = registry.get_task_class("captioning")(**cfg.task)
    assert task.build_datasets(cfg)["coco_caption"]["test"].references() == {i: [f"dog {i}"] for i in range(4)}


def test_answers_of_the_official_files_are_scored(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((data / "official.json").read_text())
    for number, annotation in enumerate(content["annotations"]):
        annotation["answers"] = [{"answer": "cat" if number == 0 else "dog"}]
    content["questions"] = content["questions"][:2]
    (data / "official.json").write_text(json.dumps(content))
    path = small("instruct msvd vqa", data)
    model = type(load_model("blip2_vicuna_instruct", "tiny"))
    monkeypatch.setattr(model, "predict_answers", lambda self, samples, **_: ["cat"] * len(samples["image"]))
    assert job(path)["overall"] == 50  # one of the two questions of `ques_files`; the dataset's answers are all "dog"
    content["annotations"] = content["annotations"][1:]
    (data / "official.json").write_text(json.dumps(content))
    assert cli_helpers.train(path, flags=["--dry-run"], job=None) == 2
    assert "run.anno_files: " in capsys.readouterr().err


def test_records_are_identified_by_the_named_field(data: Path) -> None:
    cfg = Config.from_file(small("instruct msvd vqa", data))
    datasets = registry.get_task_class("gqa")(**cfg.task).build_datasets(cfg)
    assert [r["instance_id"] for r in datasets["msvd_qa_instruct"]["test"].annotation] == ["10", "11", "12", "13"]
    cfg.datasets["msvd_qa_instruct"]["build_info"]["instance_id_key"] = "number"
    with pytest.raises(ValueError, match=r"clips\.json: record 0: build_info\.instance_id_key: no field 'number'"):
        registry.get_task_class("gqa")(**cfg.task).build_datasets(cfg)


def test_the_defaults_of_lavis_are_a_switch(data: Path) -> None:
    path = small("blip captioning", data)
    assert not {"length_penalty", "repetition_penalty"} & Config.from_file(path).task.keys()
    task = Config.from_file(path, ["run.defaults=lavis"]).task
    assert (task["repetition_penalty"], task["length_penalty"]) == (1.15, 0.0)
    assert Config.from_file(path, ["run.defaults=lavis", "run.length_penalty=1"]).task["length_penalty"] == 1.0
    assert Config.from_file(small("blip2 gqa", data, defaults="lavis")).task["length_penalty"] == 0.0  # OPT
    assert "length_penalty" not in Config.from_file(small("blip2 vqa", data, defaults="lavis")).task  # T5: -1 in both


def test_few_shot_examples_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model\.few_shot_prob: must be 0, got 0\.5"):
        load_model("blip2_t5_instruct", "tiny", few_shot_prob=0.5)


def test_a_language_model_ranks_the_names_of_classes() -> None:
    """Against `class_losses` of the same texts, one at a time."""
    model = load_model("blip2_t5_instruct", "tiny", is_eval=True, format_candidates_prompt="a {}")
    torch.manual_seed(0)
    samples = {"image": torch.randn(2, 3, 48, 48), "text_input": ["a dog runs", "cats"], "label": torch.tensor([1, 0])}
    names = ["no", "maybe", "yes it is"]
    output = model.predict({**samples, "candidates": names})
    own = torch.cat([model.class_losses(samples, [f"a {name}"]) for name in names], dim=1)
    torch.testing.assert_close(output["predictions"], -own, rtol=1e-5, atol=1e-5)
    assert output["targets"].tolist() == [1, 0]
    lists = [["no", "yes it is"], ["maybe"]]
    ragged = model.predict({**samples, "candidates": lists})["predictions"]
    torch.testing.assert_close(ragged[0], -own[0, [0, 2]], rtol=1e-5, atol=1e-5)
    assert ragged[1, 1] == float("-inf")


def test_a_written_class_counts_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("blip2_t5_instruct", "tiny", is_eval=True, predict_with_gen=True)
    monkeypatch.setattr(model, "generate", lambda samples, **_: ["It is a Sofa or a door", "nothing"])
    samples = {"image": torch.zeros(2, 3, 48, 48), "candidates": ["cup", "door", "sofa"], "instance_id": ["0", "1"]}
    task = registry.get_task_class("multimodal_classification")()
    assert [result["prediction"] for result in task.valid_step(model, samples)] == [1, -1]


def test_statements_are_classified_by_words(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the candidates no, maybe and yes the model likes maybe; one of the four statements is neutral."""
    model = type(load_model("blip2_vicuna_instruct", "tiny"))
    losses = torch.tensor([[2.0, 1.0, 3.0]])
    monkeypatch.setattr(model, "class_losses", lambda self, samples, *_, **__: losses.expand(len(samples["image"]), -1))
    assert job(small("instruct snli_ve of words", data))["acc"] == 25
