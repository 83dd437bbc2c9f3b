"""Hugging Face's layout of weights and configuration: the interface of the adapters, and the parts they share.

An adapter belongs to a family of models (`BaseModel.hf`) and is defined beside it, in `blip/hf.py` or `blip2/hf.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from lavis_lite.common.errors import InputError
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.nn.vision import ImageEncoder

Pairs = tuple[tuple[str, str], ...]
"""Pairs of our name and Hugging Face's."""
Classes = dict[str, tuple[str, ...]]
"""transformers' classes, each with the architectures that have the same parts, the default one first."""
M = TypeVar("M", bound=nn.Module)

VISION: Pairs = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
)
VISION_BLOCK: Pairs = (
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
VISION_TO_VIT = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}
DROPOUTS = ("hidden_dropout", "attention_dropout")


@dataclass(frozen=True)
class NameTable:
    """Prefixes of parameter names, and for some of our prefixes the differences in the rest of the name."""

    prefixes: Pairs
    inner: Mapping[str, Pairs] = field(default_factory=dict)

    def to_hf(self, name: str) -> str | None:
        """Return Hugging Face's name for ours, or None if the table has none."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                rest = name.removeprefix(ours)
                for old, new in self.inner.get(ours, ()):
                    rest = rest.replace(old, new)
                return theirs + rest
        return None

    @cached_property
    def inverse(self) -> "NameTable":
        """The table from Hugging Face's names to ours."""
        prefixes = tuple((theirs, ours) for ours, theirs in self.prefixes)
        inner = {theirs: tuple((new, old) for old, new in self.inner.get(ours, ())) for ours, theirs in self.prefixes}
        return NameTable(prefixes, inner)


class HFAdapter(ABC, Generic[M]):
    """Translates the weights, configuration and processors of a family of models to and from Hugging Face's layout."""

    classes: ClassVar[Classes]
    aliases: ClassVar[dict[str, str]] = {}
    """Further classes of transformers that can be read, and the class each of them is written as."""
    encoder: ClassVar[type[ImageEncoder]]
    """The image encoder of transformers' classes."""

    def archs(self, hf_class: str | None) -> tuple[str, ...]:
        """Return the architectures that a class can be read as; empty if the class belongs to another family."""
        return () if hf_class is None else self.classes.get(self.aliases.get(hf_class, hf_class), ())

    def hf_class(self, arch: str, model: M | None = None) -> str:
        """Return transformers' class for an architecture. ValueError if there is none."""
        names = [name for name, archs in self.classes.items() if arch in archs]
        if not names:
            raise InputError(f"transformers has no class for {arch}; it has {', '.join(self.classes)}")
        return names[-1] if model is not None and self.reads_instructions(model) else names[0]

    def default_arch(self, archs: tuple[str, ...], config: Mapping[str, Any]) -> str:
        """Return the architecture for a config.json if none is named."""
        return archs[0]

    def reads_instructions(self, model: M) -> bool:
        """Return whether the model's Q-Former reads the instruction, as InstructBLIP's."""
        return False

    def section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        """Return the `model` section that builds the model of a config.json, with tokenizers and weights from its
        folder.
        """
        name = config["architectures"][0]
        own_class = transformers_class(name).config_class
        config = own_class.from_dict(dict(config)).to_dict()  # adds the defaults that the file leaves out
        vision = config["vision_config"]
        vit = {ours: vision[theirs] for theirs, ours in VISION_TO_VIT.items()}
        vit["mlp_ratio"] = (vision["intermediate_size"] + 0.5) / vision["hidden_size"]  # timm rounds down
        section = {"arch": arch, "checkpoint": str(folder), "image_size": vision["image_size"], "vit": vit}
        if name.endswith("ForImageTextRetrieval"):
            section["embed_dim"] = config["image_text_hidden_size"]
        return section | self.own_section(config, folder, arch=arch)

    @abstractmethod
    def own_section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        """Return the keys of `section` for everything but the image encoder."""

    @abstractmethod
    def config(self, model: M, *, arch: str) -> Any:
        """Return transformers' configuration of a model. ValueError if transformers has no such model."""

    @abstractmethod
    def processor(self, model: M, config: Any) -> Any:
        """Return transformers' processor for the model's images and texts; if it adds an image token to the language
        model's vocabulary, `config` is updated.
        """

    def tokenizers(self, model: M) -> dict[str, Any]:
        """Return the tokenizers beside the processor's, each with the name of its folder."""
        return {}

    @abstractmethod
    def from_hf(self, state: Mapping[str, Tensor], model: M) -> LazyState:
        """Return a state_dict of transformers under the model's names."""

    @abstractmethod
    def to_hf(self, own: Mapping[str, Tensor], model: M, config: Any) -> Mapping[str, Tensor]:
        """Return the model's tensors under transformers' names."""

    def vision_sizes(self, encoder: ImageEncoder) -> dict[str, Any]:
        """Return an image encoder's sizes under transformers' names. ValueError if its class has no such encoder."""
        if type(encoder) is not self.encoder:
            wanted, found = self.encoder.__name__, type(encoder).__name__
            raise InputError(f"transformers' image encoder is {wanted}, the model's {found}: keep it as a .pth file")
        modules: dict[str, Any] = dict(encoder.named_modules())  # timm's have no types
        block = modules["blocks.0"]
        return {
            "hidden_size": encoder.width,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": block.attn.num_heads,
            "image_size": encoder.image_size,
            "patch_size": modules["patch_embed"].patch_size[0],
            "layer_norm_eps": block.norm1.eps,
        }


def transformers_class(name: str) -> Any:
    """Return a class of transformers by name, imported on first use."""
    import transformers

    return getattr(transformers, name)


def read_sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the sizes in a part of a config.json under our names."""
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config and ours not in DROPOUTS}


def write_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the sizes of one of our configurations under transformers' names."""
    return {theirs: vars(config)[ours] for theirs, ours in names.items()}


def image_processor(encoder: ImageEncoder) -> Any:
    """Return transformers' image processor for an encoder's image size."""
    from transformers import BlipImageProcessor

    return BlipImageProcessor(size={"height": encoder.image_size, "width": encoder.image_size})
