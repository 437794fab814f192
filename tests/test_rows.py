"""Rows read back: what a sink wrote comes back, byte for byte; what is foreign is named by line, what is torn told."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from dataclasses import astuple, replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output import CAT, FAILED, ODD, ROWS, UNKNOWN, written

from clipcli.errors import UsageError
from clipcli.output import rows as module
from clipcli.output.rows import read_rows
from clipcli.output.sink import SinkOptions
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row

READABLE = ("jsonl", "csv", "tsv")
HEADER = b"path,label,score,cosine,margin,abstained,error\r\n"


def read(data: bytes) -> list[Row]:
    return list(read_rows(io.BytesIO(data), "answers"))


def same(one: object, other: object) -> bool:
    """Equal, nan being equal to nan."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Prediction | Failure):
        return type(one) is type(other) and same(astuple(one), astuple(other))  # type: ignore[call-overload]
    return one == other


# ---- each format


def test_jsonl_comes_back_whole() -> None:
    rows = read(written("jsonl", *ROWS))
    best, *others = CAT.top
    assert rows[0] == replace(CAT, top=(best, others[0], others[1]._replace(cosine=0.0)))
    assert rows[1:] == list(ROWS[1:])


def test_jsonl_with_numbers_that_json_cannot_say() -> None:
    (row,) = read(written("jsonl", replace(CAT, score=math.inf, top=(Candidate("cat", math.nan, 1.0),))))
    assert same(row, replace(CAT, score=math.nan, top=(Candidate("cat", math.nan, 1.0),)))


def test_jsonl_as_other_programs_write_it_anew() -> None:
    data = (
        b'{"top":[],"path":"a","label":"cat","score":1,"cosine":0,"margin":-0.0,"abstained":false,"error":null,"x":[1]}'
    )
    assert read(data + b"\r\n") == [Prediction("a", "cat", 1.0, 0.0, 0.0, False, ())]


def test_tsv_holds_labels_and_scores() -> None:
    rows = read(written("tsv", *ROWS, options=SinkOptions(top_k=2)))
    nan = math.nan
    dog = Candidate("dog", 0.0472, nan)
    assert same(rows[0], Prediction("a.jpg", "cat", 0.9312, nan, nan, False, (Candidate("cat", 0.9312, nan), dog)))
    unknown = (Candidate("unknown", 0.4, nan), Candidate("cat", 0.35, nan))
    assert same(rows[1], Prediction(UNKNOWN.path, "unknown", 0.4, nan, nan, False, unknown))
    assert (rows[2].path, rows[2].label) == (ODD.path, ODD.label)
    assert rows[3] == FAILED


def test_csv_holds_all_but_the_cosines_of_others() -> None:
    rows = read(written("csv", *ROWS, options=SinkOptions(top_k=3)))
    best, *others = CAT.top
    assert same(
        rows[0], replace(CAT, top=(best, *(one._replace(cosine=math.nan) for one in others[:1]), rows[0].top[2]))
    )
    assert rows[0].top[2].score == 0.021604
    assert isinstance(rows[1], Prediction) and rows[1].abstained
    assert [one.label for one in rows[1].top] == ["unknown", "cat", "ox"]
    assert same(rows[2], replace(ODD, top=(Candidate(ODD.label, ODD.score, ODD.cosine),)))
    assert rows[3] == FAILED


def test_a_label_with_a_mark_is_no_failure() -> None:
    labels = ["!truncated", "\\!truncated", "\\", "!", ""]
    for label in labels:
        row = replace(CAT, label=label, top=(Candidate(label, 0.5, 0.1),))
        for format in READABLE:
            (back,) = read(written(format, row))
            assert (type(back), back.label) == (Prediction, label)


@pytest.mark.parametrize("format", READABLE)
def test_no_rows(format: str) -> None:
    assert read(written(format)) == []
    assert read(b"") == []


# ---- every name, every label

