"""The side-car of a row file, `FILE.run.json`: how far a run has come, and the settings that decide its rows.

In: what `rowfile` counts. Out: the same, read back. It is replaced as a whole, after the rows that it counts are on
the disk, so that at any moment it is true of the row file's first `offset` bytes. It touches no rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from clipcli import __version__
from clipcli.errors import UsageError

VERSION = 1
BEGINNING = '{"format": "clipcli run", '
SAVE_EVERY = 1.0  # seconds, but no more than a twentieth of the time is spent on it
EMPTY = blake2b(digest_size=16).hexdigest()


class Span(NamedTuple):
    """Where the row of a failed picture stands; of length 0 where the format leaves it out."""

    input: int  # its place among the inputs
    start: int
    length: int


@dataclass(frozen=True)
class State:
    """How far a run has come: `offset` bytes hold the rows of the first `done` inputs."""

    done: int = 0
    inputs: str = EMPTY  # digest of their paths, in order
    offset: int = 0
    rows: str = EMPTY  # digest of the bytes
    failures: int = 0


@dataclass(frozen=True)
class Saved:
    """A side-car's content."""

    settings: dict[str, Any]  # by the names that a person knows
    state: State
    failed: list[Span]
    pending: bool  # the rows that it counts lie in the temporary file, about to be renamed

    def compare(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raise UsageError where `settings` differ, with both values."""
        pairs = ((key, self.settings.get(key), settings.get(key)) for key in {**self.settings, **settings})
        told = [f"{key}: {_shown(before)}, now {_shown(now)}" for key, before, now in pairs if before != now]
        if told:
            hint = "give what it was begun with, or begin anew with --force"
            raise UsageError(f"{name}: begun with a different {'; '.join(told)}", hint=hint)


class SideCar:
    """The file beside a row file. Its methods raise OSError where the disk says so."""

    def __init__(self, rows: Path) -> None:
        rows = Path(os.path.realpath(rows))
        self.path = rows.with_name(f"{rows.name}.run.json")
        self._due = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._due

    def check(self) -> None:
        """Raise UsageError for a file of this name that isn't ours: it would be replaced."""
        if self.path.exists() and not self.path.read_bytes().startswith(BEGINNING.encode()):
            raise UsageError(f"{self.path}: is not clipcli's, and would be replaced", hint="move it away")

    def save(
        self,
        settings: Mapping[str, Any],
        state: State,
        failed: Sequence[Span],
        *,
        complete: bool = False,
        pending: bool = False,
    ) -> None:
        """Put a new one in its place."""
        began = time.monotonic()
        about = {"version": VERSION, "clipcli": __version__, "complete": complete, "pending": pending}
        content = {**about, "settings": settings, **asdict(state), "failed": failed[: state.failures]}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with temporary.open("w", encoding="ascii") as file:
                file.write(f"{BEGINNING}{json.dumps(content)[1:]}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        ended = time.monotonic()
        self._due = ended + max(SAVE_EVERY, 20 * (ended - began))

    def load(self) -> Saved:
        """What was saved last. Raises UsageError: not readable, or not by this version."""
        try:
            content = json.loads(self.path.read_bytes())
            if content["format"] == "clipcli run" and content["version"] > VERSION:
                raise UsageError(f"{self.path}: written by a newer clipcli", hint="go on with that one")
            failed = [Span(*map(int, span)) for span in content["failed"]]
            done, offset = int(content["done"]), int(content["offset"])
            state = State(done, str(content["inputs"]), offset, str(content["rows"]), len(failed))
            place = end = 0
            for span in (*failed, Span(done, offset, 0)):  # each row stands behind the one before it
                if not (place <= span.input <= sys.maxsize and end <= span.start and span.length >= 0):
                    raise ValueError("numbers that can't be")
                place, end = span.input + 1, span.start + span.length
            return Saved(dict(content["settings"]), state, failed, bool(content["pending"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            hint = "restore it, or begin anew with --force"
            raise UsageError(f"{self.path}: is no record of a run", hint=hint) from error


def _shown(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
