"""Readers of questions: LAVIS's records, the official VQA files, OCR-VQA, VizWiz, TextVQA, Visual Dialog, videos, iVQA.

A split of questions is one or more files, recognised by their content: records, an answer list (a JSON list of
strings), the official questions ({questions: [...]}) and the official annotations ({annotations: [...]}).
Note: Visual Dialog's questions get the question mark that its files leave out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.records import (
    ANY_TEXT,
    GROUP,
    ID,
    INDEX,
    NAME,
    PATH,
    TEXT,
    TRUTHS,
    VALUES,
    WORDS,
    Kind,
    Record,
    RecordCheck,
    shown,
)
from lavis_lite.datasets.annotations import as_list, as_records, check_records, place_of, read_json, section
from lavis_lite.datasets.readers.captions import rows_with_words
from lavis_lite.datasets.readers.files import PLACE, SplitFiles, derived, with_places
from lavis_lite.datasets.templates import fill

logger = logging.getLogger(__name__)

ANSWER_FIELDS = ("answer", "answers", "direct_answers")
OCR_VQA_SPLITS = {"train": 1, "val": 2, "test": 3}
SCOPES = ("valid", "plausible")
"""Fields of GQA's choices."""
IVQA_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))


def question_fields(answers: Kind) -> dict[str, Kind]:
    """Return the fields of a question, given the kind of its answers."""
    return {
        **{"image": PATH, "question": TEXT, "question_id": ID, "instance_id": ID},
        **dict.fromkeys(ANSWER_FIELDS, answers),
        **{"question_type": GROUP, "answer_type": GROUP},
    }


def answers_of(record: Record) -> list[str]:
    """Return the record's answers as strings, whichever field has them, of strings or of {answer: ...}."""
    for name in ANSWER_FIELDS:
        if record.get(name) not in (None, []):
            return [str(a["answer"] if isinstance(a, dict) else a) for a in as_list(record[name])]
    return []


# Answer lists


def read_answer_list(paths: Sequence[Path]) -> list[str] | None:
    """Return the content of the first file that is a JSON list of strings; None if none is."""
    for path in paths:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            begins_as_list = re.match(r'\s*\[\s*"', file.read(64))
        if begins_as_list and is_answer_list(content := read_json(path)):
            return check_answers(content, path)
    return None


def read_vocabulary(path: Path) -> list[str]:
    """Return the answers of a JSON object {answer: index}, by index, or of a list. InputError for another form."""
    content = read_json(path)
    if isinstance(content, dict) and all(isinstance(index, int) for index in content.values()):
        content = sorted(content, key=content.__getitem__)
    if not is_answer_list(content):
        raise InputError(f"{path}: expected the answers to rank, as {{answer: index}} or as a list of texts")
    return check_answers(content, path)


def is_answer_list(content: Any) -> bool:
    """Return whether the content of a file is a list of strings."""
    return isinstance(content, list) and bool(content) and all(isinstance(item, str) for item in content)


def check_answers(answers: list[str], path: Path) -> list[str]:
    """Return the answers to rank; raise InputError for one that no tokenizer takes."""
    problem = RecordCheck(fields={"answers": VALUES}).problem({"answers": answers})
    if problem:
        raise InputError(f"{path}{problem}")
    return answers


# Questions


def read_questions(files: SplitFiles, check: RecordCheck | None = None) -> list[Record]:
    """Return the questions, with the official annotations of the same question id merged in.

    The official questions are read where no file has records.
    """
    records: list[Record] = []
    official: list[Record] = []
    truths: dict[Any, Record] = {}
    scopes: dict[str, Record] = {}
    for path in files.paths:
        content, where = files.content(path)
        if is_answer_list(content):
            continue
        if is_choices(content):
            scopes |= {str(key): row for key, row in content.items()}
            continue
        if isinstance(content, dict) and "questions" in content:
            official += official_questions(content, path, files, check)
        elif isinstance(content, dict) and "annotations" in content:
            needed = files.needs("question_id", "answers", **question_fields(TRUTHS))
            truths |= {truth["question_id"]: truth for truth in files.section(content, "annotations", path, needed)}
        else:
            records += files.located(as_records(content, where), where, check)
    if not (records or official):
        raise InputError(f"{files}: no file has questions; add the one that does")
    for record in records or official:
        key = record.get("question_id")
        truth = truths.get(key, {}) if isinstance(key, str | int | float) else {}
        record |= {key: truth[key] for key in ("answers", "question_type", "answer_type") if key in truth}
        scope = scopes.get(str(key), {})
        record |= {name: scope[name] for name in SCOPES if name in scope}
    return records or official


def is_choices(content: Any) -> bool:
    """Return whether the content is GQA's choices: by question id the answers in scope, of the question and images."""
    first = next(iter(content.values()), None) if isinstance(content, dict) else None
    return isinstance(first, dict) and set(SCOPES) <= first.keys() and "question" not in first


