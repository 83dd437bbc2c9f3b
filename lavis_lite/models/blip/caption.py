"""BLIP captioning: an image-grounded decoder (BLIP, section 4.2 and 5.2)."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.transfer import upload
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.captions import CaptionModel
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import require_labels, texts_of
from lavis_lite.models.tokenizers import tokenize
from lavis_lite.nn.attention import CrossAttentionKV, KeyValueCache
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.decoding import Step
from lavis_lite.nn.losses import IGNORED, NextTokens, language_modeling_loss

logger = logging.getLogger(__name__)


@registry.register_model("blip_caption")
class BlipCaption(BlipBase, CaptionModel):
    """Captions an image. Training texts begin with `prompt` (added by the text processor), which is not predicted; a
    text that does not begin with it is predicted as a whole.
    """

    prompt_begins_captions = True
    reports_num_labels = True
    reads_encoded: ClassVar[bool] = True

    def __init__(self, *, prompt: str | None = "a picture of ", max_txt_len: int = 40, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.text_decoder = self.adapted(BertLMHeadModel(self.text_config()))
        self.prompt = prompt or ""
        self._warned_of_prompt = False

    def forward(self, samples: dict[str, Any]) -> Output:
        """Language-model loss of `text_input` (list[str], B) given `image` (B,3,H,W) or videos (B,3,F,H,W)."""
        image = self.checked_image(samples)
        texts = texts_of(samples, len(image))
        ids, mask = tokenize(self.tokenizer, texts, start=self.decoder_start, max_length=self.max_txt_len)
        labels = self.caption_labels(ids, texts)
        predicted = NextTokens.of(labels).upload(self.device)
        tokens = self.encode_image(image)
        decoder = self.text_decoder
        context = decoder.bert.project_kv(tokens)
        ids, _ = self.upload_texts(ids, mask)
        states, _ = decoder.bert(ids, None, context=context, causal=True)  # padding comes after all labels
        output = training_output(lm=language_modeling_loss(decoder.cls(predicted.states(states)), predicted.labels))
        output["num_labels"] = upload(torch.tensor(len(predicted.labels)), self.device)
        return output.later(
            intermediate_output=lambda: Output(
                image_embeds=tokens,
                decoder_output=Output(logits=decoder.cls(states)),
                decoder_labels=upload(labels, self.device),
            )
        )

    def caption_labels(self, ids: Tensor, texts: Sequence[str]) -> Tensor:
        """Return labels of the texts' ids (B,T), both on the CPU: `[DEC]` and, where a text begins with it, the prompt
        do not count.

        Warn once if no text of a batch begins with the prompt. Raise InputError if no text has a token to learn, or the
        prompt alone reaches `max_txt_len`.
        """
        prompt = torch.tensor(self.tokenizer(self.prompt).input_ids[1:-1], dtype=ids.dtype)
        num_masked = 1 + len(prompt)
        if self.prompt and num_masked + 1 >= self.max_txt_len:
            raise InputError(f"model.prompt: {self.prompt!r} takes all of max_txt_len={self.max_txt_len}; shorten it")
        begins = torch.zeros(len(ids), dtype=torch.bool)
        if ids.shape[1] > num_masked:
            begins = (ids[:, 1:num_masked] == prompt).all(dim=1)
        if not begins.any() and not self._warned_of_prompt:
            self._warned_of_prompt = True
            logger.warning(
                f"model.prompt: no text of a batch begins with {self.prompt!r}, e.g. {texts[0]!r}; all is learned."
                ' Add it in the text processor (prompt: "${model.prompt}"), or set model.prompt to ""'
            )
        labels = self.labels(ids, torch.where(begins, num_masked, 1))
        require_labels((labels[:, 1:] != IGNORED).sum(dim=1).tolist(), texts)
        return labels

    def caption_context(self, image: Tensor) -> CrossAttentionKV:
        return self.text_decoder.bert.project_kv(self.encode_image(image))

    def step(self, context: CrossAttentionKV) -> Step:
        return decoding_step(self.text_decoder, context)


def decoding_step(decoder: BertLMHeadModel, context: CrossAttentionKV) -> Step:
    """Return a function that scores the next token of texts without padding."""

    def step(new_ids: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        logits, cache = decoder(new_ids, None, context=context, past=cache)
        return logits[:, -1], cache

    return step
