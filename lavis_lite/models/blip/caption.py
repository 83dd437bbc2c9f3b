"""BLIP captioning: an image-grounded decoder (BLIP, section 4.2 and 5.2)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import captions_behind
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.inputs import (
    image_of,
    require_labels,
    text_list,
    texts_of,
)
from lavis_lite.models.tokenizers import tokenize
from lavis_lite.nn.attention import Context
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.decoding import Step
from lavis_lite.nn.losses import IGNORED, language_modeling_loss

logger = logging.getLogger(__name__)


@registry.register_model("blip_caption")
class BlipCaption(BlipBase):
    """Captions an image. Training texts begin with `prompt` (the text processor puts it there), which is not predicted;
    one that does not begin with it is predicted as a whole.
    """

    prompt_begins_captions = True
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
        settings = {"start": self.decoder_start, "max_length": self.max_txt_len, "device": torch.device("cpu")}
        ids, mask = tokenize(self.tokenizer, texts, **settings)
        labels = self.caption_labels(ids, texts).to(self.device)
        context = self.text_decoder.bert.project_context(self.visual_encoder(image))
        logits, _ = self.text_decoder(ids.to(self.device), mask.to(self.device), context=context)
        loss = language_modeling_loss(logits, labels)
        num_labels = (labels[:, 1:] != IGNORED).sum()
        return Output({"loss": loss, "loss_lm": loss.detach(), "num_labels": num_labels})

    def caption_labels(self, ids: Tensor, texts: Sequence[str]) -> Tensor:
        """Labels of the texts' ids (B,T) on the CPU: `[DEC]` and, where a text begins with it, the prompt do not count.

        Warns once if no text of a batch begins with the prompt. Raises ValueError if no text has a token to learn, or
        the prompt leaves no room for one.
        """
        num_masked = self.prompt_length(self.prompt)
        if self.prompt and num_masked + 1 >= self.max_txt_len:
            raise InputError(f"prompt {self.prompt!r} takes all of max_txt_len={self.max_txt_len} tokens: shorten it")
        prompt = torch.tensor(self.tokenizer(self.prompt).input_ids[1:-1], dtype=ids.dtype)
        begins = torch.zeros(len(ids), dtype=torch.bool)
        if ids.shape[1] > num_masked:
            begins = (ids[:, 1:num_masked] == prompt).all(dim=1)
        if not begins.any() and not self._warned_of_prompt:
            self._warned_of_prompt = True
            logger.warning(
                f"no text of a batch begins with model.prompt {self.prompt!r}, for instance {texts[0]!r}: whole texts "
                "are learned, and captions are still generated after the prompt. Put it into the text processor "
                '(prompt: "${model.prompt}"), or set model.prompt to ""'
            )
        labels = self.labels(ids, torch.where(begins, num_masked, 1))
        require_labels((labels[:, 1:] != IGNORED).sum(dim=1).tolist(), texts)
        return labels

    def prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt and `[DEC]`."""
        return len(self.tokenizer(prompt).input_ids) - 1

    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        temperature: float = 1.0,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
    ) -> list[str]:
        """Captions of `image` (B,3,H,W), `num_captions` of each in turn, without the prompt.

        `samples["prompt"]`, one string or one a sample, replaces the model's. Lengths are in tokens and count `[DEC]`
        and the prompt.
        """
        image = image_of(samples, answering=True)
        prompts = text_list(samples.get("prompt", self.prompt), len(image), "prompt")
        config = self.decoding(
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            num_return=num_captions,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
        )
        context = self.text_decoder.bert.project_context(self.visual_encoder(image))

        def step_of(rows: list[int]) -> Step:
            every = len(rows) == len(prompts)
            return self.step(context if every else context.select(torch.tensor(rows, device=self.device)))

        return captions_behind(prompts, self, step_of, config)

    def step(self, context: Context) -> Step:
        """One decoding step given the images."""
        return decoding_step(self.text_decoder, context)


def decoding_step(decoder: BertLMHeadModel, context: Context) -> Step:
    """Score the next token of a text whose every token counts."""

    def step(new_ids: Tensor, cache: Any, length: int) -> tuple[Tensor, Any]:
        mask = new_ids.new_ones(len(new_ids), length)
        logits, cache = decoder(new_ids, mask, context=context, past=cache)
        return logits[:, -1], cache

    return step
