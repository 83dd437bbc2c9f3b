"""BLIP pretraining: image-text contrast, image-text matching and language modelling in one step (BLIP, section 3.2)."""

from typing import Any

import torch

from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import ramp
from lavis_lite.models.blip.momentum import BlipMomentum
from lavis_lite.models.inputs import image_of, texts_of
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.learning import matching_accuracy
from lavis_lite.nn.losses import language_modeling_loss, matching_loss


@registry.register_model("blip_pretrain")
class BlipPretrain(BlipMomentum):
    """Encoder, image-grounded encoder and image-grounded decoder, tied but for the decoder's self-attention.

    `prompt` is a key of LAVIS's YAMLs and, as there, without effect: pretraining predicts whole texts.
    """

    def __init__(self, *, prompt: str = "a picture of ", max_txt_len: int = 30, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.text_decoder = BertLMHeadModel(self.text_config())
        self.text_decoder.share_with_encoder(self.text_encoder)

    def forward(self, samples: dict[str, Any]) -> Output:
        """`image` (B,3,H,W), `text_input` list[str]; the loss is the sum of `loss_itc`, `loss_itm` and `loss_lm`."""
        update = torch.is_grad_enabled()
        image = image_of(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        self.clamp_temperature()
        tokens, image_feat = self.encode_image(image)
        text_feat = self.encode_text(ids, mask)

        twin = self.momentum_features(image, ids, mask, update=update)
        own = torch.arange(len(ids), device=tokens.device)[:, None]
        columns = torch.arange(twin.image_all.shape[1], device=tokens.device)
        hard = (own + twin.start == columns).float()
        alpha = ramp(samples, self.alpha, num_epochs=2)
        loss_itc, metrics = self.contrastive_loss(image_feat, text_feat, twin, hard, alpha)
        if update:
            self.enqueue_features(twin)

        context = self.text_encoder.project_context(tokens)
        pool = self.pool(tokens, ids, mask, twin.image, twin.text)
        positive = own + pool.start == torch.arange(len(pool.ids), device=tokens.device)
        negatives = self.draw_negatives(image_feat, text_feat, pool, positive, floor=1e-4)
        pairs = self.pair_logits(tokens, ids, mask, pool, negatives, context)
        loss_itm = matching_loss(pairs, len(ids))

        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.decoder_start
        logits, _ = self.text_decoder(
            decoder_ids, mask, context=context
        )  # its cross-attention is the encoder's, and so is the context
        loss_lm = language_modeling_loss(logits, self.labels(decoder_ids))
        return Output(
            {
                "loss": loss_itc + loss_itm + loss_lm,
                "loss_itc": loss_itc.detach(),
                "loss_itm": loss_itm.detach(),
                "loss_lm": loss_lm.detach(),
                **metrics,
                "acc_itm": matching_accuracy(pairs, len(ids)),
            }
        )
