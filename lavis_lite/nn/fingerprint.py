"""Digests by which weights are told apart."""

import hashlib

import torch
from torch import nn

SAMPLED = 64
"""Values of a tensor that count in `fingerprint`."""
COLUMNS = 1024
"""Of the table as which `checksum` reads a tensor's words."""


def fingerprint(model: nn.Module) -> str:
    """Return a short digest that differs if the weights do: of the first values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def checksum(model: nn.Module) -> str:
    """Return a short digest of all bytes of the weights and buffers: of sums of each tensor's words by row and column
    of a table, so that values that change places count too.

    Reads all of the memory twice, on the weights' device; does not depend on the number of threads.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().contiguous().reshape(-1)
        ends = values.numel() * values.element_size(), values.storage_offset() * values.element_size()
        words = values.view(torch.uint8 if any(end % 4 for end in ends) else torch.int32)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in _sums(words):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums of the table's columns, its rows' sums weighted by their numbers, and the words after it."""
    table = words[: words.numel() // COLUMNS * COLUMNS].view(-1, COLUMNS)
    by_row = table.sum(dim=1, dtype=torch.int64)
    weights = torch.arange(1, len(by_row) + 1, device=words.device)
    return table.sum(dim=0, dtype=torch.int64), (by_row * weights).sum(), words[table.numel() :]
