"""CSV as RFC 4180 has it: a header, quotes where they are needed, lines that end in CR LF.

In: rows. Out: `path,label,score,cosine,margin,abstained,error[,label_2,score_2…]`, numbers with 6 decimals.
The bytes of names stay as they are, which is why Python's text-only csv module isn't used. A failure has
`kind: message` as its `error`, no label and no numbers.
"""

from __future__ import annotations

import os
import re

from clipcli.output.sink import LineSink, encode
from clipcli.records import Failure, Row

_NEEDS_QUOTES = re.compile(rb'[,"\r\n]')


class CsvSink(LineSink):
    """Writes as many columns in each row as the header has."""

    def header(self) -> bytes:
        """The names of the columns."""
        columns = ["path", "label", "score", "cosine", "margin", "abstained", "error"]
        for place in range(2, self.top_k + 1):
            columns += [f"label_{place}", f"score_{place}"]
        return ",".join(columns).encode() + b"\r\n"

    def line(self, row: Row) -> bytes:
        """Fields between commas."""
        fields = [os.fsencode(row.path)]
        if isinstance(row, Failure):
            fields += [b"", b"", b"", b"", b"false", encode(f"{row.kind}: {row.message}")]
        else:
            numbers = [_number(row.score), _number(row.cosine), _number(row.margin)]
            fields += [encode(row.label), *numbers, b"true" if row.abstained else b"false", b""]
            for candidate in self.others(row):
                fields += [encode(candidate.label), _number(candidate.score)]
        fields += [b""] * (7 + 2 * (self.top_k - 1) - len(fields))
        return b",".join(map(_quote, fields)) + b"\r\n"


def _quote(field: bytes) -> bytes:
    return b'"' + field.replace(b'"', b'""') + b'"' if _NEEDS_QUOTES.search(field) else field


def _number(number: float) -> bytes:
    return format(number, "z.6f").encode()  # z: no minus before a zero
