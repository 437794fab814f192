"""Two runs side by side: what is counted, what is matched, and the numbers against a slow reading of their meaning."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output import written

import clipcli
from clipcli.errors import UsageError
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row
from clipcli.tasks.compare import Change, compare


def row(path: str, label: str, score: float = 0.5, margin: float = 0.25, *, abstained: bool = False) -> Prediction:
    return Prediction(path, label, score, 0.25, margin, abstained, (Candidate(label, score, 0.25),))


def failure(path: str) -> Failure:
    return Failure(path, FailureKind.TRUNCATED, "the file ends before the picture does")


def paths(changes: Sequence[Change]) -> list[str]:
    return [one.path for one in changes]


A: list[Row] = [row("1", "cat", 0.9), row("2", "cat", 0.6), row("3", "dog", 0.75), row("4", "dog"), failure("5"),
                failure("6"), row("7", "unknown", abstained=True), row("8", "ox"), row("only", "ox")]  # fmt: skip
B: list[Row] = [row("new", "cat"), row("8", "unknown", abstained=True), row("7", "ox"), failure("6"), row("5", "cat"),
                failure("4"), row("3", "dog", 0.5), row("2", "dog", 0.7), row("1", "cat", 0.95, 0.5)]  # fmt: skip


def test_what_changed() -> None:
    found = compare(A, B)
    assert (found.a.rows, found.a.failed, found.a.abstained) == (9, 2, 1)
    assert (found.b.rows, found.b.failed, found.b.abstained) == (9, 2, 1)
    assert (found.both, found.only_a, found.only_b) == (8, ("only",), ("new",))
    assert found.labelled == 5  # 1, 2, 3, 7, 8
    assert found.agreement == pytest.approx(2 / 5)
    assert paths(found.changed) == ["8", "7", "2"]
    assert [(flip.a, flip.b, flip.count) for flip in found.flips] == [
        ("cat", "dog", 1),
        ("ox", "unknown", 1),
        ("unknown", "ox", 1),
    ]
    assert (paths(found.failures_appeared), paths(found.failures_went)) == (["4"], ["5"])
    assert (paths(found.abstentions_appeared), paths(found.abstentions_went)) == (["8"], ["7"])
    assert found.a.mean_score == pytest.approx((0.9 + 0.6 + 0.75 + 0.5 + 0.5) / 5)
    assert found.b.mean_score == pytest.approx((0.95 + 0.7 + 0.5 + 0.5 + 0.5) / 5)
    assert paths(found.score_changes) == ["3", "1"]
    assert paths(found.margin_changes) == ["1"]


def test_a_run_agrees_with_itself() -> None:
    found = compare(A, A)
    assert (found.agreement, found.kappa, found.both) == (1, 1, len(A))
    assert found.changed == found.score_changes == found.margin_changes == found.only_a == found.only_b == ()
    assert found.failures_appeared == found.abstentions_went == ()


def test_a_path_named_twice_is_matched_by_turns() -> None:
    a = [row("x", "cat"), row("x", "dog"), row("y", "ox"), row("x", "ox")]
    found = compare(a, [row("x", "cat"), row("x", "cat")])
    assert [(one.a.label, one.b.label) for one in found.changed] == [("dog", "cat")]
    assert (found.both, found.only_a, found.only_b) == (2, ("x", "y"), ())
    assert compare([row("x", "cat")], a).only_b == ("x", "y", "x")


def test_names_are_matched_by_their_bytes() -> None:
    names = [b"\xff.jpg", "\ufffd.jpg".encode(), "é.jpg".encode(), "e\u0301.jpg".encode(), b"./a", b"a"]
    a = [row(os.fsdecode(name), "cat") for name in names]
    found = compare(a, [row(os.fsdecode(name), "cat") for name in reversed(names)])
    assert (found.both, found.only_a, found.only_b) == (len(names), (), ())
    assert compare(a[:1], a[1:2]).both == 0


def test_the_surest_examples_come_first() -> None:
    scores = {"a": (0.9, 0.2), "b": (0.8, 0.7), "c": (0.99, 0.6), "d": (math.nan, 0.9), "e": (0.1, 0.1)}
    runs = [[row(path, label, pair[i]) for path, pair in scores.items()] for i, label in enumerate(("cat", "dog"))]
    (flip,) = compare(*runs).flips
    assert flip.count == 5
    assert paths(flip.examples) == ["b", "c", "a"]


def test_the_largest_changes_alone_are_kept() -> None:
    a = [row(str(i), "cat", 0.5, 0.5) for i in range(10)]
    b = [row(str(i), "cat", 0.5 + (-1) ** i * i / 64, 0.5 - i / 64) for i in range(10)]
    found = compare(a, b, top=3)
    assert paths(found.score_changes) == paths(found.margin_changes) == ["9", "8", "7"]
    assert found.score_changes[0].b.score == 0.5 - 9 / 64


def test_nothing_to_compare() -> None:
    for a, b in (([], []), (A, []), ([failure("x")], [failure("x")])):
        found = compare(a, b)
        assert math.isnan(found.agreement) and math.isnan(found.kappa) and math.isnan(found.a.mean_score)
        assert found.flips == []


def test_one_label_alone_leaves_chance_nothing() -> None:
    found = compare([row("x", "cat")], [row("x", "cat")])
    assert found.agreement == 1 and math.isnan(found.kappa)


def test_scores_that_no_model_gives() -> None:
    """They come from files, which another hand may have written."""
    found = compare([row("x", "cat", 1e308), row("y", "cat", 1e308)], [row("x", "cat", -1e308), row("y", "cat")])
    assert found.a.mean_score == math.inf and paths(found.score_changes) == ["x", "y"]


PATHS, LABELS, SCORES = (st.sampled_from(values) for values in ("abcdef", ("cat", "dog", "ox"), (0.25, 0.5)))
ROWS = st.lists(st.builds(row, PATHS, LABELS, SCORES) | st.builds(failure, PATHS), max_size=12)


@settings(max_examples=200, deadline=None)
@given(a=ROWS, b=ROWS)
def test_counts_against_their_meaning(a: list[Row], b: list[Row]) -> None:
    found = compare(a, b)
    named_a, named_b = Counter(one.path for one in a), Counter(one.path for one in b)
    assert found.both == (named_a & named_b).total()
    assert Counter(found.only_a) == named_a - named_b and Counter(found.only_b) == named_b - named_a
    assert (found.a.rows, found.b.rows) == (len(a), len(b))

    pairs = []
    for path in sorted(named_a & named_b):
        pairs += zip([x.label for x in a if x.path == path], [y.label for y in b if y.path == path], strict=False)
    labelled = [(x, y) for x, y in pairs if x and y]
    assert found.labelled == len(labelled)
    flips = Counter((x, y) for x, y in labelled if x != y)
    assert {(flip.a, flip.b): flip.count for flip in found.flips} == flips
    assert [flip.count for flip in found.flips] == sorted(flips.values(), reverse=True)
    if labelled:
        observed = sum(x == y for x, y in labelled) / len(labelled)
        chance = (
            sum(
                sum(x == name for x, _ in labelled) * sum(y == name for _, y in labelled)
                for name in ("cat", "dog", "ox")
            )
            / len(labelled) ** 2
        )
        assert found.agreement == pytest.approx(observed)
        if chance < 1:
            assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
        else:
            assert math.isnan(found.kappa)

    back = compare(b, a)
    assert (back.a, back.b, back.labelled) == (found.b, found.a, found.labelled)
    assert Counter(back.only_a) == Counter(found.only_b) and len(back.failures_went) == len(found.failures_appeared)
    assert back.kappa == found.kappa or math.isnan(found.kappa)


# ---- files


@pytest.mark.parametrize("format", ["jsonl", "csv", "tsv"])
def test_files_say_what_their_rows_say(tmp_path: Path, format: str) -> None:
    (tmp_path / "a").write_bytes(written(format, *A))
    (tmp_path / "b").write_bytes(written("jsonl", *B))
    found, expected = clipcli.compare(tmp_path / "a", str(tmp_path / "b")), compare(A, B)
    assert (found.both, found.agreement, found.kappa) == (expected.both, expected.agreement, expected.kappa)
    assert paths(found.changed) == paths(expected.changed)
    assert paths(found.score_changes) == paths(expected.score_changes)
    if format == "tsv":
        assert found.a.abstained == 0 and found.margin_changes == ()
    else:
        assert found == expected


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(written("csv", *A))
    with pytest.raises(UsageError, match=r"nothing\.csv: no such file or directory"):
        compare(tmp_path / "rows", tmp_path / "nothing.csv")
    with pytest.raises(UsageError, match="is a directory"):
        compare(tmp_path, tmp_path / "rows")


def test_a_file_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(written("jsonl", *A) + b'{"a": 1}\n')
    with pytest.raises(UsageError, match=r'rows\.jsonl:10: not a row of jsonl: no "path"'):
        compare(tmp_path / "rows.jsonl", A)
