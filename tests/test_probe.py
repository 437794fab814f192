"""Probes and few-shot classifiers: what is learned from, what is measured, what the file holds, and wrong use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import squares
import tiny
import torch
from conftest import Run
from scipy.special import softmax
from test_house import HEAVY, modules_after

from clipcli import load_classifier, load_model, save_classifier
from clipcli.errors import ClassifierError, UsageError
from clipcli.model import plain
from clipcli.model.clip import build_image_tower
from clipcli.model.config import ClipConfig, ViTConfig
from clipcli.records import Embedded, Label
from clipcli.tasks.build import build_classifier
from clipcli.tasks.classify import ClassifyOptions, make_rows
from clipcli.tasks.identity import row_settings
from clipcli.tasks.labelled import LabelledSet
from clipcli.tasks.linear import unit
from clipcli.tasks.probe import GRIDS, ONE_SHOT, Cell, Probed, ProbeOptions, _parts, few_shot, probe
from clipcli.weights.model import Model
from clipcli.weights.pooled import is_pooled, pooled
from clipcli.zeroshot.classifier import Classifier

NAMES = ("bird", "cat", "dog")
DIM = 16  # of the tiny models


def labelled(counts: tuple[int, ...] = (16, 16, 16), seed: int = 0, names: tuple[str, ...] = NAMES) -> LabelledSet:
    """Unit vectors about a centre a class, far from those of the others."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(counts)), counts)
    vectors = unit(np.eye(len(counts), DIM)[truth] + 1 + 0.3 * rng.normal(size=(len(truth), DIM))).astype(np.float32)
    return LabelledSet(vectors, truth, names, tuple(f"{i}.jpg" for i in range(len(truth))), ())


@pytest.fixture(scope="module")
def opened(model: Path) -> Model:
    return load_model(model, device="cpu")


@pytest.fixture(scope="module")
def text(opened: Model) -> Classifier:
    """Words that are right more often than chance, in another order than the classes'."""
    made = build_classifier(opened, ["dog", "bird", "cat"])
    rng = np.random.default_rng(5)
    weight = np.eye(3, DIM)[[2, 0, 1]] + 0.3 * rng.normal(size=(3, DIM))
    return replace(made, weight=unit(weight).astype(np.float32), logit_scale=20.0)


@pytest.fixture(scope="module")
def probed(opened: Model, text: Classifier) -> Probed:
    return probe(labelled(), opened, text, ProbeOptions(splits=2))


# ---- what is measured


def cell(found: Probed, method: str, shots: int | None) -> Cell:
    (one,) = [x for x in found.cells if (x.method, x.shots) == (method, shots)]
    return one


def test_every_method_at_every_number_of_shots(probed: Probed) -> None:
    words = ("blend", "gda+text", "wise")
    expected = {("zero-shot", 0), ("logistic", 1), ("blend", 1), ("wise", 1)}  # one of each class has no spread
    expected |= {(method, shots) for method in ("logistic", "gda", *words) for shots in (2, 4, 8, None)}
    assert {(x.method, x.shots) for x in probed.cells} == expected
    assert all(len(x.accuracies) == 2 and 0 <= x.mean <= 1 for x in probed.cells)
    assert probed.cells[0].method == "zero-shot"
    assert cell(probed, "logistic", None).mean > cell(probed, "logistic", 1).mean


def test_zero_shot_is_what_the_words_say_of_the_pictures_held_out(opened: Model, text: Classifier) -> None:
    test = labelled((5, 7, 2), seed=3)
    found = probe(labelled(), opened, text, ProbeOptions(splits=1, shots=(2,)), test=test)
    answers = [text.names[i] for i in (test.vectors @ text.weight.T).argmax(axis=1)]
    hits = [answer == NAMES[i] for answer, i in zip(answers, test.truth, strict=True)]
    assert cell(found, "zero-shot", 0).accuracies == pytest.approx((np.mean(hits),))
    assert 0.2 < np.mean(hits) < 1


def test_nothing_is_learned_from_what_is_held_out() -> None:
    data = labelled((16, 9, 30))
    examples = type("E", (), {"truth": data.truth})()
    rows, train, held, apart = _parts(examples, examples, seed=0)
    assert not set(train) & set(held) and not set(rows) & set(apart)
    assert set(train) | set(held) == set(rows) and set(rows) | set(apart) == set(range(55))
    for part, counts in ((apart, [4, 2, 8]), (held, [3, 2, 6]), (train, [9, 5, 16])):
        assert np.bincount(data.truth[part]).tolist() == counts
    assert set(_parts(examples, examples, seed=1)[3]) != set(apart)


