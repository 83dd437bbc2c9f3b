"""Our models as the model `lavis_lite` of lmms-eval, whose benchmarks then run on them.

The package `lmms-eval` is needed (`pip install "lavis-lite[lmms-eval]"`), 0.7 or newer; it imports this module for
`--model lavis_lite`. Its `loglikelihood` tasks take the lowest value as the best, so losses are returned, not
log-likelihoods.

Letters: B requests, F images of a request, C candidates.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lavis_lite.common import dist
from lavis_lite.common.bounds import MAX_TOKENS, check_number
from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.precision import autocast, resolve_precision
from lavis_lite.common.prompts import fill_placeholders
from lavis_lite.common.registry import registry
from lavis_lite.common.transfer import to_device
from lavis_lite.common.video_io import check_num_frames, decode, processed
from lavis_lite.integrations.lmms_eval_settings import Generation
from lavis_lite.models.base import BaseModel
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.loading import Processors, from_pretrained, load_model_and_preprocess
from lavis_lite.models.protocols import AnswersQuestions, Generates, ScoresCandidates
from lavis_lite.models.shared_images import encoded_once, with_repeats, without_repeats

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise MissingPackageError(
        'lavis_lite.integrations.lmms_eval: lmms-eval is missing; install it with `pip install "lavis-lite[lmms-eval]"`'
    ) from error

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_BATCH = 100_000
NO_SETTINGS = Generation((), ())
IMAGE_TAG = "<image>"
"""Marks the image's place in contexts of other models."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question about images. `indices` are the requests that it answers: one, or one per candidate."""

    where: str
    """The task and document, for messages."""
    indices: tuple[int, ...]
    text: str
    image: Tensor
    """(3,S,S), or (3,F,S,S) for several images or a video."""
    generation: Generation = NO_SETTINGS
    candidates: tuple[str, ...] = ()


class Place(NamedTuple):
    """A document: task, split and number."""

    task: str
    split: str
    number: int


