"""What is kept between runs: small values under content keys, in one SQLite file (`connection.py`).

In: keys of `keys.py`, arrays or digests. Out: those that are known. A damaged value is dropped with a notice,
and when the values take too much room, those not used for longest go. It holds no models and no pictures, and
doesn't know how values are made.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from clipcli.store.connection import OLDEST, PAGE_BYTES, Database, transaction
from clipcli.store.keys import file_key

Array = npt.NDArray[np.float32]

log = logging.getLogger("clipcli")

SIZE_LIMIT = 2 << 30  # bytes of values
MEMORY_LIMIT = 256 << 20  # the same where they are kept in memory alone
VALUE_LIMIT = 10**9 - 2**20  # SQLite takes no row of more than 10**9 bytes
DAY = 86_400  # seconds: a value's time of use is renewed at most once a day, so most reads write nothing
CHUNK = 1_024  # keys in one query
FLOATS = np.dtype("<f4")
DIGESTS = ("digest", "picture")  # kinds whose values are bytes; those of all others are float32


class Store:
    """Values of earlier runs, by content key; a context manager, or `close()` it.

    The file and its folder are made at the first use. `path` None keeps everything in memory: nothing is read
    from earlier runs and nothing left for later ones. Threads and processes may share a store. No method
    fails because of the file, but for StoreError when a newer clipcli wrote it.
    """

    def __init__(self, path: str | Path | None, *, size_limit: int = SIZE_LIMIT) -> None:
        self._database = Database(None if path is None else Path(path))
        self._size_limit = size_limit
        self._enough = 0  # bytes of pages within which values have not outgrown the limit

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        self._database.close()

    @property
    def path(self) -> Path | None:
        """Where values are kept; None: in memory, by choice or because the file can't be used."""
        return self._database.path

    def tensor_digest(self, file: Path, part: str, build: Callable[[], bytes]) -> bytes:
        """What `build()` returned for `part` of `file`, run only when the file is new or has changed.

        A file is known by its resolved path, size, modification time and inode. Raises OSError without one.
        """
        key = file_key(file, part)
        known = self._read("digest", [key]).get(key)
        if known is not None:
            return bytes(known)
        digest = build()
        if file_key(file, part) == key:  # else it was written to meanwhile
            self._write("digest", {key: np.frombuffer(digest, np.uint8)}, "")
        return digest

    def picture_digests(self, files: Sequence[bytes]) -> dict[bytes, bytes]:
        """The digests of the bytes that pictures' files had, by `file_key`, of those that are known."""
        return self._read("picture", files)

    def embeddings(self, keys: Sequence[bytes]) -> dict[bytes, Array]:
        """The embeddings that are known, float32 [D], read-only, by `embedding_key`."""
        return self._read("embedding", keys)

    def keep_pictures(self, files: Mapping[bytes, bytes], embeddings: Mapping[bytes, Array], model: str) -> None:
        """Keep digests of files' bytes by `file_key`, and embeddings; `model`: the image tower's fingerprint."""
        self._write("picture", {key: np.frombuffer(digest, np.uint8) for key, digest in files.items()}, "")
        self._write("embedding", embeddings, model)

    def prompt_vectors(self, keys: Sequence[bytes]) -> dict[bytes, Array]:
        """The vectors that are known, float32 [D], read-only, by `prompt_key`."""
        return self._read("prompt", keys)

    def keep_prompt_vectors(self, vectors: Mapping[bytes, Array], model: str = "") -> None:
        """Keep vectors, float32 [D], in one transaction; `model`: the text tower's fingerprint."""
        self._write("prompt", vectors, model)

    def classifier(self, key: bytes) -> Array | None:
        """The class weights under `classifier_key`, float32 [L, D], read-only, or None."""
        return self._read("classifier", [key]).get(key)

    def keep_classifier(self, key: bytes, weight: Array, model: str = "") -> None:
        """Keep class weights, float32 [L, D]; `model`: the text tower's fingerprint."""
        self._write("classifier", {key: weight}, model)

    def _read(self, kind: str, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The intact values under `keys`: bytes for digests and pictures, float32 for all others."""

        def work(connection: sqlite3.Connection) -> dict[bytes, Any]:
            found: dict[bytes, Any] = {}
            damaged: list[tuple[int]] = []
            stale: list[tuple[int, int]] = []
            now, is_array = int(time.time()), kind not in DIGESTS
            for start in range(0, len(keys), CHUNK):
                part = keys[start : start + CHUNK]
                rows = connection.execute(
                    "SELECT key, shape, checksum, value, used NOT BETWEEN ? AND ?, id FROM entry"
                    f" WHERE kind = ? AND key IN ({', '.join('?' * len(part))})",
                    (now - DAY, now + DAY, kind, *part),
                )
                for key, shape, checksum, value, is_stale, number in rows:
                    whole = type(shape) is type(value) is bytes  # damage may change types, too
                    if not whole or crc32(key + shape + value) != checksum:
                        damaged.append((number,))
                        continue
                    found[key] = value
                    if is_array:
                        array = np.frombuffer(value, FLOATS)
                        found[key] = array.reshape(_sizes(shape)) if b"x" in shape else array
                    if is_stale:
                        stale.append((now, number))
            if damaged or stale:
                with transaction(connection):
                    connection.executemany("DELETE FROM entry WHERE id = ?", damaged)
                    connection.executemany("UPDATE entry SET used = ? WHERE id = ?", stale)
            if damaged:
                log.warning("damaged entries in the store: %d dropped, to be computed again", len(damaged))
            return found

        return self._database.run(work) if keys else {}

    def _write(self, kind: str, values: Mapping[bytes, npt.NDArray[Any]], model: str) -> None:
        def row(key: bytes, array: npt.NDArray[Any], now: int) -> tuple[Any, ...]:
            shape = "x".join(map(str, array.shape)).encode()
            value = array.astype(np.uint8 if kind in DIGESTS else FLOATS, copy=False).tobytes()
            return kind, key, model, now, len(value), shape, crc32(key + shape + value), value

        def work(connection: sqlite3.Connection) -> None:
            limit = self._size_limit if self.path else min(self._size_limit, MEMORY_LIMIT)
            now = int(time.time())
            with transaction(connection):
                connection.executemany(
                    "INSERT OR REPLACE INTO entry (kind, key, model, used, size, shape, checksum, value)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (row(key, array, now) for key, array in values.items() if array.nbytes <= min(limit, VALUE_LIMIT)),
                )
                written = sum(array.nbytes for array in values.values())  # perhaps into pages that had room
                enough = self._enough - written if self.path else 0
                self._enough = _evict(connection, limit, max(limit, enough))

        if values:
            self._database.run(work)


def _evict(connection: sqlite3.Connection, limit: int, enough: int) -> int:
    """If the values take more than `limit` bytes, delete the longest unused until a tenth of it is free.

    Nothing is done where pages take less than `enough` bytes. Returns how many they may take before values have to be
    summed up again, which takes a second for a million of them.
    """
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    used = (pages - free) * PAGE_BYTES
    if used <= enough:
        return enough
    (total,) = connection.execute("SELECT total(size) FROM entry").fetchone()
    if total > limit:
        connection.execute(f"DELETE FROM entry WHERE {OLDEST}", (total - limit * 9 // 10,))
        return limit
    return int(used + limit - total)


@lru_cache(maxsize=16)
def _sizes(shape: bytes) -> tuple[int, ...]:
    return tuple(map(int, shape.split(b"x")))
