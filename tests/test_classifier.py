"""The averaging rule worked out by hand, the classifier file, and the rules by which a label wins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from clipcli import load_classifier, load_model, save_classifier
from clipcli.errors import ClassifierError, LabelError, UsageError
from clipcli.records import Embedded, Failure, FailureKind, Label, Prediction, Template
from clipcli.tasks.build import build_classifier
from clipcli.tasks.classify import ClassifyOptions, Ranking, _top, check_names, in_order
from clipcli.zeroshot.classifier import Classifier, average, build, encode_prompts
from clipcli.zeroshot.prompts import fill


def label(*words: str, descriptions: tuple[str, ...] = ()) -> Label:
    return Label(words[0], words, descriptions, where="test:1")


def made(weight: np.ndarray | list[list[float]], names: str = "abc", **changes: object) -> Classifier:
    array = np.array(weight, np.float32)
    array /= np.linalg.norm(array, axis=1, keepdims=True)
    labels = tuple(label(name) for name in names[: len(array)])
    plain = Classifier(array, labels, 100.0, "some model", "1" * 32, "2" * 32)
    return replace(plain, **changes)  # type: ignore[arg-type]


# ---- averaging


def test_average_by_hand() -> None:
    """Weighted mean over aliases x templates, plain mean over descriptions, mean of the two, normalised."""
    labels = [label("cat", "tom", descriptions=("fur", "whiskers", "claws")), Label("dog", (), ("it barks",))]
    templates = [Template("a <>"), Template("the <>", weight=3.0)]
    prompts = fill(labels, templates)
    assert [p.text for p in prompts] == ["a cat", "the cat", "a tom", "the tom", "fur", "whiskers", "claws", "it barks"]
    x, y, z = np.eye(3)
    vectors = np.array([x, y, x, z, x, x, y, -z], np.float32)
    group = (1 * x + 3 * y + 1 * x + 3 * z) / 8
    described = (x + x + y) / 3
    cat = (group + described) / 2
    expected = np.stack([cat / np.linalg.norm(cat), -z])
    np.testing.assert_allclose(average(prompts, vectors, labels), expected, atol=1e-7)


def test_average_equals_the_plain_rule_without_weights() -> None:
    random = np.random.default_rng(0)
    labels = [label(f"l{i}") for i in range(5)]
    templates = [Template(f"{i} <>") for i in range(7)]
    vectors = random.standard_normal((35, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = vectors.reshape(5, 7, 8).mean(axis=1)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(average(fill(labels, templates), vectors, labels), plain, atol=1e-6)


def test_a_label_without_prompts_is_refused() -> None:
    with pytest.raises(LabelError, match='label "dog" has no prompt'):
        fill([label("cat"), Label("dog", ())], [Template("<>")])


def test_weights_that_cancel_are_refused() -> None:
    labels = [label("cat")]
    prompts = fill(labels, [Template("a <>"), Template("the <>")])
    with pytest.raises(LabelError, match="not finite"), np.errstate(invalid="ignore"):
        average(prompts, np.array([[1, 0], [-1, 0]], np.float32), labels)


def test_each_distinct_prompt_is_encoded_once(tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path))
    ids = model.tokenizer(["a cat", "a dog", "a  CAT", "a cat"])
    vectors, distinct, encoded = encode_prompts(model, ids)
    assert (distinct, encoded) == (2, 2)
    assert (vectors[0] == vectors[2]).all() and (vectors[0] == vectors[3]).all() and (vectors[0] != vectors[1]).any()
    assert encode_prompts(model, model.tokenizer(["a dog", "a bird"]))[1:] == (2, 1)


def test_the_order_of_labels_and_the_template_weights_matter(tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path))
    forward, backward = build_classifier(model, ["cat", "dog"]), build_classifier(model, ["dog", "cat"])
    np.testing.assert_array_equal(forward.weight, backward.weight[::-1])
    labels = [label("cat"), label("dog")]
    light, heavy = (
        build(model, labels, [Template("a <>"), Template("the <>", weight)]).classifier.weight for weight in (1.0, 5.0)
    )
    assert np.abs(light - heavy).max() > 1e-3


# ---- the file


def test_file_round_trip(tmp_path: Path) -> None:
    labels = (
        Label("n01", ("tabby", "cat"), ("it purrs",), "animals", 0.25),
        Label("Größe | =", ("größe",), (), None, None),
    )
    classifier = made([[1, 2], [3, -4]], labels=labels, templates=(Template("a <>", 2.5),), template_set="my set")
    save_classifier(classifier, tmp_path / "c.safetensors")
    read = load_classifier(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(read.weight, classifier.weight)
    assert replace(read, weight=classifier.weight) == classifier
    first = (tmp_path / "c.safetensors").read_bytes()
    save_classifier(read, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def metadata(path: Path) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return dict(json.loads(file.metadata()["clipcli"]))


BREAKS: dict[str, tuple[dict[str, object], str]] = {
    "another format": ({"format": "embeddings"}, "no classifier"),
    "a newer version": ({"version": 2}, "version 2 of the format"),
    "labels missing": ({"labels": None}, "labels is None"),
    "a label fewer": ({"labels": [{"name": "a", "aliases": [], "descriptions": [], "group": None}]}, "for 1 labels"),
    "a label that is no text": (
        {"labels": [{"name": n, "aliases": [], "descriptions": [], "group": None} for n in (1, "b")]},
        "is not text",
    ),
    "a label twice": (
        {"labels": [{"name": "a", "aliases": [], "descriptions": [], "group": None}] * 2},
        "stands twice",
    ),
    "a scale that is no number": ({"logit_scale": "NaN"}, "logit_scale"),
    "a negative scale": ({"logit_scale": -1}, "logit_scale"),
    "features of another kind": ({"features": "patches"}, "features"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_metadata_that_lies(tmp_path: Path, case: str) -> None:
    changes, message = BREAKS[case]
    path = tmp_path / "c.safetensors"
    save_classifier(made([[1, 0], [0, 1]]), path)
    changed = {"clipcli": json.dumps({**metadata(path), **changes})}
    save_file({"weight": np.eye(2, dtype=np.float32)}, path, metadata=changed)
    with pytest.raises(ClassifierError, match=message):
        load_classifier(path)


@pytest.mark.parametrize(
    "weight",
    [np.eye(3, dtype=np.float32), np.eye(2), np.ones(2, np.float32), np.full((2, 2), np.nan, np.float32)],
    ids=["rows", "dtype", "dimensions", "nan"],
)
def test_weights_that_lie(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "c.safetensors"
    save_classifier(made([[1, 0], [0, 1]]), path)
    save_file({"weight": weight}, path, metadata={"clipcli": json.dumps(metadata(path))})
    with pytest.raises(ClassifierError, match=r"broken classifier file"):
        load_classifier(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_classifier(made([[1, 0], [0, 1]]), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ClassifierError):
            load_classifier(path)


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from clipcli.errors import OutputError

    with pytest.raises(OutputError, match="can't be written"):
        save_classifier(made([[1, 0], [0, 1]]), tmp_path / "missing" / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- the rules


def decide(ranking: Ranking, *embedding: float) -> Prediction:
    vector = np.array(embedding, np.float32)
    (row,) = ranking.decide([Embedded("a.jpg", vector / np.linalg.norm(vector))])
    return row


def test_score_cosine_and_margin_by_hand() -> None:
    classifier = made([[1, 0], [0, 1], [-1, 0]], logit_scale=2.0)
    row = decide(Ranking(classifier, None, ClassifyOptions(temperature=0.5)), 0.6, 0.8)
    logits = [4 * 0.6, 4 * 0.8, 4 * -0.6]
    scores = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
    assert [x.label for x in row.top] == ["b", "a", "c"]
    assert [x.score for x in row.top] == pytest.approx([scores[1], scores[0], scores[2]], abs=1e-6)
    assert (row.label, row.abstained) == ("b", False)
    assert row.cosine == pytest.approx(0.8) and row.margin == pytest.approx(scores[1] - scores[0], abs=1e-6)


def test_background_takes_part_and_wins_by_abstaining() -> None:
    classifier, rest = made([[1, 0], [0, 1]]), made([[1, 1]], names="z")
    row = decide(Ranking(classifier, rest, ClassifyOptions(unknown_label="none")), 1, 0.9)
    assert (row.label, row.abstained, row.top[0].label) == ("none", True, "z")
    assert len(row.top) == 3 and sum(x.score for x in row.top) == pytest.approx(1)
    assert decide(Ranking(classifier, rest, ClassifyOptions()), 1, 0).label == "a"


def test_large_logits_do_not_overflow() -> None:
    row = decide(Ranking(made([[1, 0], [-1, 0]], logit_scale=1e6), None, ClassifyOptions()), 1, 0)
    assert (row.score, row.margin) == (1.0, 1.0)


@pytest.mark.parametrize("k", [1, 2, 5, 50, 100, 200])
def test_top_equals_a_full_sort(k: int) -> None:
    rows = np.random.default_rng(k).random((3, 100), np.float32)
    before = rows.copy()
    best, highest = _top(rows, k)
    assert best.tolist() == [sorted(range(100), key=lambda i: -row[i])[:k] for row in rows]
    np.testing.assert_array_equal(highest, np.take_along_axis(before, best, 1))
    np.testing.assert_array_equal(rows, before)


def test_of_equals_the_earlier_label_comes_first() -> None:
    row = np.array([[0.1, 0.3, 0.3, 0.3] + 20 * [0.0]], np.float32)
    assert _top(row, 4)[0].tolist() == [[1, 2, 3, 0]] and _top(row, 20)[0].tolist()[0][:4] == [1, 2, 3, 0]


def test_pictures_in_a_burst_get_the_answers_they_get_alone() -> None:
    rng = np.random.default_rng(0)
    classifier = made(rng.normal(size=(50, 8)).tolist(), logit_scale=30.0, names="".join(map(chr, range(97, 147))))
    ranking = Ranking(classifier, None, ClassifyOptions(top_k=7))
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    pictures = [Embedded(str(i), v / np.linalg.norm(v)) for i, v in enumerate(vectors)]
    broken = Failure("broken", FailureKind.CORRUPT, "data damaged")
    together = list(in_order(ranking.decide, [*pictures[:9], broken, *pictures[9:]]))
    assert together.pop(9) == broken
    for row, picture in zip(together, pictures, strict=True):
        (alone,) = ranking.decide([picture])
        assert isinstance(row, Prediction) and (row.path, row.label) == (picture.path, alone.label)
        assert [one.label for one in row.top] == [one.label for one in alone.top]
        for one, other in zip(row.top, alone.top, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.cosine == pytest.approx(other.cosine, abs=1e-6)


def test_names_that_can_not_compete() -> None:
    one, two = made([[1, 0]]), made([[1, 0], [0, 1]])
    with pytest.raises(UsageError, match="one label alone"):
        check_names(one.labels, (), ClassifyOptions())
    with pytest.raises(LabelError, match="in the background"):
        check_names(two.labels, one.labels, ClassifyOptions())
    with pytest.raises(LabelError, match="abstain"):
        check_names(two.labels, (), ClassifyOptions(unknown_label="a"))


# ---- the Python interface


def test_the_three_calls(tmp_path: Path, photos: Path) -> None:
    import clipcli

    model = clipcli.load_model(tiny.save(tmp_path / "m"), device="cpu")
    classifier = clipcli.build_classifier(model, ["cat", "dog"], templates="imagenet7")
    rows = list(clipcli.classify([str(photos / "rocket.jpg"), str(photos / "sub")], classifier, model))
    assert [Path(row.path).name for row in rows] == ["rocket.jpg", "camera.png"]
    assert all(isinstance(row, clipcli.Prediction) and row.label in ("cat", "dog") for row in rows)
    other = clipcli.load_model(tiny.save(tmp_path / "o", arrays=tiny.weights(tiny.vit(), seed=9)))
    with pytest.raises(ClassifierError, match='built with model "m"'):
        clipcli.classify([], classifier, other)
