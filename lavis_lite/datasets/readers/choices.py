"""Readers of statements, labels and choices: VSR, Hateful Memes, SNLI-VE, IconQA, ScienceQA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lavis_lite.common.records import ANY_TEXT, GROUP, ID, INDEX, NAME, PATH, TEXT, WORDS, Record
from lavis_lite.datasets.readers.files import SplitFiles, derived


def read_vsr(files: SplitFiles) -> Iterator[Record]:
    """Yield VSR's records {image, caption, label, relation}: `statement`, and the relation as the question type."""
    for row in files.records(files.needs("image", "caption", image=PATH, caption=TEXT, relation=GROUP, label=ID)):
        kept = {key: row[key] for key in ("image", "label") if key in row}
        yield derived(row, statement=row["caption"], question_type=row.get("relation"), **kept)


def read_hateful_memes(files: SplitFiles) -> Iterator[Record]:
    """Yield Hateful Memes' records {id, img, text, label}; `text` is written on the image."""
    for row in files.records(files.needs("id", "img", "text", id=ID, img=PATH, text=ANY_TEXT, label=ID)):
        label = {"label": row["label"]} if "label" in row else {}
        yield derived(row, image=row["img"], text=row["text"], question_id=row["id"], **label)


def read_snli_ve(files: SplitFiles) -> Iterator[Record]:
    """Yield SNLI-VE's {image (a Flickr id), sentence, label}; `caption` is the statement."""
    check = files.needs("image", "sentence", "label", image=NAME, sentence=TEXT, label=ID)
    for row in files.records(check):
        image = f"{str(row['image']).removesuffix('.jpg')}.jpg"
        yield derived(row, image=image, caption=row["sentence"], label=row["label"])


def read_iconqa(files: SplitFiles) -> Iterator[Record]:
    """Yield IconQA's questions with choices in words: {image, question, choices, answer (an index)}."""
    check = files.needs("image", "question", "choices", image=PATH, question=TEXT, choices=WORDS, answer=INDEX)
    for row in files.records(check):
        kept = {key: row[key] for key in ("image", "question")}
        yield derived(row, candidates=row["choices"], label=row.get("answer"), **kept)


def read_scienceqa(files: SplitFiles, *, context: Sequence[str], no_context: str) -> Iterator[Record]:
    """Yield ScienceQA's problems that have an image, those of the split where they name theirs, as choices.

    `context` names the fields that are joined to the context. The official file is {id: problem}, and its images are
    `<split>/<id>/image.png`; in a list of problems `image` is a path.
    """
    fields = {"image": replace(PATH, blank=True), "split": GROUP, "question": TEXT, "choices": WORDS, "answer": INDEX}
    fields |= {"question_id": ID, **dict.fromkeys(context, ANY_TEXT)}
    for row in files.records(files.needs("question", "choices", "answer", **fields)):
        split = row.get("split", files.split)
        if not row.get("image") or split != files.split:
            continue
        known = {key: row[key] for key in ("image", "question_id") if key in row}
        if "sample_id" in row:
            known = {"image": f"{split}/{row['sample_id']}/{row['image']}", "question_id": row["sample_id"]}
        text = " ".join(row[name] for name in context if row.get(name)) or no_context
        choice = {"candidates": row["choices"], "label": row["answer"]}
        yield derived(row, question=row["question"], context=text, **choice, **known)
