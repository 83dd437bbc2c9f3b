"""Answers to questions about images: the method that BLIP and BLIP-2 share."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.bounds import one_of
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import ranked_answers
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig


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
        method = one_of("inference_method", inference_method or self.inference_method, ("rank", "generate"))
        config = self.answer_decoding(self.answer_generation.changed(*unnamed, **changes))
        self.checked_image(samples, answering=not check_only)
        prompts = self.answer_prompts(samples, prompt)
        answers = ranked_answers(answer_list, num_ans_candidates) if method == "rank" else None
        if check_only:
            self.check_answers(samples, prompts, config, answers)
            return []
        if answers is None:
            return self.finished(samples, self.write_answers(samples, prompts, config))
        order, losses = self.rank_answers(samples, prompts, answers, min(num_ans_candidates, len(answers)))
        best = order.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1)
        return self.finished(samples, [answers[i] for i in best.tolist()])

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
    def write_answers(self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig) -> list[str]:
        """Return generated answers."""

    @abstractmethod
    def rank_answers(
        self, samples: dict[str, Any], prompts: list[str], answers: list[str], k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the indices (B,k) of each question's k answers whose first tokens are likeliest, and their negative
        log-likelihoods (B,k).
        """
