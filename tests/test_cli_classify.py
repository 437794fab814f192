"""`clipcli classify` and `build-classifier` as a user types them, on real photographs with a small random model."""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import tiny
from conftest import Run

from clipcli.weights.model import Model

ORDER = ["astronaut.png", "broken.jpg", "chelsea.png", "coffee.png", "rocket.jpg", "sub/camera.png"]
LABELS = ("-L", "cat", "-L", "dog", "-L", "rocket")


@pytest.fixture(autouse=True)
def inside(photos: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.chdir(photos)
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many prompts and pictures went through the towers."""
    counts = {"text": 0, "image": 0}
    text, image = Model.encode_text, Model.encode_image

    def encode_text(self, ids):  # type: ignore[no-untyped-def]
        counts["text"] += len(ids)
        return text(self, ids)

    def encode_image(self, pixels):  # type: ignore[no-untyped-def]
        counts["image"] += len(pixels)
        return image(self, pixels)

    monkeypatch.setattr(Model, "encode_text", encode_text)
    monkeypatch.setattr(Model, "encode_image", encode_image)
    return counts


# ---- rows


def test_every_picture_has_its_row_in_order(cli: Run) -> None:
    result = cli("classify", ".", *LABELS, "-f", "jsonl")
    assert result.code == 3
    assert [row["path"].removeprefix("./") for row in result.rows] == ORDER
    broken = result.rows[1]
    assert broken["label"] is None and broken["error"]["kind"] == "truncated"
    for row in result.rows[:1] + result.rows[2:]:
        assert row["label"] in ("cat", "dog", "rocket") and row["error"] is None
        assert len(row["top"]) == 3 and row["top"][0]["label"] == row["label"]
        assert sum(x["score"] for x in row["top"]) == pytest.approx(1, abs=2e-6)
        assert row["margin"] == pytest.approx(row["top"][0]["score"] - row["top"][1]["score"], abs=2e-6)


@pytest.mark.parametrize("format", ["tsv", "csv", "jsonl", "table", "paths"])
def test_formats_agree(cli: Run, format: str) -> None:
    jsonl = [row for row in cli("classify", ".", *LABELS, "-f", "jsonl").rows if row["label"]]
    result = cli("classify", ".", *LABELS, "-f", format)
    assert result.code == 3
    good = [row["path"] for row in jsonl]
    if format == "paths":
        assert result.lines == good
    elif format == "jsonl":
        assert [row["path"] for row in result.rows if row["label"]] == good
    elif format == "csv":
        rows = list(csv.DictReader(io.StringIO(result.out.decode(), newline="")))
        assert [(row["path"], row["label"]) for row in rows if row["label"]] == [
            (row["path"], row["label"]) for row in jsonl
        ]
        assert [row["error"].partition(":")[0] for row in rows if row["error"]] == ["truncated"]
    elif format == "tsv":
        rows = [line.split("\t") for line in result.lines]
        assert [[row["path"], row["label"], f"{row['score']:.4f}"] for row in jsonl] == [
            row for row in rows if not row[1].startswith("!")
        ]
    else:
        assert len(result.lines) == len(ORDER)
        assert all(
            row["label"] in line and row["path"] in line
            for row, line in zip(jsonl, (line for line in result.lines if "!truncated" not in line), strict=True)
        )


@pytest.mark.parametrize("format", ["tsv", "csv", "jsonl", "table", "paths"])
def test_pictures_that_others_made(cli: Run, pictures: Path, tmp_path: Path, format: str) -> None:
    """Twenty ImageNet photographs with labels and indices beside them: one row each, sorted, in every format."""
    with tarfile.open(pictures / "imagenet-fullsize-20.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = sorted(str(path) for path in tmp_path.glob("*.jpg"))
    result = cli("classify", tmp_path, *LABELS, "-f", format)
    lines = result.lines[1:] if format == "csv" else result.lines
    assert result.code == 0 and len(expected) == 20
    assert [next(path for path in expected if path in line) for line in lines] == expected


def test_a_pipe_gets_tsv_and_no_escape_codes(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("classify", ".", *LABELS)
    assert result.lines[0].startswith("./astronaut.png\t") or result.lines[0].startswith("astronaut.png\t")
    assert b"\x1b" not in result.out and "\x1b" not in result.err


def test_the_same_command_writes_the_same_bytes(cli: Run) -> None:
    first, second = (cli("classify", ".", *LABELS, "-f", "jsonl", "-b", 2).out for _ in range(2))
    assert first == second


def test_batches_and_workers_change_no_number(cli: Run) -> None:
    def numbers(*options: object) -> list[float]:
        rows = cli("classify", ".", *LABELS, "-f", "jsonl", *options).rows
        return [x[key] for row in rows for x in row["top"] for key in ("score", "cosine")]

    expected = numbers("-b", 16, "-j", 1)
    for options in (("-b", 1), ("-b", 2, "-j", 3), ("--no-cache",)):
        assert numbers(*options) == pytest.approx(expected, abs=1e-5)


def test_top_k(cli: Run) -> None:
    assert all(
        len(row["top"]) == 2 for row in cli("classify", ".", *LABELS, "-f", "jsonl", "-k", 2).rows if row["label"]
    )
    header = cli("classify", ".", *LABELS, "-f", "csv", "-k", 2).lines[0]
    assert header == "path,label,score,cosine,margin,abstained,error,label_2,score_2"
    assert len(cli("classify", "rocket.jpg", *LABELS, "-f", "tsv", "-k", 9).lines[0].split("\t")) == 1 + 2 * 3


# ---- inputs


def test_a_list_on_stdin(cli: Run) -> None:
    listed = b"rocket.jpg\nsub\nmissing.png\nrocket.jpg\n"
    rows = cli("classify", *LABELS, "-f", "jsonl", stdin=listed).rows
    assert [row["path"] for row in rows] == ["rocket.jpg", "sub", "missing.png", "rocket.jpg"]
    assert [row["error"] and row["error"]["kind"] for row in rows] == [None, "unreadable", "missing", None]
    assert rows[0] == rows[3]
    nul = cli("classify", "-0", *LABELS, "-f", "jsonl", stdin=listed.replace(b"\n", b"\0")).rows
    assert nul == rows


def test_files_from(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"rocket.jpg\nchelsea.png")
    rows = cli("classify", "coffee.png", "--files-from", tmp_path / "list", *LABELS, "-f", "jsonl").rows
    assert [row["path"] for row in rows] == ["coffee.png", "rocket.jpg", "chelsea.png"]
    rows = cli("classify", "--files-from", "-", *LABELS, "-f", "jsonl", stdin=b"rocket.jpg\n").rows
    assert [row["path"] for row in rows] == ["rocket.jpg"]


def test_an_empty_list_is_no_error(cli: Run) -> None:
    result = cli("classify", *LABELS, stdin=b"")
    assert (result.code, result.out) == (0, b"")
    assert "0 pictures" in result.err


def test_bytes_on_stdin(cli: Run, photos: Path) -> None:
    direct = cli("classify", "rocket.jpg", *LABELS, "-f", "jsonl").rows
    piped = cli("classify", "-", *LABELS, "-f", "jsonl", stdin=(photos / "rocket.jpg").read_bytes()).rows
    assert piped == [{**direct[0], "path": "-"}]


def test_names_of_any_bytes(cli: Run, photos: Path, tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"-dash.jpg", b"\xff\xfe.jpg", b"[red] :smile:.jpg", "ü 🐈.jpg".encode(), b'"q"\t.jpg']
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes((photos / "rocket.jpg").read_bytes())
    result = cli("classify", tmp_path, *LABELS, "-f", "paths", "--print0")
    found = [os.path.basename(path) for path in result.out.split(b"\0") if path]
    assert found == sorted(names)
    assert result.code == 0
    for format in ("jsonl", "csv", "tsv", "table"):
        assert cli("classify", tmp_path, *LABELS, "-f", format).code == 0


def test_include_and_exclude(cli: Run) -> None:
    assert cli("classify", ".", "--include", "*.jpg", "--exclude", "broken*", *LABELS, "-f", "paths").lines == [
        path for path in cli("classify", ".", *LABELS, "-f", "paths").lines if path.endswith("rocket.jpg")
    ]


# ---- what counts as an answer


def test_select_keeps_failures_on_stderr(cli: Run) -> None:
    answers = cli("classify", ".", *LABELS, "-f", "jsonl").rows
    chosen = next(row["label"] for row in answers if row["label"])
    result = cli("classify", ".", *LABELS, "-f", "jsonl", "--select", chosen)
    assert result.rows == [row for row in answers if row["label"] == chosen]
    assert result.code == 3 and "broken.jpg: truncated" in result.err
    assert "broken.jpg: truncated" in cli("classify", ".", *LABELS, "-f", "paths", "-q").err


@pytest.mark.parametrize("option", [("--min-score", 1), ("--min-cosine", 1), ("--min-margin", 1)])
def test_weak_answers_abstain(cli: Run, option: tuple[str, object]) -> None:
    plain = cli("classify", "rocket.jpg", *LABELS, "-f", "jsonl").rows[0]
    weak = cli("classify", "rocket.jpg", *LABELS, "-f", "jsonl", *option, "--unknown-label", "other").rows[0]
    assert weak == {**plain, "label": "other", "abstained": True}
    assert cli("classify", "rocket.jpg", *LABELS, "-f", "paths", *option).out == b""


@pytest.mark.parametrize("option", ["--min-score", "--min-cosine", "--min-margin"])
def test_a_least_value_is_a_number(cli: Run, option: str) -> None:
    wrong = cli("classify", "rocket.jpg", *LABELS, option, "nan")
    assert (wrong.code, wrong.out) == (2, b"") and f"{option} is not a number" in wrong.err


def test_background(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rest.txt").write_text("moon\nflower\nbridge\nsoup\n")
    plain = cli("classify", ".", *LABELS, "-f", "jsonl").rows
    rows = cli("classify", ".", *LABELS, "-f", "jsonl", "--background", tmp_path / "rest.txt").rows
    for row, before in zip(rows, plain, strict=True):
        if row["error"]:
            continue
        best = row["top"][0]["label"]
        assert row["abstained"] == (best not in ("cat", "dog", "rocket"))
        assert row["label"] == ("unknown" if row["abstained"] else before["label"])
        assert row["score"] < before["score"] or row["abstained"]
    assert cli("classify", ".", "-L", "cat", "--background", tmp_path / "rest.txt").code == 3  # one label will do


def test_temperature(cli: Run) -> None:
    sharp, soft = (cli("classify", "rocket.jpg", *LABELS, "-f", "jsonl", "--temperature", t).rows[0] for t in (1, 1000))
    assert soft["cosine"] == sharp["cosine"] and soft["score"] < sharp["score"]
    assert soft["score"] == pytest.approx(1 / 3, abs=0.05)


def test_strict_stops_at_the_first_failure(cli: Run) -> None:
    result = cli("classify", ".", *LABELS, "--strict", "-f", "jsonl", "-b", 1)
    assert result.code == 3
    assert [row["path"].removeprefix("./") for row in result.rows] == ORDER[:2]


# ---- output files


def test_output_by_ending(cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    result = cli("classify", ".", *LABELS, "-o", out)
    assert result.out == b"" and result.code == 3
    assert out.read_bytes() == cli("classify", ".", *LABELS, "-f", "jsonl").out
    again = cli("classify", ".", *LABELS, "-o", out)
    assert again.code == 2 and "exists already" in again.err and "--force" in again.err
    assert cli("classify", "rocket.jpg", *LABELS, "-o", out, "--force").code == 0
    assert len(out.read_text().splitlines()) == 1


def test_talk_is_on_stderr(cli: Run) -> None:
    assert "6 pictures, 1 failed" in cli("classify", ".", *LABELS).err
    assert cli("classify", ".", *LABELS, "-q").err == ""
    told = cli("classify", ".", *LABELS, "-v", "-b", 3, "-j", 2).err
    for fact in (
        "open_clip",
        "cpu",
        "fp32",
        "batch size 3",
        "2 decoding threads",
        "3 labels × 7 templates",
        "passed over",
    ):
        assert fact in told


# ---- the store, and classifiers


def test_a_second_run_runs_no_tower(cli: Run, towers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = cli("classify", ".", *LABELS, "-f", "jsonl")
    assert towers["text"] == 21
    tower = towers_read(monkeypatch)
    second = cli("classify", ".", *LABELS, "-f", "jsonl")
    assert second.out == first.out
    assert towers["text"] == 21
    assert tower == set()


def towers_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The towers whose weights are read from now on, whether to compute or to hash."""
    from clipcli.weights.tensors import Arrays

    read: set[str] = set()
    getitem = Arrays.__getitem__

    def spy(self, name):  # type: ignore[no-untyped-def]
        if name != "logit_scale":
            read.add("image" if name.startswith("visual.") else "text")
        return getitem(self, name)

    monkeypatch.setattr(Arrays, "__getitem__", spy)
    return read


def test_only_new_prompts_are_encoded(cli: Run, towers: dict[str, int], tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(30)]
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(names))
    cli("build-classifier", file)
    assert towers["text"] == 30 * 7
    file.write_text("\n".join([*names, "one more"]))
    assert "7 prompts encoded, 210 reused" in cli("build-classifier", file).err
    assert towers["text"] == 31 * 7
    result = cli("build-classifier", file, "-t", "imagenet7", "-t", "a map of a <>.")
    assert "31 prompts encoded, 217 reused" in result.err
    assert "from the store" in cli("build-classifier", file).err


