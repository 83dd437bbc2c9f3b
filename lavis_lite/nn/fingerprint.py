"""Digests by which weights are told apart."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

SAMPLED = 64
"""Values of a tensor that count in `fingerprint`."""


def fingerprint(model: nn.Module) -> str:
    """Return a short digest that differs if the weights do: of the first values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of weights: their names, types, shapes and bytes, by name. About a second per gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
