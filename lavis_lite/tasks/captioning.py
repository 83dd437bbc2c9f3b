"""Captioning: generate, write COCO's result file, and score against the dataset's own references (any ids).

Note: defaults are BLIP's protocol (beam 3, 5-20 tokens, both penalties 1). LAVIS's task silently uses
repetition_penalty 1.15 and length_penalty 0 where a YAML says nothing.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import ID, TEXT, TEXTS, RecordCheck
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import as_list as as_captions
from lavis_lite.datasets.annotations import check_records, read_json, read_records, section
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.protocols import (
    IMAGE_KEYS,
    EvalDataset,
    HasExtraMetrics,
    HasReferences,
    JudgesCaptions,
    Samples,
)
from lavis_lite.models.base import BaseModel
from lavis_lite.models.protocols import Generates, method_names
from lavis_lite.tasks.base import (
    DECODING_BOUNDS,
    BaseTask,
    Metrics,
    check_settings,
    named_file,
    naming_setting,
    with_columns,
)
from lavis_lite.tasks.metrics.caption import DEFAULT_METRICS, KEYS, Tokens, caption_metrics, check_metrics
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, as_list, per_sample, positions, split_scores, unscored, write_json

logger = logging.getLogger(__name__)

NOCAPS_DOMAINS = ("in-domain", "near-domain", "out-domain")


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
    """Captions generated per image; the first one is scored, all are in the result file."""
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
    load_gt_from_file: str | bool = False
    """References in a file of records, a path or URL, instead of the dataset's: each has an id and a caption, or a
    list of captions, under the two keys below."""
    caption_key: str = "caption"
    """Field of the captions, in the file of `load_gt_from_file` if there is one, else in the dataset's records."""
    sample_id_key: str = "image_id"
    """Field of the image id, in the same records."""
    img_ids: list[str | int] = field(default_factory=list)
    """Evaluate only these image ids; empty: all."""
    save_scores: bool = False
    """Also write each caption's `score`, and `scores` of several, to the result file: see `Decoded`."""
    shuffle_images: bool = False
    """Caption the batch's next image in place of each: the score that the language alone earns."""

    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(Generates)
    sample_keys: ClassVar[tuple[str, ...]] = ("image_id", "instance_id")
    bounds: ClassVar = DECODING_BOUNDS
    choices: ClassVar = {"caption_tokens": get_args(Tokens)}
    fractions: ClassVar = frozenset(name for names in KEYS.values() for name in names)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._last_image: dict[str, torch.Tensor] | None = None
        check_metrics(self.metrics)
        if self.load_gt_from_file is True:
            raise InputError("run.load_gt_from_file: true names no file; give the path of the references")
        if self.load_gt_from_file and self.annotation_file is not None:
            raise InputError("run.load_gt_from_file and run.annotation_file both name references: give one of them")
        if self.num_captions > 1 and not self.use_nucleus_sampling and self.num_captions > self.num_beams:
            raise InputError(f"run.num_captions={self.num_captions} needs run.num_beams of at least as many")

    def unresumable(self) -> str | None:
        """As BaseTask's; `shuffle_images` takes the image of the batch before where a batch has one only."""
        return "run.shuffle_images: a batch depends on the one before" if self.shuffle_images else super().unresumable()

    def metric_names(self) -> tuple[str, ...]:
        """Return those of `metrics`, and nocaps' domains."""
        return (*(name for metric in self.metrics for name in KEYS[metric]), *NOCAPS_DOMAINS)

    @classmethod
    def lavis_defaults(cls, arch: str | None) -> dict[str, Any]:
        return {"repetition_penalty": 1.15, "length_penalty": 0.0}

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Build the datasets as BaseTask does, the evaluated splits with the images of `img_ids` only.

        Raises InputError if a split has none of them.
        """
        if not self.load_gt_from_file:
            cfg = with_columns(cfg, caption=self.caption_key, image_id=self.sample_id_key)
        built = super().build_datasets(cfg)
        for name, splits in built.items() if self.img_ids else ():
            for split in splits.keys() & {*cfg.run.valid_splits, *cfg.run.test_splits}:
                keep_images(splits[split], self.img_ids, where=f"{name}/{split}")
        return built

    @property
    def reference_source(self) -> tuple[str, str] | None:
        """The key of the setting that names a file of references, and that file; None without one."""
        if self.annotation_file is not None:
            return "run.annotation_file", self.annotation_file
        return ("run.load_gt_from_file", str(self.load_gt_from_file)) if self.load_gt_from_file else None

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for settings that the model does not take, or references that miss images."""
        check_settings(model_class, "generate", self.generate_settings())
        source = self.reference_source
        references = self.references(dataset) if source is not None and self.report_metric else None
        ids = [record["image_id"] for record in dataset.annotation if record.get("image_id") is not None]
        unknown = [image_id for image_id in ids if references is not None and str(image_id) not in references]
        if unknown and source is not None:
            images = f"{len(unknown):,} of {len(ids):,} images of the {split} split, e.g. image id {unknown[0]!r}"
            raise InputError(f"{source[0]}: {source[1]} has no references for {images}")

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError for lengths that the model has no room for."""
        for samples in map(self.inside_prompt, batches):
            with naming_setting(f"run.max_len={self.max_len}", samples, model):
                model.check_generate(samples, **self.decoding_settings())

    def inside_prompt(self, samples: Samples) -> Samples:
        """Return the batch with `prompt`, unless it has its own, which is a complete instruction."""
        return samples if self.prompt is None else {"prompt": self.prompt, **samples}

    def valid_step(self, model: Generates, samples: Samples) -> list[Result]:
        """Return `image_id` and `caption` of each sample, `score` with `save_scores`, and `captions` and `scores`, all
        of them, if there are several.
        """
        samples = self.inside_prompt(samples)
        if self.shuffle_images:
            samples = {**samples, **self._next_images({key: samples[key] for key in IMAGE_KEYS if key in samples})}
        written: list[Any] = model.generate(samples, **self.generate_settings())
        texts, scores = split_scores(written) if self.save_scores else (written, [])
        ids = as_list(samples["image_id"])
        if len(texts) != len(ids) * self.num_captions:
            raise InputError(f"{type(model).__name__}.generate returned {len(texts)} captions for {len(ids)} images")
        columns = {"image_id": ids}
        for name, values in (("caption", texts), ("score", scores)):
            groups = [values[i : i + self.num_captions] for i in range(0, len(values), self.num_captions)]
            if groups:
                columns[name] = [group[0] for group in groups]
            if groups and self.num_captions > 1:
                columns[f"{name}s"] = groups
        return per_sample(samples, **columns)

    def _next_images(self, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch's images (B,...), and their masks, rolled by one; for a batch of one the last image of the
        batch before.
        """
        previous, self._last_image = self._last_image, {key: value[-1:] for key, value in images.items()}
        if len(images["image"]) > 1:
            return {key: value.roll(1, dims=0) for key, value in images.items()}
        if previous is None:
            raise InputError("run.shuffle_images needs other images in the batch: set run.batch_size_eval above 1")
        return previous

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_captions.json`; return the caption metrics, and the dataset's own if it has any."""
        entries: dict[Any, Result] = {}
        for result in results:
            entry = {key: value for key, value in result.items() if key != "instance_id"}
            entries.setdefault(result["image_id"], entry)
        write_json(result_dir / f"{split}_captions.json", list(entries.values()))
        if not self.report_metric:
            return unscored("run.report_metric is false")
        captions = {image_id: entry["caption"] for image_id, entry in entries.items()}
        extra = dataset.extra_metrics(captions) if isinstance(dataset, HasExtraMetrics) else {}
        references = self.references(dataset)
        if not references:
            return {**unscored(f"the {split} split has no reference captions"), **extra}
        captions = {str(image_id): text for image_id, text in captions.items()}
        scored = {str(image_id): texts for image_id, texts in references.items() if str(image_id) in captions}
        if len(scored) < max(len(references), len(captions)):
            counts = len(scored), len(references), len(captions)
            logger.warning("%s: scoring %d images; %d have references, %d captions", split, *counts)
        if self.reference_source is None:  # captions that a file does not cover are an error of `caption_metrics`
            captions = {image_id: text for image_id, text in captions.items() if image_id in scored}
        scores = caption_metrics(
            scored,
            captions,
            self.metrics,
            tokens=self.caption_tokens,
            join_hyphens=self.join_hyphens,
            groups=self.domains(dataset),
        )
        return {**scores, **extra}

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return each image's caption with its references, the dataset's own metrics and its CIDEr."""
        index, own = positions(dataset), dict[str, Result]()
        for result in results:
            own.setdefault(str(result["image_id"]), result)
        texts = self.references(dataset) if self.report_metric else {}
        references = {str(key): captions for key, captions in texts.items()}
        cider, scored = metrics.get("CIDEr"), [key for key in references if key in own]
        values = dict(zip(scored, cider.scores.tolist(), strict=True)) if isinstance(cider, Mean) else {}
        found = []
        for key, result in own.items():
            caption = result["caption"]
            row = of_record(dataset, dataset.annotation[index[result["instance_id"]]], result)
            own_metrics = dataset.judge(result["image_id"], caption) if isinstance(dataset, JudgesCaptions) else {}
            row |= {"prediction": caption, "references": references.get(key, [])}
            row["metrics"] = own_metrics | ({"CIDEr": values[key]} if key in values else {})
            found.append(row)
        return found

    def references(self, dataset: EvalDataset | None) -> dict[Any, list[str]]:
        """Return the reference captions of each image id, from a file that is named, else from the dataset."""
        if self.reference_source is None:
            return dataset.references() if isinstance(dataset, HasReferences) else {}
        key, source = self.reference_source
        path = named_file(key, source)
        if self.annotation_file is not None:
            return read_references(path)
        return read_captions(path, id_key=self.sample_id_key, caption_key=self.caption_key)

    def domains(self, dataset: EvalDataset) -> dict[Any, str]:
        """Return the domain of each image of nocaps, from the dataset or `annotation_file`: LAVIS's file has none."""
        found = {record["image_id"]: record["domain"] for record in dataset.annotation if record.get("domain")}
        if found or self.annotation_file is None:
            return found
        return read_domains(named_file("run.annotation_file", self.annotation_file))


def keep_images(dataset: BaseDataset, image_ids: Sequence[Any], *, where: str) -> None:
    """Leave out all samples but those of these image ids, which are compared as texts; log ids that are not there.

    Raises InputError if none is there.
    """
    wanted = set(map(str, image_ids))
    kept = [record for record in dataset.annotation if str(record.get("image_id")) in wanted]
    if not kept:
        there = [record.get("image_id") for record in dataset.annotation[:3]]
        raise InputError(f"run.img_ids: {where} has none of these {len(wanted):,} images; its first are {there}")
    if missing := wanted - {str(record["image_id"]) for record in kept}:
        logger.warning(f"run.img_ids: {where} lacks {len(missing):,} of {len(wanted):,} images, e.g. {min(missing)}")
    dataset.annotation = kept


def read_references(path: Path) -> dict[Any, list[str]]:
    """Return the captions of a file in COCO's format by image id, a string. InputError names a wrong record."""
    where = f"run.annotation_file: {path}"
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"run.annotation_file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f'{where} is not {{"annotations": [{{"image_id", "caption"}}, ...]}}')
    check = RecordCheck(required=("image_id", "caption"), fields={"image_id": ID, "caption": TEXT})
    references: dict[Any, list[str]] = {}
    for annotation in section(content, "annotations", where, check):
        references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return references


def read_captions(path: Path, *, id_key: str, caption_key: str) -> dict[Any, list[str]]:
    """Return the captions of a file of records by image id, a string. InputError names a wrong record."""
    check = RecordCheck(required=(id_key, caption_key), fields={id_key: ID, caption_key: TEXTS})
    references: dict[Any, list[str]] = {}
    for record in check_records(read_records(path), check, f"run.load_gt_from_file: {path}"):
        references.setdefault(str(record[id_key]), []).extend(as_captions(record[caption_key]))
    return references


def read_domains(path: Path) -> dict[Any, str]:
    """Return the field `domain` of the file's images, as in nocaps' own file, by image id, of those that have it."""
    images = read_json(path).get("images")
    records = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    return {str(image.get("id")): image["domain"] for image in records if isinstance(image.get("domain"), str)}
