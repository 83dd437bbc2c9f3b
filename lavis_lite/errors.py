"""Errors that cross floors: raised by one part, recognised by another."""


class UnreadableSample(ValueError):
    """One sample of a dataset cannot be read (missing, truncated or foreign file); the message names the file.

    The training loader may skip such samples, but only up to `run.max_unreadable_share`.
    """


class RankZeroFailed(RuntimeError):
    """Rank 0 failed at something that this rank needs; rank 0 tells the user why, so this rank only ends."""


class NonFiniteLoss(ValueError):
    """A loss became nan or infinite; the message has the step, the losses and the learning rate."""
