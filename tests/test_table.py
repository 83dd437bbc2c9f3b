"""All published numbers are in a recipe or the data file, and `lavis-lite table` prints them with what was measured."""

import csv
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import evaluate, project

from lavis_lite.cli.published import FAMILIES, PAPERS, REASONS, Number, data_file, numbers, read_recipes, tables_of
from lavis_lite.cli.table import layout, table_main
from lavis_lite.common.config.config import Config

ROOT = Path(__file__).parents[1]
PROJECTS = ROOT / "projects"
REFERENCE = Path(__file__).parent / "data" / "published_numbers.csv"
"""All numbers of the three papers, of LAVIS, and of others who measured again; collected by hand."""
COLUMNS = ("paper", "table", "model", "dataset", "split", "metric", "value")
FROM_LAVIS = "LAVIS, projects/blip2/eval"
"""What LAVIS's authors wrote into the heads of their YAMLs; not in the reference."""


def reference() -> Counter[tuple[str, ...]]:
    with REFERENCE.open(encoding="utf-8") as file:
        return Counter(tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file))


def entries(kind: str) -> list[tuple[str, str, float]]:
    """Paper, table and value of every entry of the evaluation or training recipes."""
    recipes = [recipe for recipe in read_recipes(PROJECTS, FAMILIES["lavis"]) if f"/{kind}/" in recipe.name]
    found = [entry for recipe in recipes for entry in recipe.entries if entry.source != FROM_LAVIS]
    return [(*place, entry.value) for entry in found for place in tables_of(entry.source)]


def test_recipes_and_data_file_hold_every_published_number_once() -> None:
    expected = reference()
    assert expected.total() == 668
    filed = Counter(tuple(row[name] for name in COLUMNS) for row in data_file())
    assert not filed - expected, "rows of the data file that were not published"
    rest = Counter((row[0], row[1], float(row[-1])) for row in (expected - filed).elements())
    assert rest == Counter(entries("eval"))


def test_lavis_own_measurements_are_in_recipes() -> None:
    recipes = read_recipes(PROJECTS, ("blip2",))
    found = {entry.value for recipe in recipes for entry in recipe.entries if entry.source == FROM_LAVIS}
    assert found == {146.1, 145.1, 43.98, 41.22, 63.13, 52.90, 84.28, 41.01, 51.88}


def test_training_recipes_have_published_numbers_only() -> None:
    published = {(row[0], row[1], row[-1].rstrip("0").rstrip(".")) for row in reference()}
    assert not [entry for entry in entries("train") if (*entry[:2], f"{entry[2]:g}") not in published]


def test_rows_of_the_data_file_have_a_reason_and_existing_recipes() -> None:
    rows = data_file()
    assert {row["reason"] for row in rows} == set(REASONS)
    assert {row["paper"] for row in rows} <= {paper for papers in PAPERS.values() for paper in papers}
    for row in rows:
        assert bool(row["recipe"]) == (row["reason"] == "needs training")
        assert not row["recipe"] or (PROJECTS / f"{row['recipe']}.yaml").is_file()


def find(found: list[Number], **wanted: Any) -> Number:
    (number,) = (number for number in found if wanted.items() <= vars(number).items())
    return number


def result(folder: Path, job: str, date: str, *rows: dict[str, Any]) -> None:
    provenance = {"recipe": str(PROJECTS / "blip/eval/caption_coco.yaml"), "date": date}
    (folder / job).mkdir(parents=True)
    (folder / job / "evaluation.json").write_text(json.dumps({"provenance": provenance, "verdict": rows}))


def cider(here: float, verdict: str, *reasons: str) -> dict[str, Any]:
    row = {"split": "test", "metric": "CIDEr", "model": "blip_caption/base_coco", "published": 133.5, "here": here}
    row |= {"source": "LAVIS, docs/benchmark.rst", "difference": here - 133.5, "verdict": verdict}
    return {**row, "reasons": list(reasons)}


def test_the_newest_evaluation_counts(tmp_path: Path) -> None:
    result(tmp_path, "b/1", "2026-01-01T10:00:00+00:00", cider(10.0, "differs"))
    result(tmp_path, "a/2", "2026-01-02T10:00:00+00:00", cider(133.25, "reproduced"))
    found = numbers("lavis", PROJECTS, tmp_path)
    recipe = {"recipe": "blip/eval/caption_coco", "model": "blip_caption/base_coco"}
    number = find(found, metric="CIDEr", **recipe)
    assert (number.here, number.difference, number.verdict, number.how) == (133.25, -0.25, "reproduced", "")
    missing = find(found, metric="Bleu_4", **recipe)
    assert (missing.here, missing.verdict) == (None, None)
    assert missing.how == "lavis-lite evaluate --cfg-path blip/eval/caption_coco"


def test_a_later_trial_does_not_hide_a_comparison(tmp_path: Path) -> None:
    result(tmp_path, "full", "2026-01-01T10:00:00+00:00", cider(133.25, "reproduced"))
    result(tmp_path, "limit", "2026-01-02T10:00:00+00:00", cider(90.0, "not comparable", "10 of 5,000 samples"))
    wanted = {"recipe": "blip/eval/caption_coco", "model": "blip_caption/base_coco", "metric": "CIDEr"}
    assert find(numbers("lavis", PROJECTS, tmp_path), **wanted).verdict == "reproduced"


