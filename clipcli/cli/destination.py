"""Where rows go, as typed: checked before anything is loaded, opened on demand.

Comes in: the options of the panel Output, then rows. Goes out: bytes on stdout or in a file. A file is a
`rowfile.RowFile`, so that another run can go on with it; what a row looks like is its sink's matter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipcli.cli.console import wants_color
from clipcli.cli.streams import check_new_file
from clipcli.errors import UsageError, writing
from clipcli.output.text import counted
from clipcli.records import Item, Predictions, Row

if TYPE_CHECKING:
    from clipcli.output.rowfile import RowFile
    from clipcli.output.sink import LineSink


@dataclass(frozen=True)
class Destination:
    """Where rows go, which of them, and in which format."""

    path: Path | None
    format: str
    top_k: int | None
    print0: bool
    color: str
    wanted: frozenset[str] = frozenset()  # only rows with these labels; empty: all
    force: bool = False
    resume: bool = False
    retry: bool = False
    explains: bool = False  # rows say what they rest on

    def check(self, read: Sequence[object] = ()) -> None:
        """Raise UsageError or OutputError for what would fail only after the work is done.

        `read` are the files that the run reads: none of them may be written.
        """
        if self.goes_on and self.path is None:
            raise UsageError("there is no file to go on with", hint="--resume and --retry-failed need --output FILE")
        if self.goes_on and self.force:
            raise UsageError("--resume goes on, --force begins anew", hint="give one of them")
        if self.path is not None:
            with writing(self.path):
                self._check_file(self.path, read)
        if self.print0 and self.chosen != "paths":
            raise UsageError("--print0 is for paths alone", hint="add --format paths")
        if self.explains and self.chosen not in ("table", "jsonl"):
            raise UsageError("--explain is for table and jsonl", hint="choose one of them as --format")

    def _check_file(self, path: Path, read: Sequence[object]) -> None:
        from clipcli.output.journal import SideCar

        side_car = SideCar(path).path
        if side_car.exists() and path.is_file() and not (self.force or self.goes_on):
            hint = "use --resume to go on with its run, or --force to replace it"
            raise UsageError(f"{path}: exists already", hint=hint)
        check_new_file(path, force=self.force or self.goes_on, read=read)
        if self.grows:
            check_new_file(side_car, force=True, read=read)
        if self.goes_on and not self.grows:
            raise UsageError(f"{path}: is no file that a run could go on with", hint="name a file with --output")
        if self.goes_on and self.chosen == "table":
            raise UsageError("a table can't be gone on with", hint="choose jsonl, csv, tsv or paths as --format")

    @property
    def goes_on(self) -> bool:
        """Whether what an earlier run has written counts."""
        return self.resume or self.retry

    @property
    def grows(self) -> bool:
        """Whether rows go to a file, new or old: not to stdout, a device or a pipe."""
        return self.path is not None and (self.path.is_file() or not self.path.exists())

    @property
    def chosen(self) -> str:
        """The format that `auto` stands for."""
        from clipcli.output.sink import format_for

        if self.format != "auto":
            return self.format
        return format_for(str(self.path) if self.path else None, self.is_terminal or self.explains)

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches the rows come."""
        return self.path is None and sys.stdout.isatty()

    @contextmanager
    def open(self, labels: Sequence[str], settings: Mapping[str, object]) -> Iterator[Writer]:
        """The way out. A file is created with the first row, so that a run that fails early leaves none.

        `settings` are what else decides rows: a run that goes on with a file must have those it was begun with.
        Raises UsageError or OutputError where it can't go on.
        """
        from clipcli.output.rowfile import RowFile
        from clipcli.output.sink import SinkOptions, open_sink

        color = self.path is None and wants_color(sys.stdout, self.color)
        options = SinkOptions(top_k=self.top_k, null=self.print0, color=color, labels=tuple(labels))
        if self.path is None:
            yield Writer(open_sink(self.chosen, sys.stdout.buffer, options), "stdout", self.wanted)
        elif not self.grows:
            with writing(self.path):
                stream = self.path.open("wb")
            try:
                yield Writer(open_sink(self.chosen, stream, options), str(self.path), self.wanted)
            finally:
                with suppress(OSError):  # every row was flushed: what fails here has failed before
                    stream.close()
        else:
            with closing(RowFile(self.path, force=self.force, resume=self.resume, retry=self.retry)) as file:
                sink = open_sink(self.chosen, file, options)
                top_k = self.top_k or sink.default_top_k
                own = {"--format": self.chosen, "--top-k": top_k, "--print0": self.print0}
                own |= {"--explain": True} if self.explains else {}
                with writing(self.path):
                    file.open({**own, "--select": sorted(self.wanted), **settings})
                sink.begun = file.offset > 0
                yield FileWriter(sink, str(self.path), self.wanted, file)


