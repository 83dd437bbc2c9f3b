"""BLIP multimodal classification (SNLI-VE and the like), optionally distilled from momentum encoders.

Unlike the other image-grounded models it keeps `[CLS]` as the text's first token. The momentum encoders are updated in
`forward` where gradients are enabled.
"""

import logging
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.errors import SettingError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase, ramp
from lavis_lite.models.blip.nlvr import class_targets, classification_head
from lavis_lite.models.inputs import texts_of
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.losses import soft_cross_entropy
from lavis_lite.nn.momentum import update_momentum
from lavis_lite.nn.vision import ImageEncoder

logger = logging.getLogger(__name__)
MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "cls_head")


@registry.register_model("blip_classification")
class BlipClassification(BlipBase):
    """Classifies (image, text)."""

    takes_video: ClassVar[bool] = False
    reads_encoded: ClassVar[bool] = True
    newly_initialized = ("cls_head.",)
    visual_encoder_m: ImageEncoder
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
        config = self.text_config()
        self.text_encoder = self.adapted(BertModel(config))
        self.cls_head = classification_head(config.hidden_size, num_classes)
        self.use_distill = use_distill
        self.add_momentum_encoders(MOMENTUM_PARTS if use_distill else (), momentum=momentum, alpha=alpha)

    def inputs(self, samples: dict[str, Any], *, answering: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the images, and the texts' ids and mask."""
        image = self.checked_image(samples, answering=answering)
        return image, *self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image` (B,3,H,W), `text_input` list[str], `label` (B,)."""
        inputs = self.inputs(samples)
        logits = classify(self.encode_image, self.text_encoder, self.cls_head, *inputs)
        targets = class_targets(samples, logits)
        loss = F.cross_entropy(logits, targets)
        if self.use_distill:
            alpha = ramp(samples, self.alpha, num_epochs=1)
            soft = self.momentum_logits(*inputs, update=torch.is_grad_enabled()).softmax(dim=1)
            loss = (1 - alpha) * loss + alpha * soft_cross_entropy(logits, soft)

        @torch.no_grad()
        def intermediate_output() -> Output:
            image, *text = inputs
            tokens = self.encode_image(image)
            states = self.text_encoder(*text, context=self.text_encoder.project_kv(tokens))[0]
            return Output(image_embeds=tokens, encoder_output=Output(last_hidden_state=states))

        return Output({"loss": loss, "logits": logits.detach()}).later(intermediate_output=intermediate_output)

    def predict(self, samples: dict[str, Any]) -> Output:
        """Return logits (B,num_classes) and the labels (B,)."""
        inputs = self.inputs(samples, answering=True)
        logits = classify(self.encode_image, self.text_encoder, self.cls_head, *inputs)
        return Output({"predictions": logits, "targets": class_targets(samples, logits)})

    @torch.no_grad()
    def momentum_logits(self, image: Tensor, ids: Tensor, mask: Tensor | None, *, update: bool) -> Tensor:
        """Return the momentum encoders' logits, after updating them (`update`)."""
        if update:
            update_momentum(self.momentum_pairs(), self.momentum)
        return classify(self.visual_encoder_m, self.text_encoder_m, self.cls_head_m, image, ids, mask)

    def frozen_encoder(self) -> nn.Module:
        if self.use_distill:
            problem = "the momentum encoders of model.use_distill read pixels; set that to false, or leave this out"
            raise SettingError("model.cache_features", problem)
        return super().frozen_encoder()

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Initialise the encoder from the decoder's text transformer if the file, as LAVIS's captioning file, has a
        decoder only; LAVIS left it random.
        """
        decoder = {name: tensor for name, tensor in state.items() if name.startswith("text_decoder.bert.")}
        if decoder and not any(name.startswith("text_encoder.") for name in state):
            logger.info("the file holds no text encoder: its decoder's text transformer initialises it")
            state.update({name.replace("decoder.bert", "encoder", 1): tensor for name, tensor in decoder.items()})
        return super().adapt_state_dict(state)


def classify(
    encode: Callable[[Tensor], Tensor],
    text: BertModel,
    head: nn.Module,
    image: Tensor,
    ids: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return logits of the grounded text's first state."""
    return head(text(ids, mask, context=text.project_kv(encode(image)))[0][:, 0])
