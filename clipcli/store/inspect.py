"""What lies in the store, for people: how much of which kind, and deletion by choice.

In: the store's path, and what to delete. Out: counts and sizes. Reading changes nothing on the disk. Other processes
may use the store meanwhile: what they miss they compute again. It doesn't read values, and knows kinds by name alone.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clipcli.errors import StoreError
from clipcli.store.connection import DAMAGED, OLDEST, Database, schema, transaction

log = logging.getLogger("clipcli")

DAMAGED_KIND = "damaged"  # copies of a store that were set aside, in place of a kind of entry
INT8_KIND = "int8"  # image towers for ONNX Runtime, which `weights.onnx_images` keeps beside the store
COMPANIONS = ("-wal", "-shm")  # files that SQLite keeps beside its own while it is open


@dataclass(frozen=True)
class Group:
    """Entries of one kind, made by one model ("": by none): how many, their values' bytes, when first and last used."""

    kind: str
    model: str
    entries: int
    size: int
    oldest: int
    newest: int


@dataclass(frozen=True)
class Beside:
    """What lies beside the store: its files, the first of which names it."""

    kind: str
    model: str  # fingerprint of the tower; "": of none
    files: tuple[Path, ...]
    size: int
    used: float


@dataclass(frozen=True)
class Selection:
    """What to delete: entries that meet every condition, and beyond `keep` bytes those not used for longest."""

    kind: str | None = None
    model: str | None = None  # the beginning of a fingerprint
    before: float | None = None  # last used before this time, in seconds since 1970
    keep: int | None = None

    def where(self, connection: sqlite3.Connection) -> tuple[str, list[object]]:
        """An SQL condition and its values."""
        tests, values = list[str](), list[object]()
        if self.kind is not None:
            tests, values = [*tests, "kind = ?"], [*values, self.kind]
        if self.model is not None:
            tests, values = [*tests, "substr(model, 1, ?) = ?"], [*values, len(self.model), self.model]
        if self.before is not None:
            tests, values = [*tests, "used < ?"], [*values, self.before]
        if self.keep is None:
            return " AND ".join(tests) or "1", values
        (total,) = connection.execute("SELECT total(size) FROM entry").fetchone()
        return f"({' AND '.join(tests) or '0'}) OR {OLDEST}", [*values, total - self.keep]

    def covers(self, other: Beside) -> bool:
        """Whether what lies beside the store is to be deleted, too."""
        meant = self.kind in (None, other.kind) and other.model.startswith(self.model or "") and self.keep is None
        return meant and (self.before is None or other.used < self.before)


EVERYTHING = Selection()


@dataclass(frozen=True)
class Survey:
    """What is kept: the file's bytes on the disk, the entries in it, and what lies beside it."""

    path: Path
    size: int
    groups: tuple[Group, ...]
    beside: tuple[Beside, ...]

    @property
    def entries(self) -> int:
        """How many entries."""
        return sum(group.entries for group in self.groups)

    @property
    def value_bytes(self) -> int:
        """Bytes of values and of what lies beside the store."""
        return sum(group.size for group in self.groups) + sum(other.size for other in self.beside)


@dataclass(frozen=True)
class Removed:
    """What was deleted: entries, and what lay beside the store; and how many bytes the disk got back."""

    entries: int
    files: int
    freed: int


def survey(path: Path, selection: Selection = EVERYTHING) -> Survey:
    """What of the selection lies in the store at `path`. Raises StoreError where it can't be read."""
    groups: list[Group] = []
    if os.path.isfile(path):
        with _reading(path) as connection:
            if schema(connection, str(path)):
                where, values = selection.where(connection)
                rows = connection.execute(
                    f"SELECT kind, model, count(*), total(size), {_time('min')}, {_time('max')} FROM entry"
                    f" WHERE {where} GROUP BY kind, model ORDER BY kind, total(size) DESC, model",
                    values,
                )
                groups = [Group(_text(kind), _text(model), n, int(size), *used) for kind, model, n, size, *used in rows]
    beside = tuple(other for other in _beside(path) if selection.covers(other))
    return Survey(path, _bytes(_files(path)), tuple(groups), beside)


def remove(path: Path, selection: Selection) -> Removed:
    """Delete what is selected and give the space back to the disk. Raises StoreError where nothing can be written."""
    before, entries = _on_disk(path), 0
    if os.path.isfile(path):
        with closing(Database(path)) as database:
            entries = database.run(lambda connection: _delete(connection, selection))
            if database.path is None:
                raise StoreError(f"{path}: can't be written", hint="check the permissions of its folder")
            if entries:
                database.run(_shrink)
    beside = [other for other in _beside(path) if selection.covers(other)]
    for file in (file for other in beside for file in other.files):
        file.unlink(missing_ok=True)
    return Removed(entries, len(beside), max(0, before - _on_disk(path)))


def _delete(connection: sqlite3.Connection, selection: Selection) -> int:
    with transaction(connection):
        where, values = selection.where(connection)
        return connection.execute(f"DELETE FROM entry WHERE {where}", values).rowcount


def _shrink(connection: sqlite3.Connection) -> None:
    """Give free pages back to the disk; what can't be given back now is used again by the store."""
    try:
        connection.execute("PRAGMA busy_timeout = 1000")  # whoever reads may do so for hours
        connection.execute("VACUUM")
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        log.warning("the store's file keeps its size for now (%s)", error)
        return
    if busy:
        log.warning("another process reads the store: its file shrinks when that one ends")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA query_only = ON")  # mode=ro would leave SQLite's companion files behind
            connection.text_factory = bytes
            yield connection
    except sqlite3.Error as error:
        is_damaged = (getattr(error, "sqlite_errorcode", -1) & 0xFF) in DAMAGED
        hint = "clipcli cache clear --yes removes it" if is_damaged else "check its permissions"
        raise StoreError(
            f"the store {path} {'is damaged' if is_damaged else 'cannot be read'}: {error}", hint=hint
        ) from error


def _time(function: str) -> str:
    """The least or greatest time of use, a date even where damage made something else of it."""
    return f"min(max(CAST({function}(used) AS INTEGER), 0), 4102444800)"


def _beside(path: Path) -> Iterator[Beside]:
    """Damaged copies of the store, the oldest first, and image towers in int8."""
    for file in sorted(path.parent.glob(f"{path.name}.damaged-*Z")):
        with suppress(FileNotFoundError):
            files = (file, *(Path(f"{file}{ending}") for ending in (*COMPANIONS, "-journal")))
            yield Beside(DAMAGED_KIND, "", files, _bytes(files), file.stat().st_mtime)
    for file in sorted((path.parent / "onnx").glob("*-int8-*.npz")):
        with suppress(FileNotFoundError):
            yield Beside(INT8_KIND, file.name.partition("-")[0], (file,), _bytes((file,)), file.stat().st_mtime)


def _on_disk(path: Path) -> int:
    return _bytes(_files(path)) + sum(other.size for other in _beside(path))


def _files(path: Path) -> list[Path]:
    return [path, *(Path(f"{path}{ending}") for ending in COMPANIONS)]


def _bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
