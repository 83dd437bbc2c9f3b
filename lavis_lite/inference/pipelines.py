"""`pipeline(task, model=...)`: captions, answers, matching scores or features of many images.

>>> caption = pipeline("caption", model="blip_caption/base_coco")
>>> caption("photo.jpg")["caption"]
>>> for result in caption(["photos/", "more/*.png"], num_beams=5): ...
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common.bounds import check_number, one_of
from lavis_lite.common.config.zoo import model_zoo
from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.precision import autocast
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.inference.batches import BatchSizer, read_ahead
from lavis_lite.inference.inputs import Item, as_items, load_image
from lavis_lite.inference.loading import Loaded, load
from lavis_lite.models.batches import by_length
from lavis_lite.models.blip.matching import BlipMatching
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.image_text import ImageTextModel, project
from lavis_lite.models.inputs import candidate_texts
from lavis_lite.models.protocols import AnswersQuestions, Generates, ScoresPairs
from lavis_lite.nn.video import visual_summary

logger = logging.getLogger(__name__)
Prediction = dict[str, Any]
QUESTION_PROMPT = "Question: {} Short answer:"
"""The template of questions to a BLIP-2 whose type names none (BLIP-2, section 4.2)."""
TEXTS_PER_STEP = 128
MAX_BATCH = 100_000


@runtime_checkable
class CutsTexts(Protocol):
    """A text processor that reads so many words."""

    max_words: int


class Query(NamedTuple):
    """An image with its text: a question, a prompt, or none."""

    item: Item
    text: str


class Pipeline(ABC):
    """A model that reads images of any form and yields one dictionary per image, in order.

    `batch_size` of None finds one (`BatchSizer`); `num_threads` read images ahead.
    """

    protocol: ClassVar[type]
    """The interface that the model must have."""
    default_model: ClassVar[str]
    examples: ClassVar[str]
    """Architectures that are, for messages."""

    def __init__(self, loaded: Loaded, *, batch_size: int | None = None, num_threads: int = 4) -> None:
        if not isinstance(loaded.model, self.protocol):
            raise self.unable(type(loaded.model))
        if batch_size is not None:
            check_number("batch_size", batch_size, 1, MAX_BATCH)
        self.loaded, self.model = loaded, loaded.model
        self.batch_size, self.num_threads = batch_size, num_threads
        self.has_warned = False

    task: ClassVar[str]

    @classmethod
    def check_model(cls, model: str) -> None:
        """Raise InputError if `model` is an architecture of the zoo that cannot do this: before its weights are loaded,
        which may be gigabytes.
        """
        arch = model.partition("/")[0]
        if arch in model_zoo and not issubclass(kind := registry.get_model_class(arch), cls.protocol):
            raise cls.unable(kind)

    @classmethod
    def unable(cls, kind: type) -> InputError:
        """Return the error about a class of models that cannot do this."""
        return InputError(f"{cls.task}: {kind.__name__} cannot do this; choose a model of {cls.examples}")

    def __call__(self, inputs: Any, *, skip_unreadable: bool = False, **settings: Any) -> Any:
        """Return the result of one image given by itself, or an iterator over the results of several.

        `inputs`: paths, folders, patterns, URLs, tables, PIL images, uint8 arrays (H,W,3) or tensors; see
        `find_items`. With `skip_unreadable` the result of a broken file is `{"image": ..., "error": ...}`.
        """
        items = as_items(inputs)
        is_one = isinstance(inputs, Image.Image | np.ndarray | torch.Tensor) or (
            isinstance(inputs, str | Path) and len(items) == 1 and str(items[0].name) == str(inputs)
        )
        results = self.stream(items, skip_unreadable=skip_unreadable, **settings)
        return next(results) if is_one else results

    def stream(self, items: Sequence[Item], *, skip_unreadable: bool = False, **settings: Any) -> Iterator[Prediction]:
        """Yield the results of items; settings are checked before the first image is read."""
        queries = self.queries(items, settings)
        self.check(settings)
        return self._results(queries, skip_unreadable, settings)

    def _results(
        self, queries: Iterable[Query], skip_unreadable: bool, settings: dict[str, Any]
    ) -> Iterator[Prediction]:
        def read(query: Query) -> Tensor | UnreadableSample:
            try:
                return load_image(query.item, self.loaded.process_image)
            except UnreadableSample as error:
                if not skip_unreadable:
                    raise
                return error

        def apply(batch: Sequence[tuple[Query, Tensor | UnreadableSample]]) -> list[Prediction]:
            whole = [(query, image) for query, image in batch if isinstance(image, Tensor)]
            made = iter(self._predict(whole, settings) if whole else [])
            return [
                self.about(query) | ({"error": str(read)} if isinstance(read, UnreadableSample) else next(made))
                for query, read in batch
            ]

        sizer = BatchSizer(apply, size=self.batch_size, device=self.loaded.device)
        ahead = 4 * (self.batch_size or sizer.size)
        return sizer(read_ahead(queries, read, num_threads=self.num_threads, ahead=ahead))

    @torch.no_grad()
    def _predict(self, batch: Sequence[tuple[Query, Tensor]], settings: dict[str, Any]) -> list[Prediction]:
        image = torch.stack([image for _, image in batch]).to(self.loaded.device)
        with autocast(self.loaded.device, self.loaded.dtype):
            return self.predict(image, [query.text for query, _ in batch], **settings)

    def about(self, query: Query) -> Prediction:
        """Return what names a result, also that of a broken image."""
        return {"image": query.item.name}

    def queries(self, items: Sequence[Item], settings: dict[str, Any]) -> Iterable[Query]:
        """Return the items with their texts; takes the settings that are texts out of `settings`."""
        return [Query(item, "") for item in items]

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """Return texts as the processor cleans them; the first time that one is cut it warns."""
        process = self.loaded.process_text
        if isinstance(process, CutsTexts):
            longest = max((len(text.split()) for text in texts), default=0)
            if longest > process.max_words and not self.has_warned:
                self.has_warned = True
                logger.warning(
                    f"{self.task}: a text has {longest:,} words, of which the first {process.max_words} are read"
                )
        return [process(text) for text in texts]

    def check(self, settings: dict[str, Any]) -> None:  # noqa: B027  # most have nothing to check
        """Raise InputError for settings that `predict` would refuse."""

    @abstractmethod
    def predict(self, *batch: Any, **settings: Any) -> list[Prediction]:
        """Return the results of a batch: images (B,3,S,S), and each one's own text."""


