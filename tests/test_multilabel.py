"""Labels that don't compete: scores, thresholds, rows, figures against scikit-learn's, and what a user types."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from clipcli.errors import ClassifierError, LabelError, UsageError
from clipcli.records import Embedded, Label
from clipcli.tasks import multilabel
from clipcli.tasks.build import build_classifier
from clipcli.tasks.classify import ClassifyOptions
from clipcli.weights.model import load_model

LABELS = [Label("cat", ("cat", "tabby")), Label("dog", ("dog",), threshold=0.25), Label("big_car", ("car",))]
SCORES = np.array([[0.9, 0.2, 0.5], [0.8, 0.3, 0.5], [0.3, 0.6, 0.1], [0.7, 0.1, 0.5], [0.2, 0.9, 0.4]])
TRUTH = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]], bool)
LABEL = ("-L", "cat", "-L", "dog", "-L", "rocket")


@pytest.fixture
def inside(photos: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.chdir(photos)
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))


# ---- scores


def test_the_score_is_a_softmax_over_a_label_and_the_mean_neutral_prompt() -> None:
    cosines, neutral, scale = np.array([[0.25, 0.2]]), np.array([[0.21, 0.23, 0.19]]), 100.0
    mean = np.exp(scale * neutral).mean()
    expected = [math.exp(scale * c) / (math.exp(scale * c) + mean) for c in cosines[0]]
    assert multilabel.presence(cosines, neutral, scale)[0] == pytest.approx(expected, rel=1e-12)


def test_a_label_as_near_as_the_neutral_prompts_has_a_half() -> None:
    assert multilabel.presence(np.full((2, 1), 0.3), np.full((2, 4), 0.3), 100.0) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-3, 1e30])
def test_extreme_scales_give_finite_scores(scale: float) -> None:
    scores = multilabel.presence(np.float32([[1, -1, 0.1]]), np.float32([[0.1, -1]]), scale)
    assert np.isfinite(scores).all() and (scores[0, 0] >= scores[0, 2] >= scores[0, 1])


def test_a_score_doesnt_depend_on_other_labels(model: Path) -> None:
    opened = load_model(str(model))
    vectors = np.eye(4, 16, dtype=np.float32)
    few, many = (
        multilabel.Presence(build_classifier(opened, names), opened, ClassifyOptions(multi_label=True)).scores(vectors)
        for names in (["cat"], ["dog", "cat", "rocket"])
    )
    assert few[0][:, 0] == pytest.approx(many[0][:, 1], abs=1e-6)


def test_rows_hold_what_passes_best_first(model: Path) -> None:
    opened = load_model(str(model))
    options = ClassifyOptions(multi_label=True)
    presence = multilabel.Presence(build_classifier(opened, ["cat", "dog", "rocket", "bus"]), opened, options)
    pictures = [Embedded(str(i), vector) for i, vector in enumerate(np.eye(16, dtype=np.float32))]
    scores = presence.scores(np.eye(16, dtype=np.float32))[0]
    rows = list(presence.decide(pictures))
    assert {row.abstained for row in rows} == {True, False}
    for row, own in zip(rows, scores, strict=True):
        names = presence.classifier.names
        held = sorted(
            (name for name, s in zip(names, own, strict=True) if s >= 0.5), key=lambda n: -own[names.index(n)]
        )
        assert row.labels == (tuple(held) or ("unknown",)) and row.abstained == (not held)
        assert [one.label for one in row.top] == (held or [names[int(own.argmax())]])
        assert row.margin == pytest.approx(np.sort(own)[-1] - np.sort(own)[-2], abs=1e-6)


def test_a_classifier_without_words_is_refused(model: Path) -> None:
    opened = load_model(str(model))
    probe = replace(build_classifier(opened, ["cat", "dog"]), made_by="logistic regression")
    with pytest.raises(ClassifierError, match="made by logistic regression is not made of prompts alone"):
        multilabel.Presence(probe, opened, ClassifyOptions(multi_label=True))


# ---- neutral prompts


def test_shipped_neutral_prompts_are_no_template_set(cli: Run) -> None:
    prompts = multilabel.neutral_prompts()
    assert "a photo." in prompts and len(set(prompts)) == len(prompts) >= 10
    assert not any(line.startswith("neutral") for line in cli("templates", "list").lines)


def test_own_neutral_prompts_come_first(home: Path) -> None:
    own = home / "config" / "prompts" / "neutral.txt"
    own.parent.mkdir(parents=True)
    own.write_text("# mine\n\nan x-ray.\n")
    assert multilabel.neutral_prompts() == ["an x-ray."]
    own.write_text("# nothing\n")
    with pytest.raises(LabelError, match="no prompts in it"):
        multilabel.neutral_prompts()


# ---- figures


def test_figures_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, f1_score  # type: ignore[import-untyped]

    random = np.random.default_rng(0)
    truth = random.random((200, 6)) < 0.2
    scores = np.round(random.random((200, 6)) * 0.5 + truth * random.random((200, 6)), 2)  # with ties
    assert multilabel.average_precision(scores, truth) == pytest.approx(
        average_precision_score(truth, scores, average=None)
    )
    assert multilabel.f1(scores > 0.5, truth) == pytest.approx(f1_score(truth, scores > 0.5, average=None))
    found = multilabel.evaluate_multi_label(scores, truth, [Label(str(i), (str(i),)) for i in range(6)])
    assert found.micro_f1 == pytest.approx(f1_score(truth, scores >= 0.5, average="micro"))
    assert found.mean_average_precision == pytest.approx(average_precision_score(truth, scores))


def test_fitted_thresholds_give_the_best_f1() -> None:
    fitted = multilabel.fit_thresholds(SCORES, TRUTH)
    assert fitted[:2] == pytest.approx([0.75, 0.25])  # by hand: F1 4/5 of two pictures, 1 of three
    assert math.isnan(fitted[2])
    best = multilabel.f1(fitted <= SCORES, TRUTH)
    for threshold in np.linspace(0, 1, 101):
        assert (multilabel.f1(threshold <= SCORES, TRUTH)[:2] <= best[:2]).all()


def test_an_evaluation() -> None:
    found = multilabel.evaluate_multi_label(SCORES, TRUTH, LABELS)
    assert found.positives.tolist() == [3, 3, 0]
    assert found.f1[:2] == pytest.approx([2 * 2 / 6, 1.0]) and math.isnan(found.f1[2])
    assert found.precision[:2] == pytest.approx([(1 + 1 + 3 / 5) / 3, 1.0])
    with pytest.raises(UsageError, match="no picture has any of the labels"):
        multilabel.evaluate_multi_label(SCORES, np.zeros_like(TRUTH), LABELS)


def test_fitted_f1_is_of_pictures_that_thresholds_were_not_fitted_on() -> None:
    """On noise, thresholds look better on the pictures they were fitted on."""
    random = np.random.default_rng(0)
    scores, truth = random.random((60, 20)), random.random((60, 20)) < 0.3
    found = multilabel.evaluate_multi_label(scores, truth, [Label(str(i), (str(i),)) for i in range(20)])
    seen = multilabel.f1(scores >= found.fitted, truth)
    assert np.mean(found.fitted_f1) < np.mean(seen) - 0.05


def test_truth_goes_by_name_and_alias() -> None:
    truth = multilabel.truth_of(["cat|dog", "Tabby", "big car | cat", "|"], LABELS)
    assert truth.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]
    with pytest.raises(LabelError, match="not among yours: cow, hen"):
        multilabel.truth_of(["cat|hen", "cow"], LABELS)
    assert multilabel.truth_of(["cat|hen"], LABELS, ignore_missing=True).tolist() == [[1, 0, 0]]


# ---- as a user types it


@pytest.mark.usefixtures("inside")
def test_every_label_above_its_threshold(cli: Run, tmp_path: Path) -> None:
    everything = cli("classify", ".", *LABEL, "--multi-label", "--min-score", 0, "-f", "jsonl").rows
    for row in everything:
        assert len(row["top"]) == (0 if row["error"] else 3)
    scores = {(row["path"], one["label"]): one["score"] for row in everything for one in row["top"]}
    file = tmp_path / "labels.csv"
    least = sorted(scores.values())[len(scores) // 2]
    file.write_text(f"label,threshold\ncat,{least}\ndog,\nrocket,-1\n")
    rows = cli("classify", ".", "-l", file, "--multi-label", "--min-score", 1, "-f", "jsonl").rows
    for row in rows:
        names = {one["label"] for one in row["top"]}
        expected = {"rocket"} | ({"cat"} if scores.get((row["path"], "cat"), -1) >= least else set())
        assert names == (set() if row["error"] else expected)
    assert any(len(row["top"]) == 2 for row in rows)


@pytest.mark.usefixtures("inside")
def test_one_label_alone(cli: Run) -> None:
    assert cli("classify", "rocket.jpg", "-L", "cat").code == 2
    (row,) = cli("classify", "rocket.jpg", "-L", "cat", "--multi-label", "-f", "jsonl").rows
    assert 0 <= row["score"] <= 1 and row["margin"] == row["score"]
    assert row["label"] == ("cat" if row["score"] >= 0.5 else "unknown")


@pytest.mark.usefixtures("inside")
def test_selected_and_counted_by_all_labels(cli: Run) -> None:
    every = (*LABEL, "--multi-label", "--min-score", 0)
    result = cli("classify", "rocket.jpg", *every, "--select", "dog", "-f", "table")
    assert len(result.lines) == 1
    assert [line.split()[-1] for line in result.err.splitlines()[:3]] == ["cat", "dog", "rocket"]
    columns = cli("classify", "rocket.jpg", *every).lines[0].split("\t")
    assert sorted(columns[1::2]) == ["cat", "dog", "rocket"]
    assert len(cli("classify", "rocket.jpg", *every, "-k", 1).lines[0].split("\t")) == 3


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by-group"], "--by-group is about labels that compete"),
        (["--min-margin", 0.1], "--min-margin is about labels that compete"),
        (["--background", "labels.txt"], "--background is for labels that compete"),
    ],
)
def test_what_is_about_competition_is_refused(cli: Run, options: list[object], message: str) -> None:
    result = cli("classify", "rocket.jpg", "-L", "moon", "--multi-label", *options)
    assert (result.code, result.out) == (2, b"") and message in result.err


@pytest.mark.usefixtures("inside")
def test_resumed_with_other_thresholds(cli: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "labels.csv", tmp_path / "rows.jsonl"
    file.write_text("label,threshold\ncat,0.5\n")
    assert cli("classify", "rocket.jpg", "-l", file, "--multi-label", "-o", out, "--resume").code == 0
    file.write_text("label,threshold\ncat,0.6\n")
    again = cli("classify", "rocket.jpg", "-l", file, "--multi-label", "-o", out, "--resume")
    assert again.code == 2 and "begun with a different --multi-label" in again.err


@pytest.mark.usefixtures("inside")
def test_thresholds_from_labelled_pictures(cli: Run, tmp_path: Path, photos: Path) -> None:
    table, labels, fitted = (tmp_path / name for name in ("truth.csv", "labels.csv", "fitted.csv"))
    truth = {"chelsea.png": "cat", "rocket.jpg": "rocket|sky", "coffee.png": "", "astronaut.png": "person | rocket"}
    table.write_text("path,labels\n" + "".join(f"{photos / name},{said}\n" for name, said in truth.items()))
    labels.write_text("label,aliases,group\ncat,cat|a\\|b,animal\nrocket,,\nmoon,,\nperson,,\n")
    refused = cli("eval", table, "-l", labels, "--multi-label")
    assert refused.code == 2 and "pictures have labels that are not among yours: sky" in refused.err
    command = ("eval", table, "-l", labels, "--multi-label", "--ignore-missing")
    assert cli(*command).lines[0].startswith("truth, model")
    (found,) = json.loads(cli(*command, "--json", "--write-labels", fitted).out)
    assert found["pictures"] == 4
    assert {one["label"]: one["pictures"] for one in found["labels"]} == {"cat": 1, "rocket": 2, "moon": 0, "person": 1}
    rows = {row["label"]: row for row in csv.DictReader(fitted.read_text().splitlines())}
    assert rows["cat"]["aliases"] == r"cat|a\|b" and rows["cat"]["group"] == "animal" and not rows["moon"]["threshold"]
    for one in found["labels"]:
        if one["pictures"]:
            assert float(rows[one["label"]]["threshold"]) == one["fitted_threshold"]
    answers = cli("classify", photos / "rocket.jpg", "-l", fitted, "--multi-label", "--min-score", 1, "-f", "jsonl")
    assert {one["label"] for one in answers.rows[0]["top"]} <= {"cat", "rocket", "person"}
    assert cli("eval", table, "-l", labels, "--write-labels", tmp_path / "x.csv").code == 2


@pytest.mark.usefixtures("inside")
def test_a_classifier_file_with_thresholds(cli: Run, tmp_path: Path) -> None:
    file, built = tmp_path / "labels.csv", tmp_path / "c.safetensors"
    file.write_text("label,threshold\ncat,0\ndog,1\n")
    cli("build-classifier", file, "-o", built)
    for words in (("-l", file), ("-c", built)):
        assert cli("classify", "rocket.jpg", *words, "--multi-label").lines[0].split("\t")[1:2] == ["cat"]