NAMES = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.lists(st.sampled_from([b"\t", b"\n", b"\r", b'"', b",", b"\\", b"!", b"\\t", b" ", b"\xff", b"a", b"{"])).map(
        b"".join
    ),
).map(lambda name: os.fsdecode(name.replace(b"\0", b"")))
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10), st.text('!\\\t\n\r",:{}[] é\x85\u2028', max_size=8)
)
NUMBERS = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, -1e-9, math.nan, math.inf]))
TOPS = st.lists(st.builds(Candidate, TEXT, NUMBERS, NUMBERS), min_size=1, max_size=4).map(tuple)
FAILURES = st.builds(Failure, NAMES, st.sampled_from(FailureKind), TEXT)
PREDICTIONS = st.builds(
    lambda path, top, margin, unknown: Prediction(
        path,
        top[0].label if unknown is None else unknown,
        top[0].score,
        top[0].cosine,
        margin,
        unknown is not None,
        top,
    ),
    NAMES,
    TOPS,
    NUMBERS,
    st.none() | TEXT,
)


@pytest.mark.parametrize("format", READABLE)
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(FAILURES | PREDICTIONS, max_size=4), top_k=st.integers(1, 5))
def test_what_is_written_comes_back(format: str, rows: list[Row], top_k: int) -> None:
    data = written(format, *rows, options=SinkOptions(top_k=top_k))
    back = read(data)
    assert written(format, *back, options=SinkOptions(top_k=top_k)) == data
    assert [(type(row), row.path, row.label) for row in back] == [(type(row), row.path, row.label) for row in rows]
    assert [(row.kind, row.message) for row in back if isinstance(row, Failure)] == [
        (row.kind, row.message) for row in rows if isinstance(row, Failure)
    ]


@pytest.mark.parametrize("format", READABLE)
@settings(max_examples=100, deadline=None)
@given(rows=st.lists(FAILURES | PREDICTIONS, min_size=1, max_size=3), data=st.data())
def test_cut_anywhere_whole_rows_come_back(format: str, rows: list[Row], data: st.DataObject) -> None:
    whole = written(format, *rows)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [len(written(format, *rows[:number])) for number in range(len(rows) + 1)]
    here = max(end for end in (0, *ends) if end <= cut)
    if cut and not here:
        with pytest.raises(UsageError, match="answers:1: not a row: the line has no end"):
            read(whole[:cut])
        return
    with patch.object(module, "log") as log:
        assert len(read(whole[:cut])) == sum(end <= cut for end in ends[1:])
    assert log.warning.called == (here < cut)


# ---- which format


def test_the_first_line_tells_the_format() -> None:
    odd = replace(CAT, path='{"path,label\t')
    for format in READABLE:
        assert [row.path for row in read(written(format, odd))] == [odd.path]


# ---- foreign lines

JSON = '{"path": "a", "label": "cat", "score": 0.5, "cosine": 0.1, "margin": 0.2, "abstained": false, %s}'
GOOD = {
    "jsonl": written("jsonl", CAT, FAILED),
    "csv": written("csv", CAT, replace(CAT, path="two\nlines"), FAILED),
    "tsv": written("tsv", CAT, FAILED),
}


