"""Prompt advice for people and for programs.

In: an `Advice`, of labelled pictures, or a `Weighing`, of others. Out: lines. What is good advice is the task's matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from clipcli.cli.evaluation import estimate, percent, plain, section
from clipcli.cli.labels import json_text
from clipcli.output.text import counted
from clipcli.tasks.advise import Advice, Weighing

if TYPE_CHECKING:
    from clipcli.records import Template
    from clipcli.tasks.advise import Pair

# Title, header, rows, and how many of them are shown (0: the usual number). The last column is for words.
Table = tuple[str, list[str], list[list[str]], int]


def summary(found: Advice | Weighing) -> str:
    """What is worth doing, in a line."""
    if isinstance(found, Weighing):
        return f"{counted(found.pictures, 'picture')}, other labels by these weights: {found.changed:,}"
    gain = found.measured[-1].gain
    verdict = "better" if gain.low > 0 else "worse" if gain.high < 0 else "no clear difference"
    chosen = f"{len(found.chosen)} of {counted(len(found.ranked), 'template')} chosen"
    return f"{chosen}; on the other half against all: {' '.join(estimate(gain, '+'))}, {verdict}"


def templates(found: Advice | Weighing) -> list[Template]:
    """Those worth keeping."""
    return [one.template for one in found.weighed] if isinstance(found, Weighing) else list(found.chosen)


def report(found: Advice | Weighing, top: int, painted: bool) -> list[str]:
    """Tables, `top` lines of each that may be long; their titles stand out where they are `painted`."""
    tables = _of_weighing(found) if isinstance(found, Weighing) else _of_advice(found)
    lines: list[str] = []
    for title, header, rows, most in tables:
        if rows:
            lines += section(title, [header, *rows], frozenset(range(len(header) - 1)), most or top, painted)
    return lines[1:]  # no empty line before the first title


def as_json(found: Advice | Weighing) -> str:
    """One object, with everything in it. Changes of it only add keys."""
    return json_text(plain(found))


def _of_advice(found: Advice) -> Iterator[Table]:
    a, b = found.pictures
    ways = [
        [percent(way.on_a), *estimate(way.on_b), *estimate(way.gain, "+"), f"{way.templates:,}", way.name]
        for way in found.measured
    ]
    title = f"percent right on A, {counted(a, 'picture')} to choose templates by, and on B, {b:,} others"
    yield title, ["A", "B", "", "B: against all", "", "templates", ""], ways, len(ways)
    yield "chosen on A", ["weight", ""], [[f"{x.weight:g}", x.text] for x in found.chosen], len(found.chosen)
    title = "each alone; without: how many more answers of all others together are right"
    header = ["right", "loss", "without", ""]
    ranked = [
        [percent(one.accuracy), f"{one.loss:.3f}", f"{one.without:+,}", one.template.text] for one in found.ranked
    ]
    yield title, header, ranked, 0
    harm = sorted((one for one in found.ranked if one.without > 0), key=lambda one: -one.without)
    hurting = [[f"{one.without:+,}", one.template.text] for one in harm]
    yield "templates that hurt: how many more answers are right without", ["", ""], hurting, 0
    aliases = [
        [f"{one.without_on_a:+,}", f"{one.without_on_b:+,}", f"{one.alias} ({one.label})"]
        for one in found.aliases
        if one.without_on_a > 0
    ]
    yield "aliases that hurt: how many more answers are right without", ["A", "B", ""], aliases, 0
    yield _of_pairs(found.pairs)


def _of_weighing(found: Weighing) -> Iterator[Table]:
    rows = [[f"{one.template.weight:.3f}", f"{one.score:.3f}", one.template.text] for one in found.weighed]
    yield "templates by weight; the mean is 1", ["weight", "score", ""], rows, 0
    yield _of_pairs(found.pairs)


def _of_pairs(pairs: Sequence[Pair]) -> Table:
    title, names = "labels that are hard to tell apart", [f"{one.a}, {one.b}" for one in pairs]
    if not any(one.a_as_b or one.b_as_a for one in pairs):
        return title, ["cosine", ""], [[f"{x.cosine:.3f}", name] for x, name in zip(pairs, names, strict=True)], 0
    rows = [[f"{x.a_as_b:,}", f"{x.b_as_a:,}", f"{x.cosine:.3f}", name] for x, name in zip(pairs, names, strict=True)]
    return title, ["1st as 2nd", "2nd as 1st", "cosine", ""], rows, 0
