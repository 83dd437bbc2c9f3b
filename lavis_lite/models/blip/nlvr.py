"""BLIP for NLVR2: classify whether a statement is true of a pair of images; the text attends to both (BLIP, section
5.4).
"""

import re
from collections.abc import MutableMapping
from typing import Any, ClassVar

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

SINGLE_STREAM = re.compile(r"\.crossattention\.(self|output\.dense)(?=\.)")
"""Within the names of a single cross-attention's projections, of which the two streams have one each."""


@registry.register_model("blip_nlvr")
class BlipNLVR(BlipBase):
    """Classifies (image0, image1, statement)."""

    takes_video: ClassVar[bool] = False
    newly_initialized = ("cls_head.", "merge_layer")

    def __init__(self, *, num_classes: int = 2, **parts: Any) -> None:
        super().__init__(**parts)
        config = self.text_config(num_context_streams=2)
        self.text_encoder = self.adapted(BertModel(config))
        self.cls_head = classification_head(config.hidden_size, num_classes)

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of `image0`, `image1` (B,3,H,W), `text_input` list[str], `label` (B,)."""
        logits = self.logits(samples)
        output = Output({"loss": F.cross_entropy(logits, class_targets(samples, logits)), "logits": logits.detach()})

        @torch.no_grad()
        def intermediate_output() -> Output:
            tokens = [self.encode_image(image_of(samples, key)) for key in ("image0", "image1")]
            return Output(
                image_embeds=torch.stack(tokens), encoder_output=Output(last_hidden_state=self.states(samples))
            )

        return output.later(intermediate_output=intermediate_output)

    def predict(self, samples: dict[str, Any]) -> Output:
        """Return logits (B,num_classes) and the labels (B,)."""
        for key in ("image0", "image1"):
            image_of(samples, key, answering=True)
        logits = self.logits(samples)
        return Output({"predictions": logits, "targets": class_targets(samples, logits)})

    def states(self, samples: dict[str, Any]) -> Tensor:
        """Return the statement's states (B,T,E), grounded in both images."""
        first, second = (image_of(samples, key) for key in ("image0", "image1"))
        if first.shape != second.shape:
            raise InputError(f"samples['image0'] has shape {tuple(first.shape)}, 'image1' has {tuple(second.shape)}")
        ids, mask = self.tokenize(texts_of(samples, len(first)), start=self.encoder_start)
        tokens = self.encode_image(torch.cat([first, second]))
        context = self.text_encoder.project_kv(*tokens.chunk(2))
        return self.text_encoder(ids, mask, context=context)[0]

    def logits(self, samples: dict[str, Any]) -> Tensor:
        """Return logits (B,num_classes) of the statement's first state."""
        return self.cls_head(self.states(samples)[:, 0])

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Initialise both streams from a file's single cross-attention."""
        for name in [name for name in state if SINGLE_STREAM.search(name)]:
            tensor = state.pop(name)
            state.update({SINGLE_STREAM.sub(rf"\g<0>{i}", name): tensor for i in (0, 1)})
        return super().adapt_state_dict(state)


def classification_head(width: int, num_classes: int) -> nn.Sequential:
    """Build BLIP's classifier of a [CLS] state."""
    check_number("model.num_classes", num_classes, 1, MAX_WIDTH)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))


def class_targets(samples: dict[str, Any], logits: Tensor) -> Tensor:
    """Return `label`, the class of each sample (B,), of which the logits (B,num_classes) are."""
    count, num_classes = logits.shape
    return integers(samples, "label", count, "the class of each sample", logits.device, below=num_classes)
