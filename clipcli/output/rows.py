"""Rows read back from what the sinks wrote: JSON Lines, CSV and TSV, told apart by their first line.

In: a binary stream. Out: `records.Row` one at a time. It is the inverse of `jsonl.py`, `csv.py` and `tsv.py`:
a row written anew in its own format has the same bytes. What a format doesn't hold:

- numbers are nan: cosine and margin in TSV, the cosines of second and further labels in CSV;
- TSV doesn't say that a row abstained: it has the unknown label, and reads like any other;
- which label an abstaining row left out, JSON Lines alone says: elsewhere `top` begins with the unknown label itself.

A line that no sink writes is a UsageError with file:line. What a killed run or a full disk left of the last one is
no error: it is reported. Nothing is decided here about what a stopped run does next.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import sys
from base64 import b64decode
from collections.abc import Iterator
from typing import Any, BinaryIO

from clipcli.errors import UsageError
from clipcli.output.tsv import unescape
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row

log = logging.getLogger("clipcli")

_LONGEST = 1 << 26  # bytes of a row; what is longer has no line ends and never was a row file
_COLUMNS = ["path", "label", "score", "cosine", "margin", "abstained", "error"]
_HINT = "rows are read as classify writes them: jsonl, csv or tsv"


def read_rows(stream: BinaryIO, name: str = "rows") -> Iterator[Row]:
    """All whole rows; a torn last line is left out with a notice. Raises UsageError, also where nothing is whole."""
    first = stream.readline(_LONGEST)
    format = _format_of(first)
    number, columns = 1, 0
    for record, is_torn in _records(stream, first, has_quotes=format == "csv"):
        if is_torn and number == 1:
            raise UsageError(f"{name}:1: not a row: the line has no end", hint=_HINT)
        if is_torn:
            log.warning("%s: the last line is torn, and left out: the run that wrote it was stopped", name)
            return
        try:
            if len(record) >= _LONGEST:
                raise ValueError(f"more than {_LONGEST >> 20} MiB")
            row = None
            if format == "csv" and number == 1:
                columns = _columns(record)
            else:
                row = _row(record, format, columns)
                if "\0" in row.path:  # it would be two names behind --print0
                    raise ValueError("a name holds a NUL")
        except ValueError as error:
            what = f"{name}:{number}: not a row of {format or 'any format'}: {str(error)[:100]}"
            raise UsageError(what, hint=_HINT) from error
        number += record.count(b"\n")
        if row is not None:
            yield row


def _records(stream: BinaryIO, line: bytes, *, has_quotes: bool) -> Iterator[tuple[bytes, bool]]:
    """The bytes of each row, whose first `line` has been read; and whether the stream ends within it.

    A row is a line, in CSV as many as its quotes hold together.
    """
    while line:
        lines, length = [line], len(line)
        is_open = has_quotes and line.count(b'"') % 2 == 1
        while is_open and length < _LONGEST and (line := stream.readline(_LONGEST - length)):
            lines.append(line)
            length += len(line)
            is_open ^= line.count(b'"') % 2 == 1
        yield b"".join(lines), length < _LONGEST and (is_open or not lines[-1].endswith(b"\n"))
        line = stream.readline(_LONGEST)


def _row(record: bytes, format: str | None, columns: int) -> Row:
    """Raises ValueError."""
    if format == "jsonl":
        return _from_json(record)
    if format == "tsv":
        return _from_tsv(record)
    if format == "csv":
        return _from_csv(_split_csv(record), columns)
    raise ValueError("it begins with no JSON object, no header of CSV, no column of TSV")


def _format_of(line: bytes) -> str | None:
    """What the first line of a file belongs to: no sink but TSV's ever writes a tab there, and TSV always does."""
    starts = {b"{": "jsonl", b"path,": "csv"}
    return "tsv" if b"\t" in line else next((name for start, name in starts.items() if line.startswith(start)), None)


def _failure(path: str, kind: str, message: str) -> Failure:
    if kind not in FailureKind.__members__.values():
        raise ValueError(f"no kind of failure: {kind}")
    return Failure(path, FailureKind(kind), message)


# ---- JSON Lines


