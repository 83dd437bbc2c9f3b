"""Reports of tiny runs of every task: what the page says, that it fetches nothing, that its sample is a fair draw."""

import json
import random
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import test_instruct_entry_points as instructions
import test_matching as matching
import test_zero_shot as zero_shot
from typer.testing import CliRunner

from lavis_lite.cli.app import app
from lavis_lite.report.cards import card_of, confusion, judged, near_misses
from lavis_lite.report.curves import figures
from lavis_lite.report.figures import curve
from lavis_lite.report.jobs import find_jobs
from lavis_lite.tasks.predictions import Prediction, drawn, read_predictions, worst

SECTIONS = {
    "pretrain": ["Metrics", "Curves", "Throughput", "How it was made"],
    "caption": ["Metrics", "Curves", "Predictions of test", "The worst of test", "Throughput", "How it was made"],
    "vqa_rank": ["Metrics", "Curves", "test by answer type", "Predictions of test", "The worst of test"],
    "vqa_generate": ["Metrics", "Curves", "test by answer type", "Predictions of test", "The worst of test"],
    "retrieval": ["Metrics", "Curves", "Predictions of test", "The worst of test", "Near misses of test"],
    "nlvr": ["Metrics", "Curves", "Confusions", "Predictions of test", "The worst of test"],
    "classification": ["Metrics", "Curves", "Confusions", "Predictions of test", "The worst of test"],
}
FETCHING = ("src", "href", "srcset", "poster", "data", "action")


class Page(HTMLParser):
    """What a page has: headings, attributes of its images and figures, and what it names to be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())
        if data.strip():
            self.text.append(data.strip())

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [own for name, own in self.tags if name == tag and attributes.items() <= own.items()]

    def cards(self) -> int:
        return sum(own.get("class", "").startswith("card") for _, own in self.tags)


def report(folder: Path, *options: str) -> tuple[int, str]:
    """The command's exit code and output."""
    done = CliRunner().invoke(app, ["report", str(folder), *options])
    return done.exit_code, done.output


