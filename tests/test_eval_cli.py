"""`clipcli eval` and `clipcli calibrate`, as they are typed: against the rows of `classify`, and wrong use."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
import squares
import tiny
from conftest import Run
from test_house import HEAVY, modules_after

from clipcli.cli.console import Talk

LABELS = "scarlet = red\ngreen\nblue | azure\n"
NUMBER = {"type": ["number", "null"]}


def record(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def nullable(schema: dict[str, object]) -> dict[str, object]:
    return {"anyOf": [schema, {"type": "null"}]}


COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
INTERVAL = record(value=SHARE, low=SHARE, high=SHARE)
GAP = record(value={"type": "number"}, low={"type": "number"}, high={"type": "number"})
STEPS = {"type": "array", "items": record(pictures={"type": "number"}, score=SHARE, accuracy=SHARE)}
THRESHOLD = record(value={"type": "number"}, coverage=SHARE, precision=NUMBER)
TOLD = record(auroc=SHARE, fpr95=SHARE)
RESULT = record(
    set=TEXT,
    model=TEXT,
    pictures=COUNT,
    failed=COUNT,
    left_out=COUNT,
    top1=INTERVAL,
    top5=nullable(INTERVAL),
    mean_per_class=INTERVAL,
    by_group=nullable(INTERVAL),
    classes={
        "type": "array",
        "items": record(label=TEXT, pictures=COUNT, answers=COUNT, precision=NUMBER, recall=NUMBER, f1=NUMBER),
    },
    confusions={"type": "array", "items": record(truth=TEXT, answer=TEXT, count=COUNT)},
    calibration=record(temperature=NUMBER, error=SHARE, fitted_error=SHARE, steps=STEPS, fitted_steps=STEPS),
    coverage={"type": "array", "items": THRESHOLD},
    proposals=record(
        precision=SHARE, min_score=nullable(THRESHOLD), min_cosine=nullable(THRESHOLD), min_margin=nullable(THRESHOLD)
    ),
    unknown=nullable(record(pictures=COUNT, score=TOLD, cosine=TOLD, margin=TOLD, entropy=TOLD, mcm=TOLD)),
    gap=nullable(GAP),
)
PAIR = record(name=TEXT, a=TEXT, b=TEXT, pictures=COUNT, gap=GAP, only_a=COUNT, only_b=COUNT, p=SHARE)
SCHEMA = record(results={"type": "array", "items": RESULT}, comparisons={"type": "array", "items": PAIR})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` with class folders, `tars/0.tar` with the same pictures, `labels.txt`."""
    folder = tmp_path_factory.mktemp("sets")
    squares.make(folder / "data", each=4)
    squares.shards(folder / "tars", each=4, count=1)
    (folder / "labels.txt").write_text(LABELS)
    return folder


@pytest.fixture(autouse=True)
def here(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)


