"""Published values beside a run's own: `expected:`, the verdict's outcomes, --check, --limit and evaluation.json."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_helpers import evaluate, project

from lavis_lite.cli import verdict
from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.config.expected import Expected
from lavis_lite.tasks.metrics.mean import Mean

SOURCE = "A paper, table 1"


def entry(metric: str, value: float, **more: Any) -> dict[str, Any]:
    return {"split": "test", "metric": metric, "value": value, "source": SOURCE, **more}


def recipe(folder: Path, entries: list[dict[str, Any]], name: str = "vqa_rank") -> Path:
    path = project(folder, name, {"run": {"valid_splits": [], "num_workers": 0}})
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "expected": entries}))
    return path


def evaluation(folder: Path, job: str = "evaluation") -> dict[str, Any]:
    return json.loads((folder / "output" / job / "evaluation.json").read_text())


def verdicts(folder: Path) -> dict[str, str]:
    return {row["metric"]: row["verdict"] for row in evaluation(folder)["verdict"]}


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The accuracy, in percent, of the untrained tiny model that all tests here evaluate."""
    folder = tmp_path_factory.mktemp("first")
    assert evaluate(recipe(folder, [])) == 0
    return evaluation(folder)["metrics"]["test"]["overall"]


def test_the_four_outcomes(tmp_path: Path, accuracy: float, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        entry("overall", accuracy + 0.4, num_samples=14),
        entry("overall", accuracy + 9, scorer="lavis"),
        entry("official", accuracy, num_samples=5000),
        entry("overall", 70.0, server="EvalAI test-dev"),
    ]
    path = recipe(tmp_path, entries)
    assert evaluate(path, flags=["--check"]) == 1
    rows = evaluation(tmp_path)["verdict"]
    assert [row["verdict"] for row in rows] == ["reproduced", "differs", "not comparable", "by server"]
    assert rows[0]["difference"] == pytest.approx(-0.4)
    assert rows[1]["metric"] == "overall (lavis)"
    assert rows[2]["reasons"] == ["14 of 5,000 samples"]
    printed = capsys.readouterr()
    assert "reproduced" in printed.err
    assert json.loads(printed.out)["test"]["overall"] == accuracy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["run.num_ans_candidates=2"], "run.num_ans_candidates: 2, the value is for 6"),
        (["run.prompt='Question: {}'"], "run.prompt: 'Question: {}', the value is for ''"),
        (["datasets.shapes_vqa.colors=3"], "datasets.shapes_vqa.colors: 3, the value is for 4"),
        (["model.vit.depth=1"], "model.vit.depth: 1, the value is for 2"),
    ],
)
def test_a_changed_protocol_is_not_comparable(tmp_path: Path, accuracy: float, options: list[str], reason: str) -> None:
    assert evaluate(recipe(tmp_path, [entry("overall", accuracy)]), *options, flags=["--check"]) == 3
    (row,) = evaluation(tmp_path)["verdict"]
    assert row["verdict"] == "not comparable"
    assert reason in row["reasons"]


def test_batch_size_and_weights_are_not_protocol(tmp_path: Path, accuracy: float) -> None:
    path = recipe(tmp_path, [entry("overall", accuracy)])
    assert evaluate(path, "run.batch_size_eval=7", "run.seed=42", flags=["--check"]) == 0
    assert verdicts(tmp_path) == {"overall": "reproduced"}


def test_limit_evaluates_the_first_samples_and_says_so(tmp_path: Path, accuracy: float) -> None:
    path = recipe(tmp_path, [entry("overall", accuracy, num_samples=14)])
    assert evaluate(path, flags=["--limit", "3", "--check"]) == 3
    found = evaluation(tmp_path)
    assert found["num_samples"] == {"test": 3}
    assert found["verdict"][0]["reasons"] == ["run.limit: 3, the value is without it", "3 of 14 samples"]
    assert len(json.loads((tmp_path / "output/evaluation/result/test_vqa.json").read_text())) == 3


