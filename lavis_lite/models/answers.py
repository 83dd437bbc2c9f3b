"""Answers to questions about images: the method that BLIP and BLIP-2 share."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.bounds import one_of
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import ranked_answers
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, ScoredText


class AnswerModel(BaseModel):
    """Answers questions about an image, freely (`generate`) or from a list (`rank`)."""

    answer_generation: ClassVar[GenerationConfig]
    inference_method: ClassVar[str] = "generate"
    """Default of `predict_answers`."""

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        *unnamed: Any,
        inference_method: str | None = None,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        check_only: bool = False,
        **changes: Any,
    ) -> list[str]:
        """Return an answer to each question (`text_input`), which `{}` in `prompt` stands for ("Question: {} Answer:");
        a language model's `prompt` is by default the samples', or else the model's.

        `generate` writes, with `changes` of `answer_generation`. `rank` chooses from `answer_list`: of the
        `num_ans_candidates` answers whose first tokens are likeliest the one that is likeliest as a whole (BLIP's
        protocol). With `check_only` errors are raised and nothing is computed: model and images may be on the meta
        device.
        """
        config = self.answer_decoding(self.answer_generation.changed(*unnamed, **changes))
        self.checked_image(samples, answering=not check_only)
        prompts = self.answer_prompts(samples, prompt)
        answers = self._ranked(inference_method, answer_list, num_ans_candidates)
        if check_only:
            self.check_answers(samples, prompts, config, answers)
            return []
        if answers is None:
            return self.finished(samples, self.write_answers(samples, prompts, config)[0])
        order, losses = self.rank_answers(samples, prompts, answers, min(num_ans_candidates, len(answers)))
        best = order.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1)
        return self.finished(samples, [answers[i] for i in best.tolist()])

    @torch.no_grad()
    def scored_answers(
        self,
        samples: dict[str, Any],
        *,
        inference_method: str | None = None,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        **changes: Any,
    ) -> list[list[ScoredText]]:
        """Return the answers of each question, best first, with their scores; the first is that of `predict_answers`,
        whose settings these are.

        `generate`: one, with the score of `Decoded`. `rank`: the `num_ans_candidates` that were compared as a whole,
        with their log-likelihoods, summed over the tokens.
        """
        config = replace(self.answer_decoding(self.answer_generation.changed(**changes)), return_scores=True)
        self.checked_image(samples, answering=True)
        prompts = self.answer_prompts(samples, prompt)
        answers = self._ranked(inference_method, answer_list, num_ans_candidates)
        if answers is None:
            texts, scores = self.write_answers(samples, prompts, config)
            assert scores is not None
            return [[pair] for pair in zip(self.finished(samples, texts), scores.tolist(), strict=True)]
        order, losses = self.rank_answers(samples, prompts, answers, min(num_ans_candidates, len(answers)))
        losses, places = losses.sort(dim=1, stable=True)
        rows = zip(order.gather(1, places).tolist(), (-losses).tolist(), strict=True)
        named = ((self.finished(samples, [answers[i] for i in row]), scores) for row, scores in rows)
        return [list(zip(texts, scores, strict=True)) for texts, scores in named]

    def _ranked(self, inference_method: str | None, answer_list: Any, num_ans_candidates: int) -> list[str] | None:
        """Return the answers to rank; None if answers are generated."""
        method = one_of("inference_method", inference_method or self.inference_method, ("rank", "generate"))
        return ranked_answers(answer_list, num_ans_candidates) if method == "rank" else None

    def check_predict_answers(self, samples: dict[str, Any], **settings: Any) -> None:
        self.predict_answers(samples, check_only=True, **settings)

    def finished(self, samples: dict[str, Any], answers: list[str]) -> list[str]:
        """Return answers in the form that `predict_answers` returns."""
        return answers

    def answer_decoding(self, generation: GenerationConfig) -> DecodingConfig:
        """Return decoding settings with the model's tokens and positions."""
        return self.decoding(generation)

    @abstractmethod
    def answer_prompts(self, samples: dict[str, Any], prompt: str) -> list[str]:
        """Return the questions inside the prompt."""

    @abstractmethod
    def check_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig, answers: list[str] | None
    ) -> None:
        """Raise InputError for lengths that the model has no room for, of the prompts and the answers to rank."""

    @abstractmethod
    def write_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig
    ) -> tuple[list[str], Tensor | None]:
        """Return generated answers, and with `config.return_scores` their scores (B,), as in `Decoded`."""

    @abstractmethod
    def rank_answers(
        self, samples: dict[str, Any], prompts: list[str], answers: list[str], k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the indices (B,k) of each question's k answers whose first tokens are likeliest, and their negative
        log-likelihoods (B,k).
        """
