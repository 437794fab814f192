"""Two runs over the same pictures, side by side: what another label, template or model changed.

In: two row files (JSON Lines, CSV or TSV), or rows themselves. Out: a `Comparison`. Pictures are matched by the exact
bytes of their paths; the second row of a path meets the second one in the other run. Both runs are held in memory
without their `top`, about 700 bytes a picture. Nothing is said here about which run is better.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

from clipcli.errors import UsageError, reason
from clipcli.output.rows import read_rows
from clipcli.records import Failure, FailureKind, Row

EXAMPLES = 3  # of each flip

Run = str | os.PathLike[str] | Iterable[Row]


class Answer(NamedTuple):
    """What one run says of a picture."""

    label: str | None  # None: it failed
    score: float
    margin: float  # nan where the format doesn't hold it
    abstained: bool
    error: FailureKind | None


Named = tuple[str, Answer]  # a path, and what is said of it


class Change(NamedTuple):
    """A picture, and what each run says of it."""

    path: str
    a: Answer
    b: Answer


@dataclass(frozen=True)
class Flip:
    """All pictures that went from one label to another."""

    a: str
    b: str
    count: int
    examples: tuple[Change, ...]  # those of which both runs were surest


@dataclass(frozen=True)
class Side:
    """One run by itself."""

    rows: int
    failed: int
    abstained: int  # 0 in TSV, which doesn't say
    mean_score: float  # of the pictures that have a label in both runs; nan if there are none


@dataclass(frozen=True)
class Comparison:
    """Two runs, `a` and `b`. Pictures are in the order of `b`, those of numbers by size of the change."""

    a: Side
    b: Side
    both: int  # pictures that have a row in both
    labelled: int  # of these, those with a label in both; the unknown label of an abstaining row is one too
    kappa: float  # Cohen's: agreement beyond chance; nan where chance alone would agree
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[Change, ...]  # another label
    failures_appeared: tuple[Change, ...]  # a label in `a`, a failure in `b`
    failures_went: tuple[Change, ...]
    abstentions_appeared: tuple[Change, ...]
    abstentions_went: tuple[Change, ...]
    score_changes: tuple[Change, ...]  # the largest, of pictures whose label stayed
    margin_changes: tuple[Change, ...]

    @property
    def agreement(self) -> float:
        """The share of equal labels among the pictures that have one in both; nan if there are none."""
        return 1 - len(self.changed) / self.labelled if self.labelled else math.nan

    @property
    def flips(self) -> list[Flip]:
        """The changed labels by pairs, the most frequent first, equal ones by name."""
        pairs: dict[tuple[str, str], list[Change]] = {}
        for one in self.changed:
            pairs.setdefault((str(one.a.label), str(one.b.label)), []).append(one)
        ranked = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
        return [Flip(*pair, len(found), tuple(nlargest(EXAMPLES, found, _sureness))) for pair, found in ranked]


def compare(a: Run, b: Run, *, top: int = 10) -> Comparison:
    """Compare two runs: row files by path, or rows. Of the changes of numbers, the `top` largest are kept.

    Raises UsageError for a file that isn't there, or holds other things than rows.
    """
    with ExitStack() as files:
        pairs, only_a, only_b = _match(_answers(_open(a, files)), _answers(_open(b, files)))
    labelled = [one for one in pairs if one.a.label is not None and one.b.label is not None]
    stayed = [one for one in labelled if one.a.label == one.b.label]
    return Comparison(
        a=_side([one.a for one in pairs], only_a, [one.a for one in labelled]),
        b=_side([one.b for one in pairs], only_b, [one.b for one in labelled]),
        both=len(pairs),
        labelled=len(labelled),
        kappa=_kappa(labelled, len(stayed)),
        only_a=tuple(path for path, _ in only_a),
        only_b=tuple(path for path, _ in only_b),
        changed=tuple(one for one in labelled if one.a.label != one.b.label),
        failures_appeared=tuple(one for one in pairs if one.b.error and not one.a.error),
        failures_went=tuple(one for one in pairs if one.a.error and not one.b.error),
        abstentions_appeared=tuple(one for one in labelled if one.b.abstained and not one.a.abstained),
        abstentions_went=tuple(one for one in labelled if one.a.abstained and not one.b.abstained),
        score_changes=_largest(top, stayed, lambda one: abs(one.b.score - one.a.score)),
        margin_changes=_largest(top, stayed, lambda one: abs(one.b.margin - one.a.margin)),
    )


def _open(run: Run, files: ExitStack) -> Iterable[Row]:
    if not isinstance(run, str | os.PathLike):
        return run
    try:
        return read_rows(files.enter_context(Path(run).open("rb")), name=os.fspath(run))
    except OSError as error:
        what = f"{os.fspath(run)}: {reason(error)}"
        raise UsageError(what, hint="compare takes two files of rows, as classify writes them") from error


def _answers(rows: Iterable[Row]) -> Iterator[Named]:
    names: dict[str, str] = {}  # of labels, each kept once
    for row in rows:
        if isinstance(row, Failure):
            yield row.path, Answer(None, math.nan, math.nan, False, row.kind)
        else:
            label = names.setdefault(row.label, row.label)
            yield row.path, Answer(label, row.score, row.margin, row.abstained, None)


def _match(a: Iterable[Named], b: Iterable[Named]) -> tuple[list[Change], list[Named], list[Named]]:
    """Pictures in both runs, in `a` alone, in `b` alone."""
    waiting: dict[str, list[Answer]] = {}
    for path, answer in a:
        waiting.setdefault(path, []).append(answer)
    for answers in waiting.values():
        answers.reverse()  # the first stands last, where taking it away is cheap
    pairs: list[Change] = []
    only_b: list[Named] = []
    for path, answer in b:
        if others := waiting.get(path):
            pairs.append(Change(path, others.pop(), answer))
        else:
            only_b.append((path, answer))
    return pairs, [(path, answer) for path, answers in waiting.items() for answer in reversed(answers)], only_b


def _side(matched: list[Answer], alone: list[Named], labelled: list[Answer]) -> Side:
    answers = [*matched, *(answer for _, answer in alone)]
    scores = [one.score for one in labelled if math.isfinite(one.score)]
    return Side(
        rows=len(answers),
        failed=sum(one.error is not None for one in answers),
        abstained=sum(one.abstained for one in answers),
        mean_score=sum(scores) / len(scores) if scores else math.nan,
    )


def _kappa(labelled: list[Change], same: int) -> float:
    in_a, in_b = Counter(one.a.label for one in labelled), Counter(one.b.label for one in labelled)
    by_chance = sum(number * in_b[label] for label, number in in_a.items())
    every = len(labelled) ** 2
    return (same * len(labelled) - by_chance) / (every - by_chance) if every > by_chance else math.nan


def _largest(top: int, changes: list[Change], size: Callable[[Change], float]) -> tuple[Change, ...]:
    return tuple(nlargest(top, (one for one in changes if size(one) > 0), size))  # nan is never larger


def _sureness(change: Change) -> float:
    lower = min(change.a.score, change.b.score)
    return lower if math.isfinite(lower) else -math.inf
