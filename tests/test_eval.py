"""Evaluations as a library makes them, on embeddings whose answers are known beforehand; and calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import squares
import tiny

from clipcli.errors import ClassifierError, UsageError
from clipcli.records import Embedded, Failure, FailureKind, Label
from clipcli.tasks.calibrate import ENOUGH, calibrate
from clipcli.tasks.classify import ClassifyOptions, classify
from clipcli.tasks.evaluate import compare_models, evaluate
from clipcli.tasks.labelled import LabelledSet, embed_set, matching
from clipcli.weights.model import Model, load_model
from clipcli.zeroshot.classifier import Classifier
from clipcli.zeroshot.classifier_file import load_classifier, save_classifier

NAMES = ("cat", "dog", "ox", "elk")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny.save(tmp_path_factory.mktemp("model")), device="cpu")


def classifier(model: Model, labels: tuple[str, ...] = NAMES, groups: tuple[str | None, ...] = ()) -> Classifier:
    """Each label is an axis."""
    made = [Label(name, (name,), group=group) for name, group in zip(labels, groups or (None,) * 9, strict=False)]
    weight = np.eye(len(labels), model.config.embed_dim, dtype=np.float32)
    return Classifier(weight, tuple(made), 10.0, "toy", model.image_fingerprint, "words")


def pictures(model: Model, shown: str, seen: str, sure: float = 0.9) -> LabelledSet:
    """A picture a word: what it shows, and which axis it lies near (`-` for none)."""
    classes, truth = np.unique(shown.split(), return_inverse=True)
    rest = (1 - sure**2) ** 0.5
    vectors = np.zeros((len(truth), model.config.embed_dim), np.float32)
    vectors[:, -1] = rest
    for row, word in enumerate(seen.split()):
        vectors[row, NAMES.index(word) if word in NAMES else -2] = sure
    paths = tuple(f"{row}.jpg" for row in range(len(truth)))
    return LabelledSet(vectors, truth, tuple(classes.tolist()), paths, (Failure("x", FailureKind.MISSING, "no"),))


def test_figures_by_hand(opened: Model) -> None:
    found = evaluate(pictures(opened, "cat cat cat dog dog ox", "cat cat dog dog cat cat"), classifier(opened))
    assert found.hits.tolist() == [True, True, False, True, False, False]
    assert found.top1.value == 0.5 and found.top5 is None and found.failed == 1
    assert found.mean_per_class.value == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.classes.precision[:3] == pytest.approx([2 / 4, 1 / 2, np.nan], nan_ok=True)
    assert found.classes.recall == pytest.approx([2 / 3, 1 / 2, 0, np.nan], nan_ok=True)
    assert found.confusions == [(0, 1, 1), (1, 0, 1), (2, 0, 1)]
    assert found.ranks.tolist() == [0, 0, 1, 0, 1, 2]  # of equals the earlier label is first
    score = np.exp(9) / (np.exp(9) + 3)
    assert found.verdicts.score == pytest.approx(np.full(6, score), abs=1e-6)
    assert found.verdicts.margin == pytest.approx(np.full(6, score - 1 / (np.exp(9) + 3)), abs=1e-6)
    assert found.verdicts.cosine == pytest.approx(np.full(6, 0.9))
    assert found.verdicts.mcm == pytest.approx(np.full(6, np.exp(0.9) / (np.exp(0.9) + 3)))
    other = 1 / (np.exp(9) + 3)
    assert found.verdicts.entropy == pytest.approx(
        np.full(6, -score * np.log(score) - 3 * other * np.log(other)), abs=1e-5
    )
    assert found.calibration.error == pytest.approx(score - 0.5, abs=1e-6)
    assert found.coverage[0].coverage == 1 and found.coverage[-1].precision == 0.5
    assert found.proposals["score"] is None


def test_scores_are_those_of_classify(opened: Model) -> None:
    some = pictures(opened, "cat dog ox elk", "cat cat - dog", 0.4)
    verdicts = evaluate(some, classifier(opened)).verdicts
    items = [Embedded(path, vector) for path, vector in zip(some.paths, some.vectors, strict=True)]
    for index, row in enumerate(classify(items, classifier(opened), opened)):
        assert row.label == NAMES[verdicts.label[index]]
        assert (row.score, row.cosine, row.margin) == pytest.approx(
            (verdicts.score[index], verdicts.cosine[index], verdicts.margin[index]), abs=1e-6
        )


def test_a_classifier_made_of_pictures_has_bias_and_lengths(opened: Model) -> None:
    made = classifier(opened)
    made = replace(made, weight=made.weight * 3, bias=np.array([0, 0, 100, 0], np.float32), made_by="logistic")
    found = evaluate(pictures(opened, "cat dog ox", "cat dog ox"), made)
    assert found.verdicts.label.tolist() == [2, 2, 2]
    assert found.verdicts.cosine == pytest.approx([0, 0, 0.9], abs=1e-6)


def test_classes_without_a_label_stop_or_are_left_out(opened: Model) -> None:
    some = pictures(opened, "cat yak dog yak", "cat cat dog ox")
    with pytest.raises(UsageError, match=r"^zoo: classes that are no labels: yak; labels without pictures: ox, elk$"):
        evaluate(some, classifier(opened), name="zoo")
    found = evaluate(some, classifier(opened), ignore_missing=True)
    assert (found.left_out, found.paths, found.top1.value) == (2, ("0.jpg", "2.jpg"), 1)
    with pytest.raises(UsageError, match="classes that are no labels: yak"):
        evaluate(pictures(opened, "yak yak", "cat cat"), classifier(opened), ignore_missing=True)


def test_one_label_alone_and_broken_embeddings_are_refused(opened: Model) -> None:
    some = pictures(opened, "cat dog", "cat dog")
    with pytest.raises(UsageError, match="one label alone"):
        evaluate(some, classifier(opened, ("cat",)))
    some.vectors[1, 3] = np.nan
    with pytest.raises(UsageError, match="1 embedding of 2 not finite"):
        evaluate(some, classifier(opened))


def test_groups_add_the_scores_of_their_labels(opened: Model) -> None:
    some = pictures(opened, "cat cat ox", "dog ox ox")
    assert evaluate(some, classifier(opened)).by_group is None
    found = evaluate(some, classifier(opened, groups=("pet", "pet|animal", None, "deer")))
    assert found.by_group is not None and found.by_group.value == pytest.approx(2 / 3)


def test_unknown_pictures_are_told_and_lower_what_is_proposed(opened: Model) -> None:
    known = pictures(opened, "cat cat dog dog", "cat cat dog dog")
    other = pictures(opened, "yak yak", "- cat", 0.8)
    found = evaluate(known, classifier(opened), unknown=(other.paths, other.vectors), want_precision=0.9)
    assert found.unknown is not None and found.unknown.telling["cosine"] == (1.0, 0.0)
    assert found.unknown.verdicts.cosine == pytest.approx([0, 0.8], abs=1e-6)
    least = found.proposals["cosine"]
    assert least is not None and least.value == pytest.approx(0.85) and least.precision == 1
    assert least.coverage == pytest.approx(4 / 6)
    everything = evaluate(known, classifier(opened), want_precision=0.9).proposals["cosine"]
    assert everything is not None and everything.coverage == 1


def test_models_are_compared_on_the_pictures_they_share(opened: Model) -> None:
    a = evaluate(pictures(opened, "cat cat dog dog", "cat cat cat cat"), classifier(opened), name="zoo")
    b = pictures(opened, "cat cat dog dog", "dog cat dog dog")
    b = LabelledSet(b.vectors[1:], b.truth[1:], b.classes, b.paths[1:], ())
    found = compare_models(a, evaluate(b, replace(classifier(opened), model="other"), name="zoo"))
    assert found[:4] == ("zoo", "toy", "other", 3)
    assert (found.gap.value, found.only_a, found.only_b, found.p) == (pytest.approx(2 / 3), 0, 2, 0.5)


def test_a_set_is_split_by_globs(tmp_path: Path, opened: Model) -> None:
    data = [str(squares.make(tmp_path / "data", each=2)), str(squares.shards(tmp_path / "tars", each=2, count=1))]
    found = embed_set(data, opened)
    assert (found.classes, len(found.paths)) == (("blue", "green", "red"), 12)
    red = found.only(matching(data, ["red/*", "*-red.png"]))
    assert (red.classes, len(red.paths), red.truth.tolist()) == (("red",), 4, [0] * 4)
    assert len(found.only(matching(data, [], ["*-red.png"])).paths) == 10
    assert embed_set(data, opened, wanted=matching(data, ["01*"])).paths == found.only(matching(data, ["01*"])).paths
    with pytest.raises(UsageError, match="no picture of 12 matches"):
        found.only(matching(data, ["*.jpg"]))
    with pytest.raises(UsageError, match=r"no picture in .* can be used") as caught:
        embed_set(data, opened, wanted=matching(data, ["*.jpg"]))
    assert "globs see" in str(caught.value.hint)


def test_an_empty_class_folder_is_told(tmp_path: Path, opened: Model, caplog: pytest.LogCaptureFixture) -> None:
    data = squares.make(tmp_path / "data", each=1)
    (data / "pink").mkdir()
    embed_set([str(data)], opened)
    assert [r.getMessage() for r in caplog.records] == [f"{data / 'pink'}: no picture in it: its class doesn't count"]


def test_calibrated_scores_and_thresholds_are_kept_in_the_file(tmp_path: Path, opened: Model) -> None:
    """Half of the cats are dogs in truth, and as sure; dogs are always right; an ox is seen twice, once wrongly."""
    shown = "cat dog " * ENOUGH + "dog " * ENOUGH + "ox cat"
    seen = "cat cat " * ENOUGH + "dog " * ENOUGH + "ox ox"
    some = pictures(opened, shown, seen)
    some.vectors[:ENOUGH:2] += 0.01 * np.eye(opened.config.embed_dim, dtype=np.float32)[0]  # some cats are surer
    found = calibrate(some, classifier(opened), want_precision=0.9)
    save_classifier(found.classifier, tmp_path / "c.safetensors")
    kept = load_classifier(tmp_path / "c.safetensors")
    assert kept.temperature == pytest.approx(found.classifier.temperature) and kept.temperature > 2
    assert kept.how["calibration_pictures"] == 3 * ENOUGH + 2 and kept.how["calibration_precision"] == 0.9
    cat, dog, ox, elk = (label.threshold for label in kept.labels)
    assert cat is not None and dog is not None and dog < cat  # its own threshold lets every dog through
    assert ox == elk == pytest.approx(found.outcome.value)  # too few for one of their own
    assert found.own == 2 and found.outcome.precision >= 0.9
    assert found.fitted_error < found.error
    items = [Embedded(path, vector) for path, vector in zip(some.paths, some.vectors, strict=True)]
    rows = list(classify(items, kept, opened, ClassifyOptions(calibrated=True)))
    answered = [
        row.label == some.classes[truth] for row, truth in zip(rows, some.truth, strict=True) if not row.abstained
    ]
    assert len(answered) / len(rows) == pytest.approx(found.outcome.coverage) and len(answered) < len(rows)
    assert np.mean(answered) == pytest.approx(found.outcome.precision)
    with pytest.raises(ClassifierError, match="isn't calibrated"):
        list(classify(items, classifier(opened), opened, ClassifyOptions(calibrated=True)))
    with pytest.raises(UsageError, match="no least score gives 90% right answers on 2 pictures"):
        calibrate(pictures(opened, "cat dog", "dog cat"), classifier(opened), want_precision=0.9)
