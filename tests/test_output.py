"""Rows on their way out: the bytes of every format, and that nothing in a name or label can break a row."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.errors import UsageError
from clipcli.output.sink import ENDINGS, FORMATS, LineSink, SinkOptions, format_for, open_sink
from clipcli.output.table import bar
from clipcli.output.text import Counts, printable
from clipcli.output.tsv import escape, unescape
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row

CAT = Prediction(
    path="a.jpg",
    label="cat",
    score=0.931204,
    cosine=0.27131,
    margin=0.884012,
    abstained=False,
    top=(
        Candidate("cat", 0.931204, 0.27131),
        Candidate("dog", 0.047192, 0.24),
        Candidate("ox", 0.021604, -1e-9),
    ),
)
UNKNOWN = Prediction(
    path="sub/b, 2.jpg",
    label="unknown",
    score=0.4,
    cosine=0.2,
    margin=0.05,
    abstained=True,
    top=(Candidate("dog", 0.4, 0.2), Candidate("cat", 0.35, 0.199999), Candidate("ox", 0.25, 0.19)),
)
ODD = replace(
    CAT, path=os.fsdecode(b'tab\t"q"\\\n\r\xff\xc3\xa9.jpg'), label="!é\t", top=(Candidate("!é\t", 1.0, 0.5),)
)
FAILED = Failure("c.jpg", FailureKind.TRUNCATED, 'ended after 3 of "10" blocks,\nno more')
ROWS: tuple[Row, ...] = (CAT, UNKNOWN, ODD, FAILED)

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["path", "label", "score", "cosine", "margin", "abstained", "top", "error"],
    "properties": {
        "path": {"type": "string"},
        "path_bytes": {"type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$"},
        "label": {"type": ["string", "null"]},
        "score": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "cosine": {"type": ["number", "null"], "minimum": -1, "maximum": 1},
        "margin": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "abstained": {"type": "boolean"},
        "top": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["label", "score", "cosine"],
                "properties": {
                    "label": {"type": "string"},
                    "score": {"type": ["number", "null"]},
                    "cosine": {"type": ["number", "null"]},
                },
                "additionalProperties": False,
            },
        },
        "error": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["kind", "message"],
                    "properties": {
                        "kind": {"enum": [kind.value for kind in FailureKind]},
                        "message": {"type": "string"},
                    },
                    "additionalProperties": False,
                },
            ]
        },
    },
    "additionalProperties": False,
}


def written(format: str, *rows: Row, options: SinkOptions | None = None) -> bytes:
    stream = io.BytesIO()
    sink = open_sink(format, stream, options or SinkOptions(width=80))
    for row in rows:
        sink.write(row)
    sink.close()
    return stream.getvalue()


# ---- golden rows


def test_jsonl() -> None:
    lines = written("jsonl", *ROWS).decode().split("\n")
    assert lines[0] == (
        '{"path": "a.jpg", "label": "cat", "score": 0.931204, "cosine": 0.271310, "margin": 0.884012, '
        '"abstained": false, "top": [{"label": "cat", "score": 0.931204, "cosine": 0.271310}, '
        '{"label": "dog", "score": 0.047192, "cosine": 0.240000}, '
        '{"label": "ox", "score": 0.021604, "cosine": 0.000000}], "error": null}'
    )
    assert lines[1] == (
        '{"path": "sub/b, 2.jpg", "label": "unknown", "score": 0.400000, "cosine": 0.200000, '
        '"margin": 0.050000, "abstained": true, '
        '"top": [{"label": "dog", "score": 0.400000, "cosine": 0.200000}, '
        '{"label": "cat", "score": 0.350000, "cosine": 0.199999}, '
        '{"label": "ox", "score": 0.250000, "cosine": 0.190000}], "error": null}'
    )
    assert lines[2] == (
        r'{"path": "tab\t\"q\"\\\n\r'
        + "\ufffdé"
        + r'.jpg", "path_bytes": "dGFiCSJxIlwKDf/DqS5qcGc=", "label": "!é\t", '
        r'"score": 0.931204, "cosine": 0.271310, "margin": 0.884012, "abstained": false, '
        r'"top": [{"label": "!é\t", "score": 1.000000, "cosine": 0.500000}], "error": null}'
    )
    assert lines[3] == (
        '{"path": "c.jpg", "label": null, "score": null, "cosine": null, "margin": null, "abstained": false, '
        r'"top": [], "error": {"kind": "truncated", "message": "ended after 3 of \"10\" blocks,\nno more"}}'
    )
    assert lines[4:] == [""]


def test_jsonl_has_five_labels_unless_told() -> None:
    row = replace(CAT, top=tuple(Candidate(str(i), 0.1, 0.1) for i in range(8)))
    for top_k, expected in ((None, 5), (1, 1), (7, 7), (20, 8)):
        (line,) = written("jsonl", row, options=SinkOptions(top_k)).splitlines()
        assert [entry["label"] for entry in json.loads(line)["top"]] == [str(i) for i in range(expected)]


def test_jsonl_says_null_for_what_is_no_number() -> None:
    row = json.loads(written("jsonl", replace(CAT, score=float("nan"), cosine=float("inf"), margin=float("-inf"))))
    assert (row["score"], row["cosine"], row["margin"]) == (None, None, None)


def test_tsv() -> None:
    assert written("tsv", *ROWS) == (
        b"a.jpg\tcat\t0.9312\n"
        b"sub/b, 2.jpg\tunknown\t0.4000\n"
        b'tab\\t"q"\\\\\\n\\r\xff\xc3\xa9.jpg\t\\!\xc3\xa9\\t\t0.9312\n'
        b'c.jpg\t!truncated\tended after 3 of "10" blocks,\\nno more\n'
    )


def test_tsv_with_several_labels() -> None:
    options = SinkOptions(top_k=3, labels=("cat", "dog", "ox"))
    assert written("tsv", *ROWS, options=options) == (
        b"a.jpg\tcat\t0.9312\tdog\t0.0472\tox\t0.0216\n"
        b"sub/b, 2.jpg\tunknown\t0.4000\tcat\t0.3500\tox\t0.2500\n"
        b'tab\\t"q"\\\\\\n\\r\xff\xc3\xa9.jpg\t\\!\xc3\xa9\\t\t0.9312\n'
        b'c.jpg\t!truncated\tended after 3 of "10" blocks,\\nno more\n'
    )


def test_csv() -> None:
    assert written("csv", *ROWS) == (
        b"path,label,score,cosine,margin,abstained,error\r\n"
        b"a.jpg,cat,0.931204,0.271310,0.884012,false,\r\n"
        b'"sub/b, 2.jpg",unknown,0.400000,0.200000,0.050000,true,\r\n'
        b'"tab\t""q""\\\n\r\xff\xc3\xa9.jpg",!\xc3\xa9\t,0.931204,0.271310,0.884012,false,\r\n'
        b'c.jpg,,,,,false,"truncated: ended after 3 of ""10"" blocks,\nno more"\r\n'
    )


def test_csv_with_several_labels() -> None:
    options = SinkOptions(top_k=9, labels=("cat", "dog", "ox"))
    assert written("csv", CAT, UNKNOWN, FAILED, replace(CAT, top=CAT.top[:2]), options=options) == (
        b"path,label,score,cosine,margin,abstained,error,label_2,score_2,label_3,score_3\r\n"
        b"a.jpg,cat,0.931204,0.271310,0.884012,false,,dog,0.047192,ox,0.021604\r\n"
        b'"sub/b, 2.jpg",unknown,0.400000,0.200000,0.050000,true,,cat,0.350000,ox,0.250000\r\n'
        b'c.jpg,,,,,false,"truncated: ended after 3 of ""10"" blocks,\nno more",,,,\r\n'
        b"a.jpg,cat,0.931204,0.271310,0.884012,false,,dog,0.047192,,\r\n"
    )


def test_paths() -> None:
    assert written("paths", *ROWS) == b'a.jpg\ntab\t"q"\\\n\r\xff\xc3\xa9.jpg\n'
    assert written("paths", *ROWS, options=SinkOptions(null=True)) == b'a.jpg\0tab\t"q"\\\n\r\xff\xc3\xa9.jpg\0'


def test_table() -> None:
    options = SinkOptions(width=80, labels=("cat", "dog", "三毛猫"))
    wide = replace(CAT, path="写真/[red]x[/red] :smile:.jpg", label="三毛猫", score=0.5)
    assert written("table", CAT, wide, ODD, FAILED, UNKNOWN, CAT, options=options).decode() == (
        "cat     0.9312 ███████▌  a.jpg\n"
        "三毛猫  0.5000 ████      写真/[red]x[/red] :smile:.jpg\n"
        r"!é\t    0.9312 ███████▌  tab\t"
        '"q"'
        r"\\n\r\xffé.jpg"
        "\n"
        r'!truncated               c.jpg: ended after 3 of "10" blocks,\nno more'
        "\n"
        "unknown  0.4000 ███▎      sub/b, 2.jpg\n"  # wider than all that was announced: the column grows
        "cat      0.9312 ███████▌  a.jpg\n"
    )


def test_table_with_several_labels() -> None:
    options = SinkOptions(top_k=2, width=80, labels=("cat", "dog", "sheep"))
    assert written("table", CAT, FAILED, options=options).decode() == (
        "cat    0.9312 ███████▌  dog    0.0472  a.jpg\n"
        r'!truncated                             c.jpg: ended after 3 of "10" blocks,\nno more'
        "\n"
    )


def test_table_in_colour() -> None:
    options = SinkOptions(width=80, labels=("cat", "unknown"), color=True)
    assert written("table", CAT, UNKNOWN, replace(FAILED, message="ended"), options=options).decode() == (
        "\x1b[1mcat    \x1b[0m  0.9312 \x1b[36m███████▌\x1b[0m  a.jpg\n"
        "\x1b[2munknown\x1b[0m  0.4000 \x1b[36m███▎    \x1b[0m  sub/b, 2.jpg\n"
        "\x1b[31m!truncated              \x1b[0m  c.jpg: ended\n"
    )


def test_table_shortens_a_label_of_more_than_a_third() -> None:
    options = SinkOptions(width=30)
    long, wide = replace(CAT, label="an extraordinarily long label"), replace(CAT, label="三" * 8)
    assert written("table", long, wide, options=options).decode() == (
        "an extrao…  0.9312 ███████▌  a.jpg\n三三三三…   0.9312 ███████▌  a.jpg\n"
    )


# ---- how it is written


class Recorder(io.BytesIO):
    """A stream that keeps each call apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes | str] = []

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self.calls.append(data)
        return super().write(data)

    def flush(self) -> None:
        self.calls.append("flush")


