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
from itertools import chain

from clipcli.output.sink import LineSink, encode
from clipcli.records import Candidate, Evidence, Failure, Prediction, Predictions, PromptCosine, Row

_is_plain = re.compile(r"[ !#-\[\]-~]*").fullmatch  # stands in JSON as it is
_ROW = '{%s, "label": %s, "score": %s, "cosine": %s, "margin": %s, "abstained": %s, "top": [%s], "error": %s}\n'
_CANDIDATE = '{"label": %s, "score": %.6f, "cosine": %.6f}'
# Legal in JSON, but some readers take them for line ends and some terminals for commands.
_RISKY = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class JsonlSink(LineSink):
    """Writes five labels a row unless told otherwise."""

    default_top_k = 5

    def line(self, row: Row) -> bytes:
        """One object."""
        if isinstance(row, Failure):
            error = f'{{"kind": {_string(row.kind)}, "message": {_string(row.message)}}}'
            return (_ROW % (_path(row.path), *["null"] * 4, "false", "", error)).encode()
        score, cosine, margin = _number(row.score), _number(row.cosine), _number(row.margin)
        top = ", ".join(map(_candidate, row.top[: self.top_k]))
        abstained, end = "true" if row.abstained else "false", f"null{_more(row)}"
        return (_ROW % (_path(row.path), _label(row.label), score, cosine, margin, abstained, top, end)).encode()

    def write_all(self, rows: Predictions) -> None:
        """The same lines, made of columns: one template, filled by values of the same place."""
        import numpy as np

        cosines = np.where(np.abs(rows.cosines) < 5e-7, 0.0, rows.cosines)  # no minus before a zero
        numbers = (rows.scores, cosines, rows.margins[:, None])
        if not all(np.isfinite(part).all() for part in numbers):
            return super().write_all(rows)
        score, cosine, margin = (part.T.tolist() for part in numbers)
        names = list(map(_label, rows.names))
        labels = [[names[one] for one in column] for column in rows.best.T.tolist()]
        top = list(zip(labels, score, cosine, strict=True))[: self.top_k]
        abstained = ["true" if one else "false" for one in rows.abstained.tolist()]
        paths = map(_path, rows.paths)
        if _is_plain("".join(rows.paths)):
            paths = map('"path": "%s"'.__mod__, rows.paths)
        first = (paths, map(_label, rows.labels), score[0], cosine[0], margin[0], abstained)
        template = _ROW % ("%s", "%s", "%.6f", "%.6f", "%.6f", "%s", ", ".join([_CANDIDATE] * len(top)), "null")
        self.stream.write("".join(map(template.__mod__, zip(*first, *chain(*top), strict=True))).encode())


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


def _more(row: Prediction) -> str:
    """What only some runs say: the best label of a group, what an answer rests on."""
    member = f', "member": {_candidate(row.member)}' if row.member else ""
    return f'{member}, "evidence": {_evidence(row.evidence)}' if row.evidence else member


def _evidence(evidence: Evidence) -> str:
    crop = "null" if evidence.crop_file is None else _string(evidence.crop_file)
    return f'{{"crop": {crop}, "prompts": [{", ".join(map(_prompt, evidence.prompts))}]}}'


def _prompt(prompt: PromptCosine) -> str:
    template, alias = ("null" if text is None else _label(text) for text in (prompt.template, prompt.alias))
    return (
        f'{{"label": {_label(prompt.label)}, "text": {_string(prompt.text)}, "template": {template}, '
        f'"alias": {alias}, "weight": {_number(prompt.weight)}, "cosine": {_number(prompt.cosine)}}}'
    )


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
