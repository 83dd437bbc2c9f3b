"""Prompts of a language model: placeholders and what fills them, the split of a caption, the lemmas of an answer."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.prompts import fill_placeholders, joined_words, lettered
from lavis_lite.models.inputs import optional_texts, text_list, texts_of, word_lists

FRAMES = {
    "context": "context: {}. {}",
    "history": "dialog history: {}\n{}",
    "caption": 'This image has the caption "{}". {}',
}
"""LAVIS's templates for a text before a prompt; a later key is put before an earlier one."""


def generation_prompts(samples: dict[str, Any], default: str, count: int) -> list[str]:
    """Return the prompt of each of `count` samples: `samples["prompt"]` (one, or one per sample) or the model's.

    The first placeholder `{}` is filled with `ocr_tokens` if the samples have them, the next with `text_input`.
    InputError for one that nothing fills: the language model would read the braces.
    """
    prompts = text_list(samples.get("prompt", default), count, "prompt")
    if not any("{}" in prompt for prompt in prompts):
        return prompts
    columns = [_ocr_texts(samples, count)] if "ocr_tokens" in samples else []
    columns += [texts_of(samples, count)] if "text_input" in samples else []
    return _fill(prompts, *columns)


def question_prompts(samples: dict[str, Any], template: str | Sequence[str], count: int) -> list[str]:
    """Return questions (`text_input`) inside a template, or one template per sample, after `FRAMES`.

    Of two placeholders the first takes `ocr_tokens` if the samples have them; else the second takes `choices` as
    "(a) red (b) blue".
    """
    columns = [texts_of(samples, count)]
    templates = [text or "{}" for text in text_list(template, count, "prompt")]
    if any(text.count("{}") > 1 for text in templates):
        if "ocr_tokens" in samples:
            columns = [_ocr_texts(samples, count), *columns]
        elif "choices" in samples:
            columns += [[lettered(own) for own in word_lists(samples, "choices", count)]]
        else:
            raise InputError(f"prompt {template!r} has two placeholders: samples need 'ocr_tokens' or 'choices' too")
    return _framed(samples, _fill(templates, *columns))


def class_prompts(samples: dict[str, Any], default: str | Sequence[str], count: int) -> list[str]:
    """Return prompts for a choice between candidates, after `FRAMES`: `text_input` in the placeholders (alone if the
    prompt is empty; a list of texts fills several).
    """
    prompts = text_list(samples.get("prompt", default), count, "prompt")
    if "text_input" in samples:
        texts = text_list(samples["text_input"], count, nested=True)
        parts = [[text] if isinstance(text, str) else text for text in texts]
        prompts = [fill_placeholders(prompt or "{}", own) for prompt, own in zip(prompts, parts, strict=True)]
    return _framed(samples, prompts)


def _framed(samples: dict[str, Any], prompts: list[str]) -> list[str]:
    """Put the samples' `caption`, `history` and `context` before the prompts; an empty text adds nothing."""
    for key, frame in FRAMES.items():
        for row, text in enumerate(optional_texts(samples, key, len(prompts))):
            if text:
                prompts[row] = fill_placeholders(frame, (text, prompts[row]))
    return prompts


def _fill(templates: list[str], *columns: list[str]) -> list[str]:
    return [fill_placeholders(template, own) for template, *own in zip(templates, *columns, strict=True)]


def _ocr_texts(samples: dict[str, Any], count: int) -> list[str]:
    return [joined_words(words) for words in word_lists(samples, "ocr_tokens", count)]


def without_prompt(caption: str, prompt: str) -> str:
    """Return the caption without the prompt, if it begins with it as whole words."""
    rest = caption.removeprefix(prompt)
    inside_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return (caption if inside_word else rest).strip()


def split_caption(text: str) -> tuple[str, str]:
    """Return the caption's beginning, whose number of words is drawn uniformly from [1, half of them], and the rest
    (BLIP-2, section 3.2: prefix language modelling). A caption of one word has no beginning.
    """
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = int(torch.randint(1, len(words) // 2 + 1, ()))
    return " ".join(words[:cut]), " ".join(words[cut:])


def lemmatize(answers: Sequence[str]) -> list[str]:
    """Return answers with nouns and verbs in dictionary form. MissingPackageError without spaCy or its model."""
    nlp = _spacy_model()
    return [
        " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in nlp(answer))
        for answer in answers
    ]


@cache
def _spacy_model() -> Any:
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        install = "`pip install spacy` and `python -m spacy download en_core_web_sm`"
        raise MissingPackageError(f"apply_lemmatizer needs spaCy and its English model: {install}") from error
