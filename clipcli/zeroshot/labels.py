"""Label files: classes with their words, from text, CSV, TSV, JSON or the command line.

Comes in: a file (`FILE.json#KEY`: one list of many), or names. Goes out: `Label`s in order, each name once.
It doesn't fill templates or count tokens. Errors are LabelErrors that begin with file:line; what becomes of them
is a `Report`'s: the first is raised, unless somebody wants them all (lint).

Text, a label a line:           tabby | tabby cat :: a cat with stripes
Another name than its words:    n02123045 = tabby cat | tiger cat
CSV, TSV, JSON:                 `aliases`, where given, are all the words; else the label is its own word
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from clipcli.errors import LabelError
from clipcli.records import Label
from clipcli.zeroshot.files import checked, read_json, read_text, split_key

log = logging.getLogger("clipcli")

ESCAPED = "\\|=#:"
MANY_ALIASES = 50  # more than that under one key are rather labels of their own
SENTENCES = ("description", "descriptions", "prompt")  # they may come with line breaks


class Report:
    """What becomes of what is wrong: the first error is raised, warnings go to the log."""

    def error(self, error: LabelError, code: str = "syntax", label: Label | None = None) -> None:
        """Something that can't be used. If this returns, reading goes on without it."""
        raise error

    def warning(self, label: Label, message: str, code: str, other: Label | None = None) -> None:
        """Something that is hardly meant; `other` is an earlier label that it clashes with."""
        log.warning("%s: %s", label.where, message)

    def line(self, where: str, line: str) -> None:
        """A label's line as it stands in a text file."""


STRICT = Report()


def read(spec: str, report: Report = STRICT) -> list[Label]:
    """The labels of a file: `.csv`, `.tsv`, `.json`, `.json#KEY`, or text under any other name."""
    if spec == "-":
        raise LabelError("labels can't come from stdin", hint="write them to a file, or use --label NAME")
    path, key = split_key(spec)
    kind = path.suffix.lower()
    if kind == ".json":
        found = _from_json(read_json(spec, report.error), spec, key is None, report)
    elif kind in (".csv", ".tsv"):
        found = _from_table(read_text(path, report.error), spec, "\t" if kind == ".tsv" else None, report)
    else:
        found = _from_lines(read_text(path, report.error), spec, report)
    labels = join(found, report=report)
    if not labels:
        report.error(LabelError(f"{spec}: no labels in it", hint="write one label a line"), "empty")
    return labels


def from_names(names: Iterable[str], where: str = "--label") -> list[Label]:
    """Labels of the command line, each in the notation of a line (but `#` is an ordinary character)."""
    return join(*(_from_line(name, where, STRICT) for name in names))


def read_descriptions(spec: str | Path) -> list[Label]:
    """Labels known by whole prompts alone: `{"label": ["sentence", …]}`; they have no aliases."""
    data = read_json(str(spec))
    if not isinstance(data, dict) or not data:
        raise LabelError(f"{spec}: no labels with prompts in it", hint='write {"label": ["sentence", …], …}')
    labels = []
    for number, (name, sentences) in enumerate(data.items(), 1):
        where = f"{spec}: entry {number}"
        label = checked(name, "label", where)
        listed = [sentences] if isinstance(sentences, str) else sentences
        if not isinstance(listed, list) or not listed:
            raise LabelError(f'{where}: label "{label}" has no list of prompts', hint='write ["sentence", …]')
        labels.append(Label(label, (), _words(listed, "prompt", where, STRICT), where=where))
    return join(labels)


def join(*groups: Iterable[Label], report: Report = STRICT) -> list[Label]:
    """All labels, in order. Reports an error if a name stands twice, warns if only case tells two apart."""
    first: dict[str, Label] = {}
    folded: dict[str, Label] = {}
    for label in chain(*groups):
        if known := first.get(label.name):
            message = f'{label.where}: label "{label.name}" stands twice{place_of(known, label)}'
            hint = 'give one of them another name: "other name = words" in text, "aliases" in CSV and JSON'
            report.error(LabelError(message, hint=hint), "duplicate", label)
            continue
        near = folded.setdefault(label.name.casefold(), label)
        if near is not label:
            message = f'label "{label.name}" differs from "{near.name}"{place_of(near, label)} only in case'
            report.warning(label, message, "case", near)
        first[label.name] = label
    return list(first.values())


def place_of(known: Label, label: Label) -> str:
    """Where the first of two labels stands, seen from the second: the line or entry if in the same file."""
    file, _, place = known.where.rpartition(":")
    if not file or file != label.where.rpartition(":")[0]:
        return f" (first in {known.where})" if known.where != label.where else ""
    return f" (first on line {place})" if place.isdigit() else f" (first in{place})"


# Text


def _from_lines(text: str, file: str, report: Report) -> Iterator[Label]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            report.line(f"{file}:{number}", line)
            yield from _from_line(line, f"{file}:{number}", report)


