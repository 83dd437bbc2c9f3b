"""Two evaluations compared sample by sample: the statistics by hand, and `lavis-lite table --compare` on tiny runs."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest

from lavis_lite.cli.table import table_main
from lavis_lite.tasks.metrics import paired as module
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.paired import paired, sign_flip, standard_error

RUN: dict[str, Any] = {"run": {"valid_splits": [], "test_splits": ["test"]}}


def test_the_standard_error_is_that_of_the_textbook() -> None:
    scores = [100.0, 0.0, 30.0, 60.0, 100.0]
    expected = statistics.stdev(scores) / math.sqrt(len(scores))
    assert Mean(58.0, scores).standard_error() == pytest.approx(expected)
    assert standard_error(np.array(scores), np.ones(5)) == pytest.approx(expected)
    assert Mean(100.0, [100.0]).standard_error() is None


def test_samples_of_one_image_count_as_one() -> None:
    """Every sample five times, in groups, has the error of each once; as independent samples it would be smaller."""
    a, b = [0.0, 100.0, 0.0, 0.0, 100.0, 0.0], [100.0, 100.0, 0.0, 100.0, 0.0, 100.0]
    once = paired(a, b, range(6))
    grouped = paired(a * 5, b * 5, [*range(6)] * 5)
    apart = paired(a * 5, b * 5, range(30))
    assert (once.a, once.b, once.difference) == pytest.approx((100 / 3, 200 / 3, 100 / 3))
    assert (grouped.difference, grouped.error, grouped.p_value) == pytest.approx(
        (once.difference, once.error, once.p_value)
    )
    assert (grouped.num_samples, grouped.num_groups) == (30, 6)
    assert once.error is not None
    assert apart.error is not None
    assert apart.error < once.error
    assert apart.p_value < once.p_value


@pytest.mark.parametrize("differences", [[3.0, -1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0], [0.5, -0.5]])
def test_few_differences_are_flipped_in_every_way(differences: list[float]) -> None:
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    expected = statistics.mean(value >= abs(sum(differences)) - 1e-9 for value in flips)
    assert sign_flip(np.array(differences)) == expected


def test_many_differences_are_flipped_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random flips estimate the exact value; without a difference p is 1."""
    values = np.random.default_rng(5).normal(0.6, 1.0, size=12)
    exact = sign_flip(values)
    monkeypatch.setattr(module, "NUM_FLIPS", 4000)  # below 2 ** 12
    assert 0.005 < exact < 0.5
    assert sign_flip(values) == pytest.approx(exact, abs=4 * math.sqrt(exact / 4000))
    assert sign_flip(np.zeros(50)) == 1.0
    assert sign_flip(np.ones(50)) == 1 / 4001


def test_the_interval_is_that_of_drawn_samples() -> None:
    """Against a loop that draws the indices of pairs, the difference taken of each draw."""
    random = np.random.default_rng(1)
    a, b = random.normal(50, 20, 200), random.normal(53, 20, 200)
    drawn = [random.integers(0, 200, 200) for _ in range(4000)]
    low, high = np.percentile([b[one].mean() - a[one].mean() for one in drawn], [2.5, 97.5])
    result = paired(a.tolist(), b.tolist(), range(200))
    assert result.interval == pytest.approx((low, high), abs=0.35)
    assert result.error == pytest.approx((high - low) / (2 * 1.96), rel=0.06)


def table(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `lavis-lite table --compare`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        table_main(["--compare", *argv])
    return int(end.value.code or 0), *capsys.readouterr()


def two_runs(folder: Path, name: str, *options: str) -> tuple[Path, list[str]]:
    """A recipe's evaluations of two models with random weights."""
    path = cli_helpers.project(folder, name, RUN)
    for job, seed in (("a", 1), ("b", 2)):
        assert cli_helpers.evaluate(path, f"run.seed={seed}", *options, job=job) == 0
    return path, [str(folder / "output" / job) for job in ("a", "b")]


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("caption", {"CIDEr": 100, "true_rate": 1}),
        ("vqa_rank", {"overall": 1}),
        ("retrieval", {"txt_r1": 1, "img_r1": 1}),
        ("nlvr", {"acc": 1}),
    ],
)
def test_means_are_the_metrics_of_the_runs(
    name: str, names: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = two_runs(tmp_path, name)
    code, out, err = table(capsys, *runs, "--json")
    assert code == 0, err
    rows = {row["metric"]: row for row in json.loads(out)}
    assert rows.keys() == names.keys()
    for metric, factor in names.items():
        row = rows[metric]
        for side, run in zip("ab", runs, strict=True):
            found = json.loads(Path(run, "evaluation.json").read_text())
            assert row[side] == pytest.approx(found["metrics"]["test"][metric] * factor, abs=0.006)
            error = found["standard_errors"]["test"].get(metric)
            if row["num_groups"] == row["num_samples"] and metric != "true_rate":
                assert row[f"error_{side}"] == pytest.approx(error * factor)
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert 0 < row["p_value"] <= 1
    code, out, _ = table(capsys, *runs)
    assert code == 0
    assert f"A: {runs[0]}" in out
    file, twice = Path(runs[1], "predictions/test.jsonl"), Path(runs[0]).with_name("link")
    twice.symlink_to(runs[0])
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0]]))
    for second, words in (
        (runs[0], "are the same job"),
        (str(twice), "are the same job"),
        (str(file), f"{file}: a file; name the folder"),
        (runs[1], f"{file}:{len(lines) + 1}: sample"),
    ):
        code, _, err = table(capsys, runs[0], second)
        assert (code, words in err) == (2, True), err


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_runs_that_differ_in_more_than_the_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = two_runs(tmp_path, "vqa_rank")
    assert cli_helpers.evaluate(path, job="few", flags=["--limit", "5"]) == 0
    assert cli_helpers.evaluate(path, "run.accuracy=normalised", job="rule") == 0
    assert cli_helpers.evaluate(path, "run.test_splits=[val]", job="val") == 0
    output = tmp_path / "output"
    total = len(Path(runs[0], "predictions/test.jsonl").read_text().splitlines())
    other = output / "other/predictions/test.jsonl"
    other.parent.mkdir(parents=True)
    for file in ("log.txt", "config_evaluate.yaml"):
        (output / "other" / file).write_text(Path(runs[0], file).read_text())
    rows = [json.loads(line) for line in Path(runs[0], "predictions/test.jsonl").read_text().splitlines()]
    rows[3]["references"] = ["another answer"]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli_helpers.evaluate(cli_helpers.project(tmp_path, "nlvr", RUN), job="task") == 0
    for job, texts in {
        "few": [f"has {total:,}", "has 5", "5 ids in common"],
        "rule": ["run.accuracy", "official", "normalised"],
        "val": ["test", "val", "other splits"],
        "other": ["sample 3", "references"],
        "task": ["vqa", "multimodal_classification"],
        "none": ["no such folder"],
    }.items():
        code, _, err = table(capsys, runs[0], str(output / job))
        assert code == 2, job
        assert not [text for text in texts if text not in err], err
    code, _, err = table(capsys, str(output), runs[0])
    assert code == 2
    assert "jobs: name one of them" in err


@pytest.mark.parametrize("argv", [[], ["blip", "--compare", "a", "b"], ["--compare", "a", "b", "--output", "x"]])
def test_a_paper_or_two_runs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        table_main(argv)
    assert end.value.code == 2
    assert "--compare" in capsys.readouterr().err
