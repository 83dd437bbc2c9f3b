"""Readers: functions from the annotation files of a split to records, one per published format, by name.

A dataset's YAML names one under `reader`; a function of the user's own is named with its module.
"""

from importlib import import_module

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import did_you_mean
from lavis_lite.datasets.readers import capfilt, captions, choices, instructions, questions
from lavis_lite.datasets.readers.files import Reader, SplitFiles

READERS: dict[str, Reader] = {
    "records": SplitFiles.records,
    "captions": captions.read_captions,
    "textcaps": captions.read_textcaps,
    "vsr_captions": captions.read_vsr_captions,
    "video_captions": captions.read_video_captions,
    "questions": questions.read_questions,
    "answered_questions": questions.read_answered_questions,
    "question_choices": questions.read_question_choices,
    "ocr_vqa": questions.read_ocr_vqa,
    "vizwiz": questions.read_vizwiz,
    "textvqa": questions.read_textvqa,
    "visdial": questions.read_visdial,
    "visdial_options": questions.read_visdial_options,
    "video_questions": questions.read_video_questions,
    "vsr": choices.read_vsr,
    "hateful_memes": choices.read_hateful_memes,
    "snli_ve": choices.read_snli_ve,
    "iconqa": choices.read_iconqa,
    "capfilt": capfilt.read_texts,
    "instructions": instructions.read_instructions,
}


def find_reader(name: str) -> Reader:
    """Return the reader of that name, or the function with that dotted name, such as `my_package.my_reader`.

    Raises InputError for an unknown name, and for a function that cannot be imported.
    """
    if name in READERS:
        return READERS[name]
    module, _, function = name.rpartition(".")
    if not module:
        advice = f"{did_you_mean(name, READERS)} A function of your own is named with its module: my_package.{name}"
        raise InputError(f"reader: {name!r} is unknown. {advice}")
    try:
        reader: Reader = vars(import_module(module))[function]
    except (ModuleNotFoundError, KeyError) as error:
        raise InputError(f"reader: {name}: no such function ({error}); list its module under `imports`") from error
    return reader
