"""Captions after a prompt, by models whose decoder reads BERT's tokens: BLIP's captioner and the Q-Former."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.transfer import upload
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import optional_texts
from lavis_lite.models.tokenizers import tokenize, written_texts
from lavis_lite.nn.attention import CrossAttentionKV, KeyValueCache
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, ScoredText, Step, check_prompt, decode

Context = CrossAttentionKV | KeyValueCache
"""The context that a text is decoded after, a row per image."""


class CaptionModel(BaseModel):
    """Writes captions of images, which begin with a prompt."""

    generation: ClassVar[GenerationConfig] = GenerationConfig(num_beams=3, max_length=30, min_length=10)
    prompt: str = ""

    @abstractmethod
    def caption_context(self, image: Tensor) -> Context:
        """Return what captions of the images (B,3,H,W), or videos, are decoded after."""

    @abstractmethod
    def step(self, context: Any) -> Step:
        """Return the decoding step of texts without padding, after a `caption_context`."""

    @torch.no_grad()
    def generate(
        self, samples: dict[str, Any], *unnamed: Any, return_scores: bool = False, **changes: Any
    ) -> list[str | ScoredText]:
        """Return captions of `image` (B,3,H,W), `num_captions` of each in turn, without the prompt.

        `samples["prompt"]`, one text or one per sample, replaces the model's. `changes` replace settings of
        `generation`. With `return_scores` the captions are pairs (text, score); see `Decoded`.
        """
        config = self.decoding(self.generation.changed(*unnamed, **changes), return_scores=return_scores)
        image = self.checked_image(samples, answering=True)
        prompts = optional_texts(samples, "prompt", len(image), self.prompt)
        context = self.caption_context(image)
        captions: dict[int, list[str | ScoredText]] = {}
        for prompt in dict.fromkeys(prompts):  # texts of a batch must not be padded
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            own = context if len(rows) == len(prompts) else context.select(upload(torch.tensor(rows), self.device))
            written = self._continuations(prompt, own, len(rows), config)
            each = len(written) // len(rows)
            captions |= {row: written[i * each : (i + 1) * each] for i, row in enumerate(rows)}
        return [caption for row in range(len(prompts)) for caption in captions[row]]

    def _continuations(
        self, prompt: str, context: Context, count: int, config: DecodingConfig
    ) -> list[str | ScoredText]:
        ids = tokenize(self.tokenizer, [prompt] * count, start=self.decoder_start)[0][:, :-1]
        decoded = decode(self.step(context), upload(ids, self.device), config)
        return decoded.with_scores(written_texts(self.tokenizer, decoded.ids, ids.shape[1]))

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        config = self.decoding(self.generation.changed(**changes))
        count = len(self.checked_image(samples))
        for prompt in dict.fromkeys(optional_texts(samples, "prompt", count, self.prompt)):
            num_tokens = len(self.tokenizer(prompt).input_ids) - 1
            check_prompt(num_tokens, config.resolved(num_tokens))