def check_page(page: Page) -> None:
    """A page of its own: nothing fetched, no scripts, a viewport, both schemes, a text for every picture."""
    assert not page.of("script")
    assert not page.of("link")
    fetched = [own[key] for _, own in page.tags for key in FETCHING if key in own]
    assert all(one.startswith(("data:image/jpeg;base64,", "#")) for one in fetched), fetched
    assert page.of("meta", name="viewport")
    assert any("prefers-color-scheme: dark" in text for text in page.text)
    assert all(len(own["alt"]) > 3 for own in page.of("img"))
    assert all(len(own["aria-label"]) > 10 and own["role"] == "img" for own in page.of("svg"))
    ids = [own["id"] for _, own in page.tags if "id" in own]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_a_page_for_every_task(name: str, tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, name)
    assert cli_helpers.train(path, "run.max_iters=12") == 0
    job = tmp_path / "output" / "job"
    code, out = report(job)
    assert (code, out.strip()) == (0, str(job / "report.html"))
    page = Page(job / "report.html")
    check_page(page)
    found = [heading for heading in page.headings if heading in SECTIONS[name]]
    assert found == SECTIONS[name]
    metrics = cli_helpers.metrics(job, "test")
    assert {key for key in metrics if key in page.text} >= {*metrics} - {"agg_metrics", "tokenizer"} - {
        key for key, value in metrics.items() if not isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_folder_of_jobs_has_an_index_and_each_of_them(tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, "vqa_rank", {"run": {"max_iters": 2}})
    for job in ("one", "two"):
        assert cli_helpers.train(path, job=job) == 0
    best = tmp_path / "output/one/checkpoint_best.pth"
    assert cli_helpers.evaluate(path, weights=best) == 0
    page_path = tmp_path / "page.html"
    assert report(tmp_path / "output", "--out", str(page_path), "--samples", "4")[0] == 0
    page = Page(page_path)
    check_page(page)
    assert page.headings[0] == "3 jobs"
    assert [heading for heading in page.headings if heading in ("one", "two", "evaluation")] == [
        "one",
        "two",
        "evaluation",
    ]
    assert {own["href"] for own in page.of("a")} == {"#job1", "#job2", "#job3"}
    assert {own["id"] for own in page.of("section")} == {"job1", "job2", "job3"}
    assert page.cards() == 3 * (2 + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_page_about_pairs_prompts_and_instructions(tmp_path: Path) -> None:
    """The tasks without a recipe among those above, each by evaluate.py."""
    paths = cli_helpers.pictures(tmp_path / "pictures", 4)
    pairs = [
        {"image": path, "caption": f"a <b>red</b> circle {i}", "label": i % 2, "image_id": str(i)}
        for i, path in enumerate(paths)
    ]
    section = cli_helpers.classification_set(tmp_path) | {"classes": ["contradiction", "neutral", "entailment"]}
    lines = [instructions.asked(i, candidates=["red", "blue"]) for i in range(4)]
    asked = {"own": instructions.garden(tmp_path / "own", lines)}
    recipes = {
        "matching": (matching.recipe(tmp_path, pairs), "a <b>red</b> circle 0", []),
        "prompts": (zero_shot.recipe(tmp_path, "blip_retrieval", section), "reference: neutral", ["Confusions"]),
        "instruct": (instructions.project(tmp_path, asked, valid_splits=["val"]), "what color?", []),
    }
    for name, (path, text, headings) in recipes.items():
        assert cli_helpers.evaluate(path, job=name) == 0
        assert report(tmp_path / "output" / name)[0] == 0
        page = Page(tmp_path / "output" / name / "report.html")
        check_page(page)
        assert text in page.text, name
        split = "test" if name == "matching" else "val"
        expected = ["Metrics", *headings, f"Predictions of {split}", f"The worst of {split}", "Throughput"]
        assert [heading for heading in page.headings if heading in expected] == expected, name
        assert (tmp_path / "output" / name / "predictions" / f"{split}.jsonl").is_file()


def rows(values: Sequence[float]) -> list[Prediction]:
    return [
        {"instance_id": str(i), "images": [], "prediction": f"p{i}", "metrics": {"accuracy": value}}
        for i, value in enumerate(values)
    ]


def test_the_sample_is_drawn_by_its_seed_and_not_by_what_is_right() -> None:
    """Against the draw of the standard library, and in its share of wrong predictions."""
    found = rows([100.0 * (i % 5 == 0) for i in range(1000)])
    chosen = sorted(random.Random(7).sample(range(1000), 24))
    assert [int(row["instance_id"]) for row in drawn(found, 24, seed=7)] == chosen
    assert drawn(found, 24, seed=7) == drawn(found, 24, seed=7) != drawn(found, 24, seed=8)
    right = [sum(judged(row)[0] == "right" for row in drawn(found, 24, seed=seed)) for seed in range(200)]
    assert sum(right) / len(right) / 24 == pytest.approx(0.2, abs=0.03)
    assert drawn(found[:3], 24, seed=0) == found[:3]


def test_the_worst_are_those_with_the_lowest_metric() -> None:
    found = rows([30.0, 100.0, 0.0, 60.0])
    found.append({"instance_id": "none", "images": [], "prediction": "x"})
    assert [row["instance_id"] for row in worst(found, 3, seed=0)] == ["2", "0", "3"]
    equal = rows([0.0] * 50)
    firsts = {worst(equal, 1, seed=seed)[0]["instance_id"] for seed in range(40)}
    assert len(firsts) > 10
    ranked: list[Prediction] = [{**rows([0.0])[0], "rank": rank} for rank in (2, 9, 4)]
    assert [row["rank"] for row in worst(ranked, 3, seed=0)] == [9, 4, 2]


def test_a_prediction_is_right_wrong_or_in_part() -> None:
    kinds = [judged(row) for row in rows([100.0, 0.0, 30.0])]
    assert kinds == [("right", "right"), ("wrong", "wrong"), ("some", "right to 30 %")]
    assert judged({"instance_id": "0", "images": [], "metrics": {"CIDEr": 0.8}}) == ("", "")


def test_confusions_are_counted() -> None:
    pairs = [("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("cat", "dog")]
    found: list[Prediction] = [
        {"instance_id": "0", "images": [], "references": [right], "prediction": chosen} for right, chosen in pairs
    ]
    matrix = confusion(found)
    assert matrix is not None
    assert (matrix.classes, matrix.counts) == (["cat", "dog"], [[1, 2], [0, 1]])
    assert matrix.shade(0, 1) == pytest.approx(2 / 3)
    many: list[Prediction] = [
        {"instance_id": "0", "images": [], "references": [f"c{i}"], "prediction": "c0"} for i in range(20)
    ]
    table = confusion(many)
    assert table is not None
    assert table.classes == []
    assert ("c7", "c0", 1) in table.pairs
    assert confusion([{"instance_id": "0", "images": [], "prediction": "cat"}]) is None


def test_a_model_that_wrote_nothing_is_shown_so() -> None:
    row: Prediction = {"instance_id": "0", "images": [], "prediction": " "}
    assert card_of(row, lambda name, value: value).prediction == "(no text)"
    del row["prediction"]
    assert card_of(row, lambda name, value: value).prediction == ""


@pytest.mark.parametrize("evaluations", [1, 2])
def test_metrics_of_one_family_share_a_curve_if_there_are_several_evaluations(tmp_path: Path, evaluations: int) -> None:
    (tmp_path / "config.yaml").write_text("run: {task: retrieval}\nmodel: {arch: blip_retrieval}\n")
    rows: list[dict[str, Any]] = [{"step": step, "epoch": 0, "loss": 3.0 - step, "lr": 0.1} for step in (1, 2)]
    for step in range(1, evaluations + 1):
        metrics = {"txt_r1": 10.0 + step, "txt_r5": 30.0 + step, "img_r1": 20.0 + step}
        rows.append({"split": "val", "step": step, "epoch": 0, "metrics": metrics})
    (tmp_path / "log.txt").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = figures(find_jobs(tmp_path)[0])
    own = [] if evaluations == 1 else ["txt_r1, txt_r5", "img_r1"]
    assert [figure.title for figure in found] == ["Loss", *own, "Learning rate"]
    if own:
        assert "txt_r5 goes from 31 at step 1 to 32 at step 2" in found[1].alt


def test_near_misses_are_those_just_below_the_first() -> None:
    found: list[Prediction] = [
        {**rows([0.0])[0], "rank": rank, "candidates": [{"text": "a"}]} for rank in (1, 6, 3, 2, 40)
    ]
    assert [row["rank"] for row in near_misses(found, 10, seed=0)] == [2, 3]


def test_a_curve_says_in_words_what_it_shows() -> None:
    figure = curve("Loss", {"training": [(1, 4.0), (20, 1.5)]}, label="loss", last_step=20, steps_per_epoch=5)
    assert figure.alt == "Loss: training goes from 4 at step 1 to 1.5 at step 20"
    for word in ("step", "epoch", "loss", "currentColor"):
        assert word in figure.svg
    assert "<metadata" not in figure.svg
    assert "matplotlib.org" not in figure.svg


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_predictions_of_every_validation_are_kept(tmp_path: Path) -> None:
    path = cli_helpers.project(
        tmp_path, "vqa_generate", {"run": {"max_iters": 18, "max_epoch": 3, "save_scores": True}}
    )
    assert cli_helpers.train(path, job="job") == 0
    job = tmp_path / "output" / "job"
    steps = sorted(row["step"] for row in cli_helpers.log(job) if row.get("split") == "val")
    assert len(steps) == 2
    assert {file.name for file in (job / "predictions").glob("val*")} == {f"val_step{step}.jsonl" for step in steps}
    found = read_predictions(job / "predictions" / f"val_step{steps[-1]}.jsonl")
    answers = {entry["question_id"]: entry for entry in json.loads((job / "result/val_vqa.json").read_text())}
    assert [row["prediction"] for row in found] == [entry["answer"] for entry in answers.values()]
    assert [row["score"] for row in found] == [entry["score"] for entry in answers.values()]
    accuracy = sum(row["metrics"]["accuracy"] for row in found) / len(found)
    assert accuracy == pytest.approx(cli_helpers.metrics(job, "val")["overall"], abs=0.006)
    assert all(Path(image).is_file() for row in found for image in row["images"])
    assert all(row["input"] and len(row["references"]) == 10 for row in found)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: folder / "nowhere", "nowhere"),
        (lambda folder: folder, "log.txt"),
    ],
)
def test_what_is_no_run_is_refused(make, named: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(make(tmp_path))])
    assert done.exit_code == 2
    assert named in done.output


