"""The package's errors: a deliberate one derives from `UserError`, anything else is a bug and keeps its traceback.

A `UserError` is shown as one line by the command line. Its subclasses are also the built-in error that fits, so that
`except ValueError` works as usual.
"""


class UserError(Exception):
    """A mistake that the user can correct: the message says where, what is wrong and what would be right."""


class InputError(UserError, ValueError):
    """A setting, argument, file or record with a wrong value."""


class DamagedFileError(InputError):
    """A file that no longer holds what was written to it: the message says what fails its checksum."""


class AdapterError(InputError):
    """Adapters (LoRA), or their settings, that do not fit the language model."""


class InputTypeError(UserError, TypeError):
    """An argument of the wrong type."""


class MissingInputError(InputError, KeyError):
    """An entry of the samples that a model needs and was not given; `key` names it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownNameError(UserError, KeyError):
    """A name that is not known. Its text is the message itself, not the message's repr as for other KeyErrors."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that is there and must not be replaced."""


class WriteError(UserError, OSError):
    """A file that could not be written; what was there before is intact."""


class FolderInUseError(UserError, BlockingIOError):
    """A job folder that another process writes to; the message has its host and process id."""


class UnreachableError(UserError, ConnectionError):
    """A server that could not be reached, or that ended the transfer."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed; the message has the command that installs it."""


class UnreadableSample(InputError):
    """One sample of a dataset cannot be read (missing, truncated or foreign file); the message names the file.

    The training loader may skip such samples, but only up to `run.max_unreadable_share`.
    """


class NonFiniteLoss(InputError):
    """A loss became nan or infinite; the message has the step, the losses and the learning rate."""


class RankZeroFailed(RuntimeError):
    """Rank 0 failed at something that this rank needs; rank 0 tells the user why, so this rank only ends."""
