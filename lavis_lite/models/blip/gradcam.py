"""Grad-CAM of image-text matching with LAVIS's interface; `models/explain.py` has the other models."""

from typing import Any

import torch
from torch import Tensor

from lavis_lite.models.blip.matching import BlipITM
from lavis_lite.models.explain import attention_layers
from lavis_lite.nn.attention_maps import as_grid, grad_cam, recorded_attention


def compute_gradcam(
    model: BlipITM, visual_input: Tensor, text_input: list[str], tokenized_text: Any, block_num: int = 6
) -> tuple[list[Tensor], Tensor]:
    """Return maps for each image (B,3,H,W), and the logits (B,2), as LAVIS's function of this name.

    The maps of an image (2+T-1,h,w) are those of `[ENC]`, the mean over the text's tokens, and of each token after
    `[ENC]`; padding has zeros. `tokenized_text` has the texts' `attention_mask` (B,T); `block_num` counts from 0.
    """
    layer = attention_layers(model)[block_num]
    with recorded_attention(layer) as record, torch.enable_grad():
        logits = model({"image": visual_input, "text_input": text_input}, match_head="itm")
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), record[-1])
    maps = as_grid(grad_cam(record[-1], gradient)).cpu()
    mask = tokenized_text.attention_mask.cpu()[:, : maps.shape[1]]
    maps = maps * mask[:, :, None, None]
    found = []
    for own, length in zip(maps, (mask.sum(dim=1) - 2).tolist(), strict=True):
        mean = own[1 : length + 1].sum(dim=0, keepdim=True) / length
        found.append(torch.cat([own[:1], mean, own[1:]]))
    return found, logits.detach()