class LavisLite(lmms):
    """A model of the zoo, a checkpoint of train.py, or a Hugging Face folder, with the interface of lmms-eval.

    Args:
        arch, model_type, checkpoint: as in `load_model`; without `model_type` as in `from_pretrained`.
        prompt: template of what the model reads, `{}` for lmms-eval's context; without `{}` the context is not read. By
            default a language model reads its own template, if it has one, or the context alone; a captioning model
            reads its own prompt, and never the context.
        text_processor: registered name of the processor that cleans contexts, or `none`. Default: `blip_vqa`'s own;
            others read contexts as they are.
        num_frames: frames of a video, spread evenly.
        precision: as `run.precision`.
        overrides: further keys of the model section, such as `llm_precision=bf16`.

    Raises:
        InputError: a model that neither writes nor answers, and everything that `load_model` refuses.
    """

    def __init__(
        self,
        arch: str | None = None,
        model_type: str | None = None,
        checkpoint: str | None = None,
        *,
        prompt: str | None = None,
        text_processor: str | None = None,
        num_frames: int = 4,
        precision: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.batch_size = whole_batch_size(batch_size)
        self.num_frames = check_num_frames(num_frames)
        self._device = dist.resolve_device(device or "auto")
        self.dtype = resolve_precision(precision, self._device)
        model, images, texts = load(arch, model_type, checkpoint, device=self._device, **overrides)
        if not isinstance(model, Generates | AnswersQuestions):
            raise InputError(
                f"arch={arch}: {type(model).__name__} writes no text, which lmms-eval scores; choose an "
                "architecture for captions, questions or instructions"
            )
        self.model, self.process_image = model, images["eval"]
        self.clean_text: Callable[[str], str] = text_cleaner(text_processor, model, texts)
        self.prompt = default_prompt(model) if prompt is None else prompt

    @property
    def device(self) -> torch.device:
        """The device of the model, on which lmms-eval gathers numbers of all processes."""
        return self._device

    # Requests

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the text that the model writes for each request, cut at the request's stop texts.

        A request's `args` are context, `generation_kwargs`, the function from a document to its images, and the
        document's number, task and split. Raises InputError, naming task and document, for what the model cannot read.
        """
        answers = [""] * len(requests)
        for queries in self.batches(self.questions(requests), total=len(requests)):
            generation = queries[0].generation
            with naming(queries):
                texts = self.write(queries, dict(generation.settings))
            for query, text in zip(queries, texts, strict=True):
                answers[query.indices[0]] = generation.cut(text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return the loss of each request's continuation as the answer, and whether greedy search writes just that.

        Requests with one document and context are candidates of one choice: `class_losses` ranks them by the sum over
        their tokens. Each result is a `GenerationResult` whose `text` is the pair, because lmms-eval 0.7 would make a
        text of a bare pair. Raises InputError for a model without `class_losses`.
        """
        model = self.model
        if not isinstance(model, ScoresCandidates) or not isinstance(model, Generates):
            raise InputError(
                f"{type(model).__name__} cannot rank candidates, as tasks with output_type multiple_choice or "
                "loglikelihood need: choose a task with output_type generate_until, or a BLIP-2 with a language model"
            )
        results: list[Any] = [None] * len(requests)
        for queries in self.batches(self.choices(requests), total=len(requests)):
            with naming(queries), torch.no_grad(), autocast(self._device, self.dtype):
                samples = self.samples(queries)
                losses = model.class_losses(samples, [list(query.candidates) for query in queries], divided=False)
                greedy = model.generate(samples, **greedy_search(model, queries))
            if losses.isnan().any():
                raise InputError(
                    f"{queries[0].where}: losses are not numbers; set precision=fp32, or check the weights"
                )
            for query, row, written in zip(queries, losses.tolist(), greedy, strict=True):
                for index, text, loss in zip(query.indices, query.candidates, row, strict=False):
                    results[index] = GenerationResult(text=(loss, written.strip() == text))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise InputError: a conversation of several rounds is not supported."""
        raise InputError("lavis_lite: tasks of several rounds (generate_until_multi_round) are not supported")

    def questions(self, requests: Sequence[Any]) -> Iterator[Query]:
        """Return one query per request, read when it is needed."""
        for index, request in enumerate(requests):
            context, generation_kwargs, doc_to_visual, number, task, split = request.args
            place = Place(task, split, number)
            with naming(place):
                generation = Generation.of(generation_kwargs)
            yield self.query(place, context, doc_to_visual, indices=(index,), generation=generation)

    def choices(self, requests: Sequence[Any]) -> Iterator[Query]:
        """Return one query per document and context, with all candidates."""
        groups: dict[tuple[Place, str], list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.args) != 6:
                raise InputError(
                    "a request has no image: likelihoods of texts alone (metric acc_mutual_info) are not supported; "
                    "leave out the metric"
                )
            context, _, _, number, task, split = request.args
            groups.setdefault((Place(task, split, number), context), []).append(index)
        for (place, context), indices in groups.items():
            candidates = [self.candidate(place, requests[index].args[1]) for index in indices]
            visual = requests[indices[0]].args[2]
            yield self.query(place, context, visual, indices=tuple(indices), candidates=tuple(candidates))

    def candidate(self, place: Place, continuation: Any) -> str:
        """Return a request's continuation without the spaces around it: the model puts its own between texts."""
        found = continuation(self.document(place)) if callable(continuation) else continuation
        if not isinstance(found, str):
            raise InputError(f"{described(place)}: the continuation must be a text, got {found!r}")
        return found.strip()

    def query(self, place: Place, context: str, doc_to_visual: Callable[[Any], Any], **fields: Any) -> Query:
        """Return the query with its image and its text: the cleaned context inside `prompt`."""
        with naming(place):
            image = self.image(doc_to_visual(self.document(place)))
            text = self.clean_text(context.replace(IMAGE_TAG, "").strip())
            text = text if self.prompt is None else fill_placeholders(self.prompt, [text])
        return Query(where=described(place), text=text, image=image, **fields)

    def document(self, place: Place) -> Any:
        """Return the document; lmms-eval puts the datasets into `task_dict`."""
        return self.task_dict[place.task][place.split][place.number]

    def image(self, visuals: Any) -> Tensor:
        """Return one image as (3,S,S); several, or a video's frames, as (3,F,S,S). InputError for anything else."""
        found = [visual for visual in visuals or [] if visual is not None]
        if not found:
            raise InputError("the document has no image, which the model needs; choose a task with images")
        is_video = len(found) == 1 and isinstance(found[0], str)
        if not is_video and not all(isinstance(visual, Image.Image) for visual in found):
            kinds = ", ".join(dict.fromkeys(type(visual).__name__ for visual in found))
            raise InputError(f"the model reads images, or one video by its path; the document has {kinds}")
        if not is_video and len(found) == 1:
            return self.process_image(found[0])
        if not self.model.takes_video:
            raise InputError(
                f"{type(self.model).__name__} reads one image, and the document has "
                f"{'a video' if is_video else f'{len(found)} images'}: choose a BLIP-2 with a language model"
            )
        return processed(decode(found[0], self.num_frames) if is_video else found, self.process_image)

    # Batches

    def batches(self, queries: Iterable[Query], *, total: int) -> Iterator[list[Query]]:
        """Return batches of queries with equal generation settings and numbers of images, with a progress bar."""
        with tqdm(total=total, desc="lavis_lite", disable=self.rank != 0) as progress:
            for batch in grouped(queries, self.batch_size, lambda query: (query.generation, query.image.shape)):
                yield batch
                progress.update(sum(len(query.indices) for query in batch))

    def samples(self, queries: Sequence[Query]) -> dict[str, Any]:
        """Return the batch as a language model reads it: complete prompts, as the task `instruct` gives them. An image
        of several queries is encoded once.
        """
        images = without_repeats({"image": torch.stack([query.image for query in queries])})
        images = encoded_once(self.model, with_repeats(to_device(images, self._device)))
        return {**images, "text_input": [query.text for query in queries], "prompt": "{}"}

    @torch.no_grad()
    def write(self, queries: Sequence[Query], settings: Mapping[str, Any]) -> list[str]:
        """Return the text that the model writes for each query."""
        model = self.model
        with autocast(self._device, self.dtype):
            samples = self.samples(queries)
            if isinstance(model, ScoresCandidates) and isinstance(model, Generates):
                return model.generate(samples, **settings)
            del samples["prompt"]
            if isinstance(model, Generates):  # writes on after the prompt
                prompts = {} if self.prompt is None else {"prompt": samples["text_input"]}
                return model.generate(samples | prompts, **settings)
            return model.predict_answers(samples, inference_method="generate", **settings)


def load(
    arch: str | None, model_type: str | None, checkpoint: str | None, *, device: torch.device, **overrides: Any
) -> tuple[BaseModel, Processors, Processors]:
    """Return the model in evaluation mode, and its processors of images and texts."""
    if arch is not None and model_type is not None:
        return load_model_and_preprocess(
            arch, model_type, is_eval=True, device=device, checkpoint=checkpoint, **overrides
        )
    if checkpoint is None:
        raise InputError(
            "model_args: name the weights; give arch=...,model_type=... (lavis_lite.model_zoo lists them), "
            "checkpoint=..., or all three"
        )
    loaded = from_pretrained(checkpoint, arch=arch, processors=True, is_eval=True, device=device, **overrides)
    assert isinstance(loaded, tuple), "processors were asked for"
    return loaded


def text_cleaner(name: str | None, model: BaseModel, own: Processors) -> Callable[[str], str]:
    """Return the function that cleans contexts; `own` are the model's text processors."""
    if name is None:
        return str if isinstance(model, Generates) else own["eval"]
    return str if name == "none" else registry.get_processor_class(name).from_config()


def default_prompt(model: BaseModel) -> str | None:
    """Return the template around contexts; None for a model that reads its own prompt instead."""
    if isinstance(model, Blip2LLM):
        return model.prompt if "{}" in model.prompt else "{}"
    if isinstance(model, ScoresCandidates | AnswersQuestions):
        return "{}"
    logger.warning(
        f"{type(model).__name__} captions images and reads no instructions: the tasks' contexts are left out; give "
        "prompt={} to begin captions with them"
    )
    return None


def whole_batch_size(value: int | str) -> int:
    """Return `--batch_size` as a number. InputError for others, such as `auto`."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return check_number("batch_size", number, 1, MAX_BATCH)


def greedy_search(model: object, queries: Sequence[Query]) -> dict[str, Any]:
    """Return the settings of greedy search that can write the longest candidate and its end token.

    A token has at least one byte, so a candidate's bytes limit its tokens, as `max_output_txt_len` does.
    """
    longest = max(len(text.encode()) for query in queries for text in query.candidates)
    most = model.max_output_txt_len if isinstance(model, Blip2LLM) else MAX_TOKENS - 1
    return {
        "num_beams": 1,
        "max_new_tokens": min(longest, most) + 1,
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
    }


def grouped(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Return batches of up to `size` items with equal keys, each as soon as it is full, and the rest at the end."""
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        batch = waiting.setdefault(key(item), [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(key(item))
    yield from waiting.values()


def described(place: Place) -> str:
    """Return a document's name for messages."""
    return f"task {place.task}, {place.split} document {place.number}"


@contextmanager
def naming(where: Place | Sequence[Query]) -> Iterator[None]:
    """Begin an InputError with the task and document, of a batch with its first."""
    try:
        yield
    except InputError as error:
        place = described(where) if isinstance(where, Place) else where[0].where
        raise InputError(f"{place}: {error}") from error
