"""Weights between LAVIS's layout, which is ours, and Hugging Face's: name tables read both ways, and folders.

`python -m lavis_lite.convert --help` is the command.
"""

from lavis_lite.convert.blip import blip_from_hf, blip_to_hf, is_hf_blip
from lavis_lite.convert.blip2 import blip2_from_hf, blip2_to_hf, is_hf_blip2

__all__ = ["blip2_from_hf", "blip2_to_hf", "blip_from_hf", "blip_to_hf", "is_hf_blip", "is_hf_blip2"]
