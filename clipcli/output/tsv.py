r"""Tab-separated rows without a header: `path label score [label2 score2 …]`, or `path !kind message`.

In: rows. Out: lines in which backslash, tab, newline and carriage return are written `\\ \t \n \r`, so that
`cut` and `awk` see one row a line; all other bytes of a name stay as they are. A label that begins with `!`
is written `\!…`: an unescaped `!` in the second column is a failure. An abstaining row has the unknown label
with the best candidate's score; the columns after it start from the second candidate.
"""

from __future__ import annotations

import os
import re

from clipcli.output.sink import LineSink, encode
from clipcli.records import Failure, Row

_ESCAPES = {b"\\": b"\\\\", b"\t": b"\\t", b"\n": b"\\n", b"\r": b"\\r"}
_PLAIN = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}  # what follows a backslash; any other byte is itself
_SPECIAL = re.compile(rb"[\\\t\n\r]")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)


def escape(field: bytes) -> bytes:
    """`field` on one line and without tabs."""
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], field)


def unescape(field: bytes) -> bytes:
    """The inverse of `escape`, which also takes the backslash from a label's `!`."""
    return _ESCAPED.sub(lambda match: _PLAIN.get(match[1], match[1]), field)


class TsvSink(LineSink):
    """Writes 4 decimals."""

    def line(self, row: Row) -> bytes:
        """Columns between tabs."""
        columns = [escape(os.fsencode(row.path))]
        if isinstance(row, Failure):
            columns += [f"!{row.kind}".encode(), _text(row.message)]
        else:
            columns += [_label(row.label), _score(row.score)]
            for candidate in self.others(row):
                columns += [_label(candidate.label), _score(candidate.score)]
        return b"\t".join(columns) + b"\n"


def _text(text: str) -> bytes:
    return escape(encode(text))


def _label(label: str) -> bytes:
    return b"\\" + _text(label) if label.startswith("!") else _text(label)


def _score(score: float) -> bytes:
    return b"%.4f" % score