def official_questions(
    content: dict[str, Any], path: Path, files: SplitFiles, check: RecordCheck | None
) -> Iterator[Record]:
    """Return the official file's questions, with COCO's path of the image where a question has none, checked."""
    subset, where = content.get("data_subtype"), f"{path} (questions)"
    kinds = {"question_id": ID, "image_id": INDEX if subset else ID}
    rows = section(content, "questions", path, files.needs("question_id", "question", "image_id|image", **kinds))
    for row in rows if subset else ():
        row.setdefault("image", f"{subset}/COCO_{subset}_{row.get('image_id') or 0:012d}.jpg")
    return with_places(rows if check is None else check_records(rows, check, where), where)


def read_answered_questions(files: SplitFiles) -> list[Record]:
    """Return the questions with `answer`, the list of all answers."""
    check = files.needs("image", "question", **question_fields(TRUTHS))
    return [record | {"answer": answers_of(record)} for record in read_questions(files, check)]


def read_question_choices(files: SplitFiles) -> list[Record]:
    """Return questions {image, question, choices[, correct_choice_idx]}, of which the right choice is learned."""
    fields = {**question_fields(TRUTHS), "choices": WORDS, "correct_choice_idx": INDEX}
    check = files.needs("image", "question", "choices", **fields)
    records = read_questions(files, check)
    return [record | {"candidates": record["choices"], "label": record.get("correct_choice_idx")} for record in records]


def read_ocr_vqa(files: SplitFiles) -> list[Record]:
    """Return one record per question of OCR-VQA's {key: {questions, answers, split}}; `image` is the key's file.

    One file has all splits. Questions whose image is missing are left out, and counted in the log: books vanish from
    the shop that the images are fetched from. An image may have any suffix.
    """
    questions = list(ocr_vqa_questions(files))
    names = {path.stem: path.name for path in files.root.iterdir()}
    found = [{**question, "image": names[question["image"]]} for question in questions if question["image"] in names]
    if not found:
        raise MissingFileError(f"{files.root} has none of the {files.split} images of {files}")
    if num_missing := len(questions) - len(found):
        logger.warning("%s: %d of %d questions have no image and are left out", files, num_missing, len(questions))
    return found


def ocr_vqa_questions(files: SplitFiles) -> Iterator[Record]:
    """Yield the questions of the split's books; all books are in a file that names no split."""
    check = files.needs("sample_id", "questions", "answers", sample_id=NAME, questions=WORDS, answers=VALUES, split=ID)
    for book in files.records(check):
        if "split" in book and files.split not in OCR_VQA_SPLITS:
            raise InputError(f"{files} has the splits {', '.join(OCR_VQA_SPLITS)}, but no {files.split!r}")
        if "split" in book and book["split"] != OCR_VQA_SPLITS[files.split]:
            continue
        key, questions, answers = book["sample_id"], as_list(book["questions"]), as_list(book["answers"])
        if len(questions) != len(answers):
            raise InputError(f"{book[PLACE][0]}: {key} has {len(questions)} questions and {len(answers)} answers")
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield derived(book, image=key, question=question, answer=answer, question_id=f"{key}_{number}")


def read_vizwiz(files: SplitFiles) -> Iterator[Record]:
    """Yield VizWiz's own annotations {image, question[, answers, answer_type]}; a question is known by its image.

    An image `VizWiz_<split>_<number>.jpg` is in the folder `<split>`, as its archives unpack.
    """
    for row in files.records(files.needs("image", "question", **question_fields(TRUTHS))):
        image = re.sub(r"^VizWiz_([a-z]+)_", r"\1/\g<0>", row["image"])
        kept = {"question": row["question"], "answer_type": row.get("answer_type")}
        yield derived(row, image=image, question_id=row["image"], answer=answers_of(row), **kept)


def read_textvqa(files: SplitFiles) -> Iterator[Record]:
    """Yield TextVQA's questions, with the words that Rosetta read in each image (`ocr_tokens`) if their file is given.

    The validation images are in the folder of the training images.
    """
    fields = {**question_fields(TRUTHS), "image_id": NAME, "ocr_tokens": WORDS}
    for row in rows_with_words(files, files.needs("image_id", "question", "question_id", **fields)):
        folder = "test_images" if row.get("set_name") == "test" else "train_images"
        kept = {key: row[key] for key in ("question", "question_id", "ocr_tokens") if key in row}
        yield derived(row, image=f"{folder}/{row['image_id']}.jpg", answer=answers_of(row), **kept)


# Dialogues


def read_visdial_options(files: SplitFiles) -> Iterator[Record]:
    """Yield records as `read_visdial`, of a training file with candidates too."""
    return read_visdial(files, training_options=True)