@pytest.mark.parametrize(
    ("format", "line", "reason"),
    [
        ("jsonl", "", "bad JSON"),
        ("jsonl", "[]", 'no "path"'),
        ("jsonl", "{}", 'no "path"'),
        ("jsonl", '{"path": 3}', '"path" is of the wrong type'),
        ("jsonl", '{"path": "\\ud800"}', "surrogates not allowed"),
        ("jsonl", (JSON % '"top": [], "error": null').replace('"a"', '"a\\u0000b"', 1), "a name holds a NUL"),
        ("tsv", "a\0b\tcat\t0.5", "a name holds a NUL"),
        ("jsonl", '{"path_bytes": "XX"}', "padding"),
        ("jsonl", "[" * 100_000, "bad JSON"),
        ("jsonl", JSON % '"top": []', 'no "error"'),
        ("jsonl", JSON % '"top": [3], "error": null', 'no "label"'),
        ("jsonl", JSON % '"top": {}, "error": null', '"top" is of the wrong type'),
        ("jsonl", JSON.replace("0.5", "true") % '"top": [], "error": null', '"score" is of the wrong type'),
        ("jsonl", JSON % '"top": [], "error": {"kind": "bored", "message": ""}', "no kind of failure: bored"),
        ("jsonl", JSON % '"top": [], "error": {"kind": "model"}', 'no "message"'),
        ("jsonl", JSON.replace('"cat"', "null") % '"top": [], "error": null', '"label" is of the wrong type'),
        ("csv", "", "0 columns, the header has 7"),
        ("csv", "a,cat,0.5,0.1,0.2,false", "6 columns, the header has 7"),
        ("csv", "a,cat,0.5,0.1,0.2,no,", "abstained is neither"),
        ("csv", "a,cat,much,0.1,0.2,false,", "could not convert"),
        ("csv", "a,,,,,false,bored: x", "no kind of failure: bored"),
        ("csv", '"a"b"",cat,0.5,0.1,0.2,false,', "expected after"),
        ("tsv", "", "here 1"),
        ("tsv", "a\tcat", "here 2"),
        ("tsv", "a\tcat\tmuch", "could not convert"),
        ("tsv", "a\tcat\t0.5\tdog", "here 4"),
        ("tsv", "a\t!bored\tx", "no kind of failure: bored"),
    ],
)
def test_a_foreign_line_is_named(format: str, line: str, reason: str) -> None:
    before = GOOD[format]
    number = before.count(b"\n") + 1
    with pytest.raises(UsageError) as caught:
        read(before + line.encode() + b"\n" + before)
    assert caught.value.message.startswith(f"answers:{number}: not a row of {format}: ")
    assert reason in caught.value.message
    assert caught.value.hint == "rows are read as classify writes them: jsonl, csv or tsv"


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"\n", b"label,path\r\n", b"cat 0.5  a.jpg\n"])
def test_a_file_without_rows(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"answers:1: not a row of any format: it begins with no"):
        read(data)


@pytest.mark.parametrize("header", [HEADER.replace(b",margin", b""), HEADER.replace(b"\r\n", b",label_2\r\n")])
def test_another_header(header: bytes) -> None:
    with pytest.raises(UsageError, match="answers:1: not a row of csv: the header is not path,label,score"):
        read(header)


def test_half_a_label_of_what_is_no_utf8() -> None:
    with pytest.raises(UsageError, match="answers:1: not a row of jsonl: bad JSON, or not UTF-8"):
        read(b'{"path": "\xff"}\n')


def test_a_file_without_line_ends_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 1000)
    for data in (b"x" * 5000, HEADER + b'"' + b"x\n" * 5000, b"a\tcat\t0.5\n" + b"x" * 5000):
        with pytest.raises(UsageError, match="more than 0 MiB"):
            read(data)


def test_an_open_quote_costs_no_time(caplog: pytest.LogCaptureFixture) -> None:
    assert read(HEADER + b'"' + b"x,\r\n" * 500_000) == []
    assert "the last line is torn" in caplog.text


# ---- a run that was stopped


@pytest.mark.parametrize("format", READABLE)
def test_a_torn_line_is_left_out_with_a_notice(format: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clipcli"):
        rows = read(GOOD[format][:-3])
    assert len(rows) == len(read(GOOD[format])) - 1
    assert caplog.messages == ["answers: the last line is torn, and left out: the run that wrote it was stopped"]


def test_a_file_without_one_whole_line_is_none() -> None:
    with pytest.raises(UsageError, match="answers:1: not a row: the line has no end"):
        read(b'{"path": "a')


def test_rows_come_while_the_file_grows() -> None:
    first, second = written("tsv", CAT), written("tsv", FAILED)

    class Growing(io.BytesIO):
        reads = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            return super().readline(size)

    stream = Growing(first + second)
    assert next(read_rows(stream)).path == CAT.path and stream.reads == 1


@pytest.mark.skipif(sys.platform == "win32", reason="names are text there")
def test_names_of_any_bytes() -> None:
    name = os.fsdecode(bytes(range(1, 256)))
    for format in READABLE:
        (row,) = read(written(format, replace(CAT, path=name)))
        assert os.fsencode(row.path) == bytes(range(1, 256))
