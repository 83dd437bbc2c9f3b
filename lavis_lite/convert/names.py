"""Tables of parameter names in two layouts: prefixes, and what is called otherwise behind a prefix."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Pairs = tuple[tuple[str, str], ...]

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


@dataclass(frozen=True)
class Table:
    """Pairs of prefixes, ours first, and for some of ours the pairs of what stands behind."""

    prefixes: Pairs
    inner: Mapping[str, Pairs] = field(default_factory=dict)

    def to_hf(self, name: str) -> str | None:
        """Hugging Face's name for ours, or None if the table has none."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                return theirs + _replaced(name.removeprefix(ours), self.inner.get(ours, ()))
        return None

    def from_hf(self, name: str) -> str | None:
        """Our name for Hugging Face's, or None if the table has none."""
        for ours, theirs in self.prefixes:
            if name.startswith(theirs):
                swapped = tuple((new, old) for old, new in self.inner.get(ours, ()))
                return ours + _replaced(name.removeprefix(theirs), swapped)
        return None


def _replaced(text: str, pairs: Pairs) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
