"""`clipcli cache`: what is told is there, what is deleted was asked for, and others may use the store meanwhile."""

from __future__ import annotations

import io
import json
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from test_house import modules_after

from clipcli.paths import store_file
from clipcli.store.database import Store
from clipcli.store.inspect import Selection, remove, survey

DAY = 86_400
ONE, OTHER = "3f9a0b11c2d4", "77aa0b11c2d4"


def vectors(count: int, prefix: str = "v", width: int = 512) -> dict[bytes, np.ndarray]:
    return {f"{prefix}{i}".encode(): np.full(width, i, np.float32) for i in range(count)}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store with two models' entries: 300 + 100 vectors, one classifier, one fingerprint of a file."""
    with Store(store_file()) as store:
        store.keep_prompt_vectors(vectors(300), ONE)
        store.keep_prompt_vectors(vectors(100, "w"), OTHER)
        store.keep_classifier(b"c", np.ones((10, 512), np.float32), ONE)
        file = tmp_path / "file"
        file.write_text("x")
        store.tensor_digest(file, "image", lambda: b"0123456789abcdef")
    return store_file()


def counts(path: Path) -> dict[tuple[str, str], int]:
    return {(group.kind, group.model): group.entries for group in survey(path).groups}


ALL = {("classifier", ONE): 1, ("digest", ""): 1, ("prompt", ONE): 300, ("prompt", OTHER): 100}


def age(path: Path, condition: str, days: float) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE entry SET used = ? WHERE {condition}", (int(time.time() - days * DAY),))
    connection.commit()
    connection.close()


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


# ---- info, path


def test_info_before_anything_is_kept(cli: Run) -> None:
    result = cli("cache", "info")
    assert (result.code, result.err) == (0, "")
    assert result.lines == [f"{store_file()}  0 B", "nothing is kept yet"]
    assert not store_file().parent.exists()  # looking makes nothing
    assert json.loads(cli("cache", "info", "--json").out)["groups"] == []


def test_info(cli: Run, filled: Path) -> None:
    before = files(filled)
    lines = cli("cache", "info").lines
    assert lines[0].startswith(f"{filled}  ")
    assert lines[1].split() == ["kind", "entries", "values", "model", "last", "used"]
    today = time.strftime("%Y-%m-%d")
    assert lines[2:] == [
        f"classifier        1   20 kB  3f9a0b11  {today}  class weights of label lists",
        f"digest            1    16 B  -         {today}  fingerprints of weight files",
        f"prompt          300  614 kB  3f9a0b11  {today}  prompt vectors",
        f"prompt          100  205 kB  77aa0b11  {today}  prompt vectors",
    ]
    assert files(filled) == before


def test_info_as_json(cli: Run, filled: Path) -> None:
    age(filled, "key = CAST('v0' AS BLOB)", 10)
    found = json.loads(cli("cache", "info", "--json").out)
    assert found["path"] == str(filled) and found["size"] == filled.stat().st_size
    group = next(group for group in found["groups"] if group["model"] == ONE and group["kind"] == "prompt")
    assert (group["entries"], group["size"]) == (300, 300 * 512 * 4)
    assert group["first_used"] < group["last_used"] and group["first_used"].endswith("+00:00")
    assert next(group["model"] for group in found["groups"] if group["kind"] == "digest") is None


def test_a_kind_of_a_later_version_is_told_and_cleared(cli: Run, filled: Path) -> None:
    with Store(filled) as store:
        store._write("embedding", vectors(5, "e"), ONE)
    assert any(line.startswith("embedding         5") for line in cli("cache", "info").lines)
    assert cli("cache", "clear", "--kind", "embedding", "--yes").code == 0
    assert counts(filled) == ALL