def test_limit_of_a_gallery_keeps_the_images_texts(tmp_path: Path) -> None:
    assert evaluate(recipe(tmp_path, [], "retrieval"), flags=["--limit", "3"]) == 0
    result = json.loads((tmp_path / "output/evaluation/result/test_retrieval.json").read_text())
    assert len(result["images"]) == 3
    assert sum(map(len, result["img2txt"])) == len(result["texts"])


def test_of_several_entries_the_nearest_counts(tmp_path: Path, accuracy: float) -> None:
    entries = [
        entry("overall", 1.0, settings={"run.num_ans_candidates": 5}),
        entry("overall", accuracy),
        entry("overall", 2.0, model="blip_vqa/vqav2"),
    ]
    path = recipe(tmp_path, entries)
    assert evaluate(path) == 0
    (row,) = evaluation(tmp_path)["verdict"]
    assert (row["published"], row["verdict"]) == (accuracy, "reproduced")
    assert evaluate(path, "run.num_ans_candidates=5") == 0
    (row,) = evaluation(tmp_path)["verdict"]
    assert row["published"] == 1.0
    assert row["reasons"] == []


def test_all_values_of_one_measurement_are_judged(tmp_path: Path, accuracy: float) -> None:
    again = entry("overall", accuracy + 5, settings={"run.precision": "auto"})
    entries = [entry("overall", accuracy), {**entry("overall", accuracy + 3), "source": "LAVIS, docs"}, again]
    assert evaluate(recipe(tmp_path, entries), flags=["--check"]) == 1
    rows = evaluation(tmp_path)["verdict"]
    assert [(row["source"], row["verdict"]) for row in rows] == [(SOURCE, "reproduced"), ("LAVIS, docs", "differs")]


def test_a_scripts_accuracy_by_answer_type_is_its_own() -> None:
    value = Expected(split="val", metric="per_answer_type.yes/no", value=84.0, source=SOURCE, scorer="lavis")
    metrics = {"per_answer_type": {"yes/no": 83.0}, "lavis_per_answer_type": {"yes/no": 84.5}}
    assert verdict.lookup(metrics, verdict.key_of(value, "official")) == 84.5
    assert verdict.lookup(metrics, verdict.key_of(value, "lavis")) == 83.0


def test_a_recipe_based_on_one_with_values_keeps_the_bases_protocol(tmp_path: Path, accuracy: float) -> None:
    recipe(tmp_path, [entry("overall", accuracy)])
    own = tmp_path / "own.yaml"
    own.write_text("_base_: vqa_rank.yaml\nrun: {num_ans_candidates: 3}\n")
    assert evaluate(own) == 0
    assert evaluation(tmp_path)["verdict"][0]["reasons"] == ["run.num_ans_candidates: 3, the value is for 6"]


def test_the_models_own_type_is_compared_with_the_recipes(tmp_path: Path, accuracy: float) -> None:
    path = recipe(tmp_path, [entry("overall", accuracy, model="blip_vqa/vqav2")])
    assert evaluate(path) == 0
    (row,) = evaluation(tmp_path)["verdict"]
    assert row["reasons"] == ["model blip_vqa/tiny, the value is for blip_vqa/vqav2"]


def test_without_values_check_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(recipe(tmp_path, []), flags=["--check"]) == 3
    assert "expects no value" in capsys.readouterr().err


def test_values_of_a_server_alone_do_not_pass_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, [entry("overall", 70.0, server="EvalAI test-dev")])
    assert evaluate(path, flags=["--check"]) == 3
    assert "--check: only a server prints the published values" in capsys.readouterr().err