class CaptionPipeline(Pipeline):
    """`caption`, or with `num_captions` above 1 `captions` as well; settings are `GenerationConfig`'s and `prompt`."""

    task = "caption"
    protocol = Generates
    default_model = "blip_caption/base_coco"
    examples = "blip_caption, blip2, blip2_opt, blip2_t5 or their instruct types"

    def queries(self, items: Sequence[Item], settings: dict[str, Any]) -> Iterable[Query]:
        prompts = texts_for(items, settings.get("prompt") or "", "prompt")
        settings["prompt"] = settings.get("prompt") is not None
        return [Query(item, prompt) for item, prompt in zip(items, prompts, strict=True)]

    def predict(
        self, image: Tensor, own_texts: list[str], *, prompt: bool = False, scores: bool = False, **settings: Any
    ) -> list[Prediction]:
        assert isinstance(self.model, Generates)
        samples = {"image": image, **({"prompt": own_texts} if prompt else {})}
        extra = {"return_scores": True} if scores else {}
        written: Sequence[Any] = self.model.generate(samples, **settings, **extra)
        each = len(written) // len(image)
        return [_caption_result(written[i * each : (i + 1) * each], scores) for i in range(len(image))]


def _caption_result(written: Sequence[Any], scores: bool) -> Prediction:
    texts = [text for text, _ in written] if scores else list(written)
    values = [round(float(score), 4) for _, score in written] if scores else []
    result: Prediction = {"caption": texts[0]} | ({"score": values[0]} if scores else {})
    return result if len(texts) == 1 else result | {"captions": texts} | ({"scores": values} if scores else {})


class AskPipeline(Pipeline):
    """`answer` to `question`, one for all images or one per image; generated, or with `answers` chosen from a list."""

    task = "ask"
    protocol = AnswersQuestions
    default_model = "blip_vqa/vqav2"
    examples = "blip_vqa, blip2_opt, blip2_t5 or their instruct types"

    def queries(self, items: Sequence[Item], settings: dict[str, Any]) -> Iterable[Query]:
        question = settings.pop("question", None)
        if question is None:
            raise InputError("question: missing; give one question for all images, or one per image")
        return [Query(item, text) for item, text in zip(items, texts_for(items, question, "question"), strict=True)]

    def about(self, query: Query) -> Prediction:
        return super().about(query) | {"question": query.text}

    def check(self, settings: dict[str, Any]) -> None:
        if settings.get("answers") is not None:
            candidate_texts(settings["answers"], " in answers")

    def predict(
        self,
        image: Tensor,
        own_texts: list[str],
        *,
        answers: list[str] | None = None,
        prompt: str = "",
        **settings: Any,
    ) -> list[Prediction]:
        assert isinstance(self.model, AnswersQuestions)
        prompt = prompt or self.default_prompt()
        how: dict[str, Any] = {"inference_method": "generate" if answers is None else "rank", "prompt": prompt}
        if answers is not None:
            how["answer_list"] = list(answers)
        cleaned = self.cleaned(own_texts)
        found = self.model.predict_answers({"image": image, "text_input": cleaned}, **how, **settings)
        return [{"answer": answer} for answer in found]

    def asked(self, question: str) -> str:
        """Return what the model reads for a question: the cleaned text, in the template of a language model."""
        (cleaned,) = self.cleaned([question])
        if not isinstance(self.model, Blip2LLM):
            return cleaned
        return (self.default_prompt() or self.model.prompt).replace("{}", cleaned)

    def default_prompt(self) -> str:
        """Return the template around questions: the model's own, or BLIP-2's where it has none."""
        model = self.model
        if not isinstance(model, Blip2LLM) or "{}" in model.prompt:
            return ""
        return "{}" if model.qformer_text_input else QUESTION_PROMPT


