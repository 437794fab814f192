"""Evaluations for people, for programs, and for a browser: text, JSON, CSV and one HTML page.

In: `Evaluation`s and `Paired` comparisons. Out: lines, objects, HTML. What is measured, and how, is the task's.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from clipcli.cli.columns import aligned
from clipcli.output.text import counted

if TYPE_CHECKING:
    from clipcli.tasks.evaluate import Evaluation, Paired, Verdicts
    from clipcli.tasks.metrics import Bin, Estimate, Threshold

THUMBNAILS = 24  # mistakes shown on a page
THUMB = 150  # pixels, of their longer sides

TWO = "the same pictures, two models; right by A alone, by B alone"
LONG = ("worst pairs", "classes, least found first")  # tables of which a terminal shows the first lines

NAMES = ("model", "answer", "A", "B")  # titles of columns of words, which aren't aligned to the right
_HEADER = ("set", "model", "pictures", "top-1", "", "top-5", "", "mean per class", "gap", "")
_COLUMNS = ("set", "model", "path", "truth", "answer", "correct", "rank", "score", "cosine", "margin", "entropy", "mcm")

Found = Sequence["Evaluation"]
Rows = list[list[str]]


# Text


def report(found: Found, pairs: Sequence[Paired], top: int, painted: bool) -> Iterator[str]:
    """The figures of each set and model; of one alone, all that is known."""
    rows = summary(found)
    yield from aligned(rows, right=_numbers(rows[0]))
    sections = {TWO: paired(pairs)} if pairs else {}
    if len(found) == 1:
        sections |= details(found[0])
    for title, rows in sections.items():
        yield from section(title, rows, _numbers(rows[0]), top if title in LONG else len(rows), painted)


def section(title: str, rows: Rows, right: frozenset[int], top: int, painted: bool) -> Iterator[str]:
    """An empty line, a title, and a table."""
    yield ""
    yield f"\x1b[1m{title}\x1b[0m" if painted else title
    yield from table(rows, right, top)


def table(rows: Rows, right: frozenset[int], top: int) -> Iterator[str]:
    """A header, if it holds anything, and `top` rows; how many more there are."""
    shown = rows[: top + 1]
    yield from aligned(shown if any(rows[0]) else shown[1:], right=right, indent="  ")
    if len(shown) < len(rows):
        yield f"  and {len(rows) - len(shown):,} more (--top)"


def _numbers(header: Sequence[str]) -> frozenset[int]:
    return frozenset(place for place, name in enumerate(header) if place and name not in NAMES)


def summary(found: Found) -> Rows:
    """A row a set and model, in per cent with intervals of 95 %; columns that nothing stands in are left out."""
    rows = [list(_HEADER)]
    for one, gap in zip(found, gaps(found), strict=True):
        model = one.model if len({one.model for one in found}) > 1 else ""
        five = percent(one.top5.value) if one.top5 else ""
        cells = [one.name, model, f"{len(one.paths):,}", *estimate(one.top1), five, *estimate(one.mean_per_class)]
        rows.append([*cells, *(estimate(gap, sign="+") if gap else ("", ""))])
    full = [any(row[column] for row in rows[1:]) for column in range(len(_HEADER))]
    return [[cell for cell, is_full in zip(row, full, strict=True) if is_full] for row in rows]


def gaps(found: Found) -> list[Estimate | None]:
    """What each set's top-1 is above or below that of the model's first set."""
    from clipcli.tasks.metrics import gap

    first: dict[str, Evaluation] = {}
    return [None if (base := first.setdefault(one.model, one)) is one else gap(base.hits, one.hits) for one in found]


def paired(pairs: Sequence[Paired]) -> Rows:
    """A row a comparison: B against A, and McNemar's exact test."""
    header = ["set", "A", "B", "pictures", "B - A", "", "A alone", "B alone", "p"]
    return [header] + [
        [
            *(one.name, one.a, one.b, f"{one.pictures:,}"),
            *(*estimate(one.gap, sign="+"), f"{one.only_a:,}", f"{one.only_b:,}", f"{one.p:.2g}"),
        ]
        for one in pairs
    ]


