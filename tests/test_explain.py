"""Both levels of a hierarchy, and what an answer rests on; and rows written together are those written one by one."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipcli.output.sink import FORMATS, SinkOptions, open_sink
from clipcli.records import Predictions

TABLE = """label,aliases,group
tabby,tabby|tabby cat,cat
siamese,,cat|animal
dog,,animal
moon,,
cat,,
"""
MEMBERS = {"cat": ("tabby", "siamese", "cat"), "animal": ("dog",), "moon": ("moon",)}


@pytest.fixture(autouse=True)
def inside(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    (tmp_path / "labels.csv").write_text(TABLE)
    for path in photos.glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "labels.txt").unlink()


# ---- groups


def test_a_groups_score_is_the_sum_of_its_labels(cli: Run) -> None:
    below = cli("classify", ".", "-l", "labels.csv", "-f", "jsonl", "-k", 9).rows
    rows = cli("classify", ".", "-l", "labels.csv", "-f", "jsonl", "--by-group").rows
    for row, labels in zip(rows, below, strict=True):
        if row["error"]:
            continue
        of = {one["label"]: one for one in labels["top"]}
        assert {one["label"] for one in row["top"]} == set(MEMBERS)
        for one in row["top"]:
            parts = [of[name] for name in MEMBERS[one["label"]]]
            assert one["score"] == pytest.approx(sum(part["score"] for part in parts), abs=3e-6)
            assert one["cosine"] == max(part["cosine"] for part in parts)
        assert [one["score"] for one in row["top"]] == sorted((one["score"] for one in row["top"]), reverse=True)
        assert row["label"] == row["top"][0]["label"]
        assert row["margin"] == pytest.approx(row["top"][0]["score"] - row["top"][1]["score"], abs=2e-6)
        member = max((of[name] for name in MEMBERS[row["label"]]), key=lambda one: one["score"])
        assert row["member"] == {**member, "score": pytest.approx(member["score"], abs=2e-6)}


def test_minima_and_selection_are_about_groups(cli: Run) -> None:
    plain = cli("classify", "rocket.jpg", "-l", "labels.csv", "--by-group", "-f", "jsonl").rows[0]
    enough, too_much = plain["score"] - 1e-3, min(1, plain["score"] + 1e-3)
    command = ("classify", "rocket.jpg", "-l", "labels.csv", "--by-group")
    assert cli(*command, "--select", plain["label"], "--min-score", enough).lines
    assert cli(*command, "--min-score", too_much, "-f", "jsonl").rows[0]["label"] == "unknown"
    refused = cli(*command, "--select", "tabby")
    assert refused.code == 2 and '--select "tabby": no such label' in refused.err


def test_a_background_beside_groups(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rest.txt").write_text("rocket\nsoup\nanimals\n")
    command = ("classify", ".", "-l", "labels.csv", "--by-group", "--background", "rest.txt", "-f", "jsonl", "-k", 9)
    rows = [row for row in cli(*command).rows if not row["error"]]
    for row in rows:
        assert {one["label"] for one in row["top"]} == {*MEMBERS, "rocket", "soup", "animals"}
        assert sum(one["score"] for one in row["top"]) == pytest.approx(1, abs=5e-6)
        assert row["abstained"] == (row["top"][0]["label"] not in MEMBERS)
        assert row["member"]["label"] in MEMBERS.get(row["top"][0]["label"], (row["top"][0]["label"],))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("label,group\ncat,\ndog,\n", "no label has a group"),
        ("label,group\ncat,animal\ndog,animal\n", 'one group alone ("animal")'),
        ("label,group\ncat,unknown\ndog,\n", 'the label "unknown" is also that of rows that abstain'),
    ],
)
def test_groups_that_decide_nothing(cli: Run, tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "odd.csv").write_text(table)
    result = cli("classify", "rocket.jpg", "-l", "odd.csv", "--by-group")
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_a_classifier_file_keeps_groups(cli: Run) -> None:
    direct = cli("classify", ".", "-l", "labels.csv", "--by-group", "-f", "jsonl")
    cli("build-classifier", "labels.csv", "-o", "c.safetensors")
    assert cli("classify", ".", "-c", "c.safetensors", "--by-group", "-f", "jsonl").out == direct.out


# ---- explain


def test_cosines_are_those_of_the_prompts(cli: Run, model: Path) -> None:
    from clipcli import embed, load_model

    (row,) = cli("classify", "rocket.jpg", "-l", "labels.csv", "--explain", "-f", "jsonl", "-t", "simple").rows
    opened = load_model(str(model))
    (picture,) = embed("rocket.jpg", opened)
    prompts = row["evidence"]["prompts"]
    assert [one["label"] for one in prompts] == [
        name for one in row["top"] for name in [one["label"]] * (2 if one["label"] == "tabby" else 1)
    ]
    ids = opened.tokenizer([one["text"] for one in prompts])
    for places, vectors in opened.encode_text(ids):
        for place, vector in zip(places, vectors, strict=True):
            assert prompts[place]["cosine"] == pytest.approx(float(vector @ picture.vector), abs=2e-6)
    plain = cli("classify", "rocket.jpg", "-l", "labels.csv", "-f", "jsonl", "-t", "simple").rows[0]
    assert {**plain, "evidence": row["evidence"]} == row
    (alias,) = (one for one in prompts if one["alias"] == "tabby cat")
    assert alias["text"] == "a photo of a tabby cat." and alias["template"] == "a photo of a <>."


def test_a_table_for_people(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("tabby | tabby cat\ndog :: it barks\n")
    result = cli(
        "classify", "rocket.jpg", "-l", "words.txt", "--explain", "-t", "simple", "-t", "3\ta drawing of a <>."
    )
    best, other = result.lines[0].split()[0], {"tabby": "dog", "dog": "tabby"}[result.lines[0].split()[0]]
    assert result.lines[1].startswith("  margin ") and result.lines[1].endswith(f" above {other}")
    assert result.lines[2].split() == [best, other]
    text = "\n".join(result.lines[3:])
    rows = {name: cells.split() for cells, name in re.findall(r"^((?: +-?\d\.\d{4}\*?)+) +(.+)$", text, re.M)}
    assert {"score", "cosine", "a photo of a <>.", "tabby", "tabby cat", ":: it barks"} <= set(rows)
    assert all(sum("*" in cell for cell in rows[name]) == 1 for name in ("cosine", "a photo of a <>."))
    assert len(rows["tabby"]) == len(rows[":: it barks"]) == 1
    assert b"\x1b" not in result.out


def test_the_crop_that_the_model_saw(cli: Run) -> None:
    (row,) = cli("classify", "rocket.jpg", "-l", "labels.csv", "--explain", "-f", "jsonl", "--save-crop", "crops").rows
    with Image.open(row["evidence"]["crop"]) as crop:
        assert crop.size == (32, 32)


def test_the_crop_drawn(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    out = cli("classify", "rocket.jpg", "-l", "labels.csv", "--explain", "--color", "always").out.decode()
    assert out.count("▀") == 11 * 6 and "\x1b[38;2;" in out  # 32 pixels by threes, two in a cell


def test_failures_and_several_pictures(cli: Run) -> None:
    rows = cli(
        "classify", "chelsea.png", "broken.jpg", "rocket.jpg", "-l", "labels.csv", "--explain", "-f", "jsonl"
    ).rows
    assert ["evidence" in row for row in rows] == [True, False, True]
    assert rows[0]["evidence"] != rows[2]["evidence"]


@pytest.mark.parametrize("format", ["tsv", "csv", "paths"])
def test_formats_without_room_for_it(cli: Run, format: str) -> None:
    result = cli("classify", "rocket.jpg", "-l", "labels.csv", "--explain", "-f", format)
    assert result.code == 2 and "--explain is for table and jsonl" in result.err


def test_a_classifier_of_no_prompts(cli: Run) -> None:
    from clipcli import load_classifier, save_classifier

    cli("build-classifier", "labels.csv", "-o", "c.safetensors")
    save_classifier(replace(load_classifier("c.safetensors"), made_by="probe"), "probe.safetensors")
    result = cli("classify", "rocket.jpg", "-c", "probe.safetensors", "--explain")
    assert result.code == 1 and "a classifier made by probe is not made of prompts alone" in result.err


def test_by_embeddings_alone(cli: Run) -> None:
    cli("embed", "rocket.jpg", "-o", "e.safetensors")
    pictures, known = (
        cli("classify", name, "-l", "labels.csv", "--explain", "-f", "jsonl").rows
        for name in ("rocket.jpg", "e.safetensors")
    )
    assert pictures == known


# ---- rows together

PATHS = st.binary(min_size=1, max_size=9).map(lambda name: os.fsdecode(name.replace(b"\0", b"")))
NAMES = ("cat", '"q"', "é\x85", "!x", "dog")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=9).map(lambda x: os.fsdecode(x.replace(b"\0", b""))), max_size=5), st.data()
)
def test_rows_written_together(paths: list[str], data: st.DataObject) -> None:
    n, k = len(paths), data.draw(st.integers(1, 5))
    number = st.sampled_from([0.0, -1e-9, -4.9e-7, -5.1e-7, 5e-7, 0.9999996, 1.0, 0.123456, -0.5, np.nan, np.inf])
    draw = st.lists(st.lists(number | st.floats(-1, 1, width=32), min_size=k, max_size=k), min_size=n, max_size=n)
    scores, cosines = (np.abs(np.array(data.draw(draw)).reshape(n, k)), np.array(data.draw(draw)).reshape(n, k))
    rows = Predictions(
        paths=paths,
        names=NAMES,
        best=np.random.default_rng(n).integers(0, 5, (n, k)),
        scores=scores,
        cosines=cosines,
        margins=scores[:, 0],
        abstained=np.arange(n) % 2 == 0,
        unknown="unknown",
    )
    for format in FORMATS:
        for top_k in (None, 1, 2, 9):
            together, single = io.BytesIO(), io.BytesIO()
            options = SinkOptions(top_k=top_k, width=80)
            open_sink(format, together, options).write_all(rows)
            sink = open_sink(format, single, options)
            for row in rows:
                sink.write(row)
            assert together.getvalue() == single.getvalue()
