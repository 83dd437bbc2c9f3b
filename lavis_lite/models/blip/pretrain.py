"""BLIP pretraining: image-text contrast, image-text matching and language modelling in one step (BLIP, section 3.2)."""

from typing import Any

import torch
import torch.nn.functional as F

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import ramp
from lavis_lite.models.blip.momentum import BlipMomentum, StepParts
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import image_of, texts_of
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.learning import matching_accuracy
from lavis_lite.nn.losses import language_modeling_loss, matching_loss


@registry.register_model("blip_pretrain")
class BlipPretrain(BlipMomentum):
    """Encoder, image-grounded encoder and image-grounded decoder, which share all but the decoder's self-attention.

    `prompt` is a key of LAVIS's YAMLs and has no effect, as there: pretraining predicts whole texts.
    """

    def __init__(self, *, prompt: str = "a picture of ", max_txt_len: int = 30, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.text_decoder = self.adapted(BertLMHeadModel(self.text_config()))
        self.text_decoder.share_with_encoder(self.text_encoder)

    def forward(self, samples: dict[str, Any]) -> Output:
        """`image` (B,3,H,W) or videos (B,3,F,H,W), `text_input` list[str]; the loss is the sum of `loss_itc`,
        `loss_itm` and `loss_lm`.
        """
        update = torch.is_grad_enabled()
        image = image_of(samples, video=True)
        texts = texts_of(samples, len(image))
        ids, mask, predicted = self.tokenize_to_predict(texts, max_length=self.max_txt_len)
        tokens, image_feat = self.image_features(image)
        text_feat = self.encode_text(ids, mask)

        momentum = self.momentum_features(image, ids, mask, update=update)
        number = torch.arange(len(ids), device=tokens.device) + dist.rank() * len(ids)
        hard = (number[:, None] == self.candidates(number)).float()
        hard = F.pad(hard, (0, momentum.image_all.shape[1] - momentum.num_current))  # nothing queued is a positive
        alpha = ramp(samples, self.alpha, num_epochs=2)
        loss_itc, metrics = self.contrastive_loss(image_feat, text_feat, momentum, hard, alpha)
        if update:
            self.enqueue_features(momentum)

        context = self.project_kv(tokens)
        positive = number[:, None] == self.negative_candidates(number)
        others = (momentum.image, momentum.text)
        negatives = self.draw_negatives(image_feat, text_feat, others, positive, floor=1e-4)
        pairs = self.pair_logits(tokens, (ids, mask), negatives, context)

        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.decoder_start
        decoder = self.text_decoder  # it shares the encoder's cross-attention
        states, _ = decoder.bert(decoder_ids, None, context=context, causal=True)  # padding comes after all labels
        output = training_output(
            {**metrics, "acc_itm": matching_accuracy(pairs, len(ids))},
            itc=loss_itc,
            itm=matching_loss(pairs, len(ids)),
            lm=language_modeling_loss(decoder.cls(predicted.states(states)), predicted.labels),
        )
        parts = StepParts(image, tokens, (ids, mask), (image_feat, text_feat), momentum, hard, alpha, pairs)
        return self.with_parts(
            output,
            parts,
            decoder_output=lambda: Output(logits=decoder.cls(states)),
            decoder_labels=lambda: self.labels(decoder_ids),
        )
