"""What a person is shown of rows outside the rows: names made safe for a terminal, and counts by label.

No rich here: errors and summaries are printed by runs that draw no table.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path

from clipcli.records import Failure, Predictions, Row

LISTED = 20  # labels in the counts
_JOINERS = "\u200c\u200d"  # inside words and emoji of some scripts


def printable(text: str) -> str:
    r"""`text` with everything that is no visible character written as `\n`, `\x1b`, `\u202e`."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs":
        return char
    if "\udc80" <= char <= "\udcff":  # a byte of a name that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def counted(number: int, noun: str) -> str:
    """`1 picture`, `1,200 pictures`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tilde(path: str | Path) -> str:
    """A path without the name of its owner."""
    home = f"{Path.home()}{os.sep}"
    return f"~{os.sep}{str(path).removeprefix(home)}" if str(path).startswith(home) else str(path)


class Counts:
    """How many rows each label got; of multi-label rows each counts for all that it has."""

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.total = 0  # rows seen, failures included
        self.failed = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self.total += 1
        if isinstance(row, Failure):
            self.failed += 1
            self.failures[f"!{row.kind}"] += 1
        else:
            self.labels.update(row.labels)

    def add_all(self, rows: Predictions) -> None:
        """Count many rows."""
        self.total += len(rows.paths)
        self.labels.update(rows.labels)

    def lines(self) -> list[str]:
        """`count label`, the most frequent first, equal ones by name; the failures by kind last."""
        ranked = sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))
        rest = sum(count for _, count in ranked[LISTED:])
        rows = ranked[:LISTED] + sorted(self.failures.items())
        width = max((len(f"{count:,}") for _, count in [*rows, ("", rest)]), default=0)
        lines = [f"{count:>{width},}  {printable(name)}" for name, count in rows]
        if rest:
            lines.insert(LISTED, f"{rest:>{width},}  in {len(ranked) - LISTED:,} more labels")
        return lines
