"""`--resume` and `--retry-failed`: however a run ends, the one that goes on leaves what an uninterrupted one writes.

Most of it plays at the doors of `cli.destination`, with rows made by hand: a run is stopped at every line of the code
that writes, or the files are copied at that moment, as `kill -9` would leave them. Real processes, pictures and signals
come at the end.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from clipcli.cli.destination import Destination, FileWriter
from clipcli.errors import ExitCode, OutputError, UsageError
from clipcli.output import journal, rowfile
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row, Source

LABELS = ("cat", "dog", 'a, "b"')
NAMES = ("a.jpg", os.fsdecode(b'\xff\n"x",\t.jpg'), "a.jpg", "ü/b c.png", "[d].tar::e.jpg", "-f", "g.jpg")
OUTPUTS: list[dict[str, Any]] = [
    {"format": "jsonl"},
    {"format": "csv"},
    {"format": "csv", "top_k": 2, "wanted": frozenset(["dog"])},
    {"format": "tsv", "top_k": 3},
    {"format": "paths"},
    {"format": "paths", "print0": True, "wanted": frozenset(["cat", "unknown"])},
]
IDS = [f"{one['format']}{' some' * ('wanted' in one)}" for one in OUTPUTS]


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def some_rows(failing: Sequence[int] = (0, 3, 4)) -> list[Row]:
    return [_bad(name) if n in failing else _good(name, n) for n, name in enumerate(NAMES)]


def _good(path: str, seed: int) -> Prediction:
    chosen = random.Random(seed)
    top = tuple(Candidate(label, chosen.random(), chosen.random()) for label in chosen.sample(LABELS, 3))
    abstains = seed == 5
    label = "unknown" if abstains else top[0].label
    return Prediction(path, label, top[0].score, top[0].cosine, chosen.random(), abstains, top)


def _bad(path: str) -> Failure:
    return Failure(path, FailureKind.TRUNCATED, 'it, "ends"\nearly')


def write(path: Path, rows: Sequence[Row], output: dict[str, Any], stop: int | None = None, **options: Any) -> int:
    """A run whose pictures get these rows, stopped after `stop` of them. Returns how many were written."""
    given = {"path": path, "top_k": None, "print0": False, "color": "never", **output, **options}
    settings = given.pop("settings", {"--crop": "model"})
    destination = Destination(**given)
    sources = [Source(row.path) for row in rows]
    answers = {id(source): row for source, row in zip(sources, rows, strict=True)}
    written = 0
    with destination.open(LABELS, settings) as out:
        for source in out.left(iter(sources)):
            if written == stop:
                raise Stop
            out.write(answers[id(source)])
            out.flush()
            written += 1
        if written == stop:
            raise Stop
        out.close(complete=True)
    return written


def whole(folder: Path, rows: Sequence[Row], output: dict[str, Any]) -> bytes:
    path = folder / "whole"
    write(path, rows, output, force=True)
    return path.read_bytes()


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def saved(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(beside(path).read_bytes())
    return content


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def at_every_line(run: Callable[[], object], visit: Callable[[int], None]) -> int:
    """Call `visit` before every line that `run` executes in the two files that write. Returns how many there were."""
    files = {rowfile.__file__, journal.__file__}
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            visit(count)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Stop:
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here."""
    monkeypatch.setattr("os.fsync", lambda number: None)


