"""A row file that a later run can go on with: where `classify -o FILE` writes, and what `--resume` takes up.

    FILE            whole rows, flushed as they come
    FILE.run.json   how far they have come (`journal`), saved about once a second

Whatever ends a run: what stands behind the last save is cut off and made again, so that no row is lost and none
doubled. The side-car goes when the run is complete; it stays where pictures failed (it has the places of their rows,
for `--retry-failed`), and where --resume was asked for (so that the same command can tell that nothing is left to do).

In: the walk's items, and the bytes that a sink makes of their rows. It makes no rows and prints nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from clipcli.errors import OutputError, UsageError
from clipcli.output.journal import SideCar, Span, State
from clipcli.output.text import counted
from clipcli.records import Failure, Item, Row

CHUNK = 1 << 20
ANEW = "begin anew with --force"


class RowFile:
    """A sink's stream. For every row `ready`, what the sink writes, and `note`; after the last one `finish`.

    `force` replaces an older file, `resume` goes on with it. `retry` does so after its failed pictures were tried
    again: all its rows are written into a temporary file then, good ones byte for byte, which takes its place when the
    last of the failed has its new row. Methods raise OSError where the disk says so.
    """

    def __init__(self, path: Path, *, force: bool = False, resume: bool = False, retry: bool = False) -> None:
        self.state = State()
        self.offset = 0  # bytes written
        self._name = str(path)
        self._path = Path(os.path.realpath(path))
        self._side_car = SideCar(path)
        self._temporary = self._path.with_name(f"{self._path.name}.run.tmp")
        self._force, self._resume, self._retry = force, resume or retry, retry
        self._settings: Mapping[str, Any] = {}
        self._stream: BinaryIO | None = None  # None: there is nothing to go on with
        self._begun = False
        self._saves = False  # whether the side-car is to follow what is written
        self._inputs, self._rows = blake2b(digest_size=16), blake2b(digest_size=16)
        self._failed: list[Span] = []
        self._again: deque[Span] = deque()  # what is still to be tried again
        self._old: BinaryIO | None = None  # the rows before that

    @property
    def rewrites(self) -> bool:
        """Whether failed pictures are being tried again: until that is done, the file stays as it was."""
        return self._old is not None

    def open(self, settings: Mapping[str, Any]) -> None:
        """Look at what there is to go on with. `settings` decide rows, under the names that a person knows.

        Raises UsageError where it isn't this run's, OutputError where another one is writing it.
        """
        self._settings = json.loads(json.dumps(settings))
        if not (self._resume and self._path.exists() and (self._path.stat().st_size or self._side_car.path.exists())):
            return
        if not self._side_car.path.exists():
            what = f"{self._name}: exists already, and no record of a run lies beside it"
            raise UsageError(what, hint="it is complete, or not clipcli's; --force replaces it")
        self._stream = self._locked("r+b")
        saved = self._side_car.load()
        saved.compare(self._name, self._settings)
        self.state, self._failed = saved.state, saved.failed
        if saved.pending:  # a run was ended while it put the temporary file in place
            if self._temporary.exists():
                self._adopt()
            self._save()
        self._stream.seek(0)
        for chunk in _chunks(self._stream, self.state.offset):
            self._rows.update(chunk)
        if self._stream.tell() != self.state.offset or self._rows.hexdigest() != self.state.rows:
            raise UsageError(f"{self._name}: has changed since its run wrote it", hint=f"restore it, or {ANEW}")
        self.offset = self.state.offset
        if self._retry:
            self._again.extend(self._failed)

    def left(self, items: Iterable[Item]) -> Iterator[Item]:
        """Of all the inputs, those that are to be dealt with. Raises UsageError where the first ones are others now.

        That is found out before the last picture that is tried again is handed on.
        """
        items = iter(items)
        again = {span.input for span in self._again}
        last: Item | None = None
        for index, item in enumerate(islice(items, self.state.done)):
            self._inputs.update(_framed(item.path))
            if index in again:
                if last is not None:
                    yield last
                last = item
        if self._inputs.hexdigest() != self.state.inputs:
            first = f"not the same first {counted(self.state.done, 'picture')} as when it was begun"
            raise UsageError(
                f"{self._name}: the inputs have changed: {first}", hint=f"give the inputs it was begun with, or {ANEW}"
            )
        if last is not None:
            yield last
        yield from items

    # ---- row by row

    def ready(self) -> None:
        """Bring the file to where the next row belongs."""
        if not self._begun:
            self._begin()
        if self._again:
            self._copy(self._again[0].start)

    def write(self, data: bytes) -> None:
        """For the sink."""
        cast(BinaryIO, self._stream).write(data)
        self._rows.update(data)
        self.offset += len(data)

    def flush(self) -> None:
        """For the sink."""
        cast(BinaryIO, self._stream).flush()

    def note(self, row: Row, start: int) -> None:
        """The next input's row is written, from `start` on; perhaps it has no bytes."""
        if self._old is None:
            index = self.state.done
            self._inputs.update(_framed(row.path))
        else:
            index, begin, length = self._again.popleft()
            self._old.seek(begin + length)
        if isinstance(row, Failure):
            self._failed.append(Span(index, start, self.offset - start))
        if self._old is None:
            self._count(index + 1)  # an interruption comes before it or after it
            if self._side_car.due:
                self._save()
        elif not self._again:
            self._put_in_place(self._old)

    def finish(self) -> None:
        """All inputs have their rows."""
        self.ready()
        self.flush()
        if self._failed or self._resume:
            self._save(complete=True)
        else:
            self._side_car.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)  # of a run that was killed while it tried again
        self._saves = False

    def close(self) -> None:
        """Let go of the file; if the run isn't finished, save how far it has come."""
        with suppress(OSError):  # on a full disk: what was saved before is true as well
            if self._saves:
                self._save()
            if self._old is not None:
                self._temporary.unlink()
        for stream in (self._stream, self._old):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    # ---- the files

    def _begin(self) -> None:
        self._begun = True
        if self._stream is None:
            self._create()
        elif self._again:
            self._old, self._stream = self._stream, self._temporary.open("w+b")
            shutil.copymode(self._path, self._temporary)
            self._old.seek(0)
            self.offset, self._rows, self._failed = 0, blake2b(digest_size=16), []
        else:
            self._stream.seek(self.offset)
            self._stream.truncate()
            self._save()
        self._saves = self._old is None

    def _create(self) -> None:
        is_new = not self._path.exists()
        self._stream = self._locked("ab" if self._force or self._resume else "xb")
        try:
            self._side_car.check()
            self._save()
        except (OSError, UsageError):
            if is_new:
                self._path.unlink()
            raise
        self._stream.truncate(0)

    def _locked(self, mode: str) -> BinaryIO:
        """The row file, ours alone as long as it is open, where the system can see to that."""
        stream = cast(BinaryIO, self._path.open(mode))
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat(os.fstat(stream.fileno()), self._path.stat())
        except BlockingIOError:
            is_free = False
        except (ImportError, OSError):  # Windows; file systems without locks
            is_free = True
        if not is_free:
            stream.close()
            raise OutputError(f"{self._name}: another run is writing it", hint="wait for it, or stop it")
        return stream

    def _copy(self, until: int) -> None:
        """Take over old rows from where they were left."""
        for chunk in _chunks(cast(BinaryIO, self._old), until):
            self.write(chunk)

    def _put_in_place(self, old: BinaryIO) -> None:
        """Everything has been tried again: the temporary file becomes the row file."""
        self._copy(self.state.offset)
        self._old = None  # from here on its fate is the side-car's to say
        self._count(self.state.done)
        self._save(pending=True)
        old.close()
        self._adopt()
        self._save()
        self._saves = True

    def _adopt(self) -> None:
        cast(BinaryIO, self._stream).close()
        self._temporary.replace(self._path)
        self._stream = self._locked("r+b")
        self._stream.seek(0, os.SEEK_END)

    def _count(self, done: int) -> None:
        rows, inputs = self._rows.hexdigest(), self._inputs.hexdigest()
        self.state = State(done, inputs, self.offset, rows, len(self._failed))

    def _save(self, *, complete: bool = False, pending: bool = False) -> None:
        stream = cast(BinaryIO, self._stream)
        stream.flush()
        os.fsync(stream.fileno())  # rows first
        self._side_car.save(self._settings, self.state, self._failed, complete=complete, pending=pending)


def _framed(path: str) -> bytes:
    name = os.fsencode(path)
    return struct.pack("<Q", len(name)) + name


def _chunks(stream: BinaryIO, end: int) -> Iterator[bytes]:
    """The bytes of `stream` from where it stands to `end`, or to its own end."""
    left = end - stream.tell()
    while left > 0 and (chunk := stream.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk
