"""One honest row for every file of the torture folder, through the real command, in every format."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torture
from conftest import Result, Run
from pictures_made import encoded, photo
from torture import GOOD, OTHER, TAR_ROWS, ZIP_ROWS, Case

from clipcli.images import decode as decode_module
from clipcli.images.find import Walk
from clipcli.records import Failure, Source

LABELS = ("-L", "cat", "-L", "dog")
JPEG = encoded(photo(96, 64), "JPEG", quality=90)
Row = tuple[bytes, str]  # the name below the folder, and the kind


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    folder = tmp_path_factory.mktemp("torture") / "t"
    return folder, torture.build(folder)


@pytest.fixture(autouse=True)
def here(made: tuple[Path, list[Case]], model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(made[0].parent)
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)  # whatever this machine has
    decode_module._has_plugin.cache_clear()
    yield
    decode_module._has_plugin.cache_clear()


@pytest.fixture
def expected(made: tuple[Path, list[Case]]) -> list[Row]:
    """The rows of the folder, in order."""
    return [(b"t/" + os.fsencode(case.name), case.kind) for case in made[1] if case.kind != OTHER]


def from_jsonl(result: Result) -> list[Row]:
    return [
        (
            base64.b64decode(row["path_bytes"]) if "path_bytes" in row else row["path"].encode(),
            row["error"]["kind"] if row["error"] else GOOD,
        )
        for row in result.rows
    ]


def from_csv(result: Result) -> list[Row]:
    text = result.out.decode("utf-8", "surrogateescape")
    return [
        (os.fsencode(row["path"]), row["error"].partition(":")[0] or GOOD)
        for row in csv.DictReader(io.StringIO(text, newline=""))
    ]


def from_tsv(result: Result) -> list[Row]:
    plain = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\"}
    rows = []
    for line in result.out.split(b"\n")[:-1]:
        path, answer, rest = line.split(b"\t")
        kind = answer[1:].decode() if answer.startswith(b"!") else GOOD
        assert kind != GOOD or (answer in (b"cat", b"dog") and 0 <= float(rest) <= 1)
        rows.append((re.sub(rb"\\(.)", lambda match: plain[match[1]], path), kind))
    return rows


READERS: dict[str, Callable[[Result], list[Row]]] = {"jsonl": from_jsonl, "csv": from_csv, "tsv": from_tsv}


@pytest.mark.parametrize("format", READERS)
def test_every_file_has_its_row(cli: Run, expected: list[Row], format: str) -> None:
    result = cli("classify", "t", *LABELS, "-f", format, "-v")
    assert result.code == 3
    assert READERS[format](result) == expected
    assert b"\x1b[" not in result.out.replace(b"\x1b[31mred", b"") and "\x1b" not in result.err
    failed = sum(kind != GOOD for _, kind in expected)
    assert f"clipcli: {len(expected)} pictures, {failed} failed" in result.err
    assert "Traceback" not in result.err


def test_passed_over_is_counted(cli: Run, made: tuple[Path, list[Case]]) -> None:
    hidden = (".hidden.jpg", ".folder/hidden.jpg", "special/up")  # not even looked at, or a folder
    others = [case.name for case in made[1] if case.kind == OTHER and case.name not in hidden[:2]]
    told = cli("classify", "t", *LABELS, "-v").err
    assert f"{len(others)} other files passed over" in told
    assert "clipcli: t: 2 archives in it passed over; to look inside, name them as INPUT" in told


def test_a_table_has_a_line_a_row(cli: Run, expected: list[Row]) -> None:
    result = cli("classify", "t", *LABELS, "-f", "table")
    lines = result.out.split(b"\n")[:-1]
    assert len(lines) == len(expected) and not any(byte < 32 for byte in result.out.replace(b"\n", b""))
    for line, (name, kind) in zip(lines, expected, strict=True):
        assert line.startswith(b"!" + kind.encode()) == (kind != GOOD)
        if name.isalnum() or name.replace(b"/", b"").replace(b".", b"").isalnum():
            assert name in line


def test_paths_are_bytes_and_failures_are_told(cli: Run, expected: list[Row]) -> None:
    result = cli("classify", "t", *LABELS, "-f", "paths", "--print0", "-q")
    assert result.out.split(b"\0")[:-1] == [name for name, kind in expected if kind == GOOD]
    told = result.err.splitlines()
    assert len(told) == sum(kind != GOOD for _, kind in expected), "a line each, whatever the name"
    assert all(line.startswith("clipcli: t/") for line in told)
    assert [line.rsplit(": ", 2)[1] for line in told if "Thumbs" in line] == []


def test_the_paths_of_one_run_feed_the_next(cli: Run, expected: list[Row]) -> None:
    listed = cli("classify", "t", *LABELS, "-f", "paths", "--print0", "-q").out
    again = cli("classify", "-0", *LABELS, "-f", "jsonl", stdin=listed)
    assert again.code == 0
    assert from_jsonl(again) == [row for row in expected if row[1] == GOOD]


def test_what_find_lists_gets_a_row_each(cli: Run, made: tuple[Path, list[Case]]) -> None:
    """`find` names hidden files, texts, pipes and dead links too: nothing of it may be lost."""
    listed = subprocess.run(["find", "t", "!", "-type", "d", "-print0"], capture_output=True, check=True).stdout
    names = [name for name in listed.split(b"\0") if name and not name.startswith(b"t/hostile")]
    rows = from_jsonl(cli("classify", "-0", *LABELS, "-f", "jsonl", stdin=b"\0".join(names)))
    assert [name for name, _ in rows] == names
    kinds = {b"t/" + os.fsencode(case.name): case.kind for case in made[1]}
    for name, kind in rows:
        if kinds[name] == OTHER:
            assert kind in ("not-a-picture", "missing", "unreadable", GOOD), name
        else:
            assert kind == kinds[name], name


@pytest.mark.parametrize("size", [1, 3, 64])
def test_no_wrong_neighbour(cli: Run, expected: list[Row], size: int) -> None:
    """However failures fall into batches, each picture keeps the numbers that it has alone."""
    rows = cli("classify", "t", *LABELS, "-f", "jsonl", "-b", size, "-j", 2, "--no-cache").rows
    good = [row for row in rows if not row["error"]]
    assert len(good) == sum(kind == GOOD for _, kind in expected)
    same = [row["cosine"] for row in good if row["path"].startswith("t/names/")]
    assert len(same) >= 15 and max(same) - min(same) < 1e-5, "one picture under many names"
    other = {round(row["cosine"], 4) for row in good if row["path"].startswith("t/good")}
    assert len(other) > 5


def test_a_label_file_in_the_folder_changes_nothing(cli: Run, expected: list[Row]) -> None:
    result = cli("classify", "t", "-l", "t/labels.txt", "-f", "jsonl")
    assert from_jsonl(result) == expected
    assert {row["label"] for row in result.rows if row["label"]} <= {"cat", "dog", "rocket"}


@pytest.mark.parametrize(("name", "cases"), [("hostile.tar", TAR_ROWS), ("hostile.zip", ZIP_ROWS)])
@pytest.mark.parametrize("format", READERS)
def test_hostile_archives(cli: Run, made: tuple[Path, list[Case]], name: str, cases: list[Case], format: str) -> None:
    before = {path: path.lstat().st_mtime_ns for path in made[0].parent.rglob("*")}
    result = cli("classify", f"t/{name}", *LABELS, "-f", format)
    names = [f"t/{name}::{case.name}" if case.name else f"t/{name}" for case in cases]
    assert result.code == 3
    assert READERS[format](result) == [(os.fsencode(path), case.kind) for path, case in zip(names, cases, strict=True)]
    assert {path: path.lstat().st_mtime_ns for path in made[0].parent.rglob("*")} == before, "nothing was written"


def test_crops_of_the_whole_folder_stay_in_theirs(cli: Run, made: tuple[Path, list[Case]], tmp_path: Path) -> None:
    before = sorted(made[0].parent.rglob("*"))
    result = cli("classify", "t", "t/hostile.tar", *LABELS, "-f", "jsonl", "--save-crop", tmp_path / "seen")
    good = {row["path_bytes"] if "path_bytes" in row else row["path"] for row in result.rows if not row["error"]}
    assert len(list((tmp_path / "seen").iterdir())) == len(good)
    assert sorted(made[0].parent.rglob("*")) == before and len(list(tmp_path.iterdir())) == 1


# ---- while the run goes on


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Path.unlink, "missing"),
        (lambda path: (path.unlink(), path.mkdir()), "unreadable"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "unreadable"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), "unreadable"),
        (lambda path: path.write_bytes(b""), "not-a-picture"),
        (lambda path: os.truncate(path, 700), "truncated"),
        (lambda path: path.write_bytes(JPEG + bytes(3_000_000)), GOOD),
    ],
    ids=["vanishes", "becomes a folder", "becomes a pipe", "becomes a loop", "is emptied", "shrinks", "grows"],
)
def test_a_file_that_changes_after_it_was_met(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], kind: str
) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    walk = Walk.__iter__

    def changing(self: Walk) -> Iterator[Source | Failure]:
        for item in walk(self):
            if item.path.endswith("b.jpg"):
                change(Path(item.path))
            yield item

    monkeypatch.setattr(Walk, "__iter__", changing)
    rows = from_jsonl(cli("classify", tmp_path, *LABELS, "-f", "jsonl"))
    assert [(os.path.basename(name), found) for name, found in rows] == [
        (b"a.jpg", GOOD),
        (b"b.jpg", kind),
        (b"c.jpg", GOOD),
    ]


def test_a_file_that_never_stops_growing(cli: Run, tmp_path: Path) -> None:
    path, over = tmp_path / "log.jpg", threading.Event()
    path.write_bytes(JPEG)

    def grow() -> None:
        with path.open("ab") as file:
            while not over.is_set() and file.tell() < 200_000_000:
                file.write(bytes(1 << 16))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        rows = from_jsonl(cli("classify", path, *LABELS, "-f", "jsonl"))
    finally:
        over.set()
        writer.join()
    assert [kind for _, kind in rows] == [GOOD]


def test_a_folder_that_vanishes(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(JPEG)
    walk = Walk.__iter__

    def changing(self: Walk) -> Iterator[Source | Failure]:
        for item in walk(self):
            if item.path.endswith("a/x.jpg"):
                (tmp_path / "b" / "x.jpg").unlink()
                (tmp_path / "b").rmdir()
            yield item

    monkeypatch.setattr(Walk, "__iter__", changing)
    rows = from_jsonl(cli("classify", tmp_path, *LABELS, "-f", "jsonl"))
    assert [name[-7:] for name, kind in rows if kind == GOOD] == [b"a/x.jpg", b"c/x.jpg"]
