"""What every output format has in common, and the choice between them.

In: rows and a binary stream (file names are bytes). Out: whole lines of bytes, one `write` a row; the caller says with
`flush` when no further row is ready, so that each is seen as soon as it is made. Opening and closing files, closed
pipes, colour on or off and exit codes are the caller's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from clipcli.errors import UsageError
from clipcli.records import Candidate, Prediction, Predictions, Row


@dataclass(frozen=True)
class SinkOptions:
    """What a person may choose about the rows."""

    top_k: int | None = None  # labels a row; None: the format's own number
    null: bool = False  # paths: end names with NUL instead of a newline
    color: bool = False  # table only
    width: int | None = None  # columns of the terminal, table only; None: ask the terminal
    labels: tuple[str, ...] = ()  # the candidates, for widths and numbers of columns; () where unknown


class Stream(Protocol):
    """What a sink writes to: a binary file, or what counts as one."""

    def write(self, data: bytes, /) -> object:
        """Take bytes."""

    def flush(self) -> object:
        """Hand them on."""


class LineSink:
    """A sink of one line a row: a format is a subclass with `line`, and `header` if it has one."""

    default_top_k = 1

    def __init__(self, stream: Stream, options: SinkOptions) -> None:
        self.stream = stream
        self.options = options
        self.top_k = self.default_top_k if options.top_k is None else options.top_k
        if options.labels:
            self.top_k = min(self.top_k, len(options.labels))
        self.begun = False  # whether the header, if there is one, is written

    def header(self) -> bytes:
        """What stands before the first row."""
        return b""

    def line(self, row: Row) -> bytes:
        """The row with its line end; empty where the format leaves it out."""
        raise NotImplementedError

    def begin(self) -> None:
        """Write the header, if there is one and it isn't written yet."""
        if not self.begun:
            self.begun = True
            self.stream.write(self.header())

    def write(self, row: Row) -> None:
        """Write one row, whole."""
        line = self.line(row) if self.begun else self.header() + self.line(row)
        self.begun = True
        if line:
            self.stream.write(line)

    def write_all(self, rows: Predictions) -> None:
        """Write many rows, each as `write` does; they may go out together."""
        for row in rows:
            self.write(row)

    def flush(self) -> None:
        """Hand on what the stream still holds."""
        self.stream.flush()

    def close(self) -> None:
        """Write the header if no row did, and flush."""
        self.begin()
        self.flush()

    def others(self, row: Prediction) -> tuple[Candidate, ...]:
        """The second candidate and those after it, `top_k - 1` at most."""
        return row.top[1 : self.top_k]


# module:class, imported when chosen: the table alone needs rich
FORMATS = {
    "table": "table:TableSink",
    "tsv": "tsv:TsvSink",
    "csv": "csv:CsvSink",
    "jsonl": "jsonl:JsonlSink",
    "paths": "paths:PathsSink",
}
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}


def encode(text: str) -> bytes:
    """A label or message in UTF-8; what it holds of a file's name keeps its bytes."""
    return text.encode("utf-8", sys.getfilesystemencodeerrors())


def format_for(path: str | None, is_terminal: bool) -> str:
    """The format that `auto` stands for: by the ending of `path`, and tsv for any that is unknown.

    Without a path: a table on a terminal, tsv in a pipe.
    """
    if path is None:
        return "table" if is_terminal else "tsv"
    return next((name for ending, name in ENDINGS.items() if path.lower().endswith(ending)), "tsv")


def open_sink(format: str, stream: Stream, options: SinkOptions) -> LineSink:
    """A sink that writes `format` to `stream`. Raises UsageError for a name that isn't in FORMATS."""
    if format not in FORMATS:
        raise UsageError(f"there is no format `{format}`", hint=f"choose one of {', '.join(FORMATS)}")
    module, _, name = FORMATS[format].partition(":")
    sink: LineSink = getattr(import_module(f"clipcli.output.{module}"), name)(stream, options)
    return sink