def test_a_damaged_log_is_named_and_a_cut_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{model: {arch: blip_vqa}, run: {task: vqa}, datasets: {}}")
    log = tmp_path / "log.txt"
    log.write_text('{"step": 1, "epoch": 0, "loss": 2.0}\n{"step": 2, "ep\n')
    code, _ = report(tmp_path)
    assert code == 0
    assert "1 step." in (tmp_path / "report.html").read_text()
    log.write_text("nonsense\n")
    code, out = report(tmp_path)
    assert code == 2
    assert "log.txt:1" in out


def test_a_run_that_goes_on_or_ended_early_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{model: {arch: blip_vqa}, run: {task: vqa}, datasets: {}}")
    begun = ['{"run": {"steps": 20}}', '{"step": 12, "epoch": 0, "loss": 2.0}']
    for rows, expected, other in (
        (begun, "has not ended", "ended early"),
        ([*begun, '{"result": {"seconds": 3.0}}'], "ended early", "has not ended"),
        ([*begun, '{"result": {"seconds": 3.0}}', begun[0]], "has not ended", "ended early"),
    ):
        (tmp_path / "log.txt").write_text("".join(f"{row}\n" for row in rows))
        assert report(tmp_path)[0] == 0
        text = (tmp_path / "report.html").read_text()
        assert "12 of 20 steps." in text
        assert expected in text
        assert other not in text