def test_labels_at_random_are_not_learned(opened: Model) -> None:
    """Were the pictures that are measured on learned from, this would be far above chance."""
    data = labelled((60, 60))
    shuffled = replace(data, truth=np.random.default_rng(0).permutation(data.truth), classes=("a", "b"))
    found = probe(shuffled, opened, options=ProbeOptions(splits=3, shots=(8,)))
    assert all(abs(x.mean - 0.5) < 0.17 for x in found.cells)


def test_another_test_set_is_not_learned_from(opened: Model) -> None:
    options = ProbeOptions(splits=1, shots=(2,), method="logistic")
    one, other = (
        probe(labelled(), opened, options=options, test=labelled((4, 4, 4), seed)).classifier for seed in (7, 8)
    )
    np.testing.assert_array_equal(one.weight, other.weight)


def test_the_same_again(opened: Model, text: Classifier, probed: Probed) -> None:
    again = probe(labelled(), opened, text, ProbeOptions(splits=2))
    assert again.cells == probed.cells
    np.testing.assert_array_equal(again.classifier.weight, probed.classifier.weight)


@pytest.mark.parametrize(
    ("zero", "curve", "equal"),
    [
        (0.5, (0.3, 0.4, 0.6, 0.7), 2 * 2**0.5),  # half way between 2 and 4, of whose logarithm it is a line
        (0.4, (0.3, 0.4, 0.6, 0.7), 2),
        (0.2, (0.3, 0.4, 0.6, 0.7), 0),
        (0.9, (0.3, 0.4, 0.6, 0.7), math.inf),
        (0.5, (0.6, 0.4, 0.6, 0.7), 2 * 2**0.5),  # the first may have been luck
    ],
)
def test_how_many_shots_zero_shot_is_worth(probed: Probed, zero: float, curve: tuple[float, ...], equal: float) -> None:
    cells = [Cell("zero-shot", 0, (zero,))]
    cells += [Cell("logistic", shots, (value,)) for shots, value in zip((1, 2, 4, 8), curve, strict=True)]
    assert replace(probed, cells=tuple(cells)).equal_shots == pytest.approx(equal)


def test_without_words_nothing_is_compared(opened: Model) -> None:
    found = probe(labelled(), opened, options=ProbeOptions(splits=1, shots=(2,)))
    assert {x.method for x in found.cells} == {"logistic", "gda"} and found.equal_shots is None
    assert found.classifier.names == NAMES and found.classifier.text_fingerprint == ""


# ---- what is kept


@pytest.mark.parametrize("method", ["logistic", "gda", "blend", "gda+text", "wise"])
def test_the_file_answers_as_the_probe_does(opened: Model, text: Classifier, tmp_path: Path, method: str) -> None:
    found = probe(labelled(), opened, text, ProbeOptions(splits=1, shots=(2,), method=method))  # type: ignore[arg-type]
    made = found.classifier
    assert (made.made_by, made.how["method"], made.how["pictures"]) == ("probe", method, 48)
    assert made.how["accuracy"] == pytest.approx(cell(found, method, None).mean)
    assert made.names == text.names
    save_classifier(made, tmp_path / "c.safetensors")
    read = load_classifier(tmp_path / "c.safetensors")
    others = labelled(seed=9)
    rows = make_rows(read, None, opened, ClassifyOptions(top_k=3))(list(map(Embedded, others.paths, others.vectors)))
    scores = softmax(made.logits(others.vectors), axis=1)
    for row, expected in zip(rows, scores, strict=True):
        assert row.label == made.names[expected.argmax()]
        assert {x.label: x.score for x in row.top} == pytest.approx(
            dict(zip(made.names, expected, strict=True)), abs=1e-5
        )
        nearest = made.names.index(row.label)
        cosine = (
            others.vectors[others.paths.index(row.path)] @ made.weight[nearest] / np.linalg.norm(made.weight[nearest])
        )
        assert row.cosine == pytest.approx(cosine, abs=1e-5)
    assert np.mean([NAMES[i] for i in others.truth] == np.array([made.names[s.argmax()] for s in scores])) > 0.85


