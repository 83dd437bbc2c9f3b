"""Checks of the images, texts and numbers in the sample dict, for the public methods of all models.

Types, shapes and counts are compared in every call. Note: pixel values are checked by methods that generate or predict,
not by training losses: the check takes one pass over the image and waits for the device. In training the loop checks
the loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.errors import InputError, MissingInputError

LARGEST_VALUE = 64.0
"""Largest magnitude in an image. Normalised images stay within about 3; 8-bit values that were only cast reach 255."""
UNLISTED = (bytes, Mapping, set, frozenset)
"""Iterables that are not lists of texts; a set has no order, which assigns texts to images."""
SHOWN = 60
"""Characters of a wrong value in a message."""


def required(samples: Mapping[str, Any], key: str, what: str) -> Any:
    """Return `samples[key]`. MissingInputError with its description `what` if it is missing or None."""
    if not isinstance(samples, Mapping):
        raise InputError(f"samples must be a dict with {key!r} ({what}); got a {type(samples).__name__}")
    if samples.get(key) is None:
        raise MissingInputError(key, f"samples[{key!r}] is missing: {what}")
    return samples[key]


def image_of(samples: Mapping[str, Any], key: str = "image", *, video: bool = False, answering: bool = False) -> Tensor:
    """Return the batch's images (B,3,H,W) or, with `video`, videos (B,3,F,H,W); floating point, normalised.

    ValueError for anything else; with `answering` also for nan, infinite and not normalised values.
    """
    wanted = f"a batch of images (B,3,H,W){' or videos (B,3,F,H,W)' if video else ''}"
    image = required(samples, key, wanted)
    if not isinstance(image, Tensor):
        raise InputError(
            f"samples[{key!r}] is a {described(image)}; it must be one tensor: stack images of one size, and put "
            "images and videos, or videos of different lengths, into different batches. The image processor makes a "
            'tensor of a picture: vis_processors["eval"](picture).unsqueeze(0)'
        )
    if image.dim() not in ((4, 5) if video else (4,)) or image.shape[1] != 3:
        frames = ", and put the frames of a video after its channels" if video else ""
        raise InputError(
            f"samples[{key!r}] has shape {tuple(image.shape)}; it must be {wanted}: add the batch dimension with "
            f"unsqueeze(0){frames}"
        )
    if image.numel() == 0:
        raise InputError(f"samples[{key!r}] has shape {tuple(image.shape)}: there is no image or no frame")
    if not image.is_floating_point():
        raise InputError(
            f"samples[{key!r}] is of type {image.dtype}; it must be floating point, as the image processor returns it: "
            'scaled to 0..1, then normalised with mean and standard deviation (vis_processors["eval"])'
        )
    if answering:
        check_values(image, key)
    return image


def described(image: Any) -> str:
    """Return the type of a wrong image, and for a list also the shapes or types of its first entries."""
    if not isinstance(image, list | tuple):
        return type(image).__name__
    shapes = [tuple(one.shape) if isinstance(one, Tensor | np.ndarray) else type(one).__name__ for one in image[:4]]
    return f"{type(image).__name__} of shapes {shapes}"


def check_values(image: Tensor, key: str) -> None:
    """Raise ValueError for nan, inf, and pixels that were not normalised. Waits for the device."""
    if torch.compiler.is_compiling() or image.is_meta:
        return
    largest = float(torch.stack(image.detach().aminmax()).abs().amax())  # nan where any value is
    if not math.isfinite(largest):
        raise InputError(f"samples[{key!r}] holds nan or inf: the result would be meaningless; check the image file")
    if largest > LARGEST_VALUE:
        raise InputError(
            f"samples[{key!r}] holds values up to {largest:.4g}; normalised pixels stay within about 3: use the image "
            'processor (vis_processors["eval"]), which scales to 0..1 and normalises'
        )


def texts_of(samples: Mapping[str, Any], count: int, key: str = "text_input") -> list[str]:
    """Return `samples[key]` as one text per sample. MissingInputError if it is missing, ValueError as `text_list`."""
    return text_list(required(samples, key, f"a text, or a list of {count} texts, one per image"), count, key)


def optional_texts(samples: Mapping[str, Any], key: str, count: int) -> list[str]:
    """Return `samples[key]` as `text_list`, or empty texts if it is missing or None."""
    texts = samples.get(key)
    return [""] * count if texts is None else text_list(texts, count, key)


def text_list(texts: str | Sequence[str], count: int, key: str = "text_input", *, nested: bool = False) -> list[str]:
    """Return one text per sample: a single string is used for all. With `nested` a sample may have a list of texts.

    ValueError, naming `samples[key]`, for another number of texts, or if one is not text.
    """
    where = f"samples[{key!r}]"
    if isinstance(texts, str):
        return [checked_text(texts, where)] * count
    if isinstance(texts, UNLISTED) or not isinstance(texts, Iterable):
        raise InputError(f"{where}: {shown(texts)} is neither a text nor a list of one text per sample")
    texts = list(texts)
    if len(texts) != count:
        raise InputError(f"{where}: {len(texts)} texts were given for {count} images")
    for row, text in enumerate(texts):
        for one in text if nested and isinstance(text, list | tuple) else (text,):
            checked_text(one, f"{where}[{row}]")
    return texts


def require_labels(num_labels: Sequence[int], texts: Sequence[str]) -> None:
    """Raise ValueError if none of a batch's texts has a token to learn: the loss would be nan."""
    if not any(count > 0 for count in num_labels):
        first = ", ".join(map(repr, texts[:3])) + (", ..." if len(texts) > 3 else "")
        raise InputError(
            f"none of the batch's {len(texts)} texts has a token to learn ({first}): give longer texts, a shorter "
            "model.prompt, or raise model.max_txt_len and max_output_txt_len"
        )