def test_provenance(tmp_path: Path) -> None:
    path = recipe(tmp_path, [])
    assert evaluate(path) == 0
    first = evaluation(tmp_path)["provenance"]
    assert first["recipe"] == str(path)
    assert (first["model"], first["weights"], first["precision"]) == ("blip_vqa/tiny", None, "float32")
    assert len(first["weights_sha256"]) == 64
    assert evaluate(path, "run.seed=43", job="other") == 0
    assert evaluation(tmp_path, "other")["provenance"]["weights_sha256"] != first["weights_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrik": "overall"}, "expected.0.metrik: unknown key"),
        ({"value": "high"}, "expected.0.value: expected a number"),
        ({"model": "blip_vqa"}, "expected.0.model: expected <arch>/<model_type>"),
        ({"tolerance": -1.0}, "expected.0.tolerance: must be at least 0"),
        ({"num_samples": 0}, "expected.0.num_samples: must be at least 1, got 0"),
        ({"source": " "}, "expected.0.source: must name a paper or page, got ' '"),
        ({"settings": {"run": 3}}, "expected.0.settings: expected keys such as run.max_len, got 'run'"),
        ({"settings": {"": 3}}, "expected.0.settings: expected keys such as run.max_len, got ''"),
        ({"settings": {"run.a": 3, "run.a.b": 3}}, "expected.0.settings: run.a and run.a.b set the same key"),
    ],
)
def test_a_mistyped_entry_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_file(recipe(tmp_path, [{**entry("overall", 1.0), **changes}]))
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"split": "valid"}, {"metric": "CIDEr"}, {"scorer": "lavisss"}])
def test_an_entry_that_the_run_cannot_measure_is_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = recipe(tmp_path, [{**entry("overall", 1.0), **changes}])
    assert evaluate(path) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"run.num_beans": 3}}, "expected.1: run.num_beans: unknown key"),
        ({"settings": {"run.num_beams": "x"}}, "expected.1: run.num_beams: expected a whole number"),
        ({"model": "blip_vqaa/tiny"}, "expected.1: model.arch: unknown model 'blip_vqaa'"),
        ({"model": "blip_vqa/tinny"}, "expected.1: model.model_type: 'blip_vqa' has no type 'tinny'"),
    ],
)
def test_a_protocol_that_does_not_exist_is_an_error_before_the_run(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, [entry("overall", 1.0), {**entry("overall", 2.0), **changes}])
    assert evaluate(path) == 2
    assert f"{path}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "output").exists() or not any((tmp_path / "output").iterdir())


def test_a_task_without_scorers_says_so(tmp_path: Path) -> None:
    path = recipe(tmp_path, [entry("txt_r1", 1.0, scorer="lavis")], name="retrieval")
    with pytest.raises(ConfigError, match=r"expected\.0\.scorer: this recipe measures no 'lavis'\. Leave it out\."):
        verdict.check_expected(Config.from_file(path))


def test_reading_the_protocols_logs_nothing_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = recipe(tmp_path, [entry("overall", 1.0)])
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "run": {**tree["run"], "dist_url": "env://"}}))
    caplog.set_level("INFO")
    verdict.check_expected(Config.from_file(path))
    assert [record.message for record in caplog.records] == ["ignored run keys of LAVIS: dist_url"]


def test_a_splits_samples_are_printed_once() -> None:
    row = verdict.Row(
        split="val",
        metric="CIDEr",
        key="CIDEr",
        model="a/b",
        here=1.0,
        interval=(0.5, 1.5),
        published=82.0,
        difference=-81.0,
        verdict="differs",
        source=SOURCE,
        num_samples=1200,
        expected_samples=4500,
        reasons=[],
    )
    assert verdict.table([row, replace(row, expected_samples=None)]) == [
        "metric     here  95 % interval  published  difference  verdict  source",
        *["val CIDEr  1.00  0.50 to 1.50   82.0       -81.00      differs  A paper, table 1"] * 2,
        "val: 1,200 of 4,500 samples",
    ]


def test_mean_is_a_number_with_an_interval() -> None:
    scores = np.random.default_rng(1).random(400)
    mean = Mean(float(scores.mean()), scores)
    low, high = mean.interval()
    half = 1.96 * scores.std() / 20  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.003)
    assert high == pytest.approx(mean + half, abs=0.003)
    assert json.dumps({"x": Mean(0.5, [0, 1])}) == '{"x": 0.5}'
    assert type(pickle.loads(pickle.dumps(mean))) is float
    assert type(copy.deepcopy(mean)) is float