def test_metrics_are_in_percent_with_intervals_and_published_values(tmp_path: Path) -> None:
    """Of captioning, whose CIDEr is a fraction of 1; the verdict is that of the evaluation."""
    (tmp_path / "config_evaluate.yaml").write_text(
        "{model: {arch: blip_caption, model_type: base}, run: {task: captioning, evaluate: true}, datasets: {c: {}}}"
    )
    row = {"split": "test", "step": 0, "epoch": 0, "metrics": {"CIDEr": 1.331, "Bleu_4": 0.397, "agg_metrics": 1.728}}
    (tmp_path / "log.txt").write_text(json.dumps(row) + "\n")
    verdict = {"split": "test", "metric": "CIDEr", "key": "CIDEr", "here": 133.1, "published": 133.3}
    verdict |= {"difference": -0.2, "verdict": "reproduced", "source": "BLIP, table 7", "reasons": ["<none>"]}
    content = {"intervals": {"test": {"CIDEr": [1.3, 1.36]}}, "verdict": [verdict], "provenance": {"device": "cpu"}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert report(tmp_path)[0] == 0
    page = Page(tmp_path / "report.html")
    check_page(page)
    for text in ("133.10", "130.00 to 136.00", "39.70", "133.3", "-0.20", "reproduced", "BLIP, table 7", "<none>"):
        assert text in page.text, text
    assert page.of("td", **{"class": "right"})
    assert "Curves" not in page.headings
