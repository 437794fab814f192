"""Templates: sentences with a place for the label, from named sets, files and the command line.

Comes in: names of sets, files, or literals with a placeholder. Goes out: `Template`s, expanded, each once,
the label's place written `<>`, or a file of some that were chosen. It doesn't fill them. The notation is told in
prompts/README.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from clipcli.errors import LabelError
from clipcli.paths import prompt_dirs
from clipcli.records import Template
from clipcli.zeroshot.files import checked, exists, near_file, propose, read_json, read_text, split_key

DEFAULT = "imagenet7"
NEUTRAL = "neutral.txt"  # lies among the sets and is none: whole prompts, for labels that are scored by themselves
MOST_EXPANSIONS = 10_000  # of one line
MOST_WEIGHT = 1_000_000  # and 1 / it is the least, so that the average stays within fp32

_PLACEHOLDER = re.compile(r"<>|\{\}|\{c\}|\{label\}")
_ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_COMMENT = re.compile(r"(?:^|\s)#(?:\s.*)?$|^#.*$")


def read(specs: Sequence[str]) -> list[Template]:
    """The templates of all `specs` in order, a text that comes again dropped.

    Each is a literal with a placeholder, a set's name, or a file (`FILE.json#KEY` for one list of many).
    Raises LabelError: unknown, unreadable, or a template without a place for the label, with file:line.
    """
    found: dict[str, Template] = {}
    for spec in specs:
        for template in _read_one(spec):
            found.setdefault(template.text, template)
    return list(found.values())


def as_line(text: str, weight: float) -> str:
    """A template as a line of a template file: a weight other than 1 stands before it, with a tab between."""
    return text if weight == 1 else f"{weight}\t".replace(".0\t", "\t") + text


def write(templates: Sequence[Template], path: Path, comment: str) -> None:
    """Write a template file that `read` gives back, its purpose first, whole or not at all.

    Raises LabelError for a template that a text file can't hold, OutputError.
    """
    from clipcli.weights.folder import whole_file

    lines = [as_line(template.text, template.weight) for template in templates]
    for line, template in zip(lines, templates, strict=True):
        if list(_from_lines(line, str(path))) != [template]:
            what = f'{path}: template "{template.text}" would be read as a comment'
            raise LabelError(what, hint="write it without the #")
    with whole_file(path) as file:
        file.write("".join(f"{line}\n" for line in (f"# {comment}", *lines)).encode())


def sets() -> dict[str, Path]:
    """The file of every named set, the user's own before the shipped ones, names in order."""
    files = (path for folder in reversed(prompt_dirs()) for path in folder.glob("*.txt"))
    return dict(sorted({path.stem: path for path in files if path.name != NEUTRAL}.items()))


def _read_one(spec: str) -> list[Template]:
    if _PLACEHOLDER.search(spec):
        return list(_expand(spec, "--templates"))
    known = sets()
    path, key = split_key(str(known.get(spec, spec)))
    if spec not in known and not (spec and exists(path)):
        raise _unknown(spec, path, list(known))
    if path.suffix.lower() == ".json":
        name = str(path) if key is None else f"{path}#{key}"
        templates = list(_from_json(read_json(name), name))
    else:
        templates = list(_from_lines(read_text(path), str(path)))
    if not templates:
        raise LabelError(f"{path}: no templates in it", hint='write one a line, such as "a photo of a <>."')
    return templates


def _unknown(spec: str, path: Path, known: list[str]) -> LabelError:
    literal = " " in spec.strip()
    if path.suffix.lower() in (".txt", ".json") or (os.sep in spec and not literal):
        return LabelError(f"{path}: no such template file", hint=near_file(path))
    if literal:
        return _without_place(spec, "--templates")
    return LabelError(f'no template set "{spec}"', hint=propose(spec, known))


def _without_place(text: str, where: str) -> LabelError:
    return LabelError(f'{where}: template "{text}" has no place for the label', hint="write <> where the label goes")


def _from_lines(text: str, file: str) -> Iterator[Template]:
    for number, line in enumerate(text.split("\n"), 1):
        if content := _COMMENT.sub("", line.strip()).strip():
            yield from _expand(content, f"{file}:{number}")


def _from_json(data: Any, file: str) -> Iterator[Template]:
    if isinstance(data, dict):
        hint = propose("", (f"{file}#{key}" for key in data))
        raise LabelError(f"{file}: an object of lists: which one is meant?", hint=hint)
    if not isinstance(data, list):
        raise LabelError(f"{file}: no list of templates", hint='write ["a photo of a <>.", …]')
    for number, text in enumerate(data, 1):
        where = f"{file}: entry {number}"
        yield from _expand(checked(text, "template", where), where)


def _expand(text: str, where: str) -> Iterator[Template]:
    """`2⇥a {b|c} <>.` as two templates of weight 2: the leftmost alternatives change last."""
    weight, tab, rest = text.partition("\t")
    text = checked(rest if tab else text, "template", where)
    number = _weight(weight, where) if tab else 1.0
    fixed = _PLACEHOLDER.sub("<>", text)
    parts = _ALTERNATIVES.split(fixed)  # text, alternatives, text, alternatives, …, text
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise LabelError(
            f'{where}: template "{text}" has a brace that is neither a placeholder nor {{a|b}}',
            hint="write <> where the label goes; {a|b} can't hold another {…}",
        )
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_EXPANSIONS:
        raise LabelError(
            f'{where}: template "{text[:60]}…" expands to more than {MOST_EXPANSIONS:,}',
            hint="write it as several lines",
        )
    for choice in product(*choices):
        expanded = " ".join("".join(choice).split())  # an empty alternative may leave two spaces
        if "<>" not in expanded:
            raise _without_place(expanded, where)
        yield Template(expanded, number)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT:
        what = f'"{text.strip()[:40]}" before the tab is no weight'
        raise LabelError(
            f"{where}: {what}", hint=f"write a number from 1/{MOST_WEIGHT:,} to {MOST_WEIGHT:,}, or no tab"
        )
    return weight
