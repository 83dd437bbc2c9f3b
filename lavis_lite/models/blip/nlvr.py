"""BLIP for NLVR2: is a statement true of a pair of images? The text attends to both (BLIP, section 5.4)."""

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.inputs import image_of, integers, texts_of
from lavis_lite.nn.bert import BertModel


@registry.register_model("blip_nlvr")
class BlipNLVR(BlipBase):
    """Classifies (image0, image1, statement)."""

    newly_initialized: tuple[str, ...] = ("cls_head.", "merge_layer")

    def __init__(self, *, num_classes: int = 2, **parts: Any) -> None:
        super().__init__(**parts)
        config = self.text_config(num_context_streams=2)
        self.text_encoder = BertModel(config)
        self.cls_head = classification_head(config.hidden_size, num_classes)

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image0`, `image1` (B,3,H,W), `text_input` list[str], `label` (B,)."""
        logits = self.logits(samples)
        return Output({"loss": F.cross_entropy(logits, self.labels(samples, logits)), "logits": logits.detach()})

    def predict(self, samples: dict[str, Any]) -> Output:
        """Logits (B,num_classes) and the labels (B,)."""
        for key in ("image0", "image1"):
            image_of(samples, key, answering=True)
        logits = self.logits(samples)
        return Output({"predictions": logits, "targets": self.labels(samples, logits)})

    def labels(self, samples: dict[str, Any], logits: Tensor) -> Tensor:
        """The class of each pair (B,)."""
        count, num_classes = logits.shape
        return integers(samples, "label", count, "the class of each pair", logits.device, below=num_classes)

    def states(self, samples: dict[str, Any]) -> Tensor:
        """The statement's states (B,T,E), grounded in both images."""
        first, second = (image_of(samples, key) for key in ("image0", "image1"))
        if first.shape != second.shape:
            raise InputError(f"samples['image0'] has shape {tuple(first.shape)}, 'image1' has {tuple(second.shape)}")
        texts = texts_of(samples, len(first))
        tokens = self.visual_encoder(torch.cat([first, second]))
        ids, mask = self.tokenize(texts, start=self.encoder_start)
        return self.text_encoder(ids, mask, context=self.text_encoder.project_context(*tokens.chunk(2)))[0]

    def logits(self, samples: dict[str, Any]) -> Tensor:
        """(B,num_classes)"""
        return self.cls_head(self.states(samples)[:, 0])

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Both streams start as the pretrained cross-attention."""
        state = super().adapt_state_dict(state)
        for name in [name for name in state if ".crossattention." in name]:
            for old, new in ((".self.", ".self{}."), (".output.dense.", ".output.dense{}.")):
                if f".crossattention{old}" in name:
                    tensor = state.pop(name)
                    state.update(
                        {
                            name.replace(f".crossattention{old}", f".crossattention{new.format(i)}"): tensor
                            for i in (0, 1)
                        }
                    )
        return state


def classification_head(width: int, num_classes: int) -> nn.Sequential:
    """BLIP's classifier of a [CLS] state."""
    check_number("model.num_classes", num_classes, 1, MAX_WIDTH)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
