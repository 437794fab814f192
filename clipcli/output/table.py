"""Rows for a person's eyes: label, score, a bar, and the path; and the counts by label at the end.

In: rows. Out: aligned lines, each printed as its row comes: the label's column is as wide as the longest
label (a third of the terminal at most, longer ones are shortened), the path stands last and whole, so that it
can be copied. Characters that would move the cursor are shown escaped; names are never read as markup. Where
the counts are printed is the caller's matter.
"""

from __future__ import annotations

import shutil

from rich.cells import cell_len, set_cell_size

from clipcli.output.explained import explained
from clipcli.output.sink import LineSink, SinkOptions, Stream
from clipcli.output.text import printable
from clipcli.records import Failure, Row

BAR = 8  # cells
NARROWEST = 8  # cells of the label's column
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BOLD, _DIM, _RED, _CYAN = "1", "2", "31", "36"


class TableSink(LineSink):
    """Writes 4 decimals, in colour if `options.color`."""

    def __init__(self, stream: Stream, options: SinkOptions) -> None:
        super().__init__(stream, options)
        width = options.width or shutil.get_terminal_size().columns
        self._widest = max(NARROWEST, width // 3)
        self._column = 0
        for label in options.labels:
            self._fit(printable(label))

    def line(self, row: Row) -> bytes:
        """`label score bar [label2 score2 …] path`, or `!kind path: message`; a group's best label before the path."""
        path = printable(row.path)
        if isinstance(row, Failure):
            width = self.top_k * (self._column + len("  0.0000  ")) - 1 + BAR  # up to the path of other rows
            kind = self._paint(_RED, _pad(f"!{row.kind}", width))
            return f"{kind}  {path}: {printable(row.message)}\n".encode()
        label = self._paint(_DIM if row.abstained else _BOLD, self._cell(row.label))
        columns = [label, f"{row.score:.4f} {self._paint(_CYAN, bar(row.score))}"]
        others = (*self.others(row), *([row.member] if row.member and row.member.label != row.label else []))
        columns += [f"{self._cell(other.label)}  {other.score:.4f}" for other in others]
        lines = ["  ".join([*columns, path]), *(explained(row, draws=self.options.color) if row.evidence else [])]
        return "".join(f"{line}\n" for line in lines).encode()

    def _fit(self, text: str) -> None:
        self._column = max(self._column, min(cell_len(text), self._widest))

    def _cell(self, label: str) -> str:
        """The label as wide as the column, which grows if the label wasn't known before."""
        text = printable(label)
        self._fit(text)
        return _pad(text, self._column) if cell_len(text) <= self._column else _shorten(text, self._column)

    def _paint(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.options.color else text


def bar(score: float) -> str:
    """A score of 0 to 1 as BAR cells, in eighths of a cell."""
    eighths = round(min(max(score, 0.0), 1.0) * BAR * 8) if score == score else 0
    whole, part = divmod(eighths, 8)
    return ("█" * whole + _EIGHTHS[part] * (whole < BAR)).ljust(BAR)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _shorten(text: str, width: int) -> str:
    return _pad(set_cell_size(text, width - 1).rstrip() + "…", width)