@pytest.fixture(params=[True, False], ids=["often", "once"])
def often(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the side-car is saved after every row, or only when the run begins and ends."""
    monkeypatch.setattr(journal.SideCar, "due", property(lambda self: request.param))
    return bool(request.param)


# ---- however a run ends


@pytest.mark.parametrize("output", OUTPUTS, ids=IDS)
def test_a_run_that_is_stopped_after_any_row_goes_on(tmp_path: Path, output: dict[str, Any], often: bool) -> None:
    rows = some_rows()
    expected = whole(tmp_path, rows, output)
    for stop in range(len(rows) + 1):
        path = tmp_path / f"{stop}.rows"
        with pytest.raises(Stop):
            write(path, rows, output, stop)
        if stop:
            assert saved(path)["done"] == stop and not saved(path)["complete"]
            assert expected.startswith(path.read_bytes())
        assert write(path, rows, output, resume=True) == len(rows) - stop
        assert path.read_bytes() == expected
        assert saved(path)["complete"] and [span[0] for span in saved(path)["failed"]] == [0, 3, 4]


@pytest.mark.parametrize("output", OUTPUTS, ids=IDS)
def test_a_run_that_is_killed_anywhere_goes_on(tmp_path: Path, output: dict[str, Any], often: bool) -> None:
    rows = some_rows()
    expected = whole(tmp_path, rows, output)
    path = tmp_path / "run" / "rows"
    path.parent.mkdir()
    states: list[dict[str, bytes]] = []

    def look(line: int) -> None:
        if (now := contents(path.parent)) not in states:
            states.append(now)

    at_every_line(lambda: write(path, rows, output), look)
    assert len(states) > len(expected.splitlines())
    for state in states:
        restore(path.parent, state)
        write(path, rows, output, resume=True)
        assert path.read_bytes() == expected
        assert set(contents(path.parent)) == {"rows", "rows.run.json"}


@pytest.mark.parametrize("output", OUTPUTS, ids=IDS)
def test_trying_again_can_be_killed_anywhere(tmp_path: Path, output: dict[str, Any]) -> None:
    """Until it is done the old rows are there, then the new ones."""
    before, after = some_rows(), some_rows([3])
    old, new = whole(tmp_path, before, output), whole(tmp_path, after, output)
    path = tmp_path / "run" / "rows"
    path.parent.mkdir()
    write(path, before, output)
    states: list[dict[str, bytes]] = []

    def look(line: int) -> None:
        if (now := contents(path.parent)) not in states:
            states.append(now)

    at_every_line(lambda: write(path, after, output, retry=True), look)
    assert path.read_bytes() == new and len(states) > 5
    for state in states:
        assert state["rows"] in (old, new)
        restore(path.parent, state)
        assert write(path, after, output, resume=True) == 0
        assert path.read_bytes() in (old, new) and set(contents(path.parent)) == {"rows", "rows.run.json"}
        write(path, after, output, retry=True)
        assert path.read_bytes() == new and [span[0] for span in saved(path)["failed"]] == [3]
        assert set(contents(path.parent)) == {"rows", "rows.run.json"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that nobody could close
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[2]], ids=[IDS[0], IDS[2]])
def test_a_run_that_is_interrupted_anywhere_goes_on(
    tmp_path: Path, output: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal.SideCar, "due", property(lambda self: True))
    before, after = some_rows([0, 2]), some_rows([2])
    before, after = before[:4], after[:4]
    old, new = whole(tmp_path, before, output), whole(tmp_path, after, output)
    path = tmp_path / "run" / "rows"
    path.parent.mkdir()

    def stopped(line: int, rows: list[Row], **options: Any) -> bool:
        def stop(number: int) -> None:
            if number == line:
                raise Stop

        return at_every_line(lambda: write(path, rows, output, **options), stop) >= line

    line = 1
    while stopped(line, before, force=True):
        write(path, before, output, resume=True)
        assert path.read_bytes() == old
        line += 7  # of a loop, so that all its lines come about
    assert line > 100
    line = 1
    while stopped(line, after, retry=True):
        assert path.read_bytes() in (old, new)
        write(path, after, output, retry=True)
        assert path.read_bytes() == new
        write(path, before, output, force=True)
        line += 1
    assert line > 100


@pytest.mark.parametrize("output", OUTPUTS, ids=IDS)
def test_trying_again_gives_what_a_new_run_gives(tmp_path: Path, output: dict[str, Any]) -> None:
    """Whichever pictures failed, are mended, or fail in another way; and what had not been looked at yet, too."""
    chosen = random.Random(3)
    path = tmp_path / "rows"
    for _ in range(40):
        failing = chosen.sample(range(len(NAMES)), chosen.randint(0, len(NAMES)))
        still = [number for number in failing if chosen.random() < 0.5]
        stop = chosen.choice([None, *range(1, len(NAMES))])
        before, after = some_rows(failing), some_rows(still)
        with pytest.raises(Stop) if stop else nullcontext():
            write(path, before, output, stop, force=True)
        tried = sum(number < (stop or len(NAMES)) for number in failing)
        if not path.exists() or not beside(path).exists():
            continue
        if stop:  # pictures that come later have never been tried
            after = [new if number < stop else old for number, (new, old) in enumerate(zip(after, before, strict=True))]
        assert write(path, after, output, retry=True) == tried + len(NAMES) - (stop or len(NAMES))
        assert path.read_bytes() == whole(tmp_path, after, output)
        expected = [number for number, row in enumerate(after) if isinstance(row, Failure)]
        assert [span[0] for span in saved(path)["failed"]] == expected


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    path, link = tmp_path / "rows", tmp_path / "link"
    write(path, some_rows(), OUTPUTS[0])
    path.chmod(0o600)
    link.symlink_to(path)
    assert write(link, some_rows([]), OUTPUTS[0], retry=True) == 3
    assert path.stat().st_mode & 0o777 == 0o600 and link.is_symlink()


def test_a_torn_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = some_rows()
    with pytest.raises(Stop):
        write(path, rows, OUTPUTS[0], 3)
    with path.open("ab") as file:
        file.write(b'{"path": "half a r')
    write(path, rows, OUTPUTS[0], resume=True)
    assert path.read_bytes() == whole(tmp_path, rows, OUTPUTS[0])


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The system itself allows no more bytes in a file, wherever that limit falls in a row."""
    rows = some_rows()
    expected = whole(tmp_path, rows, OUTPUTS[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(1, len(expected), 23):
        path = tmp_path / f"{limit}.csv"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match="can't be written") as caught:
                write(path, rows, OUTPUTS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.hint in ("make room, and go on with --resume", "make room, and run it again")
        write(path, rows, OUTPUTS[1], resume=True)
        assert path.read_bytes() == expected


def test_a_disk_that_is_full_for_the_side_car_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    path = tmp_path / "rows"
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if path.exists() and path.stat().st_size > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(journal, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="no space left"):
        for _ in range(1000):
            write(path, rows, OUTPUTS[0], force=True)
    monkeypatch.undo()
    assert saved(path)["done"] < len(rows) and not list(tmp_path.glob("*.tmp"))
    write(path, rows, OUTPUTS[0], resume=True)
    assert path.read_bytes() == whole(tmp_path, rows, OUTPUTS[0])


# ---- what is refused, and leaves everything as it was


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A file with three of the seven rows."""
    path = tmp_path / "begun" / "rows"
    path.parent.mkdir()
    with pytest.raises(Stop):
        write(path, some_rows(), OUTPUTS[0], 3)
    return path


def refused(path: Path, rows: Sequence[Row] | None = None, output: dict[str, Any] | None = None, **options: Any) -> str:
    before = contents(path.parent)
    with pytest.raises(UsageError) as caught:
        write(path, some_rows() if rows is None else rows, output or OUTPUTS[0], **{"resume": True, **options})
    assert contents(path.parent) == before and "--force" in (caught.value.hint or "")
    return caught.value.message


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"format": "csv"}, "begun with a different --format: jsonl, now csv; --top-k: 5, now 1"),
        ({"format": "jsonl", "top_k": 2}, "begun with a different --top-k: 5, now 2"),
        ({"format": "jsonl", "print0": True}, "begun with a different --print0: False, now True"),
        ({"format": "jsonl", "wanted": {"cat", "dog"}}, "begun with a different --select: none, now cat, dog"),
        ({"format": "jsonl", "settings": {"--crop": "pad"}}, "begun with a different --crop: model, now pad"),
        ({"format": "jsonl", "settings": {}}, "begun with a different --crop: model, now none"),
    ],
)
def test_other_settings(begun: Path, output: dict[str, Any], told: str) -> None:
    assert refused(begun, None, output).endswith(told)
    assert refused(begun, None, output, retry=True).endswith(told)


@pytest.mark.parametrize("retry", [False, True])
def test_other_inputs(begun: Path, retry: bool) -> None:
    rows = some_rows()
    told = "the inputs have changed: not the same first 3 pictures as when it was begun"
    for others in (rows[1:], rows[:2], [], [rows[1], rows[0], *rows[2:]], [*rows[:2], _bad("new"), *rows[2:]]):
        assert told in refused(begun, others, retry=retry)
    assert write(begun, [*rows[:3], _bad("new"), *rows[3:]], OUTPUTS[0], resume=True) == 5  # further on nobody knows


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data.replace(b"cat", b"dog"), lambda data: b""]
)
def test_another_hand_in_the_file(begun: Path, change: Callable[[bytes], bytes]) -> None:
    begun.write_bytes(change(begun.read_bytes()))
    assert "has changed since its run wrote it" in refused(begun)


@pytest.mark.parametrize("content", ["", "{}", "[]", "nonsense", "[" * 100_000, '{"format": "clipcli run"}', None])
def test_a_side_car_that_says_nothing(begun: Path, content: str | None) -> None:
    beside(begun).write_text(json.dumps({**saved(begun), "offset": -1}) if content is None else content)
    assert "no record of a run" in refused(begun)


@pytest.mark.parametrize(
    "change",
    [
        {"done": float("inf")},
        {"done": 10**30},
        {"done": 0},
        {"offset": 0},
        {"failed": [[2, 9, 1], [1, 5, 1]]},
        {"failed": [[1, 5, 2], [1, 7, 1]]},
        {"failed": [[1, 5, 3], [2, 7, 1]]},
        {"failed": [[77, 0, 1]]},
        {"failed": [[1, 10**6, 1]]},
        {"failed": [[1, 5, -1]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("retry", [False, True])
def test_a_side_car_whose_numbers_cannot_be(begun: Path, change: dict[str, Any], retry: bool) -> None:
    """Rows would be doubled or lost by them."""
    beside(begun).write_text(json.dumps({**saved(begun), "failed": [[1, 5, 1]], **change}))
    assert "no record of a run" in refused(begun, retry=retry)


def test_a_side_car_that_counts_more_bytes_than_there_are(begun: Path) -> None:
    for more in (1, 10**30):
        beside(begun).write_text(json.dumps({**saved(begun), "offset": begun.stat().st_size + more}))
        assert "has changed since its run wrote it" in refused(begun)


def test_a_newer_side_car(begun: Path) -> None:
    beside(begun).write_text(json.dumps({**saved(begun), "version": 2}))
    before = contents(begun.parent)
    with pytest.raises(UsageError, match="written by a newer clipcli"):
        write(begun, some_rows(), OUTPUTS[0], resume=True)
    assert contents(begun.parent) == before


def test_a_file_without_a_side_car(begun: Path) -> None:
    beside(begun).unlink()
    assert "exists already, and no record of a run lies beside it" in refused(begun)


def test_the_file_of_somebody_else_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rows.run.json").write_text('{"mine": true}')
    for options in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="is not clipcli's"):
            write(tmp_path / "rows", some_rows(), OUTPUTS[0], **options)
    assert contents(tmp_path) == {"rows.run.json": b'{"mine": true}'}


def test_a_file_that_a_run_is_writing(begun: Path) -> None:
    destination = Destination(begun, "jsonl", None, False, "never", resume=True)
    with destination.open(LABELS, {"--crop": "model"}) as out:
        out.write(some_rows()[3])
        before = contents(begun.parent)
        for options in ({"resume": True}, {"force": True}, {"retry": True}):
            with pytest.raises(OutputError, match="another run is writing it"):
                write(begun, some_rows(), OUTPUTS[0], **options)
        assert contents(begun.parent) == before


# ---- when nothing is left to do


def test_what_lies_there_afterwards(tmp_path: Path) -> None:
    """The side-car goes with a complete run, unless pictures failed, or --resume may ask again."""
    path, rows = tmp_path / "rows", some_rows([])
    for options, stays in (({}, False), ({"force": True}, False), ({"force": True, "rows": some_rows()}, True)):
        write(path, options.pop("rows", rows), OUTPUTS[0], **options)  # type: ignore[arg-type]
        assert beside(path).exists() == stays
    path.unlink()
    assert write(path, rows, OUTPUTS[0], resume=True) == 7
    assert write(path, rows, OUTPUTS[0], resume=True) == 0
    assert write(path, [*rows, _good("new", 9)], OUTPUTS[0], resume=True) == 1
    assert path.read_bytes() == whole(tmp_path, [*rows, _good("new", 9)], OUTPUTS[0])


def test_an_empty_file_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.touch()
    assert write(path, some_rows(), OUTPUTS[1], resume=True) == 7
    assert path.read_bytes() == whole(tmp_path, some_rows(), OUTPUTS[1])


# ---- the command

WORDS = ("-L", "cat", "-L", "dog", "-L", "rocket")


@pytest.fixture
def album(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight small pictures, two of them broken; the current folder, and the model's name in the environment."""
    chosen = np.random.default_rng(0)
    (tmp_path / "album").mkdir()
    for number in range(8):
        picture = Image.fromarray(chosen.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        picture.save(tmp_path / "album" / f"{number}.png")
    for name in ("2.png", "5.png"):
        shutil.copy(tmp_path / "album" / name, tmp_path / f"whole-{name}")
        (tmp_path / "album" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    return tmp_path / "album"


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C comes when so many rows are written."""
    original, count = FileWriter.write, 0

    def write_some(self: FileWriter, row: Row) -> None:
        nonlocal count
        if count == after:
            raise Stop
        count += 1
        original(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileWriter, "write", write_some)
        yield


@pytest.mark.parametrize(
    "options",
    [("-f", "jsonl"), ("-f", "csv", "-k", 2), ("-f", "paths", "--select", "dog", "--min-margin", 0.5)],
    ids=str,
)
def test_ctrl_c_and_resume(cli: Run, album: Path, options: tuple[object, ...]) -> None:
    command = ("classify", album, *WORDS, *options)
    straight = cli(*command, "-o", "straight")
    with interrupted(after=4):
        stopped = cli(*command, "-o", "rows")
    assert stopped.code == ExitCode.INTERRUPTED
    told = "interrupted after 4 pictures, whose rows are written; the same command with --resume goes on"
    assert told in stopped.err
    again = cli(*command, "-o", "rows")
    assert again.code == ExitCode.USAGE and "--resume" in again.err
    resumed = cli(*command, "-o", "rows", "--resume")
    assert resumed.code == straight.code == ExitCode.SOME_PICTURES_FAILED
    assert "rows: going on after 4 pictures" in resumed.err
    assert Path("rows").read_bytes() == Path("straight").read_bytes()
    for name in ("2.png", "5.png"):
        shutil.copy(f"whole-{name}", album / name)
    retried = cli(*command, "-o", "rows", "--retry-failed")
    assert retried.code == ExitCode.OK and "2 pictures, 0 failed" in retried.err
    assert "rows: trying 2 failed pictures again" in retried.err and "going on after" not in retried.err
    cli(*command, "-o", "straight", "--force")
    assert Path("rows").read_bytes() == Path("straight").read_bytes()


def test_nothing_to_do(cli: Run, album: Path) -> None:
    command = ("classify", album, *WORDS, "-o", "rows.jsonl", "--resume")
    first = cli(*command)
    assert first.code == ExitCode.SOME_PICTURES_FAILED and "the same command with --retry-failed" in first.err
    before = contents(Path())
    again = cli(*command)
    assert again.code == ExitCode.SOME_PICTURES_FAILED and "rows.jsonl: complete, nothing to do" in again.err
    assert "0 pictures" not in again.err
    assert contents(Path())["rows.jsonl"] == before["rows.jsonl"]
    for name in ("2.png", "5.png"):
        shutil.copy(f"whole-{name}", album / name)
    assert cli(*command, "--retry-failed").code == ExitCode.OK
    assert cli(*command).code == ExitCode.OK


def test_strict_stops_and_goes_on_behind(cli: Run, album: Path) -> None:
    command = ("classify", album, *WORDS, "-o", "rows.tsv", "--strict")
    assert cli(*command).code == ExitCode.SOME_PICTURES_FAILED
    assert len(Path("rows.tsv").read_text().splitlines()) == 3 and not saved(Path("rows.tsv"))["complete"]
    assert cli(*command, "--resume").code == ExitCode.SOME_PICTURES_FAILED
    assert len(Path("rows.tsv").read_text().splitlines()) == 6
    assert cli(*command, "--resume").code == ExitCode.SOME_PICTURES_FAILED
    cli("classify", album, *WORDS, "-o", "straight.tsv")
    assert Path("rows.tsv").read_bytes() == Path("straight.tsv").read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-L", "cow"), "labels: 3 labels × 7 templates ("),
        (("-t", "simple"), "× 1 templates ("),
        (("--min-score", 0.5), "--min-score: none, now 0.5"),
        (("--min-cosine", 0.1), "--min-cosine: none, now 0.1"),
        (("--min-margin", 0), "--min-margin: none, now 0.0"),
        (("--unknown-label", "?"), "--unknown-label: unknown, now ?"),
        (("--temperature", 2), "--temperature: 1.0, now 2.0"),
        (("--pixels", "reference"), "--pixels: auto, now reference"),
        (("--crop", "pad"), "--crop: model, now pad"),
        (("--decode", "exact"), "--decode: auto, now exact"),
        (("--background", "rest.txt"), "--background: none, now 1 labels × 7 templates ("),
        (("--precision", "bf16"), "precision: torch-fp32, now torch-bf16"),
        (("--select", "cat"), "--select: none, now cat"),
        (("-k", 1), "--top-k: 5, now 1"),
        (("-m", "other"), "model: "),
        (("--exclude", "0.png"), "the inputs have changed: not the same first 8 pictures as when it was begun"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_options_that_change_rows_are_refused(cli: Run, album: Path, options: tuple[object, ...], told: str) -> None:
    import tiny

    Path("rest.txt").write_text("moon\n")
    tiny.save(Path("other"), arrays=tiny.weights(tiny.vit(), seed=1))
    command = ("classify", album, *WORDS, "-o", "rows.jsonl")
    cli(*command)
    before = contents(Path())
    for how in ("--resume", "--retry-failed"):
        result = cli(*command, *options, how)
        assert result.code == ExitCode.USAGE and told in result.err
    assert contents(Path()) == before


def test_options_that_change_no_row_are_not(cli: Run, album: Path) -> None:
    command = ("classify", album, *WORDS, "-o", "rows.jsonl")
    cli(*command)
    options = ("-b", 1, "-j", 1, "--no-cache", "--truncate", "--save-crop", "crops", "--include", "*.png", "-v")
    assert "nothing to do" in cli(*command, *(x for x in options if x != "--truncate"), "--resume").err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--resume",), "no file to go on with"),
        (("--retry-failed", "-o", "-"), "no file to go on with"),
        (("--resume", "--force", "-o", "rows"), "--resume goes on, --force begins anew"),
        (("--resume", "-f", "table", "-o", "rows"), "a table can't be gone on with"),
        (("--resume", "-o", os.devnull), "no file that a run could go on with"),
        (("--resume", "-o", "x" * 250), "file name too long"),
        (("-o", "x" * 250), "file name too long"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_wrong_use(cli: Run, album: Path, options: tuple[object, ...], told: str) -> None:
    before = set(os.listdir())
    result = cli("classify", album, *WORDS, *options)
    assert result.code in (ExitCode.USAGE, ExitCode.FAILED) and told in result.err
    assert set(os.listdir()) == before


def test_the_side_car_is_none_of_the_files_that_are_read(cli: Run, album: Path) -> None:
    Path("rows.run.json").write_text('["cat", "dog"]')
    result = cli("classify", album, "-l", "rows.run.json", "-o", "rows", "--force")
    assert result.code == ExitCode.USAGE and "is read by this very run" in result.err


def test_rows_on_stdout_leave_nothing(cli: Run, album: Path) -> None:
    before = set(os.listdir())
    assert cli("classify", album, *WORDS).code == cli("classify", album, *WORDS, "-o", os.devnull).code == 3
    assert set(os.listdir()) == before


# ---- real processes


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "clipcli", "classify", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def until(true: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_run_in_an_orderly_way(cli: Run, album: Path, number: signal.Signals) -> None:
    """The list is still open when it comes: what was answered is written and counted."""
    names = [f"album/{n}.png\n" for n in range(8)]
    expected = rows_of(cli, album, 8)
    rows = Path("rows.csv")
    with start(*WORDS, "-o", rows, stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        process.stdin.write("".join(names[:5]).encode())
        process.stdin.flush()
        until(lambda: rows.exists() and rows.read_bytes().count(b"\r\n") == 6)
        process.send_signal(number)
        assert process.wait(100) == 128 + number
        told = process.stderr.read().decode()
    assert told.endswith(
        "interrupted after 5 pictures, whose rows are written; the same command with --resume goes on\n"
    )
    assert saved(rows)["done"] == 5
    assert cli("classify", "--files-from", "list", *WORDS, "-o", rows, "--resume").code == 3
    assert rows.read_bytes() == expected


def rows_of(cli: Run, album: Path, count: int) -> bytes:
    """What a run over `list` writes that nobody disturbs, and that list: the eight pictures again and again."""
    Path("list").write_text("".join(f"album/{n % 8}.png\n" for n in range(count)))
    assert cli("classify", *[f"album/{n}.png" for n in range(8)], *WORDS, "-f", "csv", "-o", "eight").code == 3
    header, *rows = Path("eight").read_bytes().splitlines(keepends=True)
    return header + b"".join(rows[n % 8] for n in range(count))


SLOW_TO_STOP = """
import signal, sys, time
{before}
from clipcli.cli.signals import orderly_stop
with orderly_stop():
    try:
        print("go", flush=True)
        time.sleep(60)
    finally:
        print("stopping", flush=True)
        time.sleep(60)
"""


def test_a_second_signal_ends_it_at_once() -> None:
    command = [sys.executable, "-c", SLOW_TO_STOP.format(before="")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"go\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(50) == ExitCode.INTERRUPTED
        assert process.stderr.read() == b""


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As `nohup` and a script's `&` ask for."""
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_STOP.format(before=before)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(50) == 128 + signal.SIGTERM


@pytest.mark.timeout(600)  # on a machine that has other things to do
def test_killed_at_random_moments(cli: Run, album: Path) -> None:
    """The path that needs no torch: rows of known pictures, killed again and again within twenty seconds."""
    expected = rows_of(cli, album, 24_000)
    chosen = random.Random(0)
    rows = Path("rows.csv")
    ends = time.monotonic() + 20
    kills = 0
    while time.monotonic() < ends:
        with start("--files-from", "list", *WORDS, "-o", rows, "--resume", "-q") as process:
            size = rows.stat().st_size if rows.exists() else 0
            until(lambda: process.poll() is not None or (rows.exists() and rows.stat().st_size != size))  # noqa: B023
            time.sleep(chosen.random() / 4)
            process.kill()
            if process.wait() == 3:
                break
            kills += 1
        assert expected.startswith(rows.read_bytes()[: saved(rows)["offset"]])
    assert cli("classify", "--files-from", "list", *WORDS, "-o", rows, "--resume").code == 3
    assert rows.read_bytes() == expected and kills


def test_two_runs_on_one_file(cli: Run, album: Path) -> None:
    expected = rows_of(cli, album, 1_000)
    with (
        start("--files-from", "list", *WORDS, "-o", "rows.csv", "--resume") as one,
        start("--files-from", "list", *WORDS, "-o", "rows.csv", "--resume") as other,
    ):
        codes = {one.wait(100), other.wait(100)}
    assert 3 in codes and codes <= {1, 3}  # the other one came too early, or when all was done
    assert Path("rows.csv").read_bytes() == expected
