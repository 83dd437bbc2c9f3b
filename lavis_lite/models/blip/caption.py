"""BLIP captioning: an image-grounded decoder (BLIP, section 4.2 and 5.2)."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import check_prompts, generate_continuations
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import image_of, require_labels, text_list, texts_of
from lavis_lite.models.tokenizers import tokenize
from lavis_lite.nn.attention import CrossAttentionKV, KeyValueCache
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.decoding import GenerationConfig, ScoredText, Step
from lavis_lite.nn.losses import IGNORED, language_modeling_loss

logger = logging.getLogger(__name__)


@registry.register_model("blip_caption")
class BlipCaption(BlipBase):
    """Captions an image. Training texts begin with `prompt` (added by the text processor), which is not predicted; a
    text that does not begin with it is predicted as a whole.
    """

    prompt_begins_captions = True
    generation: ClassVar[GenerationConfig] = GenerationConfig(num_beams=3, max_length=30, min_length=10)
    reports_num_labels = True

    def __init__(self, *, prompt: str | None = "a picture of ", max_txt_len: int = 40, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.text_decoder = BertLMHeadModel(self.text_config())
        self.prompt = prompt or ""
        self._warned_of_prompt = False

    def forward(self, samples: dict[str, Any]) -> Output:
        """Language-model loss of `text_input` (list[str], B) given `image` (B,3,H,W)."""
        image = image_of(samples)
        texts = texts_of(samples, len(image))
        ids, mask = tokenize(
            self.tokenizer, texts, start=self.decoder_start, max_length=self.max_txt_len, device=torch.device("cpu")
        )
        labels = self.caption_labels(ids, texts).to(self.device)
        context = self.text_decoder.bert.project_kv(self.visual_encoder(image))
        logits, _ = self.text_decoder(ids.to(self.device), mask.to(self.device), context=context)
        output = training_output(lm=language_modeling_loss(logits, labels))
        output["num_labels"] = (labels[:, 1:] != IGNORED).sum()
        return output

    def caption_labels(self, ids: Tensor, texts: Sequence[str]) -> Tensor:
        """Return labels of the texts' ids (B,T), both on the CPU: `[DEC]` and, where a text begins with it, the prompt
        do not count.

        Warn once if no text of a batch begins with the prompt. Raise InputError if no text has a token to learn, or the
        prompt alone reaches `max_txt_len`.
        """
        num_masked = self.prompt_length(self.prompt)
        if self.prompt and num_masked + 1 >= self.max_txt_len:
            raise InputError(
                f"model.prompt: {self.prompt!r} takes all of max_txt_len={self.max_txt_len} tokens; shorten it"
            )
        prompt = torch.tensor(self.tokenizer(self.prompt).input_ids[1:-1], dtype=ids.dtype)
        begins = torch.zeros(len(ids), dtype=torch.bool)
        if ids.shape[1] > num_masked:
            begins = (ids[:, 1:num_masked] == prompt).all(dim=1)
        if not begins.any() and not self._warned_of_prompt:
            self._warned_of_prompt = True
            logger.warning(
                f"model.prompt: no text of a batch begins with {self.prompt!r}, for instance {texts[0]!r}; whole texts "
                "are learned, and captions are still generated after the prompt. Add it in the text processor "
                '(prompt: "${model.prompt}"), or set model.prompt to ""'
            )
        labels = self.labels(ids, torch.where(begins, num_masked, 1))
        require_labels((labels[:, 1:] != IGNORED).sum(dim=1).tolist(), texts)
        return labels

    def prompt_length(self, prompt: str) -> int:
        """Return the number of tokens of the prompt and `[DEC]`."""
        return len(self.tokenizer(prompt).input_ids) - 1

    def generate(
        self, samples: dict[str, Any], *, return_scores: bool = False, **changes: Any
    ) -> list[str | ScoredText]:
        """Return captions of `image` (B,3,H,W), `num_captions` of each in turn, without the prompt.

        `samples["prompt"]`, one text or one per sample, replaces the model's. `changes` replace settings of
        `generation`. With `return_scores` the captions are pairs (text, score); see `Decoded`.
        """
        config = self.decoding(self.generation.changed(**changes), return_scores=return_scores)
        image = image_of(samples, answering=True)
        prompts = text_list(samples.get("prompt", self.prompt), len(image), "prompt")
        context = self.text_decoder.bert.project_kv(self.visual_encoder(image))

        def step_of(rows: list[int]) -> Step:
            every = len(rows) == len(prompts)
            return self.step(context if every else context.select(torch.tensor(rows, device=self.device)))

        return generate_continuations(prompts, self, step_of, config)

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        prompts = text_list(samples.get("prompt", self.prompt), len(image_of(samples)), "prompt")
        check_prompts(prompts, self, self.decoding(self.generation.changed(**changes)))

    def step(self, context: CrossAttentionKV) -> Step:
        """Return the decoding step given the images."""
        return decoding_step(self.text_decoder, context)


def decoding_step(decoder: BertLMHeadModel, context: CrossAttentionKV) -> Step:
    """Return a function that scores the next token of texts without padding."""

    def step(new_ids: Tensor, cache: KeyValueCache | None, length: int) -> tuple[Tensor, KeyValueCache]:
        mask = new_ids.new_ones(len(new_ids), length)
        logits, cache = decoder(new_ids, mask, context=context, past=cache)
        return logits[:, -1], cache

    return step
