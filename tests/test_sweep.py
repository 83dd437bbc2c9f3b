"""`lavis-lite sweep`: the alternatives of a recipe's protocol, evaluated and compared with the published value."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import project

from lavis_lite.cli import sweep
from lavis_lite.common.config.config import Config, ConfigError

EXPECTED = [{"split": "test", "metric": "txt_r1", "value": 30.0, "source": "A paper, table 1"}]
ALTERNATIVES = [
    {"name": "The contrast alone!", "settings": {"run.k_test": 0}},
    {"name": "at 5", "metric": "txt_r5"},
    {"name": "validation", "settings": {"run.test_splits": ["val"]}, "split": "val"},
]


def recipe(folder: Path, **sections: Any) -> Path:
    path = project(folder, "retrieval", {"run": {"valid_splits": [], "k_test": 7}})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))
    return path


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        sweep.main(list(argv))
    return int(end.value.code or 0)


def test_each_alternative_is_evaluated_and_the_nearest_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, expected=EXPECTED, alternatives=ALTERNATIVES)
    assert run("--cfg-path", str(path)) == 0
    results = {
        folder.name: json.loads((folder / "evaluation.json").read_text())["percent"]
        for folder in (tmp_path / "output").iterdir()
    }
    assert results.keys() == {"sweep_as_the_recipe_is", "sweep_the_contrast_alone", "sweep_validation"}
    own = results["sweep_as_the_recipe_is"]["test"]
    here = {
        "as the recipe is": own["txt_r1"],
        "The contrast alone!": results["sweep_the_contrast_alone"]["test"]["txt_r1"],
        "at 5": own["txt_r5"],
        "validation": results["sweep_validation"]["val"]["txt_r1"],
    }
    nearest = min(here, key=lambda name: abs(here[name] - 30))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"  closest: {nearest}"
    for name, value in here.items():
        assert any(line.startswith(f"  {name} ") and f"{value:.2f}" in line for line in lines)


def test_only_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, expected=EXPECTED, alternatives=ALTERNATIVES)
    assert run("--cfg-path", str(path), "--only", "at 5", "--limit", "3") == 0
    assert [folder.name for folder in (tmp_path / "output").iterdir()] == ["sweep_as_the_recipe_is"]
    assert run("--cfg-path", str(path), "--only", "at 55") == 2
    assert "no alternative 'at 55'. Did you mean 'at 5'?" in capsys.readouterr().err


def test_what_an_alternative_does_not_measure_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, expected=EXPECTED, alternatives=[{"name": "at 5", "metric": "text_r5"}])
    assert run("--cfg-path", str(path)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  at 5              not measured",
        "  closest: as the recipe is",
    ]


def test_a_mistake_in_an_alternative_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, expected=EXPECTED, alternatives=[*ALTERNATIVES, {"name": "b", "settings": {"run.k": 0}}])
    assert run("--cfg-path", str(path)) == 2
    assert f"{path}: alternatives: b: run.k: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
    bad = recipe(tmp_path, expected=EXPECTED, alternatives=[{"name": "b", "settings": {"run": 0}}])
    with pytest.raises(ConfigError, match=r"alternatives\.0\.settings: expected keys such as run\.max_len, got 'run'"):
        Config.from_file(bad)


def test_a_dry_run_evaluates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, expected=EXPECTED, alternatives=ALTERNATIVES)
    assert run("--cfg-path", str(path), "--dry-run") == 0
    assert not list(tmp_path.rglob("evaluation.json"))
    assert capsys.readouterr().out.count("# dry run: no step was run") == 3


def test_a_recipe_without_alternatives_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cfg-path", str(recipe(tmp_path, expected=EXPECTED))) == 2
    assert "has no `alternatives`" in capsys.readouterr().err


def test_names_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alternatives: names must differ, got a, a"):
        Config.from_file(recipe(tmp_path, alternatives=[{"name": "a"}, {"name": "a"}]))