def test_what_all_rows_share_is_left_out_of_the_file(opened: Model) -> None:
    """Were it kept, float32 would lose what tells the classes apart."""
    made = probe(labelled(), opened, options=ProbeOptions(splits=1, shots=(2,), method="gda")).classifier
    assert made.bias is not None
    assert abs(made.weight.sum(axis=0)).max() < 1e-5 and abs(made.bias.sum()) < 1e-4
    assert np.linalg.norm(made.weight, axis=1).mean() == pytest.approx(1)


def test_a_blend_is_made_of_unit_vectors(opened: Model, text: Classifier) -> None:
    made = probe(labelled(), opened, text, ProbeOptions(splits=1, shots=(2,), method="blend")).classifier
    np.testing.assert_allclose(np.linalg.norm(made.weight, axis=1), 1, atol=1e-6)
    assert made.logit_scale == pytest.approx(text.logit_scale)


def test_another_bias_makes_other_rows(opened: Model, probed: Probed) -> None:
    made = replace(probed.classifier, bias=np.zeros(3, np.float32))
    moved = replace(made, bias=np.ones(3, np.float32))
    one, other = (row_settings(opened, x, None, ClassifyOptions(), is_file=True) for x in (made, moved))
    assert {name for name in one if one[name] != other[name]} == {"labels"}


def test_no_background_beside_a_probe(opened: Model, probed: Probed) -> None:
    rest = build_classifier(opened, ["tree", "house"])
    with pytest.raises(ClassifierError, match="made by probe is not made of prompts alone"):
        make_rows(probed.classifier, rest, opened, ClassifyOptions())


# ---- few-shot


def test_few_shot_by_hand(text: Classifier) -> None:
    few = labelled((2, 3, 2))
    made = few_shot(text, few)
    alpha = float(made.how["alpha"])
    assert alpha in GRIDS["blend"] and alpha > 0 and (made.made_by, made.how["pictures"]) == ("few-shot", 7)
    order = [NAMES.index(name) for name in text.names]
    means = unit(np.stack([few.vectors[few.truth == i].mean(axis=0) for i in order]).astype(np.float64))
    np.testing.assert_allclose(made.weight, unit(text.weight + alpha * means), atol=1e-6)
    held = labelled(seed=4)
    right = np.array(NAMES)[held.truth]
    before, after = (np.array(x.names)[x.logits(held.vectors).argmax(axis=1)] == right for x in (text, made))
    assert after.mean() > before.mean()


def test_single_pictures_count_little(text: Classifier) -> None:
    assert few_shot(text, labelled((1, 4, 4))).how["alpha"] == ONE_SHOT < 1


def test_a_probe_is_not_blended_again(text: Classifier, probed: Probed, opened: Model) -> None:
    for again in (
        lambda: few_shot(probed.classifier, labelled()),
        lambda: probe(labelled(), opened, probed.classifier),
    ):
        with pytest.raises(UsageError, match="made by probe has no words"):
            again()


# ---- features before the projection


@pytest.mark.parametrize("config", [tiny.vit(), tiny.resnet()], ids=["vit", "resnet"])
def test_pooled_features_projected_are_the_projected_ones(tmp_path: Path, config: ClipConfig) -> None:
    model = load_model(tiny.save(tmp_path, config=config), device="cpu")
    tower, arrays = pooled(model), model.checkpoint.arrays
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (config.preprocess.mean, config.preprocess.std))
    normalised = ((pixels / 255 - mean) / std).astype(np.float32)
    raw = build_image_tower(tower.config, tower.checkpoint.tower("image"))(torch.from_numpy(normalised)).numpy()
    np.testing.assert_allclose(tower.encode_image(pixels), unit(raw), atol=5e-5)
    if isinstance(tower.config.vision, ViTConfig):
        projected = raw @ arrays["visual.proj"]
        plainly = plain.forward(tower.config.vision, tower.checkpoint.arrays, normalised)
        np.testing.assert_allclose(plainly, raw, atol=1e-5)
    else:
        projected = raw @ arrays["visual.attnpool.c_proj.weight"].T + arrays["visual.attnpool.c_proj.bias"]
    assert raw.shape == (3, config.vision.width * (1 if isinstance(config.vision, ViTConfig) else 32))
    np.testing.assert_allclose(unit(projected), model.encode_image(pixels), atol=5e-5)


