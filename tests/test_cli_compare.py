"""`clipcli compare`, as it is typed: a report on a terminal, pairs of labels in a pipe, paths, JSON, and wrong use."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from conftest import Run
from test_cli_words import on_a_terminal
from test_compare import A, B, failure, row
from test_house import HEAVY, modules_after
from test_output import written

from clipcli.records import FailureKind

SUMMARY = """\
clipcli: 8 pictures in both, 1 only in a.jsonl, 1 only in b.csv
clipcli: same label: 2 of 5 (40.0%, kappa 0.211); mean score 0.6500 -> 0.6300
clipcli: failures: 1 appeared, 1 went; abstentions: 1 appeared, 1 went
"""
PATH = {"path": {"type": "string"}, "path_bytes": {"type": "string"}}
ANSWER = {
    "type": "object",
    "required": ["label", "score", "margin", "abstained", "error"],
    "properties": {
        "label": {"type": ["string", "null"]},
        "score": {"type": ["number", "null"]},
        "margin": {"type": ["number", "null"]},
        "abstained": {"type": "boolean"},
        "error": {"enum": [None, *(kind.value for kind in FailureKind)]},
    },
    "additionalProperties": False,
}
CHANGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["path", "a", "b"],
        "properties": {**PATH, "a": ANSWER, "b": ANSWER},
        "additionalProperties": False,
    },
}
NAMES = {
    "type": "array",
    "items": {"type": "object", "required": ["path"], "properties": PATH, "additionalProperties": False},
}
SIDE = {
    "type": "object",
    "required": ["file", "rows", "failed", "abstained", "mean_score"],
    "properties": {
        "file": {"type": "string"},
        "rows": {"type": "integer"},
        "failed": {"type": "integer"},
        "abstained": {"type": "integer"},
        "mean_score": {"type": ["number", "null"]},
    },
    "additionalProperties": False,
}
FLIP = {
    "type": "object",
    "required": ["a", "b", "count"],
    "properties": {"a": {"type": "string"}, "b": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
    "additionalProperties": False,
}
PROPERTIES = {
    "a": SIDE,
    "b": SIDE,
    "both": {"type": "integer"},
    "labelled": {"type": "integer"},
    "agreement": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "kappa": {"type": ["number", "null"], "minimum": -1, "maximum": 1},
    "flips": {"type": "array", "items": FLIP},
    "only_a": NAMES,
    "only_b": NAMES,
    "changed": CHANGES,
    "failures_appeared": CHANGES,
    "failures_went": CHANGES,
    "abstentions_appeared": CHANGES,
    "abstentions_went": CHANGES,
    "score_changes": CHANGES,
    "margin_changes": CHANGES,
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": [*PROPERTIES],
    "properties": PROPERTIES,
    "additionalProperties": False,
}
ODD = os.fsdecode(b"tab\t\xff[red]\n.jpg")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the rows of two runs, and of two over pictures of odd names."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(written("jsonl", *A))
    Path("b.csv").write_bytes(written("csv", *B))
    Path("odd-a.tsv").write_bytes(written("tsv", row(ODD, "!\t"), row("x", "cat"), row("y", "cat", 0.25)))
    Path("odd-b.tsv").write_bytes(written("tsv", row(ODD, "é\x1b[31m"), row("x", "dog", 0.75), row("y", "dog")))
    return tmp_path


def test_pairs_of_labels_in_a_pipe(cli: Run) -> None:
    done = cli("compare", "a.jsonl", "b.csv")
    assert (done.code, done.err) == (0, SUMMARY)
    assert done.out == b"1\tcat\tdog\t2\n1\tox\tunknown\t8\n1\tunknown\tox\t7\n"


def test_pairs_come_by_number_and_are_escaped(cli: Run) -> None:
    done = cli("compare", "odd-a.tsv", "odd-b.tsv", "-q")
    assert (done.code, done.err) == (0, "")
    assert done.out == b"2\tcat\tdog\tx\n1\t!\\t\t\xc3\xa9\x1b[31m\ttab\\t\xff[red]\\n.jpg\n"


def test_paths_of_what_changed(cli: Run) -> None:
    assert cli("compare", "a.jsonl", "b.csv", "--changed").out == b"8\n7\n2\n"
    done = cli("compare", "odd-a.tsv", "odd-b.tsv", "--changed", "--print0", "-q")
    assert done.out == b"tab\t\xff[red]\n.jpg\0x\0y\0"


def test_one_json_object(cli: Run) -> None:
    done = cli("compare", "a.jsonl", "b.csv", "--json", "--top", "1")
    found = json.loads(done.out)
    jsonschema.validate(found, SCHEMA)
    assert (done.err, done.out.count(b"\n")) == (SUMMARY, 1)
    assert found["a"] == {"file": "a.jsonl", "rows": 9, "failed": 2, "abstained": 1, "mean_score": 0.65}
    assert (found["both"], found["labelled"], found["agreement"], found["kappa"]) == (8, 5, 0.4, 0.210526)
    assert found["flips"][0] == {"a": "cat", "b": "dog", "count": 1}
    assert [one["path"] for one in found["changed"]] == ["8", "7", "2"]
    assert found["failures_appeared"][0]["b"] == {
        "label": None, "score": None, "margin": None, "abstained": False, "error": "truncated"
    }  # fmt: skip
    assert [one["path"] for one in found["score_changes"]] == ["3"]


def test_json_of_odd_names_and_of_nothing(cli: Run) -> None:
    out = cli("compare", "odd-a.tsv", "odd-b.tsv", "--json").out
    found = json.loads(out)
    jsonschema.validate(found, SCHEMA)
    assert base64.b64decode(found["changed"][0]["path_bytes"]) == os.fsencode(ODD)
    assert "path_bytes" not in found["changed"][1] and found["changed"][1]["a"]["margin"] is None
    assert b"\x1b" not in out and b"\\u001b" in out
    Path("empty.csv").touch()
    found = json.loads(cli("compare", "empty.csv", "a.jsonl", "--json").out)
    jsonschema.validate(found, SCHEMA)
    assert (found["agreement"], found["kappa"], found["a"]["mean_score"]) == (None, None, None)


def test_one_run_from_stdin(cli: Run) -> None:
    done = cli("compare", "a.jsonl", "-", stdin=Path("b.csv").read_bytes())
    assert (done.code, done.err) == (0, SUMMARY.replace("b.csv", "-"))
    assert done.out.count(b"\n") == 3


def test_no_picture_in_both(cli: Run) -> None:
    done = cli("compare", "a.jsonl", "odd-a.tsv")
    assert (done.code, done.out) == (0, b"")
    assert done.err.splitlines() == [
        "clipcli: 0 pictures in both, 9 only in a.jsonl, 3 only in odd-a.tsv",
        "clipcli: pictures are matched by path, byte for byte: were both runs started in the same folder?",
    ]


def test_a_torn_line_is_told(cli: Run) -> None:
    Path("torn.jsonl").write_bytes(Path("a.jsonl").read_bytes()[:-9])
    done = cli("compare", "torn.jsonl", "b.csv")
    assert done.code == 0
    assert "clipcli: torn.jsonl: the last line is torn, and left out" in done.err
    assert "8 pictures in both, 0 only in torn.jsonl, 1 only in b.csv" in done.err


# ---- into a file


def test_into_a_file(cli: Run) -> None:
    expected = cli("compare", "a.jsonl", "b.csv").out
    done = cli("compare", "a.jsonl", "b.csv", "-o", "flips.tsv")
    assert (done.code, done.out, done.err) == (0, b"", SUMMARY)
    assert Path("flips.tsv").read_bytes() == expected
    assert cli("compare", "a.jsonl", "b.csv", "-o", "flips.tsv").code == 2
    assert cli("compare", "a.jsonl", "b.csv", "--changed", "-o", "flips.tsv", "--force").code == 0
    assert Path("flips.tsv").read_bytes() == b"8\n7\n2\n"
    assert cli("compare", "a.jsonl", "b.csv", "-o", "all.json").out == b""
    jsonschema.validate(json.loads(Path("all.json").read_bytes()), SCHEMA)
    assert cli("compare", "a.jsonl", "b.csv", "-o", "-").out == expected


def test_what_it_reads_is_never_overwritten(cli: Run) -> None:
    before = Path("a.jsonl").read_bytes()
    done = cli("compare", "a.jsonl", "b.csv", "-o", "a.jsonl", "--force")
    assert done.code == 2 and "is read by this very run" in done.err
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk(cli: Run) -> None:
    done = cli("compare", "a.jsonl", "b.csv", "-o", "/dev/full")
    assert (done.code, done.out) == (1, b"")
    assert "clipcli: /dev/full: can't be written: no space left on device" in done.err


# ---- wrong use


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.jsonl"], "missing"),
        (["a.jsonl", "none.csv"], "none.csv: no such file or directory"),
        (["a.jsonl", "."], ".: is a directory"),
        (["-", "-"], "stdin can't be read twice"),
        (["a.jsonl", "b.csv", "--print0"], "--print0 is for paths alone"),
        (["a.jsonl", "b.csv", "--changed", "--json"], "--changed and --json exclude each other"),
        (["a.jsonl", "b.csv", "--top", "0"], "--top"),
        (["a.jsonl", "picture.png"], "picture.png:1: not a row of any format: it begins with no JSON object"),
        (["labels.csv", "b.csv"], "labels.csv:1: not a row of any format"),
        (["bad.tsv", "b.csv"], "bad.tsv:2: not a row of tsv: columns are 3, 5, 7, … here 2"),
    ],
)
def test_wrong_use(cli: Run, args: list[str], message: str) -> None:
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    Path("labels.csv").write_text("label,aliases\ncat,tabby\n")
    Path("bad.tsv").write_text("x\tcat\t0.5\ny\tcat\n")
    done = cli("compare", *args, stdin=b"")
    assert (done.code, done.out) == (2, b"")
    assert message in done.err.splitlines()[0]


# ---- a terminal


def test_a_report_on_a_terminal() -> None:
    lines = on_a_terminal("compare", "a.jsonl", "b.csv", "--top", "1", NO_COLOR="1").splitlines()
    assert lines == [
        *(line.removeprefix("clipcli: ") for line in SUMMARY.splitlines()),
        "",
        "labels that changed",
        "  1  cat -> dog  2",
        "  and 2 more",
        "",
        "scores that changed most",
        "  -0.2500  0.7500 -> 0.5000  dog  3",
        "",
        "margins that changed most",
        "  +0.2500  0.2500 -> 0.5000  cat  1",
        "",
        "failures that appeared",
        "  truncated  4",
        "",
        "failures that went",
        "  truncated  5",
        "",
        "abstentions that appeared",
        "  ox  8",
        "",
        "abstentions that went",
        "  ox  7",
        "",
        "only in a.jsonl",
        "  only",
        "",
        "only in b.csv",
        "  new",
    ]


def test_names_cannot_steer_a_terminal() -> None:
    shown = on_a_terminal("compare", "odd-a.tsv", "odd-b.tsv", "--color", "always")
    assert "\x1b[1mlabels that changed\x1b[0m" in shown
    assert r"!\t -> é\x1b[31m" in shown and r"tab\t\xff[red]\n.jpg" in shown
    assert shown.replace("\x1b[1m", "").replace("\x1b[0m", "").count("\x1b") == 0


def test_a_report_of_no_change() -> None:
    shown = on_a_terminal("compare", "a.jsonl", "a.jsonl")
    assert "same label: 6 of 6" not in shown  # 7 rows have a label
    assert "same label: 7 of 7 (100.0%, kappa 1.000)" in shown
    assert len(shown.splitlines()) == 3


# ---- manners


def test_nothing_heavy_is_imported() -> None:
    help_page = "sys.stdout = sys.stderr; from clipcli.cli.main import run; run(['compare', '--help'])"
    assert not modules_after(help_page) & {*HEAVY}
    here = Path.cwd()
    files = [str(here / "a.jsonl"), str(here / "b.csv")]
    assert not modules_after(f"from clipcli.cli.main import run; assert run(['compare', *{files!r}]) == 0") & {*HEAVY}


def test_help_ends_with_examples(cli: Run) -> None:
    page = cli("compare", "--help").out.decode()
    assert page.partition("Examples")[2].count("clipcli compare ") >= 4


@pytest.mark.skipif(not shutil.which("head"), reason="needs head")
def test_a_closed_pipe_is_quiet() -> None:
    rows = [row(f"{number}.jpg", f"label {number}") for number in range(6_000)]
    Path("many-a.tsv").write_bytes(written("tsv", *rows))
    Path("many-b.tsv").write_bytes(written("tsv", *(row(one.path, "cat") for one in rows)))
    script = '"$0" -m clipcli compare many-a.tsv many-b.tsv | head -1; echo ${PIPESTATUS[0]}'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, env=environment, check=True)
    assert done.stdout.splitlines() == [b"1\tlabel 0\tcat\t0.jpg", b"0"]
    assert done.stderr == b""


def test_a_failure_in_both_is_no_change(cli: Run) -> None:
    Path("f.tsv").write_bytes(written("tsv", failure("x")))
    done = cli("compare", "f.tsv", "f.tsv")
    assert (done.code, done.out) == (0, b"")
    assert done.err.splitlines()[1] == "clipcli: failures: 0 appeared, 0 went; abstentions: 0 appeared, 0 went"
