"""What `tiny` is taught: its label file and templates, and the arithmetic of its figures."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import clipcli
from clipcli.records import Label, Prediction, Source
from clipcli.zeroshot import labels, templates

TINY = Path(__file__).resolve().parents[1] / "benchmarks" / "tiny"
CARD = TINY / "card.md"


@pytest.fixture(scope="module")
def words() -> list[Label]:
    return labels.read(str(TINY / "words.csv"))


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tiny", TINY / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def broader(label: Label) -> list[str]:
    return label.group.split("|") if label.group else []


# Words


def test_a_label_for_each_class(words: list[Label], pictures: Path) -> None:
    classes = json.loads((pictures / "classes.json").read_text())["datasets"]["tiny-imagenet"]["names"]
    assert [label.name for label in words] == classes


def test_labels_have_two_to_seven_words_their_own_among_them(words: list[Label]) -> None:
    assert len(words) == 200
    for label in words:
        folded = [alias.casefold() for alias in label.aliases]
        assert 2 <= len(set(folded)) == len(folded) <= 7, label.name
        assert label.name.casefold() in folded


def test_a_word_means_one_class(words: list[Label]) -> None:
    aliases = Counter(alias.casefold() for label in words for alias in label.aliases)
    assert [word for word, count in aliases.items() if count > 1] == []
    assert not aliases.keys() & {word for label in words for word in broader(label)}


def test_broader_words_are_a_small_coherent_table(words: list[Label]) -> None:
    known = Counter(word for label in words for word in broader(label))
    assert 45 <= len(known) <= 75
    assert len({word.casefold().removesuffix("s") for word in known}) == len(known)  # one spelling of each
    assert all(word == word.strip().lower() for word in known)
    assert all(len(set(broader(label))) == len(broader(label)) for label in words)
    assert {"cat", "dog", "bird", "insect", "vehicle", "food", "furniture", "building", "car", "fruit"} <= known.keys()


def test_what_is_broader_holds_for_all_of_the_nearer(words: list[Label]) -> None:
    kinds = {
        "animal": ["mammal", "bird", "fish", "amphibian", "reptile", "bug", "sea animal", "mollusk"],
        "mammal": ["dog", "cat", "big cat", "primate", "hoofed animal"],
        "bug": ["insect", "spider"],
        "insect": ["butterfly"],
        "vehicle": ["car", "bus", "train", "boat", "van", "truck"],
        "clothing": ["swimwear", "robe", "shoe", "hat"],
        "food": ["fruit", "vegetable", "dessert", "meal"],
        "furniture": ["table", "chair"],
        "sports equipment": ["ball"],
        "container": ["bottle"],
        "structure": ["bridge", "tower", "monument"],
        "building": ["shop", "house"],
    }
    for label in words:
        near = broader(label)
        for wide, kind in kinds.items():
            for word in set(kind) & set(near):
                assert wide in near[near.index(word) + 1 :], f"{label.name}: {word} without {wide} after it"


def test_no_cell_is_more_than_a_cell() -> None:
    with (TINY / "words.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["label", "aliases", "group"] and {len(row) for row in rows} == {3}
    assert not any(cell != cell.strip() or "||" in cell for row in rows for cell in row)


def test_templates_hold_those_that_users_ask_with() -> None:
    own = [template.text for template in templates.read([str(TINY / "templates.txt")])]
    users = [template.text for template in templates.read(["imagenet7", "simple"])]
    assert 12 <= len(own) <= 20 and set(users) < set(own) and "<>" in own


def test_the_card_names_all_words(words: list[Label]) -> None:
    card = " ".join(CARD.read_text(encoding="utf-8").split())
    listed = [part.partition(":")[2] for part in card.split(". ") if part.startswith(("Broader words:", "Classes:"))]
    known, classes = ([word.strip() for word in part.split(",")] for part in listed)
    assert classes == [label.name for label in words]
    assert known == sorted({word for label in words for word in broader(label)})
    count = sum(len(label.aliases) for label in words)
    assert f"{len(known)} broader words" in card and f"{count} words and {len(known)} broader ones" in card


# Figures


def test_coarse_words_exclude_each_other(words: list[Label], evaluate: ModuleType) -> None:
    for names in (evaluate.COARSE, evaluate.COARSEST):
        found = [len(set(names) & set(broader(label))) for label in words]
        assert max(found) == 1 and sum(found) > 100
        assert set(names) <= {word for label in words for word in broader(label)}


def test_scores_are_those_of_classify(model: Path, photos: Path, tmp_path: Path, evaluate: ModuleType) -> None:
    names = ["astronaut.png", "chelsea.png", "rocket.jpg"]
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for index, name in enumerate(names):
            for ending, data in ((name[-3:], (photos / name).read_bytes()), ("cls", str(2 - index).encode())):
                member = tarfile.TarInfo(f"{name[:-4]}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    loaded = clipcli.load_model(model)
    found = evaluate.read(loaded, tmp_path / "pictures.tar")
    assert found.keys == ("astronaut", "chelsea", "rocket") and found.truth.tolist() == [2, 1, 0]
    words = evaluate.plain(["cat", "dog", "rocket"])
    scores = np.exp(evaluate.log_softmax(evaluate.logits(loaded, found, words, "imagenet7")))
    sources = [Source(name, (photos / name).read_bytes()) for name in names]
    exact = clipcli.ClassifyOptions(decode="exact")
    rows = list(clipcli.classify(sources, clipcli.build_classifier(loaded, words), loaded, exact))
    for row, mine in zip(rows, scores, strict=True):
        assert isinstance(row, Prediction) and row.label == words[mine.argmax()].name
        assert row.score == pytest.approx(mine.max(), abs=1e-5)


def test_correct_counts_ties_by_order(evaluate: ModuleType) -> None:
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    truth = np.array([0, 1, 0])
    assert evaluate.correct(scores, truth).tolist() == [True, False, False]
    assert evaluate.correct(scores, truth, 2).tolist() == [True, True, True]


def test_the_interval_is_that_of_a_proportion(evaluate: ModuleType) -> None:
    values = np.arange(1000) % 4 == 0
    low, high = evaluate.interval(values)
    spread = 1.96 * np.sqrt(0.25 * 0.75 / 1000)
    assert (low, high) == evaluate.interval(values)
    assert low == pytest.approx(0.25 - spread, abs=0.004) and high == pytest.approx(0.25 + spread, abs=0.004)


def test_the_fitted_temperature_is_the_one_that_made_the_answers(evaluate: ModuleType) -> None:
    draws = np.random.default_rng(1)
    scores = 9 * draws.normal(size=(4000, 10))
    honest = np.exp(evaluate.log_softmax(scores / 3))
    truth = (draws.random((4000, 1)) > honest.cumsum(axis=1)).sum(axis=1).clip(max=9)
    assert evaluate.fitted(scores, truth) == pytest.approx(3, rel=0.06)
    hits = evaluate.correct(scores, truth)
    assert evaluate.error(honest.max(axis=1), hits) < 0.02
    assert evaluate.error(np.exp(evaluate.log_softmax(scores)).max(axis=1), hits) > 0.1
