"""What a sample asks of a language model: prompts and their gaps, the split of a caption, the answer's lemmas."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.wording import joined_words, lettered
from lavis_lite.models.inputs import (
    optional_texts,
    required,
    text_list,
    texts_of,
    word_lists,
)

FRAMES = {
    "context": "context: {}. {}",
    "history": "dialog history: {}\n{}",
    "caption": 'This image has the caption "{}". {}',
}
"""How LAVIS puts a text before a prompt: the later a key, the further in front."""


def generation_prompts(samples: dict[str, Any], default: str, count: int) -> list[str]:
    """The prompt of each of `count` samples: `samples["prompt"]` (one, or one a sample) or the model's.

    The first gap `{}` is filled with `ocr_tokens` if the samples have them, the next with `text_input`. ValueError for
    a gap with nothing to fill it: the language model would read the braces.
    """
    prompts = text_list(samples.get("prompt", default), count, "prompt")
    if not any("{}" in prompt for prompt in prompts):
        return prompts
    values = [ocr_texts(samples, count)] if "ocr_tokens" in samples else []
    if "text_input" in samples:
        values.append(texts_of(samples, count))
    return fill(prompts, *values)


def question_prompts(samples: dict[str, Any], template: str | Sequence[str], count: int) -> list[str]:
    """Questions (`text_input`) inside a template, or one each: its one gap, or, of two, that before or after the other.

    With two gaps the first takes `ocr_tokens` if the samples have them; else the second takes `choices` as
    "(a) red (b) blue". Before it stands what `preceded` puts there.
    """
    required(samples, "text_input", "the questions, one per image")
    return preceded(samples, inside(samples, template, texts_of(samples, count)))


def inside(samples: dict[str, Any], template: str | Sequence[str], questions: list[str]) -> list[str]:
    """The questions inside the template; ValueError if nothing is there for its second gap."""
    templates = [text or "{}" for text in text_list(template, len(questions))]
    if all(text.count("{}") < 2 for text in templates):
        return fill(templates, questions)
    if "ocr_tokens" in samples:
        return fill(templates, ocr_texts(samples, len(questions)), questions)
    if "choices" in samples:
        return fill(templates, questions, choice_texts(samples, len(questions)))
    raise InputError(
        f"prompt {template!r} has two gaps: give samples['ocr_tokens'] or samples['choices'] for the other"
    )


def class_prompts(samples: dict[str, Any], default: str, count: int) -> list[str]:
    """Prompts of a choice between candidates: `text_input` in the gaps (alone, where the prompt is empty; a list of
    texts fills several), and before it what `preceded` puts there.
    """
    prompts = text_list(samples.get("prompt", default), count, "prompt")
    if "text_input" in samples:
        texts = text_list(samples["text_input"], count, nested=True)
        parts = [[text] if isinstance(text, str) else list(text) for text in texts]
        prompts = [fill_gaps(prompt or "{}", own) for prompt, own in zip(prompts, parts, strict=True)]
    return preceded(samples, prompts)


def preceded(samples: dict[str, Any], prompts: list[str]) -> list[str]:
    """The prompts behind what the samples have of `caption`, `history` and `context`; an empty text adds nothing."""
    for key, frame in FRAMES.items():
        texts = optional_texts(samples, key, len(prompts))
        prompts = [
            fill_gaps(frame, (text, prompt)) if text else prompt for text, prompt in zip(texts, prompts, strict=True)
        ]
    return prompts


def fill(templates: Sequence[str], *values: Sequence[str]) -> list[str]:
    """Each template with its gaps filled, in order. ValueError for another number of values."""
    values = tuple(text_list(own, len(templates)) for own in values)
    return [fill_gaps(template, own) for template, *own in zip(templates, *values, strict=True)]


def fill_gaps(template: str, values: Sequence[str]) -> str:
    """The template with its gaps `{}` filled in order; other braces, also in the values, are text.

    Raises ValueError if there are more gaps than values.
    """
    if template.count("{}") > len(values):
        count = template.count("{}")
        raise InputError(
            f"prompt {template!r} has {count} gaps, but there are {len(values)} texts for them: give "
            "samples['text_input'], or a prompt without '{}'"
        )
    head, *rest = template.split("{}", len(values))
    return head + "".join(value + part for value, part in zip(values, rest, strict=False))


def ocr_texts(samples: dict[str, Any], count: int) -> list[str]:
    """Words read in each image (`ocr_tokens`), joined by commas."""
    return [joined_words(words) for words in word_lists(samples["ocr_tokens"], count, "ocr_tokens")]


def choice_texts(samples: dict[str, Any], count: int) -> list[str]:
    """Return the choices of each question, each after its letter."""
    return [lettered(choices) for choices in word_lists(samples["choices"], count, "choices")]


def without_prompt(caption: str, prompt: str) -> str:
    """Return the caption without the prompt, if it begins with it as whole words."""
    rest = caption.removeprefix(prompt)
    inside_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return (caption if inside_word else rest).strip()


def split_caption(text: str) -> tuple[str, str]:
    """The caption's beginning, whose number of words is drawn uniformly from [1, half of them], and the rest.

    (BLIP-2, section 3.2: prefix language modelling.) A caption of one word has no beginning.
    """
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = int(torch.randint(1, len(words) // 2 + 1, ()))
    return " ".join(words[:cut]), " ".join(words[cut:])


def lemmatize(answers: Sequence[str]) -> list[str]:
    """Answers with nouns and verbs in their dictionary form. ImportError if spaCy or its model is missing."""
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
        raise MissingPackageError(
            "apply_lemmatizer needs spaCy and its English model: `pip install spacy` and "
            "`python -m spacy download en_core_web_sm`, or set apply_lemmatizer=False"
        ) from error