class MatchPipeline(Pipeline):
    """`scores`: for each of `texts` the matching head's probability `itm` and the cosine similarity `itc`."""

    task = "match"
    protocol = ScoresPairs
    default_model = "blip_image_text_matching/base"
    examples = "blip_image_text_matching, blip_retrieval, blip2_image_text_matching or blip2"

    def check(self, settings: dict[str, Any]) -> None:
        texts = settings.get("texts")
        settings["texts"] = candidate_texts([texts] if isinstance(texts, str) else texts, " in texts")

    def predict(self, image: Tensor, own_texts: list[str], *, texts: Sequence[str]) -> list[Prediction]:
        assert isinstance(self.model, ScoresPairs)
        parts = []
        for start in range(0, len(texts), TEXTS_PER_STEP):
            part = self.cleaned(texts[start : start + TEXTS_PER_STEP])
            scores = self.model.match_scores({"image": image, "text_input": part * len(image)})
            parts.append({name: value.reshape(len(image), len(part)) for name, value in scores.items()})
        found = {name: torch.cat([part[name] for part in parts], dim=1).tolist() for name in parts[0]}
        return [
            {
                "scores": [
                    {"text": text} | {name: rows[i][j] for name, rows in found.items()} for j, text in enumerate(texts)
                ]
            }
            for i in range(len(image))
        ]


FEATURES = ("projected", "states")


class EmbedPipeline(Pipeline):
    """`features` of each image, a float32 array.

    `projected`: as the contrast compares them, of unit length; BLIP's (D,), BLIP-2's (Q,D), one per query. `states`:
    before the projection; BLIP's of the class token (E,), BLIP-2's of the queries (Q,E).
    """

    task = "embed"
    protocol = ImageTextModel
    default_model = "blip_feature_extractor/base"
    examples = "blip_feature_extractor, blip_image_text_matching, blip2_feature_extractor or blip2"

    def check(self, settings: dict[str, Any]) -> None:
        one_of("features", settings.get("features", FEATURES[0]), FEATURES)

    def predict(self, image: Tensor, own_texts: list[str], *, features: str = FEATURES[0]) -> list[Prediction]:
        found = self.image_features(image, features)
        return [{"features": row} for row in found.float().cpu().numpy()]

    def image_features(self, image: Tensor, features: str = FEATURES[0]) -> Tensor:
        """Return features of images, (B,D) or of several queries (B,Q,D)."""
        assert isinstance(self.model, ImageTextModel)
        if features == "projected":
            return self.model.image_features(image)[1]
        states = self.model.image_states(image)
        if isinstance(self.model, BlipMatching):
            return visual_summary(self.model.visual_encoder, states, image)
        return states

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, features: str = FEATURES[0]) -> np.ndarray:
        """Return features of texts, (N,D) or before the projection (N,E), float32."""
        assert isinstance(self.model, ImageTextModel)
        one_of("features", features, FEATURES)
        model, cleaned = self.model, self.cleaned(candidate_texts(list(texts), " in texts"))

        def encode(part: list[str]) -> Tensor:
            states = model.text_states(*model.cut_texts(part))[:, 0]
            return project(model.text_proj, states) if features == "projected" else states

        with autocast(self.loaded.device, self.loaded.dtype):
            return by_length(encode, cleaned, at_once=TEXTS_PER_STEP).float().cpu().numpy()


PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind for kind in (CaptionPipeline, AskPipeline, MatchPipeline, EmbedPipeline)
}


def pipeline(
    task: str,
    model: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    num_threads: int = 4,
    **overrides: Any,
) -> Any:
    """Return the pipeline of a task, `caption`, `ask`, `match` or `embed`, with its model loaded.

    `model`: `architecture/type` of the zoo (`lavis_lite.model_zoo`), whose weights `checkpoint` replaces; a checkpoint
    of train.py; a Hugging Face folder or hub id. `overrides` replace keys of the model section.

    Raises:
        InputError: an unknown task, or a model that cannot do it; and what `load_model` raises.
    """
    if task not in PIPELINES:
        raise InputError(f"task: unknown pipeline {task!r}. {did_you_mean(task, PIPELINES)}")
    kind = PIPELINES[task]
    source = None if checkpoint is None else str(checkpoint)
    kind.check_model(model or kind.default_model)
    loaded = load(model or kind.default_model, checkpoint=source, device=device, precision=precision, **overrides)
    return kind(loaded, batch_size=batch_size, num_threads=num_threads)


def texts_for(items: Sequence[Item], texts: str | Sequence[str], name: str) -> list[str]:
    """Return one text per item: a single text for all, or a list of as many."""
    if isinstance(texts, str):
        return [texts] * len(items)
    found = list(texts)
    if len(found) != len(items):
        raise InputError(f"{name}: {len(found)} texts for {len(items)} images; give one, or one per image")
    return found
