"""Checks of the images, texts and numbers in the sample dict, for the public methods of all models.

Types, shapes and counts are compared in every call. Note: pixel values are checked by methods that generate or predict,
not by training losses: the check takes one pass over the image and waits for the device. In training the loop checks
the loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, MissingInputError
from lavis_lite.nn.features import pack

LARGEST_VALUE = 64.0
"""Largest magnitude in an image. Normalised images stay within about 3; 8-bit values that were only cast reach 255."""
NORMALISE = 'vis_processors["eval"] scales it to 0..1 and normalises it'
UNLISTED = (bytes, Mapping, set, frozenset)
"""Iterables that are not lists of texts; a set has no order, which assigns texts to images."""
MAX_RANKED = 10**9
SHOWN = 60
"""Characters of a wrong value in a message."""
IS_ENCODED = "image_is_encoded"
"""Key of a batch: true if its `image` holds the tokens of the model's own frozen image encoder."""
Candidates = Sequence[str] | Sequence[Sequence[str]]
"""Texts to choose between: those of all samples, or a list per sample."""


def required(samples: Mapping[str, Any], key: str, what: str) -> Any:
    """Return `samples[key]`. MissingInputError with its description `what` if it is missing or None."""
    if not isinstance(samples, Mapping):
        raise InputError(f"samples must be a dict with {key!r} ({what}); got a {type(samples).__name__}")
    if samples.get(key) is None:
        raise MissingInputError(key, f"samples[{key!r}] is missing: {what}")
    return samples[key]


def image_of(
    samples: Mapping[str, Any],
    key: str = "image",
    *,
    video: bool = False,
    answering: bool = False,
    encoded: bool = False,
) -> Tensor:
    """Return the batch's images (B,3,H,W) or, with `video`, videos (B,3,F,H,W); floating point, normalised. With
    `encoded` also tokens (B,S,E), of a batch that `IS_ENCODED`.

    ValueError for anything else; with `answering` also for nan, infinite and not normalised values.
    """
    wanted = f"a batch of images (B,3,H,W){' or videos (B,3,F,H,W)' if video else ''}"
    image, where = required(samples, key, wanted), f"samples[{key!r}]"
    if encoded and samples.get(IS_ENCODED):
        return image
    if not isinstance(image, Tensor):
        found = f"{where} is a {type(image).__name__}; it must be one tensor, of images or videos of one size"
        raise InputError(f'{found}: vis_processors["eval"](picture).unsqueeze(0)')
    if image.dim() not in ((4, 5) if video else (4,)) or image.shape[1] != 3:
        raise InputError(f"{where} has shape {tuple(image.shape)}; it must be {wanted}: unsqueeze(0) adds the batch")
    if image.numel() == 0:
        raise InputError(f"{where} has shape {tuple(image.shape)}: no image or no frame in it")
    if not image.is_floating_point():
        raise InputError(f"{where} is of type {image.dtype}; it must be floating point, as {NORMALISE}")
    if answering and not torch.compiler.is_compiling() and not image.is_meta:
        largest = float(
            torch.stack(image.detach().aminmax()).abs().amax()
        )  # nan where any value is; waits for the device
        if not math.isfinite(largest):
            raise InputError(f"{where} holds nan or inf: the result would be meaningless; check the image file")
        if largest > LARGEST_VALUE:
            raise InputError(f"{where} holds values up to {largest:.4g}; they must be within about 3, as {NORMALISE}")
    return image


def features_of(samples: Mapping[str, Any], width: int, *, answering: bool = False) -> Tensor:
    """Return the batch's features `image` (B,N,W) and `image_mask` (B,N; default all ones) in one tensor, as
    `nn.features.pack` does.

    InputError for another `width` W, shape or type; with `answering` also for nan, infinity, and a sample without a
    token.
    """
    wanted = f"a batch of features (B,N,{width}), as vit_model features takes"
    features, where = required(samples, "image", wanted), "samples['image']"
    if not isinstance(features, Tensor) or features.dim() != 3 or not features.is_floating_point():
        kind = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        found = f"{where} is {kind}" + (f" of {features.dtype}" if isinstance(features, Tensor) else "")
        raise InputError(f"{found}; it must be {wanted}, floating point: name the processor `features` in the dataset")
    if features.shape[2] != width or features.numel() == 0:
        raise InputError(f"{where} has shape {tuple(features.shape)}; it must be {wanted}: set model.vit.width to W")
    mask = samples.get("image_mask")
    if mask is None:
        mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
    if not isinstance(mask, Tensor) or mask.shape != features.shape[:2]:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"samples['image_mask'] is {shape}; it must be {tuple(features.shape[:2])}, 1 for each token")
    packed = pack(features, mask)
    if answering and not torch.compiler.is_compiling() and not packed.is_meta:
        if not bool(packed.isfinite().all()):
            raise InputError(f"{where} holds nan or inf: the result would be meaningless; check the file of features")
        if not bool((mask != 0).any(dim=1).all()):
            raise InputError("samples['image_mask']: a sample has no token at all; leave it out")
    return packed


def texts_of(samples: Mapping[str, Any], count: int | None, key: str = "text_input") -> list[str]:
    """Return `samples[key]` as `text_list`. MissingInputError if it is missing, ValueError as `text_list`."""
    return text_list(required(samples, key, "a text, or a list of texts, one per image"), count, key)