def listed_texts(texts: Any, where: str) -> list[str]:
    """Return one or more texts as a list. ValueError, which begins with `where`, for anything else."""
    if isinstance(texts, (str, *UNLISTED)) or not isinstance(texts, Iterable):
        raise InputError(f"{where} must be a list of texts; got {shown(texts)}")
    texts = list(texts)
    if not texts:
        raise InputError(f"{where} is an empty list; it must have at least one text")
    return [checked_text(text, f"{where}[{row}]") for row, text in enumerate(texts)]


def candidate_texts(candidates: Any, owner: str = "") -> list[str]:
    """Return texts to choose between as a list. InputError, which names their `owner`, if there are none, or if one is
    blank or not text.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise InputError(f"the candidates{owner} must be a list of texts; got {shown(candidates)}")
    if not candidates:
        raise InputError(f"the candidates{owner} are an empty list: there is nothing to choose between")
    for index, text in enumerate(candidates):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"candidate {index}{owner} must be a non-empty text; got {shown(text)}")
        checked_text(text, f"candidate {index}{owner}")
    return list(candidates)


def ranked_answers(answer_list: Any, num_ans_candidates: Any) -> list[str]:
    """Return the answers that `inference_method: rank` ranks. InputError as `candidate_texts`, and for a
    `num_ans_candidates` below 1.
    """
    if answer_list is None:
        raise InputError("inference_method rank chooses from a list of answers: give answer_list, or use generate")
    whole_number(num_ans_candidates, "num_ans_candidates", least=1)
    return candidate_texts(answer_list, " in answer_list")


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """Return the number. ValueError if it is not an integer, or below `least`."""
    if not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number; got {shown(value)}")
    if least is not None and value < least:
        raise InputError(f"{name} {value} must be at least {least}")
    return int(value)


def word_lists(value: Any, count: int, key: str) -> list[list[str]]:
    """Return a list of texts per sample (words read in an image, choices). ValueError for anything else."""
    if isinstance(value, (str, *UNLISTED)) or not isinstance(value, Iterable):
        raise InputError(f"samples[{key!r}]: {shown(value)} must be a list with a list of texts for each image")
    for row, words in enumerate(value := list(value)):
        if not isinstance(words, list | tuple):
            raise InputError(f"samples[{key!r}][{row}]: expected a list of texts for each image, got {shown(words)}")
        for word in words:
            checked_text(word, f"samples[{key!r}][{row}]")
    if len(value) != count:
        raise InputError(f"samples[{key!r}]: {len(value)} texts were given for {count} images")
    return value


def checked_text(text: Any, where: str) -> str:
    """Return the text. ValueError if it is not text, or holds half a character, which tokenizers refuse."""
    if not isinstance(text, str):
        raise InputError(f"{where} is {shown(text)}; it must be a text (str)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} holds a lone surrogate, {text[error.start]!r} at position {error.start}, which is half a "
                'character: clean it, for instance text.encode("utf-8", "ignore").decode()'
            ) from error
    return text


def integers(
    samples: Mapping[str, Any], key: str, count: int, what: str, device: torch.device, *, below: int | None = None
) -> Tensor:
    """Return `samples[key]`, a tensor or list, as a LongTensor (B,). ValueError for another number or type, and for
    values that are negative or not `below`; values are checked on the CPU only, as reading them waits for a GPU.
    """
    value = required(samples, key, f"{what} (B,)")
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"samples[{key!r}] is {shown(value)}; it must be {count} integers: {what}") from error
    if found.is_floating_point() or found.is_complex() or found.numel() != count:
        raise InputError(
            f"samples[{key!r}] is {found.dtype} of shape {tuple(found.shape)}; it must be {count} integers: {what}"
        )
    if below is not None and found.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = [number for number in found.flatten().tolist() if not 0 <= number < below]
        if wrong:
            raise InputError(f"samples[{key!r}] holds {wrong[0]}; it must be from 0 to {below - 1}: {what}")
    return found.to(device, torch.long).reshape(-1)


def shown(value: Any) -> str:
    """Return a wrong value's repr, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
