"""Paths alone, for `xargs`: one name a line, or NUL-separated.

In: rows. Out: the names' own bytes; failures and abstaining rows are left out. A name that holds a newline is
written as it is: only NUL keeps such names apart.
"""

from __future__ import annotations

import os

from clipcli.output.sink import LineSink
from clipcli.records import Failure, Row


class PathsSink(LineSink):
    """Writes the path and its end."""

    def line(self, row: Row) -> bytes:
        """`path` and a newline or NUL."""
        if isinstance(row, Failure) or row.abstained:
            return b""
        return os.fsencode(row.path) + (b"\0" if self.options.null else b"\n")