def _from_line(line: str, where: str, report: Report) -> list[Label]:
    """`name = alias | alias :: description :: description`; an escaped character means itself.

    One label, or none where that much is wrong.
    """
    hidden = "".join(
        re.sub(r"\\([\\|=#:])", lambda found: chr(ESCAPED.index(found[1]) + 1), text)
        for text in _words([line], "label", where, report)
    )
    if not hidden:
        return []
    head, *descriptions = hidden.split("::")
    name, equals, words = head.partition("=")
    if equals and "|" in name:
        hint = r"write \| or \= if the label has that character"
        report.error(LabelError(f'{where}: "|" before "="', hint=hint))
        return []
    aliases = _words(map(_reveal, (words if equals else head).split("|")), "alias", where, report)
    names = _words([_reveal(name)], "label", where, report) if equals else aliases[:1]
    described = _words(map(_reveal, descriptions), "description", where, report)
    return [Label(name, aliases, described, where=where) for name in names]


def _reveal(hidden: str) -> str:
    return re.sub("[\x01-\x05]", lambda found: ESCAPED[ord(found[0]) - 1], hidden.strip())


def _words(values: Iterable[object], what: str, where: str, report: Report) -> tuple[str, ...]:
    """Checked words or sentences, each once, without those that are wrong."""
    words: dict[str, None] = {}
    for value in values:
        try:
            words[checked(_one_line(value) if what in SENTENCES else value, what, where)] = None
        except LabelError as error:
            report.error(error)
    return tuple(words)


def _one_line(value: object) -> object:
    return " ".join(value.split()) if isinstance(value, str) else value


# Tables and JSON: entries with the same keys


def _from_table(text: str, file: str, delimiter: str | None, report: Report) -> Iterator[Label]:
    header = text.partition("\n")[0]
    cut = delimiter or max(",;", key=header.count)  # spreadsheets write `;` where the comma is decimal
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=cut, strict=True)
    columns: list[str] = []
    number = 0
    try:
        for row in rows:
            where, number = f"{file}:{number + 1}", rows.line_num  # a cell may hold line breaks
            if not any(map(str.strip, row)):
                continue
            if not columns:
                columns = [name.strip().lower() for name in row]
                if "label" not in columns:
                    hint = f"the first line names the columns; it has: {', '.join(columns)}"
                    raise LabelError(f'{where}: no column "label"', hint=hint)
            elif len(row) > len(columns):
                hint = f"a cell with {cut!r} in it needs quotes"
                report.error(LabelError(f"{where}: {len(row)} cells, but {len(columns)} columns", hint=hint))
            else:
                yield from _from_entry(dict(zip(columns, row, strict=False)), where, report)
    except csv.Error as error:
        report.error(LabelError(f"{file}:{rows.line_num}: bad CSV: {error}", hint='a quote in a cell is ""'))


def _from_json(data: Any, file: str, whole: bool, report: Report) -> Iterator[Label]:
    if isinstance(data, dict):
        entries: list[Any] = [{"label": name, "aliases": aliases} for name, aliases in data.items()]
    elif isinstance(data, list):
        entries = [entry if isinstance(entry, dict) else {"label": entry} for entry in data]
    else:
        hint = 'write ["label", …], [{"label": "…", "aliases": ["…"]}, …] or {"label": ["alias", …]}'
        raise LabelError(f"{file}: no list or object of labels", hint=hint)
    for number, entry in enumerate(entries, 1):
        if isinstance(entry.get("label"), tuple):
            continue  # the second of two equal keys: reported
        for label in _from_entry(entry, f"{file}: entry {number}", report):
            if whole and len(label.aliases) > MANY_ALIASES:
                many = f'label "{label.name}" has {len(label.aliases)} aliases'
                message = f"{many}; if these are labels, name the list: {file}#{label.name}"
                report.warning(label, message, "many-aliases")
            yield label


def _from_entry(entry: dict[str, Any], where: str, report: Report) -> list[Label]:
    """A row or object with `label` and perhaps `aliases`, `descriptions`, `group`, `threshold`: one label, or none."""
    if entry.get("label") is None:
        report.error(LabelError(f'{where}: no "label"', hint='each entry needs a "label"'))
        return []
    names = _words([entry["label"]], "label", where, report)
    aliases = _words(_listed(entry.get("aliases"), "aliases", where, report), "alias", where, report)
    described = _listed(entry.get("descriptions"), "descriptions", where, report)
    descriptions = _words(described, "description", where, report)
    group, threshold = entry.get("group"), entry.get("threshold")
    groups = _words([] if group in (None, "") else [group], "group", where, report)
    least = _threshold(threshold, where, report) if threshold not in (None, "") else None
    return [Label(name, aliases or names, descriptions, next(iter(groups), None), least, where=where) for name in names]


def _listed(value: object, what: str, where: str, report: Report) -> list[object]:
    """A cell `a|b`, or JSON's list; nothing is an empty list."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        texts = _words([value], what, where, report)
        hidden = "".join(texts).replace(r"\\", "\x01").replace(r"\|", "\x02")
        return [_reveal(part) for part in hidden.split("|")] if hidden else []
    if not isinstance(value, list):
        report.error(LabelError(f"{where}: {what} {value!r} are no list", hint='write ["…", "…"]'))
        return []
    return value


def _threshold(value: object, where: str, report: Report) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if -1 <= number <= 1:  # the range of cosines, and more than that of scores
        return number
    shown = repr(value)[:40]
    report.error(LabelError(f"{where}: threshold {shown} is no number from -1 to 1", hint="write it like 0.25"))
    return None
