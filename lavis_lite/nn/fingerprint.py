"""A digest by which weights are told apart."""

import hashlib

from torch import nn

SAMPLED = 64
"""Values of a tensor that count in `fingerprint`."""


def fingerprint(model: nn.Module) -> str:
    """Return a short digest that differs if the weights do: of the first values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
