"""Label files: classes with their words, from text, CSV, TSV, JSON or the command line.

Comes in: a file (`FILE.json#KEY`: one list of many), or names. Goes out: `Label`s in order, each name once.
It doesn't fill templates or count tokens. Errors are LabelErrors that begin with file:line.

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


def read(spec: str) -> list[Label]:
    """The labels of a file: `.csv`, `.tsv`, `.json`, `.json#KEY`, or text under any other name."""
    if spec == "-":
        raise LabelError("labels can't come from stdin", hint="write them to a file, or use --label NAME")
    path, key = split_key(spec)
    kind = path.suffix.lower()
    if kind == ".json":
        found = _from_json(read_json(spec), spec, warn=key is None)
    elif kind in (".csv", ".tsv"):
        found = _from_table(read_text(path), spec, "\t" if kind == ".tsv" else None)
    else:
        found = _from_lines(read_text(path), spec)
    labels = join(found)
    if not labels:
        raise LabelError(f"{spec}: no labels in it", hint="write one label a line")
    return labels


def from_names(names: Iterable[str], where: str = "--label") -> list[Label]:
    """Labels of the command line, each in the notation of a line (but `#` is an ordinary character)."""
    return join([_from_line(name, where) for name in names])


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
        labels.append(Label(label, (), _words(listed, "prompt", where), where=where))
    return join(labels)


def join(*groups: Iterable[Label]) -> list[Label]:
    """All labels, in order. Raises LabelError if a name stands twice; warns if only case tells two apart."""
    first: dict[str, Label] = {}
    folded: dict[str, Label] = {}
    for label in chain(*groups):
        if known := first.get(label.name):
            raise LabelError(
                f'{label.where}: label "{label.name}" stands twice{_first(known, label)}',
                hint='give one of them another name: "other name = words" in text, "aliases" in CSV and JSON',
            )
        near = folded.setdefault(label.name.casefold(), label)
        if near is not label:
            message = '%s: label "%s" differs from "%s"%s only in case'
            log.warning(message, label.where, label.name, near.name, _first(near, label))
        first[label.name] = label
    return list(first.values())


def _first(known: Label, label: Label) -> str:
    """Where the first of two labels stands: the line or entry if in the same file."""
    file, _, place = known.where.rpartition(":")
    if not file or file != label.where.rpartition(":")[0]:
        return f" (first in {known.where})" if known.where != label.where else ""
    return f" (first on line {place})" if place.isdigit() else f" (first in{place})"


# Text


def _from_lines(text: str, file: str) -> Iterator[Label]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield _from_line(line, f"{file}:{number}")


def _from_line(line: str, where: str) -> Label:
    """`name = alias | alias :: description :: description`; an escaped character means itself."""
    hidden = re.sub(r"\\([\\|=#:])", lambda found: chr(ESCAPED.index(found[1]) + 1), checked(line, "label", where))
    head, *descriptions = hidden.split("::")
    name, equals, words = head.partition("=")
    if equals and "|" in name:
        raise LabelError(f'{where}: "|" before "="', hint=r"write \| or \= if the label has that character")
    aliases = _words(map(_reveal, (words if equals else head).split("|")), "alias", where)
    return Label(
        checked(_reveal(name), "label", where) if equals else aliases[0],
        aliases,
        _words(map(_reveal, descriptions), "description", where),
        where=where,
    )


def _reveal(hidden: str) -> str:
    return re.sub("[\x01-\x05]", lambda found: ESCAPED[ord(found[0]) - 1], hidden.strip())


def _words(values: Iterable[object], what: str, where: str) -> tuple[str, ...]:
    """Checked words or sentences, each once; sentences may come with line breaks."""
    if what != "alias":
        values = map(_one_line, values)
    return tuple(dict.fromkeys(checked(value, what, where) for value in values))


def _one_line(value: object) -> object:
    return " ".join(value.split()) if isinstance(value, str) else value


# Tables and JSON: entries with the same keys


def _from_table(text: str, file: str, delimiter: str | None) -> Iterator[Label]:
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
                continue
            if len(row) > len(columns):
                hint = f"a cell with {cut!r} in it needs quotes"
                raise LabelError(f"{where}: {len(row)} cells, but {len(columns)} columns", hint=hint)
            yield _from_entry(dict(zip(columns, row, strict=False)), where)
    except csv.Error as error:
        raise LabelError(f"{file}:{rows.line_num}: bad CSV: {error}", hint='a quote in a cell is ""') from error


def _from_json(data: Any, file: str, warn: bool) -> Iterator[Label]:
    if isinstance(data, dict):
        entries: list[Any] = [{"label": name, "aliases": aliases} for name, aliases in data.items()]
    elif isinstance(data, list):
        entries = [entry if isinstance(entry, dict) else {"label": entry} for entry in data]
    else:
        hint = 'write ["label", …], [{"label": "…", "aliases": ["…"]}, …] or {"label": ["alias", …]}'
        raise LabelError(f"{file}: no list or object of labels", hint=hint)
    for number, entry in enumerate(entries, 1):
        label = _from_entry(entry, f"{file}: entry {number}")
        if warn and len(label.aliases) > MANY_ALIASES:
            message = '%s: label "%s" has %d aliases; if these are labels, name the list: %s#%s'
            log.warning(message, label.where, label.name, len(label.aliases), file, label.name)
        yield label


def _from_entry(entry: dict[str, Any], where: str) -> Label:
    """A row or object with `label` and perhaps `aliases`, `descriptions`, `group`, `threshold`."""
    if entry.get("label") is None:
        raise LabelError(f'{where}: no "label"', hint='each entry needs a "label"')
    name = checked(entry["label"], "label", where)
    group, threshold = entry.get("group"), entry.get("threshold")
    return Label(
        name,
        _words(_listed(entry.get("aliases"), "aliases", where), "alias", where) or (name,),
        _words(_listed(entry.get("descriptions"), "descriptions", where), "description", where),
        group=checked(group, "group", where) if group not in (None, "") else None,
        threshold=_threshold(threshold, where) if threshold not in (None, "") else None,
        where=where,
    )


def _listed(value: object, what: str, where: str) -> list[object]:
    """A cell `a|b`, or JSON's list; nothing is an empty list."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        text = checked(value if what == "aliases" else _one_line(value), what, where)
        hidden = text.replace(r"\\", "\x01").replace(r"\|", "\x02")
        return [_reveal(part) for part in hidden.split("|")]
    if not isinstance(value, list):
        raise LabelError(f"{where}: {what} {value!r} are no list", hint='write ["…", "…"]')
    return value


def _threshold(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LabelError(f"{where}: threshold {value!r} is no number", hint="write it like 0.25")
    return number
