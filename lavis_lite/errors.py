"""Errors that cross floors: raised by one part, recognised by another."""


class UnreadableSample(ValueError):
    """One sample of a dataset cannot be read (missing, truncated or foreign file); the message names the file.

    The training loader may skip such samples, but only up to `run.max_unreadable_share`.
    """


class NonFiniteLoss(ValueError):
    """A loss became nan or infinite; the message has the step, the losses and the learning rate."""