def test_pooled_models_are_models_of_their_own(opened: Model) -> None:
    tower = pooled(opened)
    assert is_pooled(tower) and not is_pooled(opened) and pooled(tower) is tower
    assert tower.config.embed_dim == 32 and opened.config.embed_dim == DIM
    assert len({tower.image_fingerprint, opened.image_fingerprint, pooled(opened).image_fingerprint}) == 2


def test_a_pooled_classifier_finds_its_features(opened: Model, tmp_path: Path) -> None:
    tower = pooled(opened)
    few = labelled()
    wide = replace(few, vectors=unit(np.hstack([few.vectors, few.vectors])).astype(np.float32))
    made = probe(wide, tower, options=ProbeOptions(splits=1, shots=(2,))).classifier
    assert made.features == "pooled"
    save_classifier(made, tmp_path / "c.safetensors")
    read = load_classifier(tmp_path / "c.safetensors")
    assert is_pooled(read.suited(opened)) and is_pooled(read.suited(tower))
    with pytest.raises(ClassifierError, match="was built with"):
        read.check_model(opened)
    with pytest.raises(ClassifierError, match="was built with"):
        read.suited(load_model(tiny.save(tmp_path / "o", arrays=tiny.weights(tiny.vit(), seed=9))))


def test_words_see_the_projected_features(opened: Model, text: Classifier) -> None:
    few, tower = labelled(), pooled(opened)
    wide = replace(few, vectors=unit(np.hstack([few.vectors, few.vectors])).astype(np.float32))
    options = ProbeOptions(splits=2, shots=(2,))
    found = probe(wide, tower, text, options, seen=few.vectors)
    assert {x.method for x in found.cells} == {"zero-shot", "logistic", "gda"}
    assert cell(found, "zero-shot", 0) == cell(probe(few, opened, text, options), "zero-shot", 0)


# ---- wrong use


def broken() -> LabelledSet:
    few = labelled()
    few.vectors[3, 1] = np.nan
    return few


