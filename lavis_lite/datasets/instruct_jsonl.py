"""The user's own instruction data: JSONL (or JSON, CSV, TSV) of instructions and outputs, or of conversations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, RecordCheck, missing_field
from lavis_lite.datasets.annotations import load_annotations, place_of

PLACE = "_place"
"""What a reader may put into a record: (file, number of the record in it). Errors name it; the dataset takes it out."""
OPTIONAL = ("image", "video", "conversations", "messages")
"""Fields of which a table has the columns and a row leaves some empty."""
MARK = re.compile(r"<(?:image|video)>")
FORMS = (("from", "value", "human", "gpt"), ("role", "content", "user", "assistant"))
"""How conversations are written: the key of who speaks, the key of the text, who asks, who answers."""


def placed(paths: Sequence[Path], check: RecordCheck | None = None) -> Iterator[tuple[tuple[Path, int], Record]]:
    """Each checked record of the files after its place (file, number)."""
    for path in paths:
        for number, record in enumerate(load_annotations([path], check)):
            yield (path, number), record


def read_instructions(paths: Sequence[Path]) -> list[Record]:
    """Records {image or video, instruction, output[, candidates, label]}, or {image or video, conversations}; with
    templates of one's own, whatever fields these name.

    A conversation becomes one record a question, see `turns`. Raises ValueError, naming the file, the line and the
    field, for a record without image and video, or with a broken conversation.
    """
    records: list[Record] = []
    for place, record in placed(paths):
        try:
            found = asked(record)
        except ValueError as error:
            raise InputError(f"{place_of(*place)} {error}") from None
        records += [{**one, PLACE: place} for one in found]
    return records


def asked(record: Record) -> list[Record]:
    """The record, or its conversation's questions, each with its `instruction` and `output`."""
    record = {key: value for key, value in record.items() if value != "" or key not in OPTIONAL}
    seen, told = (
        [name for name in names if record.get(name) is not None]
        for names in (("image", "video"), ("instruction", "conversations", "messages"))
    )
    for given in (seen, told):
        if len(given) > 1:
            raise InputError(f"has several of what there is to be one of: {', '.join(map(repr, given))}")
    for name in seen + [name for name in told if name == "instruction"]:
        if not isinstance(record[name], str) or not record[name].strip():
            raise InputError(f"must have a text in its field {name!r}, got {record[name]!r}")
    if not seen:
        raise InputError(missing_field(record, ("image", "video")).removeprefix(":").strip())
    return turns(record, told[0]) if told and told[0] != "instruction" else [record]


def turns(record: Record, name: str) -> list[Record]:
    """One record a question of a conversation: [{from: human, value}, {from: gpt, value}, ...] as LLaVA writes it, or
    [{role: user, content}, {role: assistant, content}, ...].

    The earlier rounds stand before the question, as InstructBLIP joins them: with line breaks, without roles; the
    marks `<image>` and `<video>` are taken out.
    """
    said = record[name]
    if not isinstance(said, list) or not said or len(said) % 2:
        count = f"{len(said)} turns" if isinstance(said, list) else f"{said!r}"
        raise InputError(f"must have pairs of a question and an answer in {name!r}, got {count}")
    form = FORMS[1] if isinstance(said[0], dict) and "role" in said[0] else FORMS[0]
    texts = [said_by(turn, number, form) for number, turn in enumerate(said)]
    kept = {key: value for key, value in record.items() if key != name}
    found = []
    for number in range(0, len(texts), 2):
        own: dict[str, Any] = {"instruction": "\n".join(texts[: number + 1]), "output": texts[number + 1]}
        for name in ("question_id", "instance_id"):
            if record.get(name) is not None:
                own[name] = f"{record[name]}_{number // 2}"
        found.append({**kept, **own})
    return found


def said_by(turn: Any, number: int, form: tuple[str, str, str, str]) -> str:
    """The text of one turn. ValueError if it is not the right speaker's, or empty."""
    who, what, *speakers = form
    speaker = speakers[number % 2]
    text = turn.get(what) if isinstance(turn, dict) and turn.get(who) == speaker else None
    text = MARK.sub("", text).strip() if isinstance(text, str) else ""
    if not text:
        raise InputError(f"must say {{{who}: {speaker}, {what}: a text}} in turn {number}, got {turn!r}")
    return text
