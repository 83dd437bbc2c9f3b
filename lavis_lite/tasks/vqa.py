"""Visual question answering: rank an answer list or generate, write EvalAI's result file, score with VQA accuracy.

`blank_images` asks the same questions of mean-coloured images: what is left of the accuracy comes from the text alone.
Surprising: `prompt` goes around the question in training too. Models that write one answer (BLIP-2's) learn the
sample's `text_output`, which the dataset draws from its answers; `blip_vqa` learns all of them, weighted.
"""

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import (
    MOST_BEAMS,
    MOST_TOKENS,
    BaseTask,
    Metrics,
    Samples,
    check_method,
    check_range,
)
from lavis_lite.tasks.metrics.vqa_accuracy import Variant, vqa_metrics
from lavis_lite.tasks.results import (
    Result,
    as_list,
    per_sample,
    write_json,
)

logger = logging.getLogger(__name__)

ANSWER_ARGUMENTS = {
    "num_beams": "num_beams",
    "max_len": "max_len",
    "min_len": "min_len",
    "inference_method": "inference_method",
    "num_ans_candidates": "num_ans_candidates",
    "length_penalty": "length_penalty",
}


@registry.register_task("vqa")
@dataclass(kw_only=True)
class VQATask(BaseTask):
    """Visual question answering; lengths are in tokens. `agg_metrics` is the overall accuracy in percent."""

    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    inference_method: Literal["rank", "generate"] = "rank"
    num_ans_candidates: int = 128
    """`rank`: answers scored as a whole, after a choice by their first token."""
    length_penalty: float | None = None
    """None leaves it to the model."""
    prompt: str = ""
    """What the question is put into, e.g. "Question: {} Answer:", in training too; empty asks it as it is."""
    report_metric: bool = True
    """False only writes the result file, for an evaluation server."""
    accuracy: Variant = "official"
    """Which script's text clean-up and rules; see tasks/metrics/vqa_accuracy.py."""
    blank_images: bool = False
    """Answer with every image blanked to the mean colour."""

    model_methods: ClassVar[tuple[str, ...]] = ("predict_answers",)
    sample_keys: ClassVar[tuple[str, ...]] = ("question_id", "instance_id")

    def __post_init__(self) -> None:
        check_range(
            self,
            num_beams=(1, MOST_BEAMS),
            max_len=(1, MOST_TOKENS),
            min_len=(0, MOST_TOKENS),
            num_ans_candidates=(1, 10**9),
            length_penalty=(-1000.0, 1000.0),
        )
        if self.inference_method not in ("rank", "generate"):
            raise InputError(f"run.inference_method must be 'rank' or 'generate', got {self.inference_method!r}")
        if self.accuracy not in get_args(Variant):
            raise InputError(f"run.accuracy must be one of {', '.join(get_args(Variant))}, got {self.accuracy!r}")
        if self.prompt and "{}" not in self.prompt:
            raise InputError(f"run.prompt={self.prompt!r} has no '{{}}' to put the question into")

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """As BaseTask's. Raises ValueError if questions of an evaluated split share an id: they'd share an answer."""
        built = super().build_datasets(cfg)
        for name, splits in built.items():
            for split in splits.keys() & {*cfg.run.valid_splits, *cfg.run.test_splits}:
                check_ids(splits[split].annotation, f"{name}/{split}")
        return built

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise for settings that the model does not take, and for ranking without an answer list."""
        self.arguments_for(model_class.predict_answers, ANSWER_ARGUMENTS)
        self.batch_context(dataset)

    def check_model(self, model: nn.Module, dataset: Any, batches: Sequence[Samples], *, split: str) -> None:
        """Raise for lengths and answers that the model does not have room for."""
        names = {name: name for name in ("inference_method", "max_len", "min_len")}
        ranks = self.inference_method == "rank"
        setting = "run.inference_method=rank" if ranks else f"run.max_len={self.max_len}"
        for samples in batches:
            samples, asked = self.asked(model, {**samples, **self.batch_context(dataset)})
            check_method(self, model, "predict_answers", samples, names, setting=setting, **asked)

    def train_step(self, model: nn.Module, samples: Samples) -> dict[str, Any]:
        """The model's loss on the questions inside the prompt."""
        return super().train_step(model, self.inside_prompt(samples))

    def inside_prompt(self, samples: Samples) -> Samples:
        """The batch with its questions put into the prompt, which are then complete. ValueError if the prompt has more
        gaps than that.
        """
        if not self.prompt or "prompt" in samples:
            return samples
        if self.prompt.count("{}") > 1:
            raise InputError(
                f"run.prompt={self.prompt!r} has several '{{}}', but there is only the question to put there"
            )
        asked = [self.prompt.replace("{}", text) for text in samples["text_input"]]
        return {**samples, "text_input": asked, "prompt": ["{}"] * len(asked)}

    def batch_context(self, dataset: Any) -> Samples:
        """The dataset's answer list, for ranking. Raises ValueError if there is none."""
        if self.inference_method != "rank":
            return {}
        answer_list = getattr(dataset, "answer_list", None)
        if not answer_list:
            raise InputError(
                "run.inference_method 'rank' chooses from an answer list and this dataset has none: add the list to "
                "the split's annotation files, or set run.inference_method: generate"
            )
        return {"answer_list": list(answer_list)}

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """`question_id` and `answer` of each sample."""
        arguments = self.arguments_for(model.predict_answers, ANSWER_ARGUMENTS)
        if self.blank_images:
            samples = blanked(samples)
        samples, asked = self.asked(model, samples)
        answers = model.predict_answers(samples, **arguments, **asked)
        return per_sample(samples, question_id=as_list(samples["question_id"]), answer=answers)

    def asked(self, model: nn.Module, samples: Samples) -> tuple[Samples, dict[str, Any]]:
        """Return the batch with its questions inside the prompt, unless the model puts them there, and what it is
        asked with: the prompt and the answer list.
        """
        asked = {} if samples.get("answer_list") is None else {"answer_list": samples["answer_list"]}
        if self.prompt and "prompt" not in samples and "prompt" in inspect.signature(model.predict_answers).parameters:
            return samples, {**asked, "prompt": self.prompt}
        return self.inside_prompt(samples), asked

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_vqa.json`; accuracy overall and by question and answer type."""
        answers = {result["question_id"]: result["answer"] for result in results}
        suffix = "vqa_blank" if self.blank_images else "vqa"
        entries = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
        write_json(result_dir / f"{split}_{suffix}.json", entries)
        truths = ground_truth(dataset.annotation)
        asked = {key: truth for key, truth in truths.items() if key in answers}
        if not self.report_metric or not asked:
            why = f"the {split} split has no answers" if self.report_metric else "run.report_metric is false"
            return {"agg_metrics": None, "note": f"{why}: only the result file was written"}
        warn_of_few_answers(asked.values(), self.accuracy, split)
        return vqa_metrics(asked, answers, variant=self.accuracy)


def blanked(samples: Samples) -> Samples:
    """The batch with images, or videos, of the mean colour."""
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

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """As VQA, and `<split>_aok_vqa_leaderboard.json`: question id to `{"direct_answer": ...}`."""
        answers = {str(result["question_id"]): {"direct_answer": result["answer"]} for result in results}
        write_json(result_dir / f"{split}_aok_vqa_leaderboard.json", answers)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


@registry.register_task("vizwiz_vqa")
@dataclass(kw_only=True)
class VizWizTask(VQATask):
    """VizWiz, whose questions are known by their image; also writes its server's file."""

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """As VQA, and `<split>_vizwiz_submission.json`: [{"image": file name, "answer": ...}]."""
        entries = [{"image": result["question_id"], "answer": result["answer"]} for result in results]
        write_json(result_dir / f"{split}_vizwiz_submission.json", entries)
        return super().score(results, dataset=dataset, split=split, result_dir=result_dir)


def id_of(record: dict[str, Any]) -> Any:
    """The question id, the instance id where there is none."""
    return record.get("question_id", record.get("instance_id"))


def check_ids(annotation: Iterable[dict[str, Any]], where: str) -> None:
    """Raise ValueError if two records have the same question id, compared as texts, as result files have them."""
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    for index, record in enumerate(annotation):
        other = first.setdefault(str(id_of(record)), (index, record))
        if other[0] != index:
            asked = " and ".join(f"{number} ({_described(one)})" for number, one in (other, (index, record)))
            raise InputError(
                f"{where}: records {asked} have the same question_id {id_of(record)!r}: answers are kept by it, so "
                "each question needs its own"
            )


def _described(record: dict[str, Any]) -> str:
    asked = record.get("question", record.get("instruction"))
    return f"{asked!r} of {record.get('image', record.get('video'))}"


def warn_of_few_answers(truths: Iterable[dict[str, Any]], accuracy: Variant, split: str) -> None:
    """Warn if the rules ask for more people to agree than answered some question."""
    needed = {"official": 4, "lavis": 4, "direct": 3, "ivqa": 2}.get(accuracy, 1)
    few = sum(len(truth["answers"]) < needed for truth in truths)
    if few:
        logger.warning(
            f"{split}: {few} questions have fewer than {needed} answers, so that with run.accuracy={accuracy} even a "
            "right prediction is not wholly right (official: a single answer counts 0): choose normalised"
        )


def ground_truth(annotation: Iterable[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The annotations that have answers, by question id."""
    return {id_of(record): record for record in annotation if record.get("answers")}