def _from_json(record: bytes) -> Row:
    try:
        row = json.loads(record.decode(), parse_int=float)  # a whole number of any length is a number
    except (ValueError, RecursionError) as error:
        raise ValueError("bad JSON, or not UTF-8") from error
    path = path_of(row)
    failed = _get(row, "error", dict | None)
    if failed is not None:
        return _failure(path, _text(failed, "kind"), _text(failed, "message"))
    top = (
        Candidate(_text(one, "label"), _number(one, "score"), _number(one, "cosine")) for one in _get(row, "top", list)
    )
    numbers = (_number(row, "score"), _number(row, "cosine"), _number(row, "margin"))
    return Prediction(path, _text(row, "label"), *numbers, _get(row, "abstained", bool), tuple(top))


def path_of(members: Any) -> str:
    """The path in an object of JSON, its bytes as they were: the inverse of `jsonl.path_members`. Raises ValueError."""
    if isinstance(members, dict) and "path_bytes" in members:
        return os.fsdecode(b64decode(_text(members, "path_bytes"), validate=True))
    return os.fsdecode(_text(members, "path").encode())


def _get(holder: Any, key: str, kind: Any) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        raise ValueError(f'no "{key}"')
    if not isinstance(holder[key], kind):
        raise ValueError(f'"{key}" is of the wrong type')
    return holder[key]


def _text(holder: Any, key: str) -> str:
    text: str = _get(holder, key, str)
    text.encode()  # raises for half of a character, which no sink writes
    return text


def _number(holder: Any, key: str) -> float:
    number: float | None = _get(holder, key, float | None)
    return math.nan if number is None else number


# ---- TSV and CSV


def _from_tsv(record: bytes) -> Row:
    path, *columns = map(unescape, record.removesuffix(b"\n").split(b"\t"))
    if len(columns) < 2 or len(columns) % 2:
        raise ValueError(f"columns are 3, 5, 7, … here {len(columns) + 1}")
    if record.split(b"\t", 2)[1].startswith(b"!"):  # a label's own is escaped
        return _failure(os.fsdecode(path), _decode(columns[0][1:]), _decode(columns[1]))
    top = _candidates(columns)
    return Prediction(os.fsdecode(path), top[0].label, top[0].score, math.nan, math.nan, False, top)


def _split_csv(record: bytes) -> list[bytes]:
    try:
        (fields,) = csv.reader([record.decode("latin-1")], strict=True)  # a character a byte
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return [field.encode("latin-1") for field in fields]


def _columns(header: bytes) -> int:
    """How many columns CSV has, by its first row. Raises ValueError for another header than the sink writes."""
    fields = _split_csv(header)
    others = [f"{kind}_{place}" for place in range(2, 2 + (len(fields) - 7) // 2) for kind in ("label", "score")]
    if fields != [name.encode() for name in _COLUMNS + others]:
        raise ValueError(f"the header is not {','.join(_COLUMNS)}")
    return len(fields)


def _from_csv(fields: list[bytes], columns: int) -> Row:
    if len(fields) != columns:
        raise ValueError(f"{len(fields)} columns, the header has {columns}")
    path, (label, *numbers, abstained, error) = os.fsdecode(fields[0]), fields[1:7]
    if error:
        kind, _, message = error.partition(b": ")
        return _failure(path, _decode(kind), _decode(message))
    if abstained not in (b"true", b"false"):
        raise ValueError("abstained is neither true nor false")
    score, cosine, margin = map(float, numbers)
    best = Candidate(_decode(label), score, cosine)
    others = fields[7:]
    while others and not any(others[-2:]):  # fewer labels than columns
        del others[-2:]
    return Prediction(path, best.label, score, cosine, margin, abstained == b"true", (best, *_candidates(others)))


def _candidates(columns: list[bytes]) -> tuple[Candidate, ...]:
    """Labels and scores by turns."""
    pairs = zip(columns[::2], columns[1::2], strict=True)
    return tuple(Candidate(_decode(label), float(score), math.nan) for label, score in pairs)


def _decode(text: bytes) -> str:
    """The inverse of `sink.encode`."""
    return text.decode("utf-8", sys.getfilesystemencodeerrors())