def test_a_source_without_a_table(tmp_path: Path) -> None:
    (tmp_path / "blip" / "eval").mkdir(parents=True)
    tree = {"model": {"arch": "blip_vqa", "model_type": "tiny"}, "expected": [{"split": "val", "metric": "overall"}]}
    tree["expected"][0] |= {"value": 50.0, "source": "BLIP"}
    (tmp_path / "blip" / "eval" / "own.yaml").write_text(yaml.safe_dump(tree))
    assert find(numbers("blip", tmp_path, tmp_path), recipe="blip/eval/own").table == ""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lavis", {"recipe": "blip/eval/nocaps", "metric": "Bleu_4"}),
        ("lavis", {"recipe": "blip2/eval/vqav2_zeroshot_opt"}),
        ("instructblip", {"recipe": "instructblip/eval/nocaps", "model": "blip2_t5/pretrain_flant5xl"}),
    ],
)
def test_a_missing_number_shows_the_command_that_measures_it(name: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    number = find(numbers(name, PROJECTS, tmp_path), **wanted)
    words = shlex.split(number.how)
    assert words[:3] == ["lavis-lite", "evaluate", "--cfg-path"]
    assert words[4] == "--options"
    run = Config.from_file(words[3], words[5:])
    assert f"{run.model['arch']}/{run.model['model_type']}" == number.model
    entry = next(e for e in run.expected if str(e.value) == number.published)
    values = {"run.repetition_penalty": run.task.get("repetition_penalty"), "run.prompt": run.task.get("prompt")}
    values |= {"run.length_penalty": run.task.get("length_penalty")}
    assert entry.settings
    assert {key: values[key] for key in entry.settings} == entry.settings


def test_a_row_without_public_weights_shows_its_reason_or_training(tmp_path: Path) -> None:
    found = numbers("blip2", PROJECTS, tmp_path)
    assert find(found, table="2", model="Flamingo-3B", published="49.2").how == "cited"
    number = find(found, table="4", published="82.19")
    assert number.recipe == "blip2/train/vqav2_ft"
    assert number.how.startswith("needs training: lavis-lite train --cfg-path blip2/train/vqav2_ft --options")
    assert "model.model_type=pretrain_opt6.7b run.lr_layer_decay=0.9" in number.how
    both = [n.table for n in found if (n.metric, n.published, n.model) == ("txt_r1", "97.6", "blip2/coco")]
    assert both == ["1", "5"]


@pytest.mark.slow
def test_an_evaluation_of_ones_own_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "blip" / "eval"
    folder.mkdir(parents=True)
    path = project(folder, "vqa_rank", {"run": {"valid_splits": [], "num_workers": 0}})
    common = {"split": "test", "source": "BLIP, tables 1, 12"}
    values = [{"metric": "overall", "value": 170.0}, {"metric": "overall", "value": 171.0, "scorer": "lavis"}]
    tree = {**yaml.safe_load(path.read_text()), "expected": [{**common, **value} for value in values]}
    path.write_text(yaml.safe_dump(tree))
    assert evaluate(path) == 0
    found = [n for n in numbers("blip", tmp_path, tmp_path) if n.recipe == "blip/eval/vqa_rank"]
    assert [(n.table, n.metric) for n in found] == [
        (table, metric) for table in ("1", "12") for metric in ("overall", "overall (lavis)")
    ]
    assert {n.verdict for n in found} == {"differs"}
    assert all(n.difference == pytest.approx(n.here - float(n.published)) for n in found)


def table(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        table_main([*argv])
    return int(end.value.code or 0), *capsys.readouterr()


@pytest.mark.slow
def test_the_printed_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(tmp_path, "1", "2026-01-01", cider(131.0, "not comparable", "10 of 5,000 samples"))
    where = ("--output", str(tmp_path), "--projects", str(PROJECTS))
    code, text, _ = table(capsys, "lavis", *where)
    assert code == 0
    line = next(line for line in text.splitlines() if "133.5 " in line)
    assert line.split(maxsplit=7) == [
        *("blip/eval/caption_coco", "blip_caption/base_coco", "test", "CIDEr", "133.5", "131.00", "-2.50"),
        "not comparable: 10 of 5,000 samples",
    ]
    assert "LAVIS, docs/benchmark.rst\n" in text
    assert "1 not comparable" in text.splitlines()[-1]
    _, text, _ = table(capsys, "lavis", *where, "--json")
    assert len(json.loads(text)) == len(numbers("lavis", PROJECTS, tmp_path))


def test_errors_name_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = table(capsys, "blip", "--output", str(tmp_path / "gone"))
    assert (code, "gone" in err) == (2, True)
    code, _, err = table(capsys, "blip", "--projects", str(tmp_path))
    assert (code, "blip/eval" in err) == (2, True)
    for recipe, verdict in (("x", None), ("x", [3]), (3, [])):
        content = {"provenance": {"date": "x", "recipe": recipe}, "verdict": verdict}
        (tmp_path / "evaluation.json").write_text(json.dumps(content))
        code, _, err = table(capsys, "blip", "--output", str(tmp_path), "--projects", str(PROJECTS))
        assert (code, "evaluation.json: not the result of an evaluation" in err) == (2, True)


def test_the_command_imports_no_torch() -> None:
    source = "import sys; sys.argv[1:] = ['table', 'blip2']; from lavis_lite.cli import __main__ as m\n"
    source += "try: m.main()\nexcept SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_missing_numbers_refer_to_a_command_below_the_table() -> None:
    rows = [row for row in numbers("blip2", PROJECTS, PROJECTS / "nothing") if row.table == "1"]
    table = layout(rows)
    commands = [line for line in table if line.startswith("  command ")]
    assert len(commands) == len({row.how for row in rows}) == 3
    assert commands[1] == f"  command 2: {rows[2].how}"
    assert [line.split()[-1] for line in table[1:6]] == ["1", "1", "2", "2", "3"]
