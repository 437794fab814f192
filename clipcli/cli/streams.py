"""Where pictures come from and where rows go, as typed: checked before anything is loaded, opened on demand."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from clipcli.cli.console import wants_color
from clipcli.errors import OutputError, UsageError
from clipcli.images.find import HEAD, Walk, check_inputs, read_list, sniff
from clipcli.records import Failure, FailureKind, Row, Source

if TYPE_CHECKING:
    from clipcli.output.sink import LineSink


@dataclass(frozen=True)
class Destination:
    """Where rows go, and in which format."""

    path: Path | None
    format: str
    force: bool
    top_k: int | None
    print0: bool
    color: str

    def check(self, read: Sequence[object] = ()) -> None:
        """Raise UsageError or OutputError for what would fail only after the work is done.

        `read` are the files that the run reads: none of them may be written.
        """
        if self.path is not None:
            check_new_file(self.path, force=self.force, read=read)
        if self.print0 and self.chosen != "paths":
            raise UsageError("--print0 is for paths alone", hint="add --format paths")

    @property
    def chosen(self) -> str:
        """The format that `auto` stands for."""
        from clipcli.output.sink import format_for

        if self.format != "auto":
            return self.format
        return format_for(str(self.path) if self.path else None, self.is_terminal)

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches the rows come."""
        return self.path is None and sys.stdout.isatty()

    @contextmanager
    def open(self, labels: Sequence[str]) -> Iterator[Writer]:
        """The sink; an output file is created with the first row, so that a run that fails early leaves none."""
        from clipcli.output.sink import SinkOptions, open_sink

        stream = sys.stdout.buffer if self.path is None else _open(self.path, force=self.force)
        color = self.path is None and wants_color(sys.stdout, self.color)
        options = SinkOptions(top_k=self.top_k, null=self.print0, color=color, labels=tuple(labels))
        try:
            yield Writer(open_sink(self.chosen, stream, options), str(self.path or "stdout"))
        finally:
            if self.path is not None:
                with suppress(OSError):  # every row was flushed: what fails here has failed before
                    stream.close()


class Writer:
    """A sink whose failures are told as what they are: rows that can't be written."""

    def __init__(self, sink: LineSink, place: str) -> None:
        self._sink = sink
        self._place = place

    def write(self, row: Row) -> None:
        """Write one row. Raises OutputError, or BrokenPipeError where nobody reads any more."""
        with self._telling():
            self._sink.write(row)

    def close(self) -> None:
        """Finish the output. Raises as `write` does."""
        with self._telling():
            self._sink.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(self._place, error) from error


def cannot_write(place: str, error: OSError) -> OutputError:
    """The error that says why `place` can't be written."""
    hint = "make room, and run it again" if error.errno == errno.ENOSPC else "choose another place with --output"
    return OutputError(f"{place}: can't be written: {error.strerror}", hint=hint)


def check_new_file(path: Path, *, force: bool, read: Sequence[object] = ()) -> None:
    """Raise UsageError where `path` exists or is among the files `read`, OutputError where it can't be created."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder", hint="name a file")
        if path.is_file() and any(_is_same(path, other) for other in read):
            raise UsageError(f"{path}: is read by this very run", hint="choose another file with --output")
        if path.is_file() and not force:
            raise UsageError(f"{path}: exists already", hint="use --force to replace it")
        if path.is_file() and _is_picture(path):  # maybe one of those that a folder or a list will name
            raise UsageError(f"{path}: is a picture", hint="remove it first, or choose another file with --output")
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{path}: is a link to nothing", hint="remove it, or name another file")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"{path}: no permission to write there", hint="choose another place with --output")
    except OSError as error:  # no permission even to look
        raise cannot_write(str(path), error) from error


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        return sniff(file.read(HEAD)) is not None


def _is_same(path: Path, other: object) -> bool:
    try:
        return path.samefile(str(other))
    except (OSError, ValueError):  # no file, or a literal such as a template
        return False


def _open(path: Path, *, force: bool) -> BinaryIO:
    try:
        return path.open("wb" if force or not path.is_file() else "xb")
    except OSError as error:
        raise cannot_write(str(path), error) from error


@dataclass
class Pictures:
    """What is to be looked at; `passed_over` counts what folders held besides pictures."""

    inputs: Sequence[str]
    files_from: str | None
    null: bool
    include: Sequence[str]
    exclude: Sequence[str]
    follow: bool
    passed_over: int = field(default=0, init=False)

    @property
    def given(self) -> bool:
        """Whether there is anything to look at: something typed, or a list on stdin."""
        return bool(self.inputs or self.files_from) or not sys.stdin.isatty()

    @property
    def listed(self) -> str | None:
        """The file that holds the list of paths, `-` for stdin."""
        return self.files_from or (None if self.inputs else "-")

    @property
    def live(self) -> bool:
        """Whether the list may still be growing while we read it."""
        return self.listed is not None and (self.listed == "-" or not Path(self.listed).is_file())

    def check(self) -> None:
        """Raise UsageError for an INPUT that isn't there."""
        check_inputs(self.inputs)
        if [*self.inputs, self.listed].count("-") > 1:
            raise UsageError("stdin can't be read twice", hint="give - once, as INPUT or as --files-from -")
        if self.listed in (None, "-"):
            return
        listed = Path(str(self.listed))
        wrong = "no such file" if not listed.exists() else "is a folder" if listed.is_dir() else None
        if wrong is None and not os.access(listed, os.R_OK):
            wrong = "permission denied"
        if wrong:
            raise UsageError(f"{listed}: {wrong}", hint="--files-from takes a file with a path a line")

    def walk(self) -> Iterator[Source | Failure]:
        """Every picture, in order: the INPUTs, then the list."""
        for path in self.inputs:
            yield from [_picture_on_stdin()] if path == "-" else self._walk([path])
        if self.listed == "-":
            yield from self._walk(read_list(sys.stdin.buffer, self.null), folders=False)
        elif self.listed is not None:
            with Path(self.listed).open("rb") as stream:
                yield from self._walk(read_list(stream, self.null), folders=False)

    def _walk(self, names: Iterable[str], *, folders: bool = True) -> Iterator[Source | Failure]:
        walk = Walk(names, self.include, self.exclude, self.follow, folders)
        yield from walk
        self.passed_over += walk.passed_over


def _picture_on_stdin() -> Source | Failure:
    from clipcli.images.decode import MAX_BYTES

    # Raw: a buffered read holds a lock that the interpreter can't take back when Ctrl-C ends it.
    stream = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    data = bytearray()
    while chunk := stream.read(1 << 20):
        data += chunk
        if len(data) > MAX_BYTES:
            return Failure("-", FailureKind.TOO_LARGE, f"more than {MAX_BYTES >> 30} GiB came")
    return Source("-", bytes(data))