def test_no_cache_leaves_nothing(cli: Run, home: Path, towers: dict[str, int]) -> None:
    for _ in range(2):
        cli("classify", "rocket.jpg", *LABELS, "--no-cache")
    assert towers["text"] == 42
    assert not (home / "cache").exists()


def test_a_classifier_file_gives_the_same_rows(cli: Run, tmp_path: Path, towers: dict[str, int]) -> None:
    built = cli("build-classifier", "labels.txt", "-o", tmp_path / "my.safetensors")
    assert built.code == 0 and built.out == b""
    assert "3 labels × 7 templates" in built.err and "21 prompts encoded" in built.err
    direct = cli("classify", ".", "-l", "labels.txt", "-f", "jsonl")
    assert cli("classify", ".", "-c", tmp_path / "my.safetensors", "-f", "jsonl").out == direct.out
    assert towers["text"] == 21
    again = tmp_path / "again.safetensors"
    cli("build-classifier", "labels.txt", "-o", again, "--no-cache")
    assert again.read_bytes() == (tmp_path / "my.safetensors").read_bytes()  # reproducible


def test_a_classifier_of_another_model_is_refused(cli: Run, tmp_path: Path, model: Path) -> None:
    other = tiny.save(tmp_path / "other", arrays=tiny.weights(tiny.vit(), seed=1))
    cli("build-classifier", "labels.txt", "-o", tmp_path / "my.safetensors")
    result = cli("classify", ".", "-c", tmp_path / "my.safetensors", "-m", other)
    assert result.code == 1 and result.out == b""
    assert '"other"' in result.err and model.name in result.err.splitlines()[0]