def read_visdial(files: SplitFiles, *, training_options: bool = False) -> Iterator[Record]:
    """Yield one record per round of Visual Dialog 1.0's dialogues, with `history`, `question` and 100 candidates.

    A training file's rounds have none unless `training_options`; of a test file's dialogues only the last round is
    asked. A list among the files has the dense annotations. Raises InputError for those that fit no round.
    """
    contents = {path: read_json(path) for path in files.paths}
    dense, has_fitted = _dense_annotations(files, contents), False
    for path, content in contents.items():
        if isinstance(content, list):
            continue
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, dict) or not {"questions", "answers", "dialogs"} <= data.keys():
            raise InputError(f'{path}: expected Visual Dialog\'s {{"data": {{"questions", "answers", "dialogs"}}}}')
        split = str(content.get("split", "val")).removesuffix("2018")
        check = files.needs("image_id", "dialog", image_id=INDEX, caption=ANY_TEXT)
        for dialog in files.section(data, "dialogs", path, check):
            try:
                for record in list(visdial_rounds(dialog, data, split, training_options=training_options)):
                    found = dense.get(record["question_id"])
                    has_fitted |= found is not None
                    yield record if found is None else _with_relevance(record, *found)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"found {shown(dialog['dialog'])} ({type(error).__name__}: {error})"
                where = f"{place_of(*dialog[PLACE])}: `dialog`"
                raise InputError(f"{where} must be rounds with indices of questions and answers, {problem}") from error
    if dense and not has_fitted:
        _, path = next(iter(dense.values()))
        raise InputError(f"{path}: no image_id and round_id is of these dialogues; give the file of the same split")


def _dense_annotations(files: SplitFiles, contents: Mapping[Path, Any]) -> dict[str, tuple[Any, Path]]:
    """Return the relevance of each annotated round's candidates and its file, by `question_id`."""
    found = {}
    for path, content in contents.items():
        if isinstance(content, list):
            check = files.needs("image_id", "round_id", "gt_relevance|relevance", image_id=INDEX, round_id=INDEX)
            where = f"{path} (dense annotations)"  # the file may have any suffix
            for row in check_records(as_records(content, where), check, where):
                own = row.get("gt_relevance")
                relevance = row["relevance"] if own is None else own
                found[f"{row['image_id']}_{row['round_id']}"] = relevance, path
    return found


def _with_relevance(record: Record, relevance: Any, path: Path) -> Record:
    """Return a round with its candidates' relevance, checked before it is needed, which is after the evaluation."""
    if "candidates" in record:
        count = len(record["candidates"])
        numbers = relevance if isinstance(relevance, list) else []
        if len(numbers) != count or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in numbers):
            problem = f"the relevance must be {count} numbers from 0 to 1, one per candidate, got {shown(relevance)}"
            raise InputError(f"{path}: image and round {record['question_id']}: {problem}")
        if not any(numbers):
            problem = "no candidate has a relevance above 0, so NDCG cannot be normalised; leave this round out"
            raise InputError(f"{path}: image and round {record['question_id']}: {problem}")
    return {**record, "relevance": relevance}


def visdial_rounds(dialog: Record, data: Record, split: str, *, training_options: bool = False) -> Iterator[Record]:
    """Yield the rounds that are asked. `history` is written as LAVIS does; `caption` is the sentence that began the
    dialogue, for templates that name it.
    """
    folder, history = f"VisualDialog_{split}2018", ""
    for number, turn in enumerate(dialog["dialog"], start=1):
        question = data["questions"][turn["question"]].rstrip("? ") + "?"
        answer = data["answers"][turn["answer"]] if "answer" in turn else None
        ids = {"question_id": f"{dialog['image_id']}_{number}", "caption": dialog.get("caption")}
        ids |= {"image": f"{folder}/{folder}_{dialog['image_id']:012d}.jpg", "history": history.strip()}
        record = derived(dialog, question=question, answer=answer, **ids)
        if (split != "train" or training_options) and "answer_options" in turn:
            options = [data["answers"][index] for index in turn["answer_options"]]
            yield {**record, "candidates": options, "label": turn.get("gt_index")}
        elif split == "train" and answer is not None:
            yield record
        history += f" q: {question} a: {answer}"


# Videos


def read_video_questions(files: SplitFiles) -> Iterator[Record]:
    """Yield records {video, question[, answer, question_id]}."""
    return files.records(files.needs("video", "question", **question_fields(TRUTHS), video=PATH))


def read_ivqa(files: SplitFiles, *, video_name: str) -> Iterator[Record]:
    """Yield iVQA's questions, with the list of the answers that were given; `video_name` may name columns."""
    fields = {"video_id": ID, **question_fields(TRUTHS), **dict.fromkeys(IVQA_ANSWERS, GROUP)}
    for row in files.records(files.needs("video_id", "question", **fields)):
        answers = [row[name] for name in IVQA_ANSWERS if row.get(name)]
        yield derived(row, video=fill(video_name, row), question=row["question"], answer=answers)