def measured(cli: Run, *args: object) -> dict[str, Any]:
    done = cli("eval", *args, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    jsonschema.validate(found, SCHEMA)
    return found


def test_figures_are_those_of_classify(cli: Run, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    found = measured(cli, "data", "-l", "labels.txt", "-m", model, "--csv", table)["results"][0]
    rows = cli("classify", "data", "-l", "labels.txt", "-m", model, "-f", "jsonl").rows
    truth = [{"red": "scarlet"}.get(name, name) for name in (row["path"].split("/")[1] for row in rows)]
    hits = [row["label"] == name for row, name in zip(rows, truth, strict=True)]
    assert found["top1"]["value"] == pytest.approx(np.mean(hits), abs=1e-6)
    for one in found["classes"]:
        own = [hit for hit, name in zip(hits, truth, strict=True) if name == one["label"]]
        assert one["recall"] == pytest.approx(np.mean(own), abs=1e-6) and one["pictures"] == len(own) == 4
    entries = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [(one["path"], one["truth"], one["answer"]) for one in entries] == [
        (row["path"], name, row["label"]) for row, name in zip(rows, truth, strict=True)
    ]
    for row, one, hit in zip(rows, entries, hits, strict=True):
        assert (one["correct"], one["rank"] == "1") == ("true" if hit else "false", hit)
        assert [float(one[key]) for key in ("score", "cosine", "margin")] == pytest.approx(
            [row["score"], row["cosine"], row["margin"]], abs=2e-6
        )


def test_sets_have_gaps_and_models_are_paired(cli: Run, model: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", arrays=tiny.weights(tiny.vit(), 5))
    args = ("all=data", "tar=tars/0.tar", "-l", "labels.txt", "-m", model, "-m", other)
    found = measured(cli, *args)
    assert [(one["set"], one["gap"] is None) for one in found["results"]] == [("all", True), ("tar", False)] * 2
    assert [one["gap"]["value"] for one in found["results"][1::2]] == [0, 0]  # the same pictures
    assert [(one["name"], one["a"], one["b"]) for one in found["comparisons"]] == [
        (name, model.name, "other") for name in ("all", "tar")
    ]
    for pair, a, b in zip(found["comparisons"], found["results"][:2], found["results"][2:], strict=True):
        assert pair["pictures"] == 12
        assert pair["gap"]["value"] == pytest.approx(b["top1"]["value"] - a["top1"]["value"], abs=2e-6)
        assert pair["only_b"] - pair["only_a"] == round(12 * pair["gap"]["value"])
    text = cli("eval", *args).out.decode()
    assert text.startswith("set  model") and "\x1b" not in text and "B - A" in text


def test_one_archive_is_split_by_globs(cli: Run, model: Path) -> None:
    args = ("tars/0.tar", "-l", "labels.txt", "-m", model)
    whole = measured(cli, *args)["results"][0]
    parts = measured(cli, *args, "--include", "warm=*-red*", "--include", "cold=*-blue*", "--include", "cold=*-green*")
    assert [(one["set"], one["pictures"]) for one in parts["results"]] == [("warm", 4), ("cold", 8)]
    sums = sum(one["pictures"] * one["top1"]["value"] for one in parts["results"])
    assert sums == pytest.approx(12 * whole["top1"]["value"], abs=1e-4)
    assert measured(cli, *args, "--include", "*-red*", "--exclude", "00*")["results"][0]["pictures"] == 3


def test_pictures_of_no_label(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    args = ("data", "-l", "labels.txt", "-m", model, "--unknown", photos)
    done = cli("eval", *args, "--json", "--csv", table)
    assert done.code == 3 and "broken.jpg: truncated" in done.err
    found = json.loads(done.out)["results"][0]
    jsonschema.validate(found, RESULT)
    assert found["unknown"]["pictures"] == 5
    assert [row["truth"] for row in csv.DictReader(io.StringIO(table.read_text()))][12:] == [""] * 5
    assert "5 pictures of no label" in cli("eval", *args).out.decode()


def test_a_report_for_people(cli: Run, model: Path) -> None:
    done = cli("eval", "data", "-l", "labels.txt", "-m", model, "--top", 2, "--want-precision", 0)
    lines = done.lines
    assert lines[0].split() == ["set", "pictures", "top-1", "mean", "per", "class"]
    assert {"worst pairs", "classes, least found first", "scores", "coverage"} <= set(lines)
    assert "  and 1 more (--top)" in lines
    assert done.err == "clipcli: in percent; in parentheses bootstrap intervals of 95 %\n"
    assert any(line.startswith("  --min-score") and line.endswith(lines[1].split()[2]) for line in lines)


def test_calibrate_and_use_it(cli: Run, model: Path, tmp_path: Path) -> None:
    plain, new = tmp_path / "plain.safetensors", tmp_path / "new.safetensors"
    assert cli("build-classifier", "labels.txt", "-m", model, "-o", plain).code == 0
    done = cli("calibrate", plain, "data", "-m", model, "-o", new, "--want-precision", 0.3)
    assert done.code == 0 and done.out == b"" and "temperature" in done.err, done.err
    before = cli("classify", "data", "-c", plain, "-m", model, "-f", "jsonl").rows
    assert cli("classify", "data", "-c", new, "-m", model, "-f", "jsonl").rows == before
    after = cli("classify", "data", "-c", new, "-m", model, "-f", "jsonl", "--calibrated").rows
    assert [row["top"][0]["label"] for row in after] == [row["label"] for row in before]
    assert [row["score"] for row in after] != [row["score"] for row in before]
    from clipcli.zeroshot.classifier_file import load_classifier

    least = {label.name: label.threshold for label in load_classifier(new).labels}
    for row in after:
        assert row["abstained"] is (row["score"] < least[row["top"][0]["label"]])
    for args, wrong in (
        (("-c", plain), "the classifier isn't calibrated"),
        (("-c", new, "--by-group"), "--calibrated and --by-group exclude each other"),
    ):
        done = cli("classify", "data", *args, "-m", model, "--calibrated")
        assert done.code in (1, 2) and wrong in done.err
    done = cli("calibrate", plain, "data", "-m", model, "-o", new)
    assert done.code == 2 and "exists already" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "-L", "green", "-L", "pink"), "data: classes that are no labels: blue, red; labels without pictures"),
        (("data", "-L", "green"), 'one label alone ("green")'),
        (("data", "--multi-label"), "no labels"),
        (("data", "tars/0.tar", "-l", "labels.txt", "--multi-label", "--write-labels", "t.csv"), "of several sets"),
        (
            ("data", "-l", "labels.txt", "--include", "a=*", "--include", "b=no*"),
            "--include b: no picture of 12 matches",
        ),
        (("data", "data", "-l", "labels.txt"), 'two sets are named "data"'),
        (("nothing", "-l", "labels.txt"), "nothing: no such file or folder"),
        (("data", "-l", "labels.txt", "--include", "*.gif"), "no picture in data can be used"),
        (("data", "-l", "labels.txt", "--include", "a=*", "--include", "*"), "--include with a name and without"),
        (("data", "-l", "labels.txt", "--unknown", "empty"), "no picture in empty can be used"),
        (("gone.csv", "-l", "labels.txt"), "no picture in gone.csv can be used; the first: x.jpg: no such file (gone"),
        (("data", "-l", "labels.txt", "--csv", "labels.txt"), "labels.txt: is read by this very run"),
        (("data", "-l", "labels.txt", "--html", "no/such/r.html"), "the folder no/such does not exist"),
        (("data", "-l", "labels.txt", "--want-precision", "2"), "not in the range 0<=x<=1"),
        (("data", "-l", "labels.txt", "--want-precision", "nan"), "the wanted precision is nan"),
        (("data", "-l", "labels.txt", "--csv", "-"), "-: must be a regular file"),
        (("data", "-l", "labels.txt", "--html", "/dev/null"), "/dev/null: must be a regular file"),
        (("data", "-l", "labels.txt", "--csv", "x", "--html", "./x"), "x: is to hold two things"),
        (("data", "-l", "l.json#a", "--csv", "l.json", "--force"), "l.json: is read by this very run"),
        (("data", "-l", "labels.txt", "--multi-label", "--write-labels", "t.txt"), "t.txt: -l would not read it"),
    ],
)
def test_wrong_use_is_one_line(cli: Run, model: Path, data: Path, args: tuple[str, ...], message: str) -> None:
    (data / "empty").mkdir(exist_ok=True)
    (data / "l.json").write_text('{"a": ["red", "green", "blue"]}')
    (data / "gone.csv").write_text("path,label\nx.jpg,red\ny.jpg,green\n")
    done = cli("eval", *args, "-m", model)
    assert done.code == (1 if "does not exist" in message else 2) and done.out == b""
    lines = [line for line in done.err.splitlines() if not line.startswith("hint: ")]
    assert message in done.err and len(lines) == 1 and lines[0].startswith("clipcli: ")


