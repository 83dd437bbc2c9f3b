"""Digests by which weights are told apart."""

import hashlib

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


def checksum(model: nn.Module) -> str:
    """Return a short digest of all bytes of the weights and buffers: of the sum of each tensor's words.

    Reads all of the memory once, on the weights' device; does not depend on the number of threads.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().contiguous().reshape(-1)
        ends = values.numel() * values.element_size(), values.storage_offset() * values.element_size()
        words = values.view(torch.uint8 if any(end % 4 for end in ends) else torch.int32)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(words.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()