def details(one: Evaluation) -> dict[str, Rows]:
    """All that is known of one evaluation, by title; each a header and rows."""
    calibration = one.calibration
    sections = {
        LONG[0]: [
            ["truth", "answer", "times", "of"],
            *([one.labels[t], one.labels[a], f"{n:,}", f"{one.classes.pictures[t]:,}"] for t, a, n in one.confusions),
        ],
        LONG[1]: [["class", "pictures", "precision", "recall", "F1"], *_classes(one)],
        "scores": [
            ["", "temperature", "calibration error"],
            ["as they are", "1", _number(calibration.error)],
            ["fitted", _number(calibration.temperature), _number(calibration.fitted_error)],
        ],
        "coverage": [
            ["score at least", "answered", "right of these"],
            *([f"{step.value:.2f}", percent(step.coverage), percent(step.precision)] for step in one.coverage),
        ],
        f"least values for {100 * one.wanted_precision:g} % right answers on these pictures": [
            ["", "at least", "answered", "right of these"],
            *(_proposal(key, step) for key, step in one.proposals.items()),
        ],
    }
    if one.by_group:
        sections["groups"] = [["", "top-1", ""], ["right group", *estimate(one.by_group)]]
    if one.unknown:
        sections[f"{counted(len(one.unknown.paths), 'picture')} of no label"] = [
            ["told by", "AUROC", "FPR at 95 % TPR"],
            *([key, _number(told.auroc), percent(told.fpr95)] for key, told in one.unknown.telling.items()),
        ]
    return {title: rows for title, rows in sections.items() if len(rows) > 1}


def _classes(one: Evaluation) -> Rows:
    by = one.classes
    order = sorted((i for i in range(len(one.labels)) if by.pictures[i]), key=lambda i: (by.recall[i], i))
    order += [i for i in range(len(one.labels)) if not by.pictures[i] and by.answers[i]]
    ratios = (by.precision, by.recall, by.f1)
    return [[one.labels[i], f"{by.pictures[i]:,}", *(percent(ratio[i]) for ratio in ratios)] for i in order]


def _proposal(key: str, step: Threshold | None) -> list[str]:
    if step is None:
        return [f"--min-{key}", "-", "no value gives it", ""]
    return [f"--min-{key}", _number(step.value), percent(step.coverage), percent(step.precision)]


def percent(value: float, sign: str = "") -> str:
    """`93.4`; a dash where there is no number."""
    return format(100 * value, f"{sign}z.1f") if math.isfinite(value) else "-"


def estimate(one: Estimate, sign: str = "") -> tuple[str, str]:
    """A figure and its interval, in per cent."""
    return percent(one.value, sign), f"({percent(one.low, sign)} to {percent(one.high, sign)})"


def _number(value: float) -> str:
    return format(value, "z.4g") if abs(value) >= 1 else format(value, "z.4f")


# JSON


def as_json(found: Found, pairs: Sequence[Paired]) -> dict[str, Any]:
    """One object with everything; shares from 0 to 1, null where a ratio is of nothing. Changes of it only add keys."""
    results = [_result(one) | {"gap": plain(gap)} for one, gap in zip(found, gaps(found), strict=True)]
    return {"results": results, "comparisons": [one._asdict() | {"gap": plain(one.gap)} for one in pairs]}


def _result(one: Evaluation) -> dict[str, Any]:
    calibration = one.calibration
    columns = ("label", *one.classes._fields)
    classes = zip(one.labels, *(numbers.tolist() for numbers in one.classes), strict=True)
    return {
        "set": one.name,
        "model": one.model,
        "pictures": len(one.paths),
        "failed": one.failed,
        "left_out": one.left_out,
        "top1": plain(one.top1),
        "top5": plain(one.top5),
        "mean_per_class": plain(one.mean_per_class),
        "by_group": plain(one.by_group),
        "classes": [plain(dict(zip(columns, row, strict=True))) for row in classes],
        "confusions": [{"truth": one.labels[t], "answer": one.labels[a], "count": n} for t, a, n in one.confusions],
        "calibration": plain(calibration)
        | {"steps": _steps(calibration.steps), "fitted_steps": _steps(calibration.fitted_steps)},
        "coverage": plain(one.coverage),
        "proposals": {
            "precision": one.wanted_precision,
            **plain({f"min_{key}": step for key, step in one.proposals.items()}),
        },
        "unknown": one.unknown and {"pictures": len(one.unknown.paths), **plain(one.unknown.telling)},
    }


def plain(value: Any) -> Any:
    """The same in dictionaries and lists; numbers with six decimals, None for one that isn't finite."""
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _steps(steps: Sequence[Bin]) -> list[dict[str, float | None]]:
    return [plain({key: float(value) for key, value in step._asdict().items()}) for step in steps]


# CSV