class Writer:
    """A sink for the rows that are wanted. Its failures are told as what they are: rows that can't be written."""

    _again = "run it again"

    def __init__(self, sink: LineSink, place: str, wanted: frozenset[str]) -> None:
        self._sink = sink
        self._place = place
        self._wanted = wanted
        self.done = 0  # pictures that had their row before

    @property
    def failed(self) -> int:
        """Pictures with a row that failed, where that is known."""
        return 0

    def left(self, items: Iterator[Item]) -> Iterator[Item]:
        """Of all inputs those that are to have a row."""
        return items

    def write(self, row: Row) -> None:
        """Write one row, if it is wanted. Raises OutputError, or BrokenPipeError where nobody reads any more."""
        with self._writing():
            if self._wants(row):
                self._sink.write(row)

    @property
    def at_once(self) -> bool:
        """Whether many rows may be handed on together: all are wanted, none is counted here."""
        return not self._wanted

    def write_all(self, rows: Predictions) -> None:
        """Write them all. Raises as `write` does."""
        with self._writing():
            self._sink.write_all(rows)

    def flush(self) -> None:
        """Let the rows be seen. Raises as `write` does."""
        with self._writing():
            self._sink.flush()

    def close(self, *, complete: bool) -> None:
        """Finish the output; `complete`: all inputs have their rows. Raises as `write` does."""
        with self._writing():
            self._sink.close()

    def kept(self, total: int) -> str:
        """What is there after an interruption, for `total` rows."""
        return f"after {counted(total, 'picture')}, whose rows are written"

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._place, self._again)

    def _wants(self, row: Row) -> bool:
        return not self._wanted or not self._wanted.isdisjoint(row.labels)


class FileWriter(Writer):
    """A sink that writes to a file which keeps count of the inputs, whether their rows are wanted or not."""

    _again = "go on with --resume"
    at_once = False

    def __init__(self, sink: LineSink, place: str, wanted: frozenset[str], file: RowFile) -> None:
        super().__init__(sink, place, wanted)
        self._file = file
        self.done = file.state.done

    @property
    def failed(self) -> int:
        """Pictures with a row that failed, of earlier runs too."""
        return self._file.state.failures

    def left(self, items: Iterator[Item]) -> Iterator[Item]:
        """Of all inputs those that have no row yet, after those that are tried again."""
        return self._file.left(items)

    def write(self, row: Row) -> None:
        """Write one row, if it is wanted, and count its input. Raises OutputError."""
        with self._writing():
            self._file.ready()
            if wanted := self._wants(row):
                self._sink.begin()
            start = self._file.offset
            if wanted:
                self._sink.write(row)
            self._file.note(row, start)

    def close(self, *, complete: bool) -> None:
        """Finish the output; `complete`: all inputs have their rows. Raises as `write` does."""
        with self._writing():
            self._file.ready()
            self._sink.close()
            if complete:
                self._file.finish()

    def kept(self, total: int) -> str:
        """What is there after an interruption, for `total` rows."""
        if self._file.rewrites:
            return f"while failed pictures were tried again; {self._place} is as it was"
        return f"{super().kept(total)}; the same command with --resume goes on"
