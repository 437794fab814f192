"""One SQLite file that never makes a run fail: opening, schema, damage, several threads and processes.

In: a path and functions that work on a connection. Out: what they return. A damaged file is set aside and
begun anew; where nothing can be kept, the same functions run in memory; each with a notice in the log. It
knows the tables' schema, and nothing of what lies in them.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from clipcli.errors import StoreError

T = TypeVar("T")

log = logging.getLogger("clipcli")

BUSY_SECONDS = 30.0
PAGE_BYTES = 32_768  # fifteen vectors of 512 floats a page; SQLite's default of 4,096 bytes holds one
CACHE_KIB = 16_000  # a thousand pictures' vectors, in whatever order they are asked for
SETTINGS = (f"page_size = {PAGE_BYTES}", "journal_mode = WAL", "synchronous = NORMAL", f"cache_size = -{CACHE_KIB}")

# One tuple a schema version; released ones are never changed. `model`: the fingerprint of the tower that made
# the value ("" for a file's digest); `used`: seconds since 1970; `size`: of the value; `shape`: b"3x512".
MIGRATIONS = (
    (
        """CREATE TABLE entry (
            id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key BLOB NOT NULL, model TEXT NOT NULL,
            used INTEGER NOT NULL, size INTEGER NOT NULL, shape BLOB NOT NULL, checksum INTEGER NOT NULL,
            value BLOB NOT NULL, UNIQUE (kind, key))""",
        "CREATE INDEX entry_by_use ON entry (used, size)",
    ),
)

# Which entries to delete to make room for some bytes: those not used for longest.
OLDEST = (
    "id IN (SELECT id FROM (SELECT id, size, sum(size) OVER (ORDER BY used, size, id) AS upto FROM entry)"
    " WHERE upto - size < ?)"
)

# Errors and broken constraints in statements that never change mean that the tables are not ours.
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
DAMAGED |= {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
UNUSABLE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY}
UNUSABLE |= {sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}

_inherited: list[sqlite3.Connection] = []  # a forked child may not even close its parent's connections


class Database:
    """A file at `path`, opened at the first use; `path` None, or one that turns out unusable: in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # which file the connection reads, whatever lies at `path`
        self._renewed = False
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; when the file fails, it runs once more on a fresh one, at last in memory.

        Raises StoreError when the file was written by a newer clipcli.
        """
        with self._alone():
            while True:
                try:
                    self._connection = self._connection or self._open()
                    return work(self._connection)
                except (sqlite3.DatabaseError, OSError) as error:
                    self._give_up(error)

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        with self._alone():
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time; in a forked child, without what belongs to the parent."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.RLock()
            if self._connection is not None:
                _inherited.append(self._connection)
            self._connection = None
        with self._lock:
            yield

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _prepare(_connect(":memory:"), ":memory:")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(self.path):
            connection = _connect(str(self.path))
            self._opened = _identity(self.path)
            return _prepare(connection, str(self.path))

    def _give_up(self, error: sqlite3.DatabaseError | OSError) -> None:
        """Leave the file for a fresh one or for memory; what is no fault of the file is raised again."""
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if self.path is None or not (isinstance(error, OSError) or code in DAMAGED | UNUSABLE):
            raise error
        self.close()
        if code in DAMAGED and not self._renewed:
            self._renewed = True
            with suppress(OSError, sqlite3.Error):  # on Windows another process may hold it
                self._set_aside(self.path)
                return
        log.warning("the store %s can't be used (%s): going on without", self.path, error)
        self.path = None

    def _set_aside(self, path: Path) -> None:
        """Rename the damaged file, unless another process has done so already."""
        with _file_lock(path):
            if _identity(path) != self._opened:
                return
            aside = f"{path}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            for ending in ("-journal", "-wal", "-shm", ""):  # the file last: the others must not outlive it
                with suppress(FileNotFoundError):
                    Path(f"{path}{ending}").rename(f"{aside}{ending}")
            log.warning("the store %s was damaged: set aside as %s, begun anew", path, Path(aside).name)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what the block writes."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            connection.execute("ROLLBACK")
        raise


def schema(connection: sqlite3.Connection, name: str) -> int:
    """The version of the tables; 0 before there are any. Raises StoreError for one that we don't know."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the store {name} was written by a newer clipcli (schema {version}, not {len(MIGRATIONS)})",
            hint="upgrade clipcli, or choose another folder with CLIPCLI_CACHE_DIR, or use --no-cache",
        )
    return version


def _connect(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.text_factory = bytes  # damaged text then gives a wrong checksum, not an exception
    return connection


def _prepare(connection: sqlite3.Connection, name: str) -> sqlite3.Connection:
    """Bring the schema up to date, or close the connection and raise."""
    try:
        for setting in SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        version = schema(connection, name)
        for number, statements in enumerate(MIGRATIONS[version:], version + 1):
            with transaction(connection):
                for statement in (*statements, f"PRAGMA user_version = {number}"):
                    connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """One process at a time: SQLite's own lock on an empty file beside the store works on every system."""
    with closing(sqlite3.connect(f"{path}.lock", timeout=BUSY_SECONDS, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at `path` (device and inode), if any."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None
