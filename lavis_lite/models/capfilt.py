"""CapFilt's models in one: the filter scores texts, the captioner writes them (BLIP, section 3.3), CLIP ranks them
(BLIP-2, section 3.4).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import BaseModel
from lavis_lite.models.clip_ranker import ClipRanker
from lavis_lite.models.inputs import image_of
from lavis_lite.models.loading import build, configured
from lavis_lite.models.protocols import Generates, ScoresPairs


class CapFiltModel(BaseModel):
    """A filter, a captioner that takes images of `image_size`, and a ranker; any may be None, but not all that score.

    It is built by the task `capfilt` of its parts' sections, and is not in the registry.
    """

    def __init__(
        self,
        *,
        filter: BaseModel | None = None,
        captioner: BaseModel | None = None,
        ranker: ClipRanker | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.filter, self.captioner, self.ranker, self.image_size = filter, captioner, ranker, image_size

    def match_scores(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Return the scores of each text: the filter's `itm` and `itc`, the ranker's `clip`."""
        scores: dict[str, Tensor] = {}
        if self.filter is not None:
            assert isinstance(self.filter, ScoresPairs), type(self.filter)
            scores |= self.filter.match_scores(samples)
        if self.ranker is not None:
            image = resized(image_of(samples), self.ranker.image_size)
            scores |= self.ranker.match_scores({**samples, "image": image})
        return scores

    def generate(self, samples: dict[str, Any], **settings: Any) -> list[list[str]]:
        """Return the captioner's texts of each image, without blank ones and repetitions; none without a captioner."""
        image = image_of(samples)
        if self.captioner is None:
            return [[] for _ in image]
        assert isinstance(self.captioner, Generates), type(self.captioner)
        texts = self.captioner.generate({**samples, "image": resized(image, self.image_size)}, **settings)
        each = len(texts) // len(image)
        groups = (texts[start : start + each] for start in range(0, len(texts), each))
        return [without_repetitions(group) for group in groups]

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        if self.captioner is not None:
            self.captioner.check_generate(samples, **changes)


def without_repetitions(texts: Sequence[str]) -> list[str]:
    """Return the texts that are not blank, each once."""
    return list(dict.fromkeys(text for text in texts if text.strip()))


def resized(image: Tensor, size: int | None) -> Tensor:
    """Return images (B,3,H,W) in the height and width of a model that takes others."""
    if size is None or image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)


def check_captioner(section: dict[str, Any], where: str) -> None:
    """Raise InputError, before anything is built, for a section that names no model that writes captions."""
    if not (section.get("arch") and section.get("model_type")):
        raise InputError(f"{where}: needs arch and model_type, as the section `model`; got {section}")
    if not issubclass(registry.get_model_class(section["arch"]), Generates):
        raise InputError(f"{where}.arch: {section['arch']} writes no captions; choose blip_caption, blip2_opt ...")


def load_captioner(section: dict[str, Any], *, device: str | torch.device = "cpu") -> tuple[BaseModel, int | None]:
    """Return the model of a `captioner` section with its weights, and the height and width of its images."""
    named = dict(section)
    arch, model_type, checkpoint = named.pop("arch"), named.pop("model_type"), named.pop("checkpoint", None)
    layers, tree = configured(arch, model_type, checkpoint, named, level=logging.INFO)
    model = build(tree["model"], layers, is_eval=True, device=device, checkpoint=checkpoint)
    return model, model_setting(tree["model"], "image_size")