def test_extend(cli: Run, tmp_path: Path, towers: dict[str, int]) -> None:
    old, new, whole = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "whole"))
    cli("build-classifier", "-L", "cat", "-L", "dog", "-t", "simple", "-o", old)
    result = cli("build-classifier", "-L", "rocket", "--extend", old, "-o", new)
    assert result.code == 0 and towers["text"] == 3
    cli("build-classifier", *LABELS, "-t", "simple", "-o", whole)
    assert new.read_bytes() == whole.read_bytes()
    twice = cli("build-classifier", "-L", "cat", "--extend", old, "-o", tmp_path / "x.safetensors")
    assert twice.code == 2 and 'label "cat" is in the old classifier already' in twice.err
    assert not (tmp_path / "x.safetensors").exists()


def test_descriptions_in_place_of_templates(cli: Run, tmp_path: Path, towers: dict[str, int]) -> None:
    (tmp_path / "cupl.json").write_text(json.dumps({"cat": ["a small cat", "whiskers"], "dog": ["a dog on a lead"]}))
    rows = cli("classify", "rocket.jpg", "--prompts", tmp_path / "cupl.json", "-f", "jsonl").rows
    assert {x["label"] for x in rows[0]["top"]} == {"cat", "dog"}
    assert towers["text"] == 3


