"""Captioning: generate, write COCO's result file, and score against the dataset's own references (any ids).

Surprising: defaults are BLIP's protocol (beam 3, 5-20 tokens, both penalties 1). LAVIS's task silently uses
repetition_penalty 1.15 and length_penalty 0 where a YAML says nothing.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.records import ID, TEXT, RecordCheck
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.tasks.base import (
    MOST_BEAMS,
    MOST_TOKENS,
    BaseTask,
    Metrics,
    Samples,
    check_method,
    check_range,
)
from lavis_lite.tasks.metrics.caption import (
    DEFAULT_METRICS,
    Tokens,
    caption_metrics,
    check_metrics,
)
from lavis_lite.tasks.results import (
    Result,
    as_list,
    per_sample,
    write_json,
)

logger = logging.getLogger(__name__)

GENERATE_ARGUMENTS = {
    "use_nucleus_sampling": "use_nucleus_sampling",
    "num_beams": "num_beams",
    "max_length": "max_len",
    "min_length": "min_len",
    "top_p": "top_p",
    "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
    "length_penalty": "length_penalty",
    "num_captions": "num_captions",
}


@registry.register_task("captioning")
@dataclass(kw_only=True)
class CaptionTask(BaseTask):
    """Image captioning; lengths are in tokens. `agg_metrics` is CIDEr + Bleu_4, as in LAVIS."""

    num_beams: int = 3
    max_len: int = 20
    min_len: int = 5
    use_nucleus_sampling: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    num_captions: int = 1
    """Captions generated for an image; the first one is scored, all are in the result file."""
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    prompt: str | None = None
    """Start of every caption; None leaves it to the model."""
    report_metric: bool = True
    """False only writes the result file, for an evaluation server."""
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    """Of bleu, meteor, rouge, cider, spice. METEOR and SPICE need Java."""
    caption_tokens: Tokens = "auto"
    """How captions are split for scoring: `ptb` (the COCO caption code's words), `characters`, or `auto`: characters
    where most letters of the references are of a language without spaces."""
    join_hyphens: bool = False
    """Score "well - known", as WordPiece writes it, as "well-known" where a reference has that. Published scores of
    BLIP's captions were taken without."""
    annotation_file: str | None = None
    """References in COCO's format, a file or URL, instead of the dataset's."""
    shuffle_images: bool = False
    """Caption the batch's next image in place of each: what is left of the score comes from the language alone."""

    model_methods: ClassVar[tuple[str, ...]] = ("generate",)
    sample_keys: ClassVar[tuple[str, ...]] = ("image_id", "instance_id")

    def __post_init__(self) -> None:
        self._last_image: torch.Tensor | None = None
        check_metrics(self.metrics)
        if self.caption_tokens not in get_args(Tokens):
            raise InputError(
                f"run.caption_tokens must be one of {', '.join(get_args(Tokens))}, got {self.caption_tokens!r}"
            )
        check_range(
            self,
            num_beams=(1, MOST_BEAMS),
            num_captions=(1, MOST_BEAMS),
            max_len=(1, MOST_TOKENS),
            min_len=(0, MOST_TOKENS),
            temperature=(1e-3, 1000),
            top_p=(1e-6, 1),
            length_penalty=(-1000.0, 1000.0),
            repetition_penalty=(1e-3, 1000),
        )
        if self.num_captions > 1 and not self.use_nucleus_sampling and self.num_captions > self.num_beams:
            raise InputError(f"run.num_captions={self.num_captions} needs run.num_beams of at least as many")

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise for decoding settings that the model does not take, and for a file of references that does not fit."""
        self.arguments_for(model_class.generate, GENERATE_ARGUMENTS)
        if self.annotation_file is None or not self.report_metric:
            return
        references = {str(key) for key in self.references(dataset)}
        asked = [record.get("image_id") for record in dataset.annotation]
        alien = [image_id for image_id in asked if image_id is not None and str(image_id) not in references]
        if alien:
            raise InputError(
                f"run.annotation_file: {self.annotation_file} has no references for {len(alien):,} of {len(asked):,} "
                f"images of the {split} split, e.g. image id {alien[0]!r}: name the file of this split"
            )

    def check_model(self, model: nn.Module, dataset: Any, batches: Sequence[Samples], *, split: str) -> None:
        """Raise for lengths that the model does not have room for."""
        names = {"max_length": "max_len", "min_length": "min_len"}
        for samples in map(self.prompted, batches):
            check_method(self, model, "generate", samples, names, setting=f"run.max_len={self.max_len}")

    def prompted(self, samples: Samples) -> Samples:
        """Return the batch with the task's prompt, if it has one."""
        return samples if self.prompt is None else {"prompt": self.prompt, **samples}  # see prompt_order.py

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """`image_id` and `caption` of each sample (and `captions`, all of them, if there are several)."""
        samples = self.prompted(samples)
        if self.shuffle_images:
            samples = {**samples, "image": self.other_images(samples["image"])}
        texts = model.generate(samples, **self.arguments_for(model.generate, GENERATE_ARGUMENTS))
        ids = as_list(samples["image_id"])
        if len(texts) != len(ids) * self.num_captions:
            raise InputError(f"{type(model).__name__}.generate gave {len(texts)} captions for {len(ids)} images")
        groups = [texts[i : i + self.num_captions] for i in range(0, len(texts), self.num_captions)]
        columns = {"image_id": ids, "caption": [group[0] for group in groups]}
        return per_sample(samples, **columns, **({"captions": groups} if self.num_captions > 1 else {}))

    def other_images(self, images: torch.Tensor) -> torch.Tensor:
        """The neighbour of each image (B,...) in its batch; a batch of one gets the last image of the batch before."""
        if len(images) == 1 and self._last_image is None:
            raise InputError("run.shuffle_images needs other images in the batch: set run.batch_size_eval above 1")
        others = images.roll(1, dims=0) if len(images) > 1 else self._last_image
        self._last_image = images[-1:]
        return others

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_captions.json`; caption metrics, and the dataset's `extra_metrics(captions)` if it has any."""
        entries: dict[Any, Result] = {}
        for result in results:
            entry = {key: value for key, value in result.items() if key != "instance_id"}
            entries.setdefault(result["image_id"], entry)
        write_json(result_dir / f"{split}_captions.json", list(entries.values()))
        if not self.report_metric:
            return {"agg_metrics": None, "note": "run.report_metric is false: only the result file was written"}
        captions = {image_id: entry["caption"] for image_id, entry in entries.items()}
        extra = dataset.extra_metrics(captions) if hasattr(dataset, "extra_metrics") else {}
        references = self.references(dataset)
        if not references:
            note = f"the {split} split has no reference captions: only the result file was written"
            return {"agg_metrics": None, "note": note, **extra}
        told = {str(key) for key in captions}
        answered = {key: texts for key, texts in references.items() if str(key) in told}
        if len(answered) < len(references):
            logger.warning("%s: scoring %d of %d images with references", split, len(answered), len(references))
        if self.annotation_file is None:  # a file that knows other images is the wrong one, which is an error
            gold = {str(key) for key in answered}
            known = {key: caption for key, caption in captions.items() if str(key) in gold}
            if len(known) < len(captions):
                logger.warning("%s: %d images have no references", split, len(captions) - len(known))
            captions = known
        options = {"tokens": self.caption_tokens, "join_hyphens": self.join_hyphens}
        return {**caption_metrics(answered, captions, tuple(self.metrics), **options), **extra}

    def references(self, dataset: Any) -> dict[Any, list[str]]:
        """The reference captions of each image id, from `annotation_file` or the dataset."""
        if self.annotation_file is None:
            return dataset.references() if hasattr(dataset, "references") else {}
        path = (
            download.fetch(self.annotation_file)
            if download.is_url(self.annotation_file)
            else (Path(self.annotation_file).expanduser())
        )
        if not path.is_file():
            raise MissingFileError(f"run.annotation_file: no such file: {path}")
        return read_references(path)


def read_references(path: Path) -> dict[Any, list[str]]:
    """The captions of a file in COCO's format, by image id as a text. InputError, with the record, for what is none."""
    expected = '{"annotations": [{"image_id": ..., "caption": "..."}]}'
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"run.annotation_file: {path} is not {expected} ({error})") from error
    if not isinstance(annotations, list) or not all(isinstance(record, dict) for record in annotations):
        raise InputError(f"run.annotation_file: {path} is not {expected}")
    check = RecordCheck(required=("image_id", "caption"), fields={"image_id": ID, "caption": TEXT})
    check(annotations, lambda number: f"run.annotation_file: {path} (annotations): record {number}")
    references: dict[Any, list[str]] = {}
    for annotation in annotations:
        references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return references
