"""Classification of images alone by BLIP's image encoder and BLIP's own head, without a text transformer."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.nlvr import class_targets, classification_head
from lavis_lite.models.blip.vision import BlipVision
from lavis_lite.nn.video import visual_summary


@registry.register_model("blip_image_classification")
class BlipImageClassification(BlipVision):
    """Classifies images, or videos, by the state of `[CLS]`. The weights of any BLIP model initialise the encoder."""

    reads_encoded: ClassVar[bool] = True
    learns_answers: ClassVar[bool] = False
    newly_initialized = ("cls_head.",)

    def __init__(self, *, num_classes: int, label_smoothing: float = 0.0, **parts: Any) -> None:
        super().__init__(**parts)
        self.label_smoothing = check_number("model.label_smoothing", label_smoothing, 0.0, 1.0)
        self.cls_head = classification_head(self.visual_encoder.width, num_classes)

    def logits(self, image: Tensor) -> Tensor:
        """Return logits (B,num_classes) of images (B,3,H,W) or videos (B,3,F,H,W)."""
        return self.cls_head(visual_summary(self.visual_encoder, self.encode_image(image), image))

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image` (B,3,H,W), `label` (B,)."""
        logits = self.logits(self.checked_image(samples))
        loss = F.cross_entropy(logits, class_targets(samples, logits), label_smoothing=self.label_smoothing)
        return Output({"loss": loss, "logits": logits.detach()})

    def predict(self, samples: dict[str, Any]) -> Output:
        """Return logits (B,num_classes) and the labels (B,)."""
        logits = self.logits(self.checked_image(samples, answering=True))
        return Output({"predictions": logits, "targets": class_targets(samples, logits)})