def test_a_background_beside_whole_prompts(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "cupl.json").write_text(json.dumps({"cat": ["a small cat"], "dog": ["a dog on a lead"]}))
    (tmp_path / "rest.txt").write_text("moon\n")
    rest = ("--background", tmp_path / "rest.txt", "-f", "jsonl")
    direct = cli("classify", "rocket.jpg", "--prompts", tmp_path / "cupl.json", *rest)
    assert {x["label"] for x in direct.rows[0]["top"]} == {"cat", "dog", "moon"}
    cli("build-classifier", "--prompts", tmp_path / "cupl.json", "-o", tmp_path / "c.safetensors")
    assert cli("classify", "rocket.jpg", "-c", tmp_path / "c.safetensors", *rest).out == direct.out


def test_a_template_set_from_the_environment_is_one_value(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = cli("classify", "rocket.jpg", *LABELS, "-t", "a drawing of a <>.", "-f", "jsonl")
    monkeypatch.setenv("CLIPCLI_TEMPLATES", "a drawing of a <>.")
    assert cli("classify", "rocket.jpg", *LABELS, "-f", "jsonl").out == typed.out != b""


def test_label_files_add_up(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("moon\n")
    rows = cli(
        "classify", "rocket.jpg", "-l", "labels.txt", "-l", tmp_path / "more.txt", "-L", "sun", "-f", "jsonl"
    ).rows
    assert {x["label"] for x in rows[0]["top"]} == {"cat", "dog", "rocket", "moon", "sun"}


def test_no_pictures_is_said(cli: Run) -> None:
    result = cli("classify", ".", "--include", "png", *LABELS)
    assert result.code == 0 and "no pictures found" in result.err


def test_output_dash_is_stdout(cli: Run, photos: Path) -> None:
    assert cli("classify", "rocket.jpg", *LABELS, "-o", "-").out == cli("classify", "rocket.jpg", *LABELS).out
    assert not (photos / "-").exists()


OPTIONS: list[tuple[list[object], str, object]] = [
    (["--crop", "pad"], "crop", "pad"),
    (["--pixels", "reference"], "pixels", "reference"),
    (["--decode", "exact"], "decode", "exact"),
    (["--batch-size", 3], "batch_size", 3),
    (["--workers", 2], "workers", 2),
    (["--top-k", 7], "top_k", 7),
    (["--min-cosine", 0.5], "min_cosine", 0.5),
    (["--precision", "bf16"], "precision", "bf16"),
    (["--device", "cpu"], "device", "cpu"),
    (["--head-width", 16], "head_width", 16),
    (["--activation", "gelu"], "activation", "gelu"),
    (["--vocabulary", "merges.txt"], "vocabulary", Path("merges.txt")),
    (["--offline"], "offline", True),
    (["--truncate"], "truncate", True),
    (["--follow"], "follow", True),
    (["--exclude", "x*"], "exclude", ["x*"]),
    (["--include", "x*"], "include", ["x*"]),
]


@pytest.mark.parametrize(("typed", "name", "value"), OPTIONS, ids=[str(x[0][0]) for x in OPTIONS])
def test_every_option_arrives(
    cli: Run, monkeypatch: pytest.MonkeyPatch, model: Path, typed: list[object], name: str, value: object
) -> None:
    """What is typed reaches the library under its own name: recorded at its doors."""
    from clipcli.cli import streams
    from clipcli.tasks import build, classify
    from clipcli.weights import model as models

    monkeypatch.chdir(model)
    seen: dict[str, object] = {}

    def record(module: object, function: str) -> None:
        real = getattr(module, function)

        def spy(*args: object, **kwargs: object) -> object:
            seen.update(inspect.signature(real).bind(*args, **kwargs).arguments)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)

    record(models, "load_model")
    record(build, "make")
    record(classify, "ClassifyOptions")
    record(streams, "Walk")
    resolve = models.resolve
    monkeypatch.setattr("clipcli.weights.fetch.resolve", lambda *a, **k: (seen.update(k), resolve(*a, **k))[1])
    cli("classify", "absent", ".", "-L", "cat", "-L", "dog", *typed)  # refused: nothing was loaded
    assert not seen
    cli("classify", ".", "-L", "cat", "-L", "dog", *typed)
    assert seen.get(name) == value


# ---- real pipes


def test_a_picture_through_a_pipe() -> None:
    result = shell("cat rocket.jpg | clipcli classify - -L cat -L dog -f jsonl -q")
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == ["-"] and result.stderr == ""


def test_selected_paths_through_xargs() -> None:
    label = shell("clipcli classify rocket.jpg -L cat -L dog -q").stdout.split("\t")[1]
    result = shell(
        f"clipcli classify rocket.jpg coffee.png -L cat -L dog -q -f paths --select {label} --print0 | xargs -0 ls"
    )
    assert "rocket.jpg" in result.stdout.splitlines() and result.stderr == ""


def test_a_listener_that_leaves_stderr_loses_no_row(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    command = f"clipcli classify {' '.join(LABELS)} -f paths -v -o {out}"
    shell(f"(echo no.jpg; ls -d *.*) | {command} 2> >(head -0)")
    assert out.read_text().split() == ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    result = shell(f"clipcli classify rocket.jpg -L cat -L dog -o {tmp_path}/rows {closed}; echo $? > {tmp_path}/code")
    assert "Traceback" not in result.stderr
    assert (tmp_path / "code").read_text() == "0\n" and (tmp_path / "rows").read_text().startswith("rocket.jpg\t")


def test_a_list_from_a_process(tmp_path: Path) -> None:
    result = shell("clipcli classify --files-from <(ls *.png) -L cat -L dog -q -f paths")
    assert result.stdout.split() == ["astronaut.png", "chelsea.png", "coffee.png"]


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash with `clipcli` standing for this checkout's."""
    function = f'clipcli() {{ "{sys.executable}" -m clipcli "$@"; }}; set -o pipefail; '
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        ["bash", "-c", function + command], capture_output=True, text=True, env=environment, timeout=120
    )


def test_head_closes_the_pipe_quietly() -> None:
    result = shell(
        "for i in $(seq 200); do echo rocket.jpg; done > $LIST;"
        " clipcli classify --files-from $LIST -L cat -L dog -b 1 -f jsonl | head -1; echo ${PIPESTATUS[0]} >&2",
        LIST=str(Path(os.environ["CLIPCLI_CACHE_DIR"]).parent / "list"),
    )
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == "0\n"


def test_find_and_xargs() -> None:
    result = shell(
        "find . -name '*.png' -not -name '.*' -print0 | sort -z"
        " | clipcli classify -0 -L cat -L dog -L rocket -f paths --print0 -q | xargs -0 ls | sort"
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["./astronaut.png", "./chelsea.png", "./coffee.png", "./sub/camera.png"]


def test_ctrl_c_keeps_finished_rows(tmp_path: Path) -> None:
    """Rows come while the list is still open; Ctrl-C then ends the run with 130 and whole lines."""
    with subprocess.Popen(
        [sys.executable, "-m", "clipcli", "classify", *LABELS, "-o", str(tmp_path / "rows.tsv")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"rocket.jpg\nchelsea.png\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        rows = tmp_path / "rows.tsv"
        while not (rows.exists() and rows.read_bytes().count(b"\n") == 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert b"Traceback" not in process.stderr.read()
    assert [line.split("\t")[0] for line in rows.read_text().splitlines()] == ["rocket.jpg", "chelsea.png"]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["classify", "--help"], 0)])
def test_a_help_page_into_a_closed_pipe(arguments: list[str], code: int) -> None:
    result = shell(f"clipcli {' '.join(arguments)} | true; echo ${{PIPESTATUS[0]}} >&2")
    assert result.stderr == f"{code}\n"


def test_ctrl_c_while_a_picture_is_awaited_on_stdin() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "clipcli", "classify", "-", *LABELS],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr and b"rror" not in process.stderr.read()


def test_the_list_on_stdin_is_not_the_output(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("rocket.jpg\n")
    result = shell(f"clipcli classify -L cat -L dog -o {tmp_path}/list --force < {tmp_path}/list")
    assert result.returncode == 2 and "is read by this very run" in result.stderr
    assert (tmp_path / "list").read_text() == "rocket.jpg\n"
