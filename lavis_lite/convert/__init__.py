"""Conversion between LAVIS's layout of weights, which is ours, and Hugging Face's: folders, and tables of names.

`python -m lavis_lite.convert --help` is the command.
"""

from lavis_lite.models.blip.hf import blip_from_hf, blip_to_hf, is_hf_blip
from lavis_lite.models.blip2.hf import blip2_from_hf, blip2_to_hf, is_hf_blip2

__all__ = ["blip2_from_hf", "blip2_to_hf", "blip_from_hf", "blip_to_hf", "is_hf_blip", "is_hf_blip2"]
