"""A comparison of two runs for people, for `cut` and `sort`, and for programs.

In: a `Comparison` and the names of its files as they were typed. Out: text. What is compared, and how, is the task's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clipcli.cli.columns import aligned
from clipcli.cli.labels import json_text
from clipcli.output.jsonl import path_members
from clipcli.output.sink import encode
from clipcli.output.text import counted, printable
from clipcli.output.tsv import escape

if TYPE_CHECKING:
    from clipcli.tasks.compare import Answer, Change, Comparison, Flip, Side


def summary(found: Comparison, a: str, b: str) -> Iterator[str]:
    """The whole in three lines at most."""
    alone = f"{len(found.only_a):,} only in {a}, {len(found.only_b):,} only in {b}"
    yield f"{counted(found.both, 'picture')} in both, {alone}"
    if not found.both:
        yield "pictures are matched by path, byte for byte: were both runs started in the same folder?"
    if found.labelled:
        same = found.labelled - len(found.changed)
        kappa = "" if math.isnan(found.kappa) else f", kappa {found.kappa:.3f}"
        means = f"mean score {found.a.mean_score:.4f} -> {found.b.mean_score:.4f}"
        yield f"same label: {same:,} of {found.labelled:,} ({found.agreement:.1%}{kappa}); {means}"
    failed = f"{len(found.failures_appeared):,} appeared, {len(found.failures_went):,} went"
    abstained = f"{len(found.abstentions_appeared):,} appeared, {len(found.abstentions_went):,} went"
    if found.both:
        yield f"failures: {failed}; abstentions: {abstained}"


def columns(flip: Flip) -> bytes:
    """A line of TSV: count, label, label, example."""
    fields = [str(flip.count).encode(), encode(flip.a), encode(flip.b), os.fsencode(flip.examples[0].path)]
    return b"\t".join(map(escape, fields))


def report(found: Comparison, a: str, b: str, top: int, painted: bool) -> Iterator[str]:
    """Lines for a terminal: the summary, and `top` of each kind of change."""
    yield from map(printable, summary(found, a, b))
    sections = {
        "labels that changed": [
            [f"{flip.count:,}", f"{flip.a} -> {flip.b}", flip.examples[0].path] for flip in found.flips
        ],
        "scores that changed most": [_moved(one, one.a.score, one.b.score) for one in found.score_changes],
        "margins that changed most": [_moved(one, one.a.margin, one.b.margin) for one in found.margin_changes],
        "failures that appeared": [[str(one.b.error), one.path] for one in found.failures_appeared],
        "failures that went": [[str(one.a.error), one.path] for one in found.failures_went],
        "abstentions that appeared": [[str(one.a.label), one.path] for one in found.abstentions_appeared],
        "abstentions that went": [[str(one.b.label), one.path] for one in found.abstentions_went],
        f"only in {a}": [[path] for path in found.only_a],
        f"only in {b}": [[path] for path in found.only_b],
    }
    for title, rows in sections.items():
        yield from _section(f"\x1b[1m{printable(title)}\x1b[0m" if painted else printable(title), rows, top)


def _section(title: str, rows: Sequence[Sequence[str]], top: int) -> Iterator[str]:
    if rows:
        yield from ("", title, *aligned(rows[:top], right=frozenset({0} if len(rows[0]) > 2 else ()), indent="  "))
    if len(rows) > top:
        yield f"  and {len(rows) - top:,} more"


def _moved(one: Change, a: float, b: float) -> list[str]:
    return [f"{b - a:+.4f}", f"{a:.4f} -> {b:.4f}", str(one.a.label), one.path]


def as_json(found: Comparison, a: str, b: str) -> str:
    """One object: all pictures that changed, and the largest changes of numbers. Changes of it only add keys."""
    holder = {
        "a": _side(a, found.a),
        "b": _side(b, found.b),
        "both": found.both,
        "labelled": found.labelled,
        "agreement": _number(found.agreement),
        "kappa": _number(found.kappa),
        "flips": [{"a": flip.a, "b": flip.b, "count": flip.count} for flip in found.flips],
    }
    for name in ("only_a", "only_b"):
        holder[name] = [path_members(path) for path in getattr(found, name)]
    changes = ("changed", "failures_appeared", "failures_went", "abstentions_appeared", "abstentions_went")
    for name in (*changes, "score_changes", "margin_changes"):
        holder[name] = [_change(one) for one in getattr(found, name)]
    return json_text(holder)


def _side(name: str, side: Side) -> dict[str, Any]:
    return {"file": path_members(name)["path"], **asdict(side), "mean_score": _number(side.mean_score)}


def _change(one: Change) -> dict[str, Any]:
    return {**path_members(one.path), "a": _answer(one.a), "b": _answer(one.b)}


def _answer(answer: Answer) -> dict[str, Any]:
    return {**answer._asdict(), "score": _number(answer.score), "margin": _number(answer.margin)}


def _number(number: float) -> float | None:
    return round(number, 6) if math.isfinite(number) else None
