"""BLIP multimodal classification (SNLI-VE and the like), optionally distilled from a momentum twin.

Unlike the other image-grounded models it keeps `[CLS]` as the text's first token. The twin moves in `forward` where
gradients are enabled.
"""

import logging
from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase, ramp
from lavis_lite.models.blip.nlvr import classification_head
from lavis_lite.models.inputs import image_of, integers, texts_of
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.losses import soft_cross_entropy
from lavis_lite.nn.momentum import copy_parameters, update_momentum

logger = logging.getLogger(__name__)
TWINS = ("visual_encoder", "text_encoder", "cls_head")


@registry.register_model("blip_classification")
class BlipClassification(BlipBase):
    """Classifies (image, text)."""

    newly_initialized: tuple[str, ...] = ("cls_head.",)

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
        for name in TWINS if use_distill else ():
            self.add_module(f"{name}_m", deepcopy(getattr(self, name)).requires_grad_(False))

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) modules; none without distillation."""
        return [(getattr(self, name), getattr(self, f"{name}_m")) for name in TWINS if self.use_distill]

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image` (B,3,H,W), `text_input` list[str], `label` (B,)."""
        image = image_of(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        logits = self.logits(image, ids, mask)
        label = self.labels(samples, logits)
        loss = F.cross_entropy(logits, label)
        if self.use_distill:
            alpha = ramp(samples, self.alpha, num_epochs=1)
            targets = self.twin_logits(image, ids, mask, update=torch.is_grad_enabled()).softmax(dim=1)
            loss = (1 - alpha) * loss + alpha * soft_cross_entropy(logits, targets)
        return Output({"loss": loss, "logits": logits.detach()})

    def predict(self, samples: dict[str, Any]) -> Output:
        """Logits (B,num_classes) and the labels (B,)."""
        image = image_of(samples, answering=True)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        logits = self.logits(image, ids, mask)
        return Output({"predictions": logits, "targets": self.labels(samples, logits)})

    def labels(self, samples: dict[str, Any], logits: Tensor) -> Tensor:
        """The class of each image (B,)."""
        count, num_classes = logits.shape
        return integers(samples, "label", count, "the class of each image", logits.device, below=num_classes)

    def logits(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,num_classes)"""
        return classify(self.visual_encoder, self.text_encoder, self.cls_head, image, ids, mask)

    @torch.no_grad()
    def twin_logits(self, image: Tensor, ids: Tensor, mask: Tensor, *, update: bool) -> Tensor:
        """The twin's logits, after it moved (`update`)."""
        if update:
            update_momentum(self.twins(), self.momentum)
        return classify(self.visual_encoder_m, self.text_encoder_m, self.cls_head_m, image, ids, mask)

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """A captioning file (LAVIS's choice here) has a decoder only: its text transformer initialises the encoder;
        LAVIS left that random.
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
            copy_parameters(self.twins())


def classify(vision: nn.Module, text: BertModel, head: nn.Module, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits from the grounded text's first state."""
    return head(text(ids, mask, context=text.project_context(vision(image)))[0][:, 0])