@pytest.mark.parametrize("format", FORMATS)
def test_each_row_is_one_write_and_seen_when_asked_for(format: str) -> None:
    stream = Recorder()
    sink: LineSink = open_sink(format, stream, SinkOptions(width=80))
    assert stream.calls == []  # nothing before the first row
    sink.write(CAT)
    sink.write(CAT)
    sink.flush()
    first, *rest = stream.calls
    assert isinstance(first, bytes) and first.endswith(b"\n")
    assert rest == [first.removeprefix(b"path,label,score,cosine,margin,abstained,error\r\n"), "flush"]
    sink.close()
    assert not stream.closed


def test_no_rows_leave_the_header_alone() -> None:
    empty = {format: written(format) for format in FORMATS}
    assert empty == dict.fromkeys(FORMATS, b"") | {"csv": b"path,label,score,cosine,margin,abstained,error\r\n"}


@pytest.mark.parametrize(
    ("path", "is_terminal", "expected"),
    [
        (None, True, "table"),
        (None, False, "tsv"),
        ("out.jsonl", False, "jsonl"),
        ("OUT.NDJSON", True, "jsonl"),
        ("out.json", True, "jsonl"),
        ("out.csv", True, "csv"),
        ("dir.csv/out.tsv", True, "tsv"),
        ("out.txt", True, "tsv"),
        ("dir.csv/out", True, "tsv"),
        ("csv", True, "tsv"),
    ],
)
def test_the_format_of_auto(path: str | None, is_terminal: bool, expected: str) -> None:
    assert format_for(path, is_terminal) == expected
    assert expected in FORMATS


