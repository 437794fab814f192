"""What can go wrong, and the exit code of each.

    ClipcliError            1  the run failed
    ├── UsageError          2  wrong use: a bad option, a missing INPUT, an existing output
    │   ├── LabelError      2  a label, prompt or template file is wrong, with file:line
    │   └── VocabularyError 2  no usable BPE vocabulary
    ├── ModelError          1  a checkpoint can't be read
    │   ├── NotPlainClip    1  a checkpoint of another architecture
    │   └── UnsafeFile      1  a file that would execute code
    ├── ClassifierError     1  a classifier file can't be read, or belongs to another model
    ├── EmbeddingsError     1  the same of an embeddings file
    ├── PictureError        3  a picture can't be read, and --strict leaves none out
    ├── StoreError          1  the store can't be used (a newer schema)
    └── OutputError         1  rows can't be written

Messages are one line, lower case, without a final stop: what is wrong, where. `hint` says what to do next.
A picture that can't be read is no error but a `records.Failure`. Nothing here prints or exits.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    FAILED = 1
    USAGE = 2
    SOME_PICTURES_FAILED = 3
    INTERRUPTED = 130


class ClipcliError(Exception):
    """The run failed, for a reason that one line can tell."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ClipcliError):
    """The command was called in a way that can't work."""

    exit_code = ExitCode.USAGE


class LabelError(UsageError):
    """A label, description, prompt or template is wrong; the message begins with file:line."""


class VocabularyError(UsageError):
    """The BPE vocabulary is missing, broken, or not the model's."""


class ModelError(ClipcliError):
    """A checkpoint is missing, broken or incomplete."""


class NotPlainClip(ModelError):
    """The checkpoint is of an architecture that clipcli doesn't build."""


class UnsafeFile(ModelError):
    """The file holds more than tensors and would execute code on loading."""


class ClassifierError(ClipcliError):
    """A classifier file is broken, or was built with other weights."""


class EmbeddingsError(ClipcliError):
    """An embeddings file is broken, or was made with other weights."""


class PictureError(ClipcliError):
    """A picture can't be read, and the run was asked to stop then."""

    exit_code = ExitCode.SOME_PICTURES_FAILED


class StoreError(ClipcliError):
    """The store of earlier results can't be used."""


class OutputError(ClipcliError):
    """Rows can't be written where they should go."""


def cannot_write(
    place: object, error: OSError, again: str = "run it again", elsewhere: str = "choose another place with --output"
) -> OutputError:
    """The error that says why `place` can't be written; the hint is `again` after a full disk, else `elsewhere`."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = f"make room, and {again}" if is_full else elsewhere
    return OutputError(f"{place}: can't be written: {reason(error)}", hint=hint)


@contextmanager
def writing(place: object, again: str = "run it again") -> Iterator[None]:
    """Raise OutputError for an OSError; a closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(place, error, again) from error


def reason(error: OSError) -> str:
    """What the system says is wrong, as our messages have it."""
    return (error.strerror or str(error)).lower()