WRONG: dict[str, tuple[Callable[[], LabelledSet], ProbeOptions, str]] = {
    "one class": (lambda: labelled((9,), names=("cat",)), ProbeOptions(), 'one class alone \\("cat"\\)'),
    "two pictures": (lambda: labelled((9, 2, 9)), ProbeOptions(), 'class "cat" has 2 pictures; 3 are the fewest'),
    "fewer than k": (
        lambda: labelled((9, 9, 40)),
        ProbeOptions(shots=(2, 16)),
        'class "bird" has 9 pictures, 5 of them to learn from: fewer than 16 shots',
    ),
    "not finite": (broken, ProbeOptions(), "1 embedding of 48 not finite"),
    "no words": (labelled, ProbeOptions(method="blend"), "blend takes words"),
    "no spread": (lambda: labelled((3, 3)), ProbeOptions(method="gda"), "gda takes two pictures a class that differ"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told(opened: Model, case: str) -> None:
    make, options, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        probe(make(), opened, options=options)


def test_the_same_pictures_in_every_class(opened: Model) -> None:
    few = labelled((4, 4), names=("a", "b"))
    with pytest.raises(UsageError, match="nothing tells the classes apart"):
        probe(replace(few, vectors=np.broadcast_to(few.vectors[0], few.vectors.shape)), opened)


def test_pictures_that_hardly_differ(opened: Model, tmp_path: Path) -> None:
    few = labelled((4, 4), names=("a", "b"))
    near = few.vectors[4 * few.truth] + np.float32(1e-3) * few.vectors
    made = probe(replace(few, vectors=near), opened, options=ProbeOptions(method="gda", splits=1)).classifier
    save_classifier(made, tmp_path / "near.safetensors")
    read = load_classifier(tmp_path / "near.safetensors")  # sharp as it is, the file holds it
    assert (read.logits(near).argmax(axis=1) == few.truth).all()


def test_a_class_of_white_space_alone(cli: Run, model: Path, tmp_path: Path) -> None:
    squares.make(tmp_path / "data", 4)
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "_")
    out = tmp_path / "my.safetensors"
    assert cli("probe", tmp_path / "data", "-m", model, "-o", out, "--splits", 1).code == 0
    assert load_classifier(out).names == ("_", "blue", "green")


def test_classes_and_labels_that_do_not_meet(opened: Model, text: Classifier) -> None:
    strange = replace(labelled(), classes=("bird", "cat", "zebra"))
    with pytest.raises(UsageError, match="classes that are no labels: zebra"):
        probe(strange, opened, text)
    for use in (lambda few: probe(few, opened, text), lambda few: few_shot(text, few)):
        with pytest.raises(UsageError, match="labels without a picture: dog"):
            use(labelled((9, 9), names=("bird", "cat")))
    with pytest.raises(UsageError, match="classes that are no labels: zebra"):
        probe(labelled(), opened, text, test=strange)


# ---- as it is typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("probe") / "data", 4)


def test_the_command(cli: Run, model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.safetensors"
    words = ("-L", "red", "-L", "green", "-L", "blue | azure")
    made = cli("probe", folder, *words, "-m", model, "-o", out, "--splits", 2, "--method", "logistic")
    assert made.code == 0, made.err
    head, *rows = [line.split() for line in made.lines]
    assert head == ["shots", "0", "1", "2", "all"] and "\x1b" not in made.out.decode()
    assert [row[0] for row in rows] == ["zero-shot", "logistic", "gda", "blend", "gda+text", "wise"]
    assert "12 pictures of 3 classes, 0 failed" in made.err and f"written to {out}" in made.err
    rows_ = cli("classify", folder, "-c", out, "-m", model, "-f", "jsonl").rows
    assert {row["label"] for row in rows_} == {"red", "green", "blue"}
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows_)
    assert cli("probe", folder, *words, "-m", model, "-o", out).code == 2  # it exists


def test_the_object(cli: Run, model: Path, folder: Path) -> None:
    made = cli("probe", folder, "-m", model, "--json", "-q", "--shots", 2, "--splits", 1, "--features", "pooled")
    assert (made.code, made.err) == (0, "")
    found = json.loads(made.out)
    assert list(found) == ["labels", "model", "features", "cells", "strengths", "equal_shots", "classifier"]
    assert (found["labels"], found["features"], found["equal_shots"]) == (["blue", "green", "red"], "pooled", None)
    assert {(x["method"], x["shots"]) for x in found["cells"]} >= {("logistic", 2), ("logistic", None)}
    assert all(x["mean"] == pytest.approx(np.mean(x["accuracies"])) for x in found["cells"])


def test_pooled_from_end_to_end(cli: Run, model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.safetensors"
    made = cli(
        "probe", folder, "-L", "red", "-L", "green", "-L", "blue", "-m", model, "-o", out, "--features", "pooled"
    )
    assert made.code == 0 and made.lines[1].startswith("zero-shot"), made.err
    rows = cli("classify", folder, "-c", out, "-m", model, "-f", "jsonl").rows
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)
    refused = cli("classify", folder, "-c", out, "-m", model, "--background", folder.parent / "rest.txt")
    assert refused.code == 2


def test_a_picture_that_fails_is_told_and_left_out(cli: Run, model: Path, folder: Path, tmp_path: Path) -> None:
    more = squares.make(tmp_path / "data", 4)
    (more / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    made = cli("probe", folder, "--test", more, "-m", model, "--splits", 1, "--shots", 1)
    assert made.code == 3 and "torn.png: " in made.err and "1 failed" in made.err


def test_examples_of_build_classifier(cli: Run, model: Path, folder: Path, tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.txt", tmp_path / "my.safetensors"
    labels.write_text("red\nazure = blue\ngreen\n")
    made = cli("build-classifier", labels, "--examples", folder, "-m", model, "-o", out)
    assert made.code == 0 and "12 examples blended in, alpha " in made.err, made.err
    read = load_classifier(out)
    assert (read.made_by, read.names, read.how["pictures"]) == ("few-shot", ("red", "azure", "green"), 12)
    assert read.labels[1] == Label("azure", ("blue",))
    assert cli("classify", folder, "-c", out, "-m", model, "-q").code == 0
    for wrong in (("--extend", out), ()):
        refused = cli("build-classifier", labels, "--examples", folder, "-m", model, *wrong)
        assert refused.code == 2
    labels.write_text("red\ngreen\nblue\nmauve\n")
    refused = cli("build-classifier", labels, "--examples", folder, "-m", model, "-o", tmp_path / "new.safetensors")
    assert refused.code == 2 and "labels without a picture: mauve" in refused.err
    assert not (tmp_path / "new.safetensors").exists()


def test_help_is_light(cli: Run) -> None:
    assert cli("probe", "--help").out.decode().partition("Examples")[2].count("clipcli ") >= 3
    assert not modules_after(
        "from clipcli.cli.main import run; import io; sys.stdout = io.StringIO(); run(['probe', '--help'])"
    ) & set(HEAVY)
