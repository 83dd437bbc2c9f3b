"""A conversation about one image or video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.precision import autocast
from lavis_lite.inference.inputs import VIDEOS, load_image, load_video, one_item
from lavis_lite.inference.loading import Loaded
from lavis_lite.models.blip2.llm import Blip2LLM

MAX_ROUNDS = 1000
NUM_FRAMES = 4
"""Frames of a video, as in InstructBLIP's evaluations of videos."""


class Conversation:
    """Questions about an image, each after the last `num_rounds` questions and answers.

    The models were trained on single questions and on Visual Dialog's rounds ("q: ... a: ..."), so later answers may
    be worse than first ones. `settings` are those of `generate`; `seed` is set before each answer, for sampling.
    """

    def __init__(self, loaded: Loaded, *, num_rounds: int = 3, seed: int | None = None, **settings: Any) -> None:
        if not isinstance(loaded.model, Blip2LLM):
            name = type(loaded.model).__name__
            raise InputError(f"chat: {name} has no language model; choose blip2_t5_instruct, blip2_vicuna_instruct ...")
        check_number("rounds", num_rounds, 0, MAX_ROUNDS)
        self.loaded, self.model = loaded, loaded.model
        self.num_rounds, self.seed, self.settings = num_rounds, seed, settings
        self.rounds: list[tuple[str, str]] = []
        self.image: torch.Tensor | None = None

    def look_at(self, source: str, *, num_frames: int = NUM_FRAMES) -> None:
        """Take another image, or `num_frames` of a video, and begin anew.

        Raises UnreadableSample or MissingFileError and keeps the last one.
        """
        if Path(source).suffix.lower() in VIDEOS:
            image = load_video(source, self.loaded.process_image, num_frames=num_frames)
        else:
            image = load_image(one_item(source), self.loaded.process_image)
        self.image = image[None]
        self.clear()

    def clear(self) -> None:
        """Forget the questions so far."""
        self.rounds = []

    @torch.no_grad()
    def ask(self, question: str) -> str:
        """Return the answer to a question."""
        if self.image is None:
            raise InputError("chat: no image was given yet")
        samples = {"image": self.image.to(self.loaded.device), "prompt": self.prompt(question)}
        if self.seed is not None:
            torch.manual_seed(self.seed)
        with autocast(self.loaded.device, self.loaded.dtype):
            answer = str(self.model.generate(samples, **self.settings)[0]).strip()
        self.rounds.append((question, answer))
        return answer

    def prompt(self, question: str) -> str:
        """Return what the model reads: the question after the rounds before it."""
        kept = self.rounds[len(self.rounds) - self.num_rounds :] if self.num_rounds else []
        if not kept:
            return question
        history = ", ".join(f"q: {asked} a: {answer}" for asked, answer in kept)
        return f"Dialog history: {history}\nQuestion: {question} Short answer:"
