"""BLIP for Visual Dialog: tell the right answer to a question from wrong ones, given the dialogue, the image and its
caption (BLIP, section 5.4 and figure 5).

The dialog encoder attends to the image's tokens and, after them, the caption's states. As in pretraining, the encoder
of captions and the grounded encoder are one text transformer; the paper does not say whether its two are.

Letters: B samples, C candidates of each, S image tokens, T caption tokens, E width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.image_text import scored, training_output
from lavis_lite.models.inputs import candidate_lists, integers, required, texts_of
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.learning import matching_accuracy
from lavis_lite.nn.losses import matching_loss

TEXTS_PER_STEP = 128
"""Candidates that are scored at once."""


@registry.register_model("blip_visdial")
class BlipVisDial(BlipBase):
    """Scores candidate answers of a dialogue about an image. Of a long dialogue the last `max_txt_len` tokens are
    read, the candidate included.
    """

    reads_encoded: ClassVar[bool] = True
    newly_initialized = ("caption_proj.",)

    def __init__(self, *, max_txt_len: int = 256, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.tokenizer.truncation_side = "left"
        config = self.text_config()
        self.text_encoder = self.adapted(BertModel(config))
        self.itm_head = nn.Linear(config.hidden_size, 2)
        width = self.visual_encoder.width
        self.caption_proj = nn.Identity() if width == config.hidden_size else nn.Linear(config.hidden_size, width)

    def forward(self, samples: dict[str, Any]) -> Output:
        """Matching loss of every candidate, averaged over right and wrong ones alike.

        `image` (B,3,H,W) or videos, `caption` and `text_input` (the dialogue up to the question) list[str],
        `candidates` B lists of one length C, `label` (B,), the index of the right one.
        """
        count = len(self.checked_image(samples))
        dialogs = texts_of(samples, count)
        lists = list_per_sample(required(samples, "candidates", "the answers to tell apart"), count)
        num_candidates = len(lists[0])
        if any(len(own) != num_candidates for own in lists):
            numbers = sorted({len(own) for own in lists})
            raise InputError(f"samples['candidates'] have {numbers} texts; in training all must have the same number")
        context = self.context(samples)
        what = "the index of the right candidate"
        label = integers(samples, "label", count, what, self.device, below=num_candidates)
        logits = self.answer_logits(dialogs, lists, context)
        is_wrong = torch.arange(num_candidates, device=label.device) != label[:, None]
        right_first = logits[is_wrong.flatten().long().argsort(stable=True)]
        metrics = {"acc_itm": matching_accuracy(right_first, len(label))}
        return training_output(metrics, itm=matching_loss(right_first, len(label)))

    def context(self, samples: dict[str, Any]) -> CrossAttentionKV:
        """Return the keys and values of each image's tokens and its caption's states, (B,S+T,E)."""
        image = self.checked_image(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image), "caption"), max_length=self.max_txt_len)
        tokens = self.encode_image(image)
        caption = self.caption_proj(self.text_encoder(ids, mask)[0])
        states = torch.cat([tokens, caption.to(tokens.dtype)], dim=1)
        mask = None if mask is None else torch.cat([mask.new_ones(tokens.shape[:2]), mask], dim=1)
        return self.text_encoder.project_kv(states, mask=mask)

    def answer_logits(self, dialogs: list[str], lists: list[list[str]], context: CrossAttentionKV) -> Tensor:
        """Return logits (BxC,2) of each dialogue with each of its C candidates: wrong, right."""
        texts = [f"{dialog} {answer}" for dialog, own in zip(dialogs, lists, strict=True) for answer in own]
        ids, mask = self.tokenize(texts, start=self.encoder_start, max_length=self.max_txt_len)
        return scored(self.itm_head, self.text_encoder(ids, mask, context=context)[0][:, 0])

    @torch.no_grad()
    def class_losses(self, samples: dict[str, Any], candidates: Any, *, divided: bool = False) -> Tensor:
        """Return the negative log-probability (B,C) that each candidate is right; inf where a sample has fewer than C.

        `candidates` are those of all samples, or a list per sample. Nothing depends on their lengths, so `divided`,
        which language models need, changes nothing.
        """
        count = len(self.checked_image(samples, answering=True))
        lists, dialogs = list_per_sample(candidates, count), texts_of(samples, count)
        context = self.context(samples)
        losses = torch.full((count, max(map(len, lists))), float("inf"), device=self.device)
        for row, own in enumerate(lists):
            one = context.select(torch.tensor([row], device=self.device))
            for start in range(0, len(own), TEXTS_PER_STEP):
                part = own[start : start + TEXTS_PER_STEP]
                logits = self.answer_logits([dialogs[row]], [part], one)
                losses[row, start : start + len(part)] = -logits.float().log_softmax(dim=1)[:, 1]
        return losses

    def text_readers(self, samples: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        return [(key, "tokenizer", self.tokenizer) for key in ("text_input", "caption") if key in samples]


def list_per_sample(candidates: Any, count: int) -> list[list[str]]:
    """Return a list of candidates per sample. InputError as `candidate_lists`."""
    lists = candidate_lists(candidates, count)
    return lists * count if len(lists) == 1 else lists