def test_path(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("cache", "path").out == f"{store_file()}\n".encode()
    monkeypatch.setenv("CLIPCLI_CACHE_DIR", "caf\udce9")  # any bytes
    assert cli("cache", "path").out == b"caf\xe9/store.sqlite\n"


def test_times_of_a_damaged_entry_are_told_somehow(cli: Run, filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("UPDATE entry SET used = 'gibberish' WHERE kind = 'digest'")
    connection.execute("UPDATE entry SET used = 9e18 WHERE kind = 'classifier'")
    connection.commit()
    connection.close()
    assert cli("cache", "info").code == 0


# ---- clear


@pytest.mark.parametrize(
    ("args", "left"),
    [
        ([], {}),
        (["--kind", "prompt"], {("classifier", ONE): 1, ("digest", ""): 1}),
        (["--model", "3F9A"], {("digest", ""): 1, ("prompt", OTHER): 100}),
        (["--kind", "prompt", "-m", "77"], {**ALL, ("prompt", OTHER): 0}),
        (["--model", "%"], ALL),
        (["--older-than", "30d"], {**ALL, ("prompt", ONE): 250}),
        (["--older-than", "9w"], ALL),
        (["--kind", "damaged"], ALL),
    ],
    ids=str,
)
def test_clear(cli: Run, filled: Path, args: list[str], left: dict[tuple[str, str], int]) -> None:
    age(filled, f"model = '{ONE}' AND kind = 'prompt' AND CAST(substr(CAST(key AS TEXT), 2) AS INTEGER) < 50", 40)
    dry = cli("cache", "clear", *args, "--dry-run")
    assert counts(filled) == ALL
    size = filled.stat().st_size
    result = cli("cache", "clear", *args, "--yes")
    expected = {group: number for group, number in left.items() if number}
    assert (result.code, dry.code, result.out) == (0, 0, b"")
    assert counts(filled) == expected
    gone = sum(ALL.values()) - sum(expected.values())
    if gone:
        entries = "1 entry" if gone == 1 else f"{gone} entries"
        assert dry.err.startswith(f"clipcli: would delete {entries}, ") and dry.lines
        assert result.err.startswith(f"clipcli: {entries} deleted, ")
    else:
        assert dry.err == result.err == "clipcli: nothing to delete\n"
    assert (filled.stat().st_size < size) == (gone > 1)
    assert files(filled) == ["store.sqlite", "store.sqlite.lock"]


def test_what_the_disk_gets_back_is_told(cli: Run, filled: Path) -> None:
    before = filled.stat().st_size
    result = cli("cache", "clear", "--kind", "prompt", "-y")
    back = before - filled.stat().st_size
    assert result.err == f"clipcli: 400 entries deleted, {back / 1000:.0f} kB given back to the disk\n"


def test_a_dry_run_lists_what_would_go(cli: Run, filled: Path) -> None:
    lines = cli("cache", "clear", "--model", "77", "--dry-run").lines
    assert [line.split()[0] for line in lines] == ["kind", "prompt"]


def test_nothing_is_deleted_without_being_asked(cli: Run, filled: Path) -> None:
    result = cli("cache", "clear", stdin=b"y\n")  # no terminal
    assert (result.code, result.out) == (2, b"")
    assert result.err.splitlines()[0].startswith("clipcli: can't ask whether to delete 402 entries, ")
    assert result.err.splitlines()[1] == "hint: add --yes, or --dry-run to see what it is"
    assert counts(filled) == ALL


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, {}), ("n\n", 1, ALL), ("\n", 1, ALL), ("", 130, ALL)])
def test_a_terminal_is_asked(
    filled: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: dict[tuple[str, str], int]
) -> None:
    import sys

    from clipcli.cli.main import run

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    out, err = io.StringIO(), Terminal()
    for name, stream in (("stdin", Terminal(answer)), ("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, stream)
    assert run(["cache", "clear"]) == code
    assert "delete 402 entries, " in err.getvalue() and out.getvalue() == ""
    assert counts(filled) == left


def test_wrong_use(cli: Run, filled: Path) -> None:
    cases = {
        ("clear", "--kind", "promt"): ('no kind "promt"', "did you mean prompt?"),
        ("clear", "--older-than", "30"): ('--older-than "30" is no age', "write 12h, 30d, 8w or 1y"),
        ("prune", "--max-size", "5 apples"): ('--max-size "5 apples" is no size', "write 500MB, 2GB or 2GiB"),
        ("prune",): ("nothing says what to delete", "give --max-size 500MB or --older-than 30d"),
        ("clera",): ("no such command 'clera'", "did you mean clear?"),
        ("info", "--jsn"): ("no such option: --jsn", "did you mean --json?"),
    }
    for args, (message, hint) in cases.items():
        result = cli("cache", *args)
        assert (result.code, result.out, result.err) == (2, b"", f"clipcli: {message}\nhint: {hint}\n")
    assert counts(filled) == ALL


# ---- prune


def test_prune_keeps_what_was_used_last(cli: Run, filled: Path) -> None:
    age(filled, f"kind = 'prompt' AND model = '{ONE}'", 3)
    age(filled, f"kind = 'prompt' AND model = '{OTHER}'", 2)
    dry = cli("cache", "prune", "--max-size", "300kB", "--dry-run")
    assert counts(filled) == ALL
    result = cli("cache", "prune", "--max-size", "300kB", "--yes")
    kept = (300_000 - 100 * 2048 - 10 * 2048 - 16) // 2048
    assert counts(filled) == {**ALL, ("prompt", ONE): kept}
    assert dry.err.startswith(f"clipcli: would delete {300 - kept} entries, ")
    assert result.err.startswith(f"clipcli: {300 - kept} entries deleted, ")
    assert cli("cache", "prune", "--max-size", "300kB", "--yes").err == "clipcli: nothing to delete\n"


def test_prune_by_age_and_size(cli: Run, filled: Path) -> None:
    age(filled, f"kind = 'prompt' AND model = '{OTHER}'", 40)
    assert cli("cache", "prune", "--older-than", "30d", "--max-size", "1GiB", "--yes").code == 0
    assert counts(filled) == {key: number for key, number in ALL.items() if key != ("prompt", OTHER)}
    assert cli("cache", "prune", "--max-size", "0", "--yes").code == 0
    assert counts(filled) == {}


# ---- damage, and other processes


def test_image_towers_in_int8_are_listed_and_deleted(cli: Run, tmp_path: Path) -> None:
    folder = store_file().parent / "onnx"
    folder.mkdir(parents=True)
    for model in ("3f9a", "77aa"):
        (folder / f"{model}-int8-127-1-1.31.1.npz").write_bytes(bytes(5000))
    assert [line.split()[:5:4] for line in cli("cache", "info").lines[-2:]] == [["int8", "3f9a"], ["int8", "77aa"]]
    assert (
        cli("cache", "clear", "--model", "3f", "--yes").err == "clipcli: 1 file deleted, 5 kB given back to the disk\n"
    )
    assert cli("cache", "clear", "--kind", "prompt", "--yes").err == "clipcli: nothing to delete\n"
    assert cli("cache", "clear", "--yes").code == 0 and list(folder.iterdir()) == []


def test_copies_that_were_set_aside(cli: Run, filled: Path) -> None:
    copy = Path(f"{filled}.damaged-20260101T000000.000000Z")
    copy.write_bytes(b"x" * 5000)
    Path(f"{copy}-wal").write_bytes(b"x" * 1000)
    assert cli("cache", "info").lines[-1].split()[:3] == ["damaged", "-", "6"]
    assert json.loads(cli("cache", "info", "--json").out)["beside"][0]["size"] == 6000
    assert cli("cache", "clear", "--kind", "prompt", "--model", "77", "--yes").code == 0
    assert copy.exists()  # other things were asked for
    result = cli("cache", "clear", "--kind", "damaged", "--yes")
    assert result.err == "clipcli: 1 file deleted, 6 kB given back to the disk\n"
    assert files(filled) == ["store.sqlite", "store.sqlite.lock"]
    assert counts(filled) == {**{key: number for key, number in ALL.items() if key != ("prompt", OTHER)}}


def test_a_damaged_store(cli: Run, filled: Path) -> None:
    filled.write_bytes(b"junk" * 4096)
    result = cli("cache", "info")
    assert result.code == 1
    assert result.err.startswith(f"clipcli: the store {filled} is damaged: ")
    assert result.err.splitlines()[1] == "hint: clipcli cache clear --yes removes it"
    assert cli("cache", "clear", "--yes").code == 0
    assert counts(filled) == {} and files(filled) == ["store.sqlite", "store.sqlite.lock"]


def test_a_store_of_a_newer_clipcli_is_left_alone(cli: Run, filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = filled.read_bytes()
    for args in (["info"], ["clear", "--yes"], ["prune", "--max-size", "1", "--yes"]):
        result = cli("cache", *args)
        assert result.code == 1 and "newer clipcli" in result.err
    assert filled.read_bytes() == before


def test_another_process_that_uses_the_store_goes_on(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(filled) as other:
        assert len(other.prompt_vectors(list(vectors(300)))) == 300
        reader = sqlite3.connect(filled, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM entry").fetchone() == (402,)
        assert remove(filled, Selection(kind="prompt")).entries == 400
        assert reader.execute("SELECT count(*) FROM entry").fetchone() == (402,)  # its own view, until it ends
        assert "its file shrinks when that one ends" in caplog.text
        reader.close()
        assert other.prompt_vectors(list(vectors(300))) == {}
        other.keep_prompt_vectors(vectors(3), ONE)
    assert counts(filled)[("prompt", ONE)] == 3


def test_help_and_path_import_nothing_heavy() -> None:
    code = "sys.stdout = open('/dev/null', 'w'); from clipcli.cli.main import run; run({args!r})"
    for args in (["cache", "--help"], ["cache", "clear", "--help"], ["cache", "path"]):
        loaded = modules_after(code.format(args=args) + "; sys.stdout = sys.__stdout__")
        assert not loaded & {"torch", "numpy", "PIL", "huggingface_hub", "ftfy", "regex", "sqlite3"}
