"""Visual question answering: rank an answer list or generate, write EvalAI's result file, score with VQA accuracy.

`blank_images` asks the same questions about images of the mean colour: the accuracy that the text alone earns.
Note: `prompt` goes around the question in training too. Models that write one answer (BLIP-2's) learn the sample's
`text_output`, which the dataset draws from its answers; `blip_vqa` learns all of them, weighted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import TRUTHS, Record, RecordCheck
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import check_unique, place_of, read_json, section
from lavis_lite.datasets.protocols import EvalDataset, HasAnswerList, Samples
from lavis_lite.datasets.readers.questions import answers_of, question_fields
from lavis_lite.models.base import BaseModel
from lavis_lite.models.protocols import AnswersQuestions, ScoresAnswers, method_names
from lavis_lite.models.shared_images import encoded_once
from lavis_lite.tasks.base import (
    DECODING_BOUNDS,
    BaseTask,
    Metrics,
    check_settings,
    named_file,
    naming_setting,
    with_columns,
)
from lavis_lite.tasks.metrics.gqa import GQA_METRICS, gqa_metrics
from lavis_lite.tasks.metrics.vqa_accuracy import RAW, Variant, vqa_accuracy, vqa_metrics
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, as_list, per_sample, positions, split_scores, unscored, write_json

logger = logging.getLogger(__name__)

SCRIPTS: tuple[Variant, ...] = ("official", "lavis")
"""Published accuracies are of one or the other, so both are printed whatever `run.accuracy` is."""
NUM_RANKED = 10
"""Answers per question that `save_scores` writes."""
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
    ques_files: dict[str, str | None] = field(default_factory=dict)
    """Split to an official question file, or URL, whose questions alone are scored."""
    anno_files: dict[str, str | None] = field(default_factory=dict)
    """Split to an official annotation file, or URL, whose answers are scored instead of the dataset's."""
    sample_id_key: str = "question_id"
    """Field of the question id in the dataset's records."""
    save_scores: bool = False
    """Also write each answer's `score` to the result file, and with `rank` the likeliest answers, `ranked`."""
    blank_images: bool = False
    """Replace every image by one of the mean colour."""

    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(AnswersQuestions)
    sample_keys: ClassVar[tuple[str, ...]] = ("question_id", "instance_id")
    bounds: ClassVar = {**DECODING_BOUNDS, "num_ans_candidates": (1, 10**9)}
    choices: ClassVar = {"inference_method": get_args(InferenceMethod), "accuracy": get_args(Variant)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt and "{}" not in self.prompt:
            raise InputError(f"run.prompt={self.prompt!r} has no '{{}}' to put the question into")

    @classmethod
    def lavis_defaults(cls, arch: str | None) -> dict[str, Any]:
        return {"length_penalty": 0.0} if arch in ("blip2_opt", "blip2_vicuna_instruct") else {}

    def metric_names(self) -> tuple[str, ...]:
        """Return the accuracy, its tables, and the accuracies by other rules."""
        return ("overall", "per_question_type", "per_answer_type", *self.further_rules())

    def further_rules(self) -> tuple[Variant, ...]:
        """Return the rules whose accuracy is printed too: of both scripts, and that of the raw strings."""
        return (*SCRIPTS, RAW[self.accuracy]) if self.accuracy in RAW else SCRIPTS

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Build as BaseTask does. Raises InputError if two questions of an evaluated split have the same id."""
        built = super().build_datasets(with_columns(cfg, question_id=self.sample_id_key))
        for name, splits in built.items():
            for split in splits.keys() & {*cfg.run.valid_splits, *cfg.run.test_splits}:
                ids = [{"question_id": question_id(record)} for record in splits[split].annotation]
                check_unique(ids, "question_id", partial(place_of, f"{name}/{split}"))
        return built

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for settings that the model does not take, and for ranking without an answer list."""
        method = "predict_answers"
        if self.save_scores:
            method = "scored_answers"
            if not issubclass(model_class, ScoresAnswers):
                problem = f"needs a model with a method {method}, which {model_class.__name__} lacks; leave it out"
                raise InputError(f"run.save_scores: true {problem}")
        check_settings(model_class, method, self.settings(self.batch_context(dataset)))
        self.records(dataset, split)

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
            raise InputError(f"run.prompt={self.prompt!r} has several '{{}}', for which there is only the question")
        questions = [self.prompt.replace("{}", text) for text in samples["text_input"]]
        return {**samples, "text_input": questions, "prompt": ["{}"] * len(questions)}

    def batch_context(self, dataset: EvalDataset) -> Samples:
        """Return the dataset's answer list, for ranking. InputError if there is none."""
        if self.inference_method != "rank":
            return {}
        if not isinstance(dataset, HasAnswerList) or not dataset.answer_list:
            raise InputError(
                "run.inference_method 'rank' chooses from an answer list and this dataset has none: add the list to "
                "the split's annotation files, or set run.inference_method: generate"
            )
        return {"answer_list": list(dataset.answer_list)}

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
        """Return `question_id` and `answer` of each sample, and with `save_scores` the scores."""
        if self.blank_images:
            samples = blanked(samples)
        samples, settings = self.arguments(encoded_once(model, samples))
        ids = as_list(samples["question_id"])
        if not self.save_scores:
            return per_sample(samples, question_id=ids, answer=model.predict_answers(samples, **settings))
        assert isinstance(model, ScoresAnswers)
        rows = model.scored_answers(samples, **settings)
        ranked = {"ranked": [row[:NUM_RANKED] for row in rows]} if self.inference_method == "rank" else {}
        answers, scores = split_scores([row[0] for row in rows])
        return per_sample(samples, question_id=ids, answer=answers, score=scores, **ranked)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_vqa.json`; return the accuracy overall and by question and answer type."""
        answers = {result["question_id"]: result["answer"] for result in results}
        names = ("question_id", "answer", "score", "ranked")
        unique = {result["question_id"]: result for result in results}
        entries = [{name: result[name] for name in names if name in result} for result in unique.values()]
        write_json(result_dir / f"{split}_vqa{'_blank' if self.blank_images else ''}.json", entries)
        if not self.report_metric:
            return unscored("run.report_metric is false")
        records = self.records(dataset, split)
        truths = {key: record for key, record in records.items() if record.get("answers") and key in answers}
        if not truths:
            return unscored(f"the {split} split has no answers")
        num_needed = NUM_NEEDED.get(self.accuracy, 1)
        if num_few := sum(len(truth["answers"]) < num_needed for truth in truths.values()):
            logger.warning(
                f"{split}: {num_few} questions have fewer than {num_needed} answers, so a correct prediction cannot "
                f"reach 100 % with run.accuracy={self.accuracy} (official: one answer counts 0): choose normalised"
            )
        return vqa_metrics(truths, answers, variant=self.accuracy) | self.by_further_rules(truths, answers)

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return each question's answer with the human answers and its accuracy in percent."""
        index, truths, found = positions(dataset), self.records(dataset, split), []
        for result in results:
            record = dataset.annotation[index[result["instance_id"]]]
            row = of_record(dataset, record | truths.get(question_id(record), {}), result)
            row |= {"input": str(record.get("question", "")), "prediction": result["answer"]}
            if answers := truths.get(question_id(record), {}).get("answers"):
                value = vqa_accuracy(result["answer"], answers, variant=self.accuracy)
                row |= {"references": list(map(str, answers)), "metrics": {"accuracy": 100 * value}}
            found.append(row)
        return found

    def records(self, dataset: EvalDataset, split: str) -> dict[Any, Record]:
        """Return the records to score by question id; with `ques_files` and `anno_files` of the split, their questions
        and answers.

        Raises InputError if such a file lacks a question of the dataset.
        """
        records = {question_id(record): record for record in dataset.annotation}
        questions, answers = (files.get(split) for files in (self.ques_files, self.anno_files))
        if answers:
            truths = official(named_file(f"run.anno_files.{split}", answers), "annotations", split)
            records = {key: record | truth_of(truths, key, answers) for key, record in records.items()}
        if questions:
            asked = official(named_file(f"run.ques_files.{split}", questions), "questions", split)
            records = {key: record for key, record in records.items() if str(key) in asked}
            if not records:
                raise InputError(f"run.ques_files.{split}: {questions} has no question of this split")
        return records

    def by_further_rules(self, truths: Mapping[Any, Record], answers: Mapping[Any, str]) -> Metrics:
        """Return the overall accuracy by each further rule; of those that `accuracy` does not name, also by type."""
        found: Metrics = {}
        for name in self.further_rules():
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
    """Questions with one right answer: the prediction must equal it, both cleaned. Also writes the server's file, and
    measures what else GQA's owners do where the records have their fields.
    """

    accuracy: Variant = "normalised"

    def metric_names(self) -> tuple[str, ...]:
        """Return VQA's metrics and GQA's own."""
        return (*super().metric_names(), *GQA_METRICS)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Score as VQA and by metrics/gqa.py; write `<split>_gqa_submission.json`: [{questionId, prediction}]."""
        answers = {str(result["question_id"]): result["answer"] for result in results}
        entries = [{"questionId": key, "prediction": answer} for key, answer in answers.items()]
        write_json(result_dir / f"{split}_gqa_submission.json", entries)
        metrics = super().score(results, dataset=dataset, split=split, result_dir=result_dir)
        if metrics["agg_metrics"] is None:
            return metrics
        truths = self.records(dataset, split)
        found = {str(key): record for key, record in truths.items() if record.get("answers")}
        records = {key: record for key, record in found.items() if key in answers}
        hits = {
            key: vqa_accuracy(answers[key], record["answers"], variant=self.accuracy) for key, record in records.items()
        }
        return metrics | gqa_metrics(records, answers, hits)


@registry.register_task("aok_vqa")
@dataclass(kw_only=True)
class AOKVQATask(VQATask):
    """A-OKVQA's direct answers: min(1, matches/3) of the raw strings; also writes the leaderboard's file."""

    accuracy: Variant = "direct"

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Score as VQA; write `<split>_aok_vqa_leaderboard.json`: question id to `{"direct_answer": ...}`."""
        answers = {str(result["question_id"]): {"direct_answer": result["answer"]} for result in results}
        write_json(result_dir / f"{split}_aok_vqa_leaderboard.json", answers)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


@registry.register_task("vizwiz_vqa")
@dataclass(kw_only=True)
class VizWizTask(VQATask):
    """VizWiz, whose question ids are image names; also writes its server's file."""

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Score as VQA; write `<split>_vizwiz_submission.json`: [{"image": file name, "answer": ...}]."""
        entries = [{"image": result["question_id"], "answer": result["answer"]} for result in results]
        write_json(result_dir / f"{split}_vizwiz_submission.json", entries)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


def official(path: Path, key: str, split: str) -> dict[str, Record]:
    """Return the records under a key of an official VQA file, `questions` or `annotations`, by question id as text."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected {{"{key}": [...]}}, as the VQA datasets are published')
    fields = question_fields(TRUTHS)
    check = RecordCheck(required=("question_id",), fields=fields)
    return {str(record["question_id"]): record for record in section(content, key, path, check)}


def truth_of(truths: Mapping[str, Record], key: Any, source: str) -> Record:
    """Return the answers and kinds of a question. InputError if it is not among the truths."""
    if str(key) not in truths:
        raise InputError(f"run.anno_files: {source} has no question {key!r}, which the dataset has")
    truth = truths[str(key)]
    kept = {name: truth[name] for name in ("question_type", "answer_type") if name in truth}
    return kept | {"answers": answers_of({"answers": truth.get("answers")})}


def question_id(record: Record) -> Any:
    """Return the question id, or the instance id where there is none."""
    return record.get("question_id", record.get("instance_id"))
