"""A CLIP of transformers or open_clip that ranks the captions of an image (BLIP-2, section 3.4).

Both are frozen and read images that are normalised with CLIP's mean and standard deviation, as BLIP's processors do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError
from lavis_lite.common.sources import download, reach
from lavis_lite.common.sources.hub import COPY_CACHE, hub_offline
from lavis_lite.models.inputs import image_of, texts_of
from lavis_lite.models.tokenizers import checked_texts
from lavis_lite.nn.llm_sources import fetch


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """The key `run.ranker`: which CLIP."""

    library: Literal["transformers", "open_clip"] = "transformers"
    model: str = "openai/clip-vit-large-patch14"
    """transformers: a folder or hub id, with weights and tokenizer. open_clip: an architecture, such as `ViT-L-14`."""
    weights: str | None = None
    """open_clip: a file of weights, or the name of published ones of the architecture, such as `openai`."""

    def check(self) -> None:
        """Raise an error, before anything is loaded, for weights that are not named or not there."""
        one_of("run.ranker.library", self.library, ("transformers", "open_clip"))
        if self.library == "transformers":
            if self.weights is not None:
                raise InputError(
                    f"run.ranker.weights: {self.weights}: transformers' are in the folder of run.ranker.model"
                )
            download.local_folder(
                self.model, what="run.ranker.model: folder", give="give a folder of a CLIP or a hub id"
            )
            return
        open_clip = import_open_clip()
        one_of("run.ranker.model", self.model, open_clip.list_models())
        published = open_clip.list_pretrained_tags_by_model(self.model)
        if self.weights is None:
            known = ", ".join(published) or "none is published"
            raise InputError(
                f"run.ranker.weights: missing: open_clip needs a file, or the name of published ones: {known}"
            )
        if self.weights not in published and not Path(self.weights).expanduser().is_file():
            known = ", ".join(published) or "none"
            raise MissingFileError(
                f"run.ranker.weights: no such file: {self.weights}; published of {self.model}: {known}"
            )


def import_open_clip() -> Any:
    """Return the module open_clip. MissingPackageError without it."""
    try:
        import open_clip
    except ImportError as error:
        advice = "pip install 'lavis-lite[clip]'"
        raise MissingPackageError(f"run.ranker.library: open_clip needs open_clip_torch: {advice}") from error
    return open_clip


class ClipRanker(nn.Module):
    """A CLIP as a scorer of pairs: `clip`, the cosine similarity."""

    image_size: int

    def match_scores(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Return `clip` (k*B), float32, for images (B,3,H,W) and k texts of each in a row."""
        image, texts = image_of(samples), checked_texts(texts_of(samples, None))
        each = len(texts) // len(image)
        image_feat, text_feat = (F.normalize(part.float(), dim=-1) for part in self.features(image, texts))
        return {"clip": (image_feat.repeat_interleave(each, dim=0) * text_feat).sum(dim=-1)}

    def features(self, image: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the projected features (B,D) of the images and (k*B,D) of the texts."""
        raise NotImplementedError(f"{type(self).__name__} does not define features")


class TransformersRanker(ClipRanker):
    """A CLIP of transformers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        self.tokenizer = fetch(AutoTokenizer.from_pretrained, source, "run.ranker.model: the tokenizer")
        self.clip = fetch(CLIPModel.from_pretrained, source, "run.ranker.model: the weights")
        self.image_size = self.clip.config.vision_config.image_size

    def features(self, image: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        longest = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens = {key: tokens[key].to(image.device) for key in ("input_ids", "attention_mask")}
        image_out = self.clip.vision_model(pixel_values=image).pooler_output
        return self.clip.visual_projection(image_out), self.clip.text_projection(
            self.clip.text_model(**tokens).pooler_output
        )


class OpenClipRanker(ClipRanker):
    """A CLIP of open_clip."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        open_clip = import_open_clip()
        file = Path(weights).expanduser()
        is_published = not file.is_file()
        problem = reach.hub_problem() if is_published else None
        if download.is_offline() and is_published and "hf_hub" not in open_clip.get_pretrained_cfg(name, weights):
            raise MissingFileError(f"run.ranker.weights: {weights}: {problem}: give a file")
        try:
            with hub_offline(problem is not None):
                source = weights if is_published else str(file)
                self.clip = open_clip.create_model(name, pretrained=source, require_pretrained=True)
                self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if problem:
                reason = f"{reason.partition('. ')[0]}; {problem}: {COPY_CACHE}, or give a file"
            raise MissingFileError(f"run.ranker.weights: {weights} of {name} could not be loaded: {reason}") from error
        size = self.clip.visual.image_size
        self.image_size = size[0] if isinstance(size, tuple | list) else size

    def features(self, image: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(texts).to(image.device)
        return self.clip.encode_image(image), self.clip.encode_text(tokens)


def load_ranker(config: RankerConfig, *, device: str | torch.device = "cpu") -> ClipRanker:
    """Return the CLIP with its weights, in evaluation mode. MissingFileError if they are not to be had."""
    config.check()
    if config.library == "transformers":
        ranker: ClipRanker = TransformersRanker(config.model)
    else:
        ranker = OpenClipRanker(config.model, str(config.weights))
    return ranker.requires_grad_(False).eval().to(device)
