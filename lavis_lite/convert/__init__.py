"""Conversion between LAVIS's layout of weights, which is ours, and Hugging Face's: folders, and tables of names.

`python -m lavis_lite.convert --help` is the command. Importing this loads no torch.
"""

from lavis_lite.common.lazy import lazy_names

_BLIP = ("blip_from_hf", "blip_to_hf", "is_hf_blip")
_BLIP2 = ("blip2_from_hf", "blip2_to_hf", "is_hf_blip2")
__all__ = ["blip2_from_hf", "blip2_to_hf", "blip_from_hf", "blip_to_hf", "is_hf_blip", "is_hf_blip2"]
__getattr__ = lazy_names(
    __name__,
    {name: "lavis_lite.models.blip.hf" for name in _BLIP} | {name: "lavis_lite.models.blip2.hf" for name in _BLIP2},
)
