"""The reader of the user's own instruction data: instructions and outputs, or conversations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.datasets.annotations import place_of
from lavis_lite.datasets.readers.files import PLACE, SplitFiles

OPTIONAL = ("image", "video", "conversations", "messages")
"""Fields of which a table has the columns, and which may be empty in a row."""
MARK = re.compile(r"<(?:image|video)>")
FORMS = (("from", "value", "human", "gpt"), ("role", "content", "user", "assistant"))
"""How conversations are written: the key of the speaker, the key of the text, the one who asks, the one who answers."""


def read_instructions(files: SplitFiles) -> Iterator[Record]:
    """Yield records {image or video, instruction, output[, candidates, label]}, or one per question of records
    {image or video, conversations}; with templates of one's own, whatever fields these name.

    Raises InputError, naming the file, the line and the field, for a record without image and video, or with a broken
    conversation.
    """
    for record in files.records():
        place = record.pop(PLACE)
        try:
            found = expand_conversation(record)
        except ValueError as error:
            raise InputError(f"{place_of(*place)} {error}") from None
        yield from ({**one, PLACE: place} for one in found)


def expand_conversation(record: Record) -> list[Record]:
    """Return the record, or its conversation's questions, each with its `instruction` and `output`."""
    record = {key: value for key, value in record.items() if value != "" or key not in OPTIONAL}
    visual, texts = (
        [name for name in names if record.get(name) is not None]
        for names in (("image", "video"), ("instruction", "conversations", "messages"))
    )
    for given in (visual, texts):
        if len(given) > 1:
            raise InputError(f"has several fields of which it may have one: {', '.join(map(repr, given))}")
    return questions_of(record, texts[0]) if texts and texts[0] != "instruction" else [record]


def questions_of(record: Record, name: str) -> list[Record]:
    """Return one record per question of a conversation: [{from: human, value}, {from: gpt, value}, ...] as LLaVA writes
    it, or [{role: user, content}, {role: assistant, content}, ...].

    The earlier rounds are put before the question, as InstructBLIP joins them: with line breaks, without roles; the
    marks `<image>` and `<video>` are removed.
    """
    turns = record[name]
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        count = f"{len(turns)} turns" if isinstance(turns, list) else f"{turns!r}"
        raise InputError(f"must have pairs of a question and an answer in {name!r}, got {count}")
    form = FORMS[1] if isinstance(turns[0], dict) and "role" in turns[0] else FORMS[0]
    texts = [turn_text(turn, number, form) for number, turn in enumerate(turns)]
    kept = {key: value for key, value in record.items() if key != name}
    found = []
    for number in range(0, len(texts), 2):
        own: dict[str, Any] = {"instruction": "\n".join(texts[: number + 1]), "output": texts[number + 1]}
        for key in ("question_id", "instance_id"):
            if record.get(key) is not None:
                own[key] = f"{record[key]}_{number // 2}"
        found.append({**kept, **own})
    return found


def turn_text(turn: Any, number: int, form: tuple[str, str, str, str]) -> str:
    """Return the text of one turn. Raises InputError if it is not the right speaker's, or empty."""
    speaker_key, text_key, *speakers = form
    speaker = speakers[number % 2]
    text = turn.get(text_key) if isinstance(turn, dict) and turn.get(speaker_key) == speaker else None
    text = MARK.sub("", text).strip() if isinstance(text, str) else ""
    if not text:
        raise InputError(f"must have {{{speaker_key}: {speaker}, {text_key}: a text}} in turn {number}, got {turn!r}")
    return text
