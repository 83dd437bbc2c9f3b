"""BLIP multimodal classification (SNLI-VE and the like), optionally distilled from momentum encoders.

Unlike the other image-grounded models it keeps `[CLS]` as the text's first token. The momentum encoders are updated in
`forward` where gradients are enabled.
"""

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase, ramp
from lavis_lite.models.blip.nlvr import class_targets, classification_head
from lavis_lite.models.inputs import image_of, texts_of
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.losses import soft_cross_entropy
from lavis_lite.nn.momentum import ModulePair, add_momentum_encoders, copy_parameters, momentum_pairs, update_momentum
from lavis_lite.nn.vision import BlipViT

logger = logging.getLogger(__name__)
MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "cls_head")


@registry.register_model("blip_classification")
class BlipClassification(BlipBase):
    """Classifies (image, text)."""

    newly_initialized = ("cls_head.",)
    visual_encoder_m: BlipViT
    text_encoder_m: BertModel
    cls_head_m: nn.Sequential

    def __init__(
        self,
        *,
        num_classes: int,
        use_distill: bool = True,
        momentum: float = 0.995,
        alpha: float = 0.4,
        max_txt_len: int = 40,
        **parts: Any,
    ) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        check_number("model.momentum", momentum, 0.0, 1.0)
        check_number("model.alpha", alpha, 0.0, 1.0)
        config = self.text_config()
        self.text_encoder = BertModel(config)
        self.cls_head = classification_head(config.hidden_size, num_classes)
        self.use_distill, self.momentum, self.alpha = use_distill, momentum, alpha
        add_momentum_encoders(self, MOMENTUM_PARTS if use_distill else ())

    def momentum_pairs(self) -> list[ModulePair]:
        """Return the (online, momentum) modules; none without distillation."""
        return momentum_pairs(self, MOMENTUM_PARTS if self.use_distill else ())

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image` (B,3,H,W), `text_input` list[str], `label` (B,)."""
        image = image_of(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        logits = self.logits(image, ids, mask)
        targets = class_targets(samples, logits)
        loss = F.cross_entropy(logits, targets)
        if self.use_distill:
            alpha = ramp(samples, self.alpha, num_epochs=1)
            soft = self.momentum_logits(image, ids, mask, update=torch.is_grad_enabled()).softmax(dim=1)
            loss = (1 - alpha) * loss + alpha * soft_cross_entropy(logits, soft)
        return Output({"loss": loss, "logits": logits.detach()})

    def predict(self, samples: dict[str, Any]) -> Output:
        """Return logits (B,num_classes) and the labels (B,)."""
        image = image_of(samples, answering=True)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        logits = self.logits(image, ids, mask)
        return Output({"predictions": logits, "targets": class_targets(samples, logits)})

    def logits(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B,num_classes)."""
        return classify(self.visual_encoder, self.text_encoder, self.cls_head, image, ids, mask)

    @torch.no_grad()
    def momentum_logits(self, image: Tensor, ids: Tensor, mask: Tensor, *, update: bool) -> Tensor:
        """Return the momentum encoders' logits, after updating them (`update`)."""
        if update:
            update_momentum(self.momentum_pairs(), self.momentum)
        return classify(self.visual_encoder_m, self.text_encoder_m, self.cls_head_m, image, ids, mask)

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Initialise the encoder from the decoder's text transformer if the file, as LAVIS's captioning file, has a
        decoder only; LAVIS left it random.
        """
        state = super().adapt_state_dict(state)
        decoder = {name: tensor for name, tensor in state.items() if name.startswith("text_decoder.bert.")}
        if decoder and not any(name.startswith("text_encoder.") for name in state):
            logger.info("the file holds no text encoder: its decoder's text transformer initialises it")
            state.update(
                {name.replace("text_decoder.bert.", "text_encoder."): tensor for name, tensor in decoder.items()}
            )
        return state

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        if not any(name.startswith("visual_encoder_m.") for name in state):
            copy_parameters(self.momentum_pairs())


def classify(vision: nn.Module, text: BertModel, head: nn.Module, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return logits of the grounded text's first state."""
    return head(text(ids, mask, context=text.project_kv(vision(image)))[0][:, 0])