def test_missing_files_and_labels_without_pictures_are_told(cli: Run, model: Path, data: Path) -> None:
    (data / "some.csv").write_text("path,label\ndata/red/00.png,red\ndata/green/00.png,green\nx.jpg,green\n")
    done = cli("eval", "some.csv", "-l", "labels.txt", "-m", model, "--json")
    assert done.code == 3 and json.loads(done.out)["results"][0]["failed"] == 1
    assert "x.jpg: missing: no such file (some.csv:4)" in done.err
    assert "some: labels without pictures: blue" in done.err
    assert "some: 1 picture failed, of 3" in done.err
    left = cli("eval", "data", "-L", "green", "-L", "pink", "-m", model, "--ignore-missing")
    assert "data: pictures of one class alone" in left.err
    assert left.code == 0 and "data: 8 pictures left out: their classes are no labels" in left.err


def test_no_file_of_the_model_is_replaced(cli: Run, tmp_path: Path) -> None:
    own = tiny.save(tmp_path / "model")
    config = own / "open_clip_config.json"
    before = config.read_bytes()
    done = cli("eval", "data", "-l", "labels.txt", "-m", own, "--csv", config, "--force")
    assert done.code == 2 and "is read by this very run" in done.err and config.read_bytes() == before


def test_names_that_differ_in_case_only(cli: Run, model: Path, data: Path) -> None:
    (data / "case.csv").write_text("path,label\ndata/red/00.png,Cat\ndata/green/00.png,cat\n")
    for args in (), ("--multi-label",):
        done = cli("eval", "case.csv", "-L", "Cat", "-L", "cat", "-m", model, "--json", *args)
        assert done.code == 0 and "without pictures" not in done.err
        found = json.loads(done.out)
        found = found[0]["labels"] if args else found["results"][0]["classes"]
        assert [one["pictures"] for one in found] == [1, 1]


