"""Keys and values that grow in place during decoding.

Letters: N rows, H heads, S tokens, D width of a head.
"""

import torch
from torch import Tensor

ROOM = 16
"""Tokens for which memory is made at once; with more, the memory of large language models would be noticed."""


class Growing:
    """Keys or values (N,H,S,D) of a text to which tokens are added, without copying the earlier ones each time.

    The tokens that it starts with are taken to be the same in all rows of a sample, so that `select` leaves them.
    """

    def __init__(self, start_NHSD: Tensor) -> None:
        self.memory = start_NHSD
        """With room for more tokens after `length`."""
        self.length = self.num_shared = start_NHSD.shape[2]

    @property
    def tokens(self) -> Tensor:
        """All tokens so far (N,H,S,D), a view of the memory."""
        return self.memory[:, :, : self.length]

    def add(self, new_NHTD: Tensor) -> Tensor:
        """Add tokens and return all of them."""
        num_new = new_NHTD.shape[2]
        tokens = self.lengthened(num_new)
        tokens[:, :, -num_new:] = new_NHTD
        return tokens

    def lengthened(self, num_new: int) -> Tensor:
        """Return all tokens and, after them, `num_new` whose values the caller writes."""
        end = self.length + num_new
        if end > self.memory.shape[2]:
            num_rows, num_heads, _, width = self.memory.shape
            larger = self.memory.new_empty(num_rows, num_heads, end + ROOM, width)
            larger[:, :, : self.length] = self.tokens
            self.memory = larger
        self.length = end
        return self.tokens

    def select(self, index: Tensor) -> None:
        """Put these rows (N,), each of the same sample as the row it replaces, in the rows' place."""
        added = self.memory[:, :, self.num_shared : self.length]
        added.copy_(torch.index_select(added, 0, index.to(added.device)))
