"""Collect the quickstart's figures: a table on the terminal, results.json, and report.html with curves and pictures.

The page is one file, with its pictures inline and without scripts.
"""

import argparse
import base64
import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.registry import registry
from lavis_lite.datasets.shapes.truth import is_true
from lavis_lite.tasks.metrics.vqa_accuracy import vqa_metrics

NUM_SHOWN = 24
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1c2330; background: #fbfbfd }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.4rem }
table { border-collapse: collapse }
td, th { padding: .3rem .9rem; border-bottom: 1px solid #d9dde6; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem }
.card { background: white; border: 1px solid #d9dde6; border-left: 5px solid; border-radius: 6px;
  padding: .6rem; display: flex; gap: .7rem }
.card img { width: 96px; height: 96px; image-rendering: pixelated; border-radius: 3px; flex: none }
.right { border-left-color: #2c9a5b }
.wrong { border-left-color: #cf3f3f }
.card small { color: #5b6579; display: block }
.verdict { font-weight: 600 }
.right .verdict { color: #1f7a46 }
.wrong .verdict { color: #b02c2c }
svg { background: white; border: 1px solid #d9dde6; border-radius: 6px }
svg text { font: 11px system-ui, sans-serif; fill: #5b6579 }
"""


class Figure(NamedTuple):
    """A number of the table: its key in results.json, the job that measured it, and the metric's name there."""

    key: str
    job: str
    metric: str
    label: str
    unit: str = " %"
    factor: float = 1.0
    split: str = "test"


class Family(NamedTuple):
    """A quickstart: its jobs with their titles, its figures, and the jobs whose pictures are shown, by kind."""

    title: str
    intro: str
    jobs: dict[str, str]
    figures: tuple[Figure, ...]
    pictures: tuple[tuple[str, str, str], ...]


FAMILIES = {
    "blip": Family(
        "A tiny BLIP",
        "Pretrained, then finetuned for three tasks",
        {"pretrain": "Pretraining", "caption": "Captioning", "vqa": "Question answering", "retrieval": "Retrieval"},
        (
            Figure("captioning.true_rate", "caption", "true_rate", "captions that are true of their image"),
            Figure("captioning.cider", "caption", "CIDEr", "captions: CIDEr", "", 100),
            Figure("vqa.accuracy", "vqa", "agg_metrics", "questions answered right (VQA accuracy)"),
            Figure("vqa.blank_accuracy", "vqa_blank", "agg_metrics", "  the same with blank images"),
            Figure("retrieval.tr1", "retrieval", "txt_r1", "right text found for an image (TR@1)"),
            Figure("retrieval.ir1", "retrieval", "img_r1", "right image found for a text (IR@1)"),
        ),
        (
            ("caption", "caption", "Captions"),
            ("vqa", "vqa", "Answers"),
            ("retrieval", "retrieval", "Texts found for an image"),
        ),
    ),
    "blip2": Family(
        "A tiny BLIP-2",
        "A frozen image encoder and frozen language models, joined in two stages, then finetuned for three tasks",
        {
            "stage1": "Stage 1",
            "stage2_opt": "Stage 2, OPT",
            "stage2_t5": "Stage 2, T5",
            "caption": "Captioning",
            "vqa": "Question answering",
            "retrieval": "Retrieval",
        },
        (
            Figure("stage2_opt.true_rate", "stage2_opt", "true_rate", "stage 2, OPT: captions that are true"),
            Figure("stage2_opt.shuffled", "stage2_opt_shuffled", "true_rate", "  with the queries of other images"),
            Figure("stage2_t5.true_rate", "stage2_t5", "true_rate", "stage 2, T5: captions that are true"),
            Figure("stage2_t5.shuffled", "stage2_t5_shuffled", "true_rate", "  with the queries of other images"),
            Figure("captioning.true_rate", "caption", "true_rate", "finetuned, OPT: captions that are true"),
            Figure("vqa.accuracy", "vqa", "agg_metrics", "finetuned, T5: questions answered right"),
            Figure("vqa.blank_accuracy", "vqa_blank", "agg_metrics", "  the same with blank images"),
            Figure("retrieval.tr1", "retrieval", "txt_r1", "right text found for an image (TR@1)"),
            Figure("retrieval.ir1", "retrieval", "img_r1", "right image found for a text (IR@1)"),
        ),
        (
            ("caption", "stage2_opt", "Captions of stage 2, OPT"),
            ("caption", "stage2_t5", "Captions of stage 2, T5"),
            ("caption", "caption", "Captions after finetuning"),
            ("vqa", "vqa", "Answers"),
            ("retrieval", "retrieval", "Texts found for an image"),
        ),
    ),
    "instructblip": Family(
        "A tiny InstructBLIP",
        "A tiny BLIP-2 with T5, tuned on instructions of seven kinds; an eighth kind, dialogues, is held out",
        {"instruct": "Instruction tuning", "instruct_unaware": "Without the instruction in the Q-Former"},
        (
            *(
                Figure(f"held_in.{group}", "instruct", "accuracy", label, split=f"shapes_instruct_{group}_test")
                for group, label in {
                    "color": "colours named right",
                    "count": "numbers named right",
                    "relation": "questions about relations",
                    "yesno": "yes or no",
                    "options": "one of several options",
                    "statement": "statements: true or false",
                }.items()
            ),
            Figure("held_out.accuracy", "held_out", "accuracy", "held out: dialogues, last question right"),
            Figure("held_out.unaware", "held_out_unaware", "accuracy", "  without the instruction in the Q-Former"),
            Figure("held_out.blip2", "held_out_blip2", "accuracy", "  BLIP-2, not tuned on instructions"),
        ),
        (("instruct", "held_out", "The held-out group: the last question of a dialogue"),),
    ),
}


class Card(NamedTuple):
    """A test image with the model's text."""

    image: Path
    text: str
    right: bool
    note: str


def rows(job: Path) -> list[dict[str, Any]]:
    """Return the rows of a job's log.txt."""
    return [json.loads(line) for line in (job / "log.txt").read_text(encoding="utf-8").splitlines() if line.strip()]


def last_metrics(job: Path, split: str) -> dict[str, Any]:
    """Return the last metrics of a job on a split."""
    found = [row for row in rows(job) if row.get("split") == split]
    if not found:
        raise SystemExit(f"error: {job / 'log.txt'} holds no {split} metrics; did that step finish?")
    return found[-1]["metrics"]


def collect(out: Path, family: Family, seconds: float) -> dict[str, Any]:
    """Return the quickstart's figures, in percent, nested by their keys."""
    results: dict[str, Any] = {}
    for figure in family.figures:
        group, name = figure.key.split(".")
        results.setdefault(group, {})[name] = (
            figure.factor * last_metrics(out / figure.job, figure.split)[figure.metric]
        )
    return results | {"seconds": seconds}


def table(results: dict[str, Any], family: Family) -> list[tuple[str, str]]:
    """Return the rows of the table: the name of each figure and its value on the test split."""
    rows = []
    for figure in family.figures:
        group, name = figure.key.split(".")
        rows.append((figure.label, f"{results[group][name]:.1f}{figure.unit}"))
    return [*rows, ("time for everything", f"{results['seconds'] / 60:.1f} min")]


def test_set(job: Path) -> Any:
    """Return the test dataset of a job."""
    (config,) = job.glob("config*.yaml")
    ((name, section),) = OmegaConf.to_container(OmegaConf.load(config))["datasets"].items()
    builder = section.pop("builder", name)
    section.pop("type", None)
    return registry.get_builder_class(builder)(**section).build(["test"])["test"]


def result(job: Path, name: str) -> Any:
    """Return the content of a job's result file."""
    return json.loads((job / "result" / f"test_{name}.json").read_text(encoding="utf-8"))


def caption_cards(job: Path) -> Iterator[Card]:
    """Yield every test image's caption, compared with its scene."""
    dataset = test_set(job)
    images = {str(record["image_id"]): record["image"] for record in dataset.annotation}
    scenes = {str(key): scene for key, scene in dataset.scenes.items()}
    references = {str(key): texts for key, texts in dataset.references().items()}
    for entry in result(job, "captions"):
        key = str(entry["image_id"])
        right = is_true(entry["caption"], scenes[key])
        yield Card(
            Path(dataset.vis_root) / images[key], entry["caption"], right, f"a person said: {references[key][0]}"
        )


def vqa_cards(job: Path) -> Iterator[Card]:
    """Yield every test question's answer; right if at least two people gave it."""
    dataset = test_set(job)
    answers = {entry["question_id"]: entry["answer"] for entry in result(job, "vqa")}
    for record in dataset.annotation:
        answer = answers[record["question_id"]]
        score = vqa_metrics({0: record}, {0: answer})["agg_metrics"]
        yield Card(Path(dataset.vis_root) / record["image"], answer, score > 50, record["question"])


def retrieval_cards(job: Path) -> Iterator[Card]:
    """Yield every gallery image's best text."""
    dataset = test_set(job)
    found = result(job, "retrieval")
    for i, best in enumerate(found["top_texts_of_image"]):
        right = best[0] in found["img2txt"][i]
        note = "its own" if right else f"its own: {found['texts'][found['img2txt'][i][0]]}"
        yield Card(Path(dataset.vis_root) / found["images"][i], found["texts"][best[0]], right, note)


def instruct_cards(job: Path) -> Iterator[Card]:
    """Yield every test instruction's answer; right if it is one of the record's."""
    dataset = test_set(job)
    predictions = {entry["instance_id"]: entry["prediction"] for entry in result(job, "predictions")}
    for index, record in enumerate(dataset.annotation):
        answer, instruction = predictions[str(index)], dataset[index]["text_input"]
        yield Card(Path(dataset.vis_root) / record["image"], answer, answer in record["answers"], instruction)


def shown(cards: Iterable[Card]) -> list[Card]:
    """Return evenly spread cards, up to a third of them wrong ones."""
    cards = list(cards)
    wrong = [card for card in cards if not card.right][: NUM_SHOWN // 3]
    right = [card for card in cards if card.right]
    stride = max(1, len(right) // (NUM_SHOWN - len(wrong)))
    return right[::stride][: NUM_SHOWN - len(wrong)] + wrong


def card_html(card: Card) -> str:
    """Return a picture with the model's text."""
    data = base64.b64encode(card.image.read_bytes()).decode()
    verdict = "right" if card.right else "wrong"
    return (
        f'<div class="card {verdict}"><img alt="{html.escape(card.image.name)}" src="data:image/jpeg;base64,{data}">'
        f'<div>{html.escape(card.text)}<div class="verdict">{verdict}</div>'
        f"<small>{html.escape(card.note)}</small></div></div>"
    )


def curve(points: list[tuple[float, float]], title: str) -> str:
    """Return a loss curve as an inline SVG."""
    width, height, left, bottom = 330, 200, 42, 26
    xs, ys = [x for x, _ in points], [y for _, y in points]
    top, low = max(ys), min(0.0, min(ys))
    across = (width - left - 12) / max(xs[-1], 1)
    up = (height - bottom - 26) / max(top - low, 1e-9)
    path = " ".join(f"{left + x * across:.1f},{height - bottom - (y - low) * up:.1f}" for x, y in points)
    ticks = "".join(
        f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e7eaf0"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>'
        for value in (low, (low + top) / 2, top)
        for y in [height - bottom - (value - low) * up]
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}: loss by step">{ticks}'
        f'<polyline points="{path}" fill="none" stroke="#2f5fd0" stroke-width="2"/>'
        f'<text x="{left}" y="16" style="font-weight:600">{title}: loss</text>'
        f'<text x="{width - 12}" y="{height - 8}" text-anchor="end">step {xs[-1]:,.0f}</text></svg>'
    )


def curves(out: Path, family: Family) -> str:
    """Return the training loss of every job of the quickstart."""
    losses = {job: [(row["step"], row["loss"]) for row in rows(out / job) if "loss" in row] for job in family.jobs}
    return " ".join(curve(points, family.jobs[job]) for job, points in losses.items())


def section(title: str, text: str, cards: Iterable[Card]) -> str:
    """Return a heading and its pictures."""
    return f'<h2>{title}</h2><p>{text}</p><div class="grid">{"".join(card_html(card) for card in shown(cards))}</div>'


KINDS = {
    "caption": (caption_cards, "Right: every statement of the caption is true of the scene."),
    "instruct": (instruct_cards, "Right: the likeliest of the possible answers is the true one."),
    "vqa": (vqa_cards, "Right: at least two of ten people gave this answer."),
    "retrieval": (retrieval_cards, "The best of all texts of the gallery."),
}


def page(out: Path, family: Family, results: dict[str, Any]) -> str:
    """Return the whole report."""
    figures = "".join(
        f'<tr><td>{html.escape(name).replace("  ", "&emsp;")}</td><td class="number">{value}</td></tr>'
        for name, value in table(results, family)
    )
    pictures = [section(title, KINDS[kind][1], KINDS[kind][0](out / job)) for kind, job, title in family.pictures]
    return "".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>lavis_lite quickstart</title>',
            f"<style>{STYLE}</style><h1>{family.title} on <code>shapes</code></h1>",
            f"<p>{family.intro}; figures and pictures are of the test split, whose scenes were never trained on.</p>",
            f"<table>{figures}</table><h2>Training</h2>{curves(out, family)}",
            *pictures,
            "</html>",
        ]
    )


def main() -> None:
    """Write results.json and report.html, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the quickstart's output folder")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="blip")
    parser.add_argument("--seconds", type=float, required=True, help="how long everything took")
    arguments = parser.parse_args()
    family = FAMILIES[arguments.family]
    results = collect(arguments.out, family, arguments.seconds)
    write_text(arguments.out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(arguments.out / "report.html", page(arguments.out, family, results))
    lines = [f"{name:<44}{value:>10}" for name, value in table(results, family)]
    print(
        "\n".join(
            [
                "",
                *lines,
                "",
                f"figures   {arguments.out / 'results.json'}",
                f"pictures  {arguments.out / 'report.html'}",
            ]
        )
    )


if __name__ == "__main__":
    main()