def test_every_ending_leads_to_a_format() -> None:
    assert set(ENDINGS.values()) <= set(FORMATS)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        open_sink("xml", io.BytesIO(), SinkOptions())
    assert error.value.message == "there is no format `xml`"
    assert error.value.hint == "choose one of table, tsv, csv, jsonl, paths"


def test_only_the_table_imports_rich() -> None:
    program = (
        "import io, sys; from clipcli.output.sink import FORMATS, SinkOptions, open_sink\n"
        "for name in FORMATS:\n"
        "    if name != 'table': open_sink(name, io.BytesIO(), SinkOptions()).close()\n"
        "assert not {'rich', 'numpy', 'torch', 'typer'} & set(sys.modules)\n"
        "open_sink('table', io.BytesIO(), SinkOptions()); assert 'rich' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- any name, any label

paths = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name).map(os.fsdecode)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
numbers = st.floats(0, 1)
candidates = st.builds(Candidate, texts, numbers, numbers)
predictions = st.builds(
    Prediction,
    paths,
    texts,
    numbers,
    numbers,
    numbers,
    st.booleans(),
    st.lists(candidates, max_size=3).map(tuple),
)
failures = st.builds(Failure, paths, st.sampled_from(FailureKind), st.one_of(texts, paths))
rows = st.one_of(predictions, failures)
given_rows = given(st.lists(rows, min_size=1, max_size=4))


