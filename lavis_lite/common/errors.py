"""The package's errors: those of the user derive from `UserError`; anything else is a bug and keeps its traceback.

The command line prints a `UserError` as one line. Each subclass also derives from the built-in error that fits, so
that `except ValueError` works as usual.
"""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, candidates: Iterable[str], *, limit: int = 12) -> str:
    """Return the sentence to append to an error about `name`: its nearest candidates, or else the known ones."""
    known = sorted(candidates)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    if not known:
        return "None is known."
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"Known: {', '.join(known[:limit])}{more}."


class UserError(Exception):
    """A mistake that the user can correct; the message says where, what is wrong and what to do."""


class InputError(UserError, ValueError):
    """A setting, argument, file or record with a wrong value."""


class SettingError(InputError):
    """A setting with a wrong value: `name` is its dotted key, `problem` the rest of the message.

    The configuration puts the file that sets the key in front of the message.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name
        self.problem = problem


class DamagedFileError(InputError):
    """A file whose content fails its checksum, which the message names."""


class AdapterError(InputError):
    """Adapters (LoRA), or settings of theirs, that do not fit the language model."""


class InputTypeError(UserError, TypeError):
    """An argument of the wrong type."""


class MissingInputError(InputError, KeyError):
    """A missing entry of the samples that a model needs; `key` names it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownNameError(UserError, KeyError):
    """An unknown name. `str()` gives the message itself, not its repr as for other KeyErrors."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingFileError(UserError, FileNotFoundError):
    """A missing file or folder."""


class ExistingFileError(UserError, FileExistsError):
    """An existing file or folder that must not be replaced."""


class WriteError(UserError, OSError):
    """A file that could not be written; its previous content is intact."""


class FolderInUseError(UserError, BlockingIOError):
    """A job folder that another process writes to; the message names its host and process id."""


class UnreachableError(UserError, ConnectionError):
    """A server that could not be reached, or that ended the transfer."""


class MissingPackageError(UserError, ImportError):
    """A missing optional package; the message gives the command that installs it."""


class UnreadableSample(InputError):
    """A sample that cannot be read (missing or truncated file, unsupported format); the message names the file.

    Only the training loader may skip such samples, up to `run.max_unreadable_share`.
    """


class NonFiniteLoss(InputError):
    """A loss that is NaN or infinite; the message gives the step, the losses and the learning rate."""


class RankZeroFailed(RuntimeError):
    """Rank 0 failed at something that this rank needs. Rank 0 reports the reason, so this rank ends silently."""