def test_a_set_whose_name_a_terminal_should_not_see(cli: Run, model: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"\xff\x1b[1m[/x]\n")
    squares.make(place, each=2)
    for args in (), ("--json",), ("--multi-label",), ("--multi-label", "--json"):
        done = cli("eval", place, "-l", "labels.txt", "-m", model, *args)
        assert done.code == 0 and b"\x1b" not in done.out


def test_a_name_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk()
    talk.live = True
    with talk.working("looking at x[/y]") as tick:
        tick.say("[/z]\x1b")
    assert "\x1b]" not in capsys.readouterr().err


def test_a_calibrated_classifier_is_not_extended(cli: Run, model: Path, tmp_path: Path) -> None:
    plain, new = tmp_path / "plain.safetensors", tmp_path / "new.safetensors"
    assert cli("build-classifier", "labels.txt", "-m", model, "-o", plain).code == 0
    one = tmp_path / "one.csv"
    one.write_text(f"path,label\n{Path('data/red/00.png').resolve()},red\n")
    done = cli("calibrate", plain, one, "-m", model, "-o", new, "--want-precision", 0)
    assert done.code == 0 and "no temperature but the bound" in done.err, done.err
    done = cli("build-classifier", "-L", "pink", "--extend", new, "-m", model, "-o", tmp_path / "x.safetensors")
    assert done.code == 1 and "a calibrated classifier can't be extended" in done.err
    done = cli("build-classifier", "-L", "pink", "--extend", plain, "-m", model, "-o", plain, "--force")
    assert done.code == 2 and "is read by this very run" in done.err


def test_several_models_from_the_environment_are_one(cli: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = model.parent / "a b"
    if not place.exists():
        os.symlink(model, place)
    monkeypatch.setenv("CLIPCLI_MODEL", str(place))
    assert measured(cli, "data", "-l", "labels.txt")["results"][0]["pictures"] == 12


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_help_imports_nothing_heavy(cli: Run, command: str) -> None:
    page = cli(command, "--help").out.decode()
    assert page.partition("Examples")[2].count("clipcli ") >= 3
    code = f"sys.stderr = open({os.devnull!r}, 'w'); from clipcli.cli.main import run; run([{command!r}, '--help'])"
    assert not modules_after(code + "; sys.stderr = sys.__stderr__") & {*HEAVY, "sklearn"}


def test_without_labels_the_classes_are_the_labels(cli: Run, model: Path) -> None:
    (Path("classes.txt")).write_text("".join(f"{name}\n" for name in sorted(os.listdir("data"))))
    given = cli("eval", "data", "-l", "classes.txt", "-m", model, "--json")
    for data in ("data", "tars/0.tar"):
        found = cli("eval", data, "-m", model, "--json")
        assert found.code == 0 and f"labels: the 3 classes of {data}; -l gives others" in found.err
        own, named = (json.loads(one.out)["results"][0]["classes"] for one in (found, given))
        assert own == named
    advised = cli("advise", "data", "-m", model, "--json")
    assert advised.code == 0 and "labels: the 3 classes of data" in advised.err
    assert cli("eval", "data", "-m", model, "--multi-label").code == 2  # which labels there are, isn't clear then


def test_an_alias_of_two_labels_is_no_truth(cli: Run, model: Path) -> None:
    wrong = cli("eval", "data", "-m", model, "-L", "scarlet|green", "-L", "lime|green", "-L", "blue", "-L", "red")
    assert wrong.code == 2 and 'class "green" is an alias of two labels, "scarlet" and "lime"' in wrong.err
    by_name = cli("eval", "data", "-m", model, "-L", "scarlet|green|red", "-L", "green", "-L", "blue", "--json")
    assert (
        by_name.code == 0 and [one["pictures"] for one in json.loads(by_name.out)["results"][0]["classes"]] == [4] * 3
    )


def test_calibrate_names_labels_without_pictures(cli: Run, model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    labels = [arg for name in ("red", "green", "blue", "violet") for arg in ("-L", name)]
    assert cli("build-classifier", *labels, "-m", model, "-o", plain).code == 0
    done = cli("calibrate", plain, "data", "-m", model, "-o", tmp_path / "new.safetensors", "--want-precision", 0.2)
    assert done.code == 0 and "labels without pictures: violet" in done.err
