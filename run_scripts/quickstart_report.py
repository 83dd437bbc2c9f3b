"""Collect the quickstart's figures: a table on the terminal, results.json, and report.html with curves and pictures.

The page is that of `lavis-lite report` about all jobs of the quickstart, with the table of figures before it.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lite.common.checkpoint import write_text
from lavis_lite.report.jobs import find_jobs
from lavis_lite.report.page import NAME, Extra, write_report

NUM_SHOWN = 24
SEED = 0


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
    """A quickstart: its trainings with their titles, its figures, and the jobs whose predictions are shown."""

    title: str
    intro: str
    jobs: dict[str, str]
    figures: tuple[Figure, ...]
    pictures: tuple[str, ...]


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
        ("caption", "vqa", "retrieval"),
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
        ("stage2_opt", "stage2_t5", "caption", "vqa", "retrieval"),
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
        ("held_out",),
    ),
}


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


def additions(family: Family, results: dict[str, Any]) -> Extra:
    """Return what the quickstart adds to the page about its jobs."""
    return Extra(
        title=f"{family.title} on shapes",
        intro=f"{family.intro}; figures and pictures are of the test split, whose scenes were never trained on.",
        table=table(results, family),
        names=family.jobs,
        with_predictions=frozenset(family.pictures),
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
    extra = additions(family, results)
    write_report(find_jobs(arguments.out), arguments.out / NAME, samples=NUM_SHOWN, seed=SEED, extra=extra)
    lines = [f"{name:<44}{value:>10}" for name, value in table(results, family)]
    print(
        "\n".join(
            [
                "",
                *lines,
                "",
                f"figures   {arguments.out / 'results.json'}",
                f"pictures  {arguments.out / NAME}",
            ]
        )
    )


if __name__ == "__main__":
    main()