@settings(max_examples=80, deadline=None)
@given_rows
def test_jsonl_comes_back(rows: list[Row]) -> None:
    lines = written("jsonl", *rows).decode().splitlines()  # str's own splitlines knows U+0085 and U+2028, too
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        value = json.loads(line)
        jsonschema.validate(value, SCHEMA)
        name = os.fsencode(row.path)
        assert (base64.b64decode(value["path_bytes"]) if "path_bytes" in value else value["path"].encode()) == name
        assert value["path"] == name.decode("utf-8", "replace")
        if isinstance(row, Failure):
            assert value["error"]["kind"] == row.kind
            assert value["label"] is None and value["top"] == []
        else:
            assert (value["label"], value["abstained"], value["error"]) == (row.label, row.abstained, None)
            assert value["score"] == pytest.approx(row.score, abs=5.1e-7)
            assert [entry["label"] for entry in value["top"]] == [candidate.label for candidate in row.top]


@settings(max_examples=80, deadline=None)
@given_rows
def test_tsv_comes_back(rows: list[Row]) -> None:
    output = written("tsv", *rows, options=SinkOptions(top_k=4))
    lines = output.split(b"\n")
    assert lines.pop() == b"" and len(lines) == len(rows) and b"\r" not in output
    for line, row in zip(lines, rows, strict=True):
        path, second, *rest = line.split(b"\t")
        assert unescape(path) == os.fsencode(row.path)
        assert second.startswith(b"!") == isinstance(row, Failure)
        if isinstance(row, Failure):
            assert second == f"!{row.kind}".encode()
            assert [unescape(field) for field in rest] == [row.message.encode("utf-8", "surrogateescape")]
        else:
            assert unescape(second).decode() == row.label
            assert [unescape(field).decode() for field in rest[1::2]] == [other.label for other in row.top[1:]]


@settings(max_examples=80, deadline=None)
@given_rows
def test_csv_comes_back(rows: list[Row]) -> None:
    text = written("csv", *rows, options=SinkOptions(top_k=3)).decode("utf-8", "surrogateescape")
    header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert len(lines) == len(rows) and {len(line) for line in lines} == {len(header)} == {11}
    for line, row in zip(lines, rows, strict=True):
        value = dict(zip(header, line, strict=True))
        assert value["path"].encode("utf-8", "surrogateescape") == os.fsencode(row.path)
        if isinstance(row, Failure):
            assert value["error"] == f"{row.kind}: {row.message}"
            assert value["label"] == value["score"] == value["label_2"] == ""
        else:
            assert (value["label"], value["error"]) == (row.label, "")
            assert value["abstained"] == ("true" if row.abstained else "false")
            assert float(value["margin"]) == pytest.approx(row.margin, abs=5.1e-7)


@settings(max_examples=80, deadline=None)
@given_rows
def test_a_table_row_is_one_visible_line(rows: list[Row]) -> None:
    lines = written("table", *rows, options=SinkOptions(top_k=3, width=60)).decode().split("\n")
    assert lines.pop() == "" and len(lines) == len(rows)
    assert all(ord(char) >= 0x20 and not 0x7F <= ord(char) < 0xA0 for line in lines for char in line)


@settings(max_examples=80, deadline=None)
@given(st.binary())
def test_escaping_has_an_inverse(field: bytes) -> None:
    assert unescape(escape(field)) == field
    assert not set(escape(field)) & set(b"\t\n\r")


# ---- for a person's eyes


def test_what_would_move_the_cursor_is_shown() -> None:
    assert printable("a b\u00a0é三\u3000👩\u200d🚀") == "a b\u00a0é三\u3000👩\u200d🚀"
    assert printable("\n\t\x1b[31m\x07\x9b\u202e\u2028\ufeff") == r"\n\t\x1b[31m\x07\x9b\u202e\u2028\ufeff"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\xff.jpg"


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.0, "        "),
        (0.015625, "▏       "),
        (0.5, "████    "),
        (0.55, "████▍   "),
        (0.99, "███████▉"),
        (1.0, "████████"),
        (1.2, "████████"),
        (-1.0, "        "),
        (float("nan"), "        "),
    ],
)
def test_bar(score: float, expected: str) -> None:
    assert bar(score) == expected


def test_counts() -> None:
    counts = Counts()
    assert (counts.total, counts.failed, counts.lines()) == (0, 0, [])
    for row in (UNKNOWN, CAT, ODD, CAT, FAILED, replace(FAILED, kind=FailureKind.MISSING), FAILED):
        counts.add(row)
    assert (counts.total, counts.failed) == (7, 3)
    assert counts.lines() == ["2  cat", r"1  !é\t", "1  unknown", "1  !missing", "2  !truncated"]


def test_counts_of_many_labels() -> None:
    counts = Counts()
    for label in range(30):
        for _ in range(1200 if label == 7 else 30 - label):
            counts.add(replace(CAT, label=f"label {label:02}"))
    counts.add(FAILED)
    lines = counts.lines()
    assert lines[:3] == ["1,200  label 07", "   30  label 00", "   29  label 01"]
    assert lines[-3:] == ["   11  label 19", "   55  in 10 more labels", "    1  !truncated"]
    assert len(lines) == 22