def csv_rows(found: Found) -> Iterator[Sequence[str]]:
    """A header, then a row a picture, set and model; pictures of no label have no truth."""
    yield _COLUMNS
    for one in found:
        known = [(one.labels[index], rank) for index, rank in zip(one.truth, one.ranks, strict=True)]
        yield from _csv(one, one.paths, known, one.verdicts)
        if one.unknown:
            yield from _csv(one, one.unknown.paths, [("", None)] * len(one.unknown.paths), one.unknown.verdicts)


def _csv(
    one: Evaluation, paths: Sequence[str], known: Iterable[tuple[str, int | None]], verdicts: Verdicts
) -> Iterator[Sequence[str]]:
    columns = (verdicts.score, verdicts.cosine, verdicts.margin, verdicts.entropy, verdicts.mcm)
    for path, (truth, rank), label, *numbers in zip(paths, known, verdicts.label, *columns, strict=True):
        right = ("", "") if rank is None else ("true" if rank == 0 else "false", str(rank + 1))
        texts = (format(number, "z.6f") for number in numbers)
        yield one.name, one.model, path, truth, one.labels[label], *right, *texts


# HTML


def as_page(found: Found, pairs: Sequence[Paired]) -> str:
    """One page: the summary, then a section for each evaluation."""
    from clipcli.report import page as html

    rows = summary(found)
    parts = [html.heading("Evaluation", 1), html.table(rows[0], rows[1:])]
    models = sorted({one.model for one in found})
    parts.append(html.paragraph(f"In per cent, with bootstrap intervals of 95 %. Model: {', '.join(models)}."))
    if pairs:
        rows = paired(pairs)
        parts += [html.heading(_title(TWO)), html.table(rows[0], rows[1:])]
    for one in found:
        parts += _section(one, titled=len(models) > 1)
    return html.page(f"Evaluation: {', '.join(dict.fromkeys(one.name for one in found))}", parts)


def _section(one: Evaluation, *, titled: bool) -> Iterator[str]:
    from clipcli.report import page as html
    from clipcli.report.plots import matrix, unit_plot

    yield html.heading(f"{one.name}, {one.model}" if titled else one.name)
    steps, fitted = one.calibration.steps, one.calibration.fitted_steps
    worth = {"as they are": steps, f"at temperature {_number(one.calibration.temperature)}": fitted}
    size = len(one.paths)
    points = {name: [(step.score, step.accuracy, step.pictures / size) for step in own] for name, own in worth.items()}
    answered = [step for step in one.coverage if math.isfinite(step.precision)]
    counts = {
        "right of those answered": [(step.value, step.precision, 0.02) for step in answered],
        "answered": [(step.value, step.coverage, 0.02) for step in one.coverage],
    }
    yield html.row([unit_plot("score", "accuracy", points, diagonal=True), unit_plot("least score", "share", counts)])
    hits = Counter((int(index), int(index)) for index in one.truth[one.hits])
    yield html.heading("Truth by row, answer by column", 3)
    yield matrix(one.labels, {**hits, **{(t, a): n for t, a, n in one.confusions}})
    tables = {title: html.table(rows[0], rows[1:]) for title, rows in details(one).items()}
    yield from (html.folded(_title(title), tables.pop(title)) for title in LONG if title in tables)
    yield html.row(f"<div>{html.heading(_title(title), 3)}{table}</div>" for title, table in tables.items())
    if figures := list(_mistakes(one)):
        yield html.heading("The surest mistakes: in bold the answer", 3)
        yield html.row(figures)


def _title(words: str) -> str:
    return words[0].upper() + words[1:]


def _mistakes(one: Evaluation) -> Iterator[str]:
    import numpy as np

    from clipcli.images.find import Walk
    from clipcli.images.thumbnail import thumbnail
    from clipcli.records import Source
    from clipcli.report import page as html

    wrong = np.flatnonzero(~one.hits)
    surest = wrong[np.argsort(-one.verdicts.score[wrong], kind="stable")][:THUMBNAILS]
    for row in surest:
        lines = (
            one.labels[one.verdicts.label[row]],
            f"is: {one.labels[one.truth[row]]}",
            f"score {one.verdicts.score[row]:.4f}",
            os.path.basename(one.paths[row].rpartition("::")[2]),
        )
        source = next(iter(Walk((one.paths[row],), folders=False)))
        pixels = thumbnail(source, THUMB, THUMB) if isinstance(source, Source) else None
        if pixels is not None:  # its file may be gone since it was embedded
            yield html.figure(pixels, lines)