def optional_texts(samples: Mapping[str, Any], key: str, count: int, default: str = "") -> list[str]:
    """Return `samples[key]`, or `default` if it is missing or None, as `text_list`."""
    texts = samples.get(key)
    return text_list(default if texts is None else texts, count, key)


def text_list(texts: Any, count: int | None, key: str = "text_input", *, nested: bool = False) -> list[str]:
    """Return one text per sample: a single string is used for all. With `nested` a sample may have a list of texts. A
    `count` of None stands for any number of texts.

    ValueError, naming `samples[key]`, for another number of texts, or if one is not text.
    """
    where = f"samples[{key!r}]"
    if isinstance(texts, str):
        return [checked_text(texts, where)] * (1 if count is None else count)
    texts = as_list(texts, where, "a text or a list of one text per sample")
    if count not in (None, len(texts)) or not texts:
        raise InputError(f"{where}: {len(texts)} texts were given for {'any' if count is None else count} images")
    for row, text in enumerate(texts):
        for one in text if nested and isinstance(text, list | tuple) else (text,):
            checked_text(one, f"{where}[{row}]")
    return texts


def as_list(value: Any, where: str, wanted: str) -> list[Any]:
    """Return a list or other ordered iterable as a list. ValueError, with what is `wanted`, for anything else."""
    if isinstance(value, (str, *UNLISTED)) or not isinstance(value, Iterable):
        raise InputError(f"{where}: {shown(value)} is not {wanted}")
    return list(value)


def require_labels(num_labels: Sequence[int], texts: Sequence[str]) -> None:
    """Raise ValueError if none of a batch's texts has a token to learn: the loss would be nan."""
    if not any(count > 0 for count in num_labels):
        found = f"none of the batch's {len(texts)} texts has a token to learn ({', '.join(map(repr, texts[:3]))} ...)"
        raise InputError(f"{found}: shorten model.prompt, or raise model.max_txt_len and max_output_txt_len")


def candidate_texts(candidates: Any, owner: str = "") -> list[str]:
    """Return texts to choose between as a list. InputError, which names their `owner`, if there are none, or if one is
    blank or not text.
    """
    texts = as_list(candidates, f"candidates{owner}", "a list of texts")
    if not texts:
        raise InputError(f"candidates{owner}: an empty list; give at least one")
    for index, text in enumerate(texts):
        if not checked_text(text, f"candidate {index}{owner}").strip():
            raise InputError(f"candidate {index}{owner}: {text!r} is blank; give a text")
    return texts


def candidate_lists(candidates: Candidates, count: int) -> list[list[str]]:
    """Return the candidates of all samples (one list), or of each of `count` samples. InputError for an empty list, a
    candidate that is not a text or blank, and another number of lists.
    """
    lists = as_list(candidates, "candidates", "a list of texts, or one such list for each image")
    if not lists or isinstance(lists[0], str):
        return [candidate_texts(lists)]
    if len(lists) != count:
        raise InputError(f"candidates: {len(lists)} lists were given for {count} images")
    return [candidate_texts(own, f" of sample {row}") for row, own in enumerate(lists)]


def ranked_answers(answer_list: Any, num_ans_candidates: Any) -> list[str]:
    """Return the answers that `inference_method: rank` ranks. InputError as `candidate_texts`, and for a
    `num_ans_candidates` below 1.
    """
    if answer_list is None:
        raise InputError("inference_method rank chooses from a list of answers: give answer_list, or use generate")
    check_number("num_ans_candidates", num_ans_candidates, 1, MAX_RANKED)
    return candidate_texts(answer_list, " in answer_list")


def word_lists(samples: Mapping[str, Any], key: str, count: int) -> list[list[str]]:
    """Return `samples[key]`, a list of texts per sample (words read in an image, choices). ValueError for anything
    else.
    """
    where = f"samples[{key!r}]"
    lists = [as_list(own, where, "a list of texts") for own in as_list(samples[key], where, "a list per image")]
    if len(lists) != count:
        raise InputError(f"{where}: {len(lists)} lists were given for {count} images")
    return [[checked_text(word, f"{where}[{row}]") for word in words] for row, words in enumerate(lists)]


def checked_text(text: Any, where: str) -> str:
    """Return the text. ValueError if it is not text, or holds half a character, which tokenizers refuse."""
    if not isinstance(text, str):
        raise InputError(f"{where} is {shown(text)}; it must be a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"a lone surrogate, {text[error.start]!r} at position {error.start}"
        raise InputError(f'{where} holds {half}: clean it, e.g. text.encode("utf-8", "ignore").decode()') from error
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
        is_wrong = f"is {found.dtype} of shape {tuple(found.shape)}"
        raise InputError(f"samples[{key!r}] {is_wrong}; it must be {count} integers: {what}")
    if below is not None and found.device.type == "cpu" and not torch.compiler.is_compiling():
        for number in found.flatten().tolist():
            if not 0 <= number < below:
                raise InputError(f"samples[{key!r}] holds {number}; it must be from 0 to {below - 1}: {what}")
    return found.to(device, torch.long).reshape(-1)


def shown(value: Any) -> str:
    """Return a wrong value's repr, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
