"""JSON lines: one object a row, its keys always in the same order.

In: rows. Out: UTF-8 lines, numbers with 6 decimals (null where a number isn't finite, which JSON can't say).
A name that is no UTF-8 is written with replacement characters, and its bytes as base64 in `path_bytes`.
Changes of this format only add keys.
"""

from __future__ import annotations

import json
import math
import os
import re
from base64 import b64encode
from functools import lru_cache

from clipcli.output.sink import LineSink, encode
from clipcli.records import Candidate, Failure, Prediction, Row

_is_plain = re.compile(r"[ !#-\[\]-~]*").fullmatch  # stands in JSON as it is
# Legal in JSON, but some readers take them for line ends and some terminals for commands.
_RISKY = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class JsonlSink(LineSink):
    """Writes five labels a row unless told otherwise."""

    default_top_k = 5

    def line(self, row: Row) -> bytes:
        """One object."""
        return f"{{{_path(row.path)}, {self._rest(row)}}}\n".encode()

    def _rest(self, row: Prediction | Failure) -> str:
        if isinstance(row, Failure):
            error = f'{{"kind": {_string(row.kind)}, "message": {_string(row.message)}}}'
            numbers = '"label": null, "score": null, "cosine": null, "margin": null, "abstained": false'
            return f'{numbers}, "top": [], "error": {error}'
        abstained = "true" if row.abstained else "false"
        top = ", ".join(map(_candidate, row.top[: self.top_k]))
        return (
            f'"label": {_label(row.label)}, "score": {_number(row.score)}, "cosine": {_number(row.cosine)}, '
            f'"margin": {_number(row.margin)}, "abstained": {abstained}, "top": [{top}], "error": null'
        )


def path_members(path: str) -> dict[str, str]:
    """A path as JSON has it: a name that is no UTF-8 with its bytes beside it."""
    name = os.fsencode(path)
    try:
        return {"path": name.decode()}
    except UnicodeDecodeError:
        return {"path": name.decode(errors="replace"), "path_bytes": b64encode(name).decode()}


def _path(path: str) -> str:
    if _is_plain(path):
        return f'"path": "{path}"'
    return ", ".join(f'"{key}": {_string(text)}' for key, text in path_members(path).items())


def _candidate(candidate: Candidate) -> str:
    label, score, cosine = candidate
    if math.isfinite(score + cosine):
        return f'{{"label": {_label(label)}, "score": {score:z.6f}, "cosine": {cosine:z.6f}}}'
    return f'{{"label": {_label(label)}, "score": {_number(score)}, "cosine": {_number(cosine)}}}'


def _string(text: str) -> str:
    if _is_plain(text):
        return f'"{text}"'
    return json.dumps(encode(text).decode("utf-8", "replace"), ensure_ascii=False).translate(_RISKY)


_label = lru_cache(10_000)(_string)  # few, in many rows


def _number(number: float) -> str:
    return format(number, "z.6f") if math.isfinite(number) else "null"  # z: no minus before a zero
