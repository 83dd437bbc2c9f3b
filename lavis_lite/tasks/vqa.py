"""Visual question answering: rank an answer list or generate, write EvalAI's result file, score with VQA accuracy.

`blank_images` asks the same questions about images of the mean colour: the accuracy that the text alone earns.
Note: `prompt` goes around the question in training too. Models that write one answer (BLIP-2's) learn the sample's
`text_output`, which the dataset draws from its answers; `blip_vqa` learns all of them, weighted.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, HasAnswerList, Samples
from lavis_lite.models.base import BaseModel
from lavis_lite.models.protocols import AnswersQuestions, method_names
from lavis_lite.tasks.base import DECODING_BOUNDS, BaseTask, Metrics, check_settings, naming_setting
from lavis_lite.tasks.metrics.vqa_accuracy import Variant, vqa_metrics
from lavis_lite.tasks.results import Result, as_list, per_sample, unscored, write_json

logger = logging.getLogger(__name__)

SCRIPTS: tuple[Variant, ...] = ("official", "lavis")
"""Published accuracies are of one or the other, so both are printed whatever `run.accuracy` is."""
InferenceMethod = Literal["rank", "generate"]
NUM_NEEDED: dict[Variant, int] = {"official": 4, "lavis": 4, "direct": 3, "ivqa": 2}
"""Answers that a question needs for a prediction to count fully; 1 for other rules."""


@registry.register_task("vqa")
@dataclass(kw_only=True)
class VQATask(BaseTask):
    """Visual question answering; lengths are in tokens. `agg_metrics` is the overall accuracy in percent."""

    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    inference_method: InferenceMethod = "rank"
    num_ans_candidates: int = 128
    """`rank`: answers scored as a whole, after a choice by their first token."""
    length_penalty: float | None = None
    """None leaves it to the model."""
    prompt: str = ""
    """Template of the question, e.g. "Question: {} Answer:", in training too; empty leaves the question as it is."""
    report_metric: bool = True
    """False only writes the result file, for an evaluation server."""
    accuracy: Variant = "official"
    """Which script's text clean-up and rules; see tasks/metrics/vqa_accuracy.py."""
    blank_images: bool = False
    """Replace every image by one of the mean colour."""

    model_methods: ClassVar[tuple[str, ...]] = method_names(AnswersQuestions)
    sample_keys: ClassVar[tuple[str, ...]] = ("question_id", "instance_id")
    bounds: ClassVar = {**DECODING_BOUNDS, "num_ans_candidates": (1, 10**9)}
    choices: ClassVar = {"inference_method": get_args(InferenceMethod), "accuracy": get_args(Variant)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt and "{}" not in self.prompt:
            raise InputError(f"run.prompt={self.prompt!r} has no '{{}}' to put the question into")

    def metric_names(self) -> tuple[str, ...]:
        """Return the accuracy, its tables, and the accuracies of both scripts."""
        return ("overall", "per_question_type", "per_answer_type", *SCRIPTS)

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """As BaseTask's. Raises InputError if two questions of an evaluated split have the same id."""
        built = super().build_datasets(cfg)
        for name, splits in built.items():
            for split in splits.keys() & {*cfg.run.valid_splits, *cfg.run.test_splits}:
                check_ids(splits[split].annotation, f"{name}/{split}")
        return built

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for settings that the model does not take, and for ranking without an answer list."""
        check_settings(model_class, "predict_answers", self.settings(self.batch_context(dataset)))

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError for lengths and answers that the model has no room for."""
        ranks = self.inference_method == "rank"
        setting = "run.inference_method=rank" if ranks else f"run.max_len={self.max_len}"
        for batch in batches:
            samples, settings = self.arguments({**batch, **self.batch_context(dataset)})
            with naming_setting(setting, samples, model):
                model.check_predict_answers(samples, **settings)

    def train_step(self, model: nn.Module, samples: Samples) -> dict[str, Any]:
        """Return the model's output for the questions inside the prompt."""
        return super().train_step(model, self.inside_prompt(samples))

    def inside_prompt(self, samples: Samples) -> Samples:
        """Return the batch with its questions inside `prompt`. InputError if that has further placeholders."""
        if not self.prompt or "prompt" in samples:
            return samples
        if self.prompt.count("{}") > 1:
            raise InputError(
                f"run.prompt={self.prompt!r} has several '{{}}', but there is only the question to put there"
            )
        questions = [self.prompt.replace("{}", text) for text in samples["text_input"]]
        return {**samples, "text_input": questions, "prompt": ["{}"] * len(questions)}

    def batch_context(self, dataset: EvalDataset) -> Samples:
        """Return the dataset's answer list, for ranking. InputError if there is none."""
        if self.inference_method != "rank":
            return {}
        answer_list = dataset.answer_list if isinstance(dataset, HasAnswerList) else None
        if not answer_list:
            raise InputError(
                "run.inference_method 'rank' chooses from an answer list and this dataset has none: add the list to "
                "the split's annotation files, or set run.inference_method: generate"
            )
        return {"answer_list": list(answer_list)}

    def settings(self, samples: Samples) -> dict[str, Any]:
        """Return the settings of `predict_answers`, with the batch's answer list if it has one."""
        settings = self.decoding_settings() | {"inference_method": self.inference_method}
        if samples.get("answer_list") is not None:
            settings |= {"answer_list": samples["answer_list"], "num_ans_candidates": self.num_ans_candidates}
        return settings

    def arguments(self, samples: Samples) -> tuple[Samples, dict[str, Any]]:
        """Return the batch and the settings that a model's `predict_answers` gets."""
        settings = self.settings(samples)
        if self.prompt.count("{}") < 2 or "prompt" in samples:
            return self.inside_prompt(samples), settings
        return samples, {**settings, "prompt": self.prompt}  # the model fills the other placeholder, by OCR tokens say

    def valid_step(self, model: AnswersQuestions, samples: Samples) -> list[Result]:
        """Return `question_id` and `answer` of each sample."""
        if self.blank_images:
            samples = blanked(samples)
        samples, settings = self.arguments(samples)
        answers = model.predict_answers(samples, **settings)
        return per_sample(samples, question_id=as_list(samples["question_id"]), answer=answers)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_vqa.json`; return the accuracy overall and by question and answer type."""
        answers = {result["question_id"]: result["answer"] for result in results}
        entries = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
        write_json(result_dir / f"{split}_vqa{'_blank' if self.blank_images else ''}.json", entries)
        if not self.report_metric:
            return unscored("run.report_metric is false")
        with_answers = {question_id(record): record for record in dataset.annotation if record.get("answers")}
        truths = {key: record for key, record in with_answers.items() if key in answers}
        if not truths:
            return unscored(f"the {split} split has no answers")
        num_needed = NUM_NEEDED.get(self.accuracy, 1)
        num_few = sum(len(truth["answers"]) < num_needed for truth in truths.values())
        if num_few:
            logger.warning(
                f"{split}: {num_few} questions have fewer than {num_needed} answers, so with "
                f"run.accuracy={self.accuracy} a correct prediction cannot reach 100 % (official: a single answer "
                "counts 0): choose normalised"
            )
        return vqa_metrics(truths, answers, variant=self.accuracy) | self.both_scripts(truths, answers)

    def both_scripts(self, truths: Mapping[Any, Record], answers: Mapping[Any, str]) -> Metrics:
        """Return the overall accuracy of each script; of those that `accuracy` does not name, also by answer type."""
        found: Metrics = {}
        for name in SCRIPTS:
            metrics = vqa_metrics(truths, answers, variant=name)
            found[name] = metrics["overall"]
            if name != self.accuracy and "per_answer_type" in metrics:
                found[f"{name}_per_answer_type"] = metrics["per_answer_type"]
        return found


def blanked(samples: Samples) -> Samples:
    """Return the batch with images, or videos, of the mean colour."""
    return {**samples, "image": torch.zeros_like(samples["image"])}


@registry.register_task("gqa")
@dataclass(kw_only=True)
class GQATask(VQATask):
    """Questions with one right answer: the prediction must equal it, both cleaned."""

    accuracy: Variant = "normalised"


@registry.register_task("aok_vqa")
@dataclass(kw_only=True)
class AOKVQATask(VQATask):
    """A-OKVQA's direct answers: min(1, matches/3) of the raw strings; also writes the leaderboard's file."""

    accuracy: Variant = "direct"

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """As VQA, and `<split>_aok_vqa_leaderboard.json`: question id to `{"direct_answer": ...}`."""
        answers = {str(result["question_id"]): {"direct_answer": result["answer"]} for result in results}
        write_json(result_dir / f"{split}_aok_vqa_leaderboard.json", answers)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


@registry.register_task("vizwiz_vqa")
@dataclass(kw_only=True)
class VizWizTask(VQATask):
    """VizWiz, whose question ids are image names; also writes its server's file."""

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """As VQA, and `<split>_vizwiz_submission.json`: [{"image": file name, "answer": ...}]."""
        entries = [{"image": result["question_id"], "answer": result["answer"]} for result in results]
        write_json(result_dir / f"{split}_vizwiz_submission.json", entries)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


def question_id(record: Record) -> Any:
    """Return the question id, or the instance id where there is none."""
    return record.get("question_id", record.get("instance_id"))


def check_ids(annotation: Iterable[Record], where: str) -> None:
    """Raise InputError if two records have the same question id, compared as strings, as in result files."""
    first: dict[str, tuple[int, Record]] = {}
    for index, record in enumerate(annotation):
        other, same = first.setdefault(str(question_id(record)), (index, record))
        if other != index:
            raise InputError(
                f"{where}: records {other} ({_described(same)}) and {index} ({_described(record)}) have the same "
                f"question_id {question_id(record)!r}: answers are kept by it, so each question needs its own"
            )


def _described(record: Record) -> str:
    return f"{record.get('question', record.get('instruction'))!r} of {record.get('image', record.get('video'))}"
