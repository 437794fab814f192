"""Figures of merit: against scikit-learn where it has them, against examples worked by hand where it hasn't."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from clipcli.tasks import metrics


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def drawn(random: np.random.Generator, pictures: int = 400, labels: int = 7) -> tuple[metrics.Floats, metrics.Indices]:
    """Logits and truth that have to do with each other; the last class has no picture."""
    truth = random.integers(labels - 1, size=pictures)
    logits = random.normal(size=(pictures, labels)) + 1.5 * np.eye(labels)[truth]
    return logits.astype(np.float32), truth


def test_ranks_are_places_in_the_stable_order(random: np.random.Generator) -> None:
    logits, truth = drawn(random)
    logits = np.round(logits, 0)  # many are equal
    order = np.argsort(-logits, axis=1, kind="stable")
    assert metrics.ranks(logits, truth).tolist() == np.argmax(order == truth[:, None], axis=1).tolist()


def test_top_k_equals_scikit_learn(random: np.random.Generator) -> None:
    logits, truth = drawn(random)
    ranks = metrics.ranks(logits, truth)
    for k in (1, 2, 5):
        wanted = reference.top_k_accuracy_score(truth, logits, k=k, labels=range(7))
        assert (ranks < k).mean() == pytest.approx(wanted)


def test_classes_equal_scikit_learn(random: np.random.Generator) -> None:
    logits, truth = drawn(random)
    answer = np.where(logits.argmax(axis=1) == 2, 3, logits.argmax(axis=1))  # class 2 is never answered
    found = metrics.by_class(truth, answer, 7)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        truth, answer, labels=range(7), zero_division=np.nan
    )
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    assert found.pictures.tolist() == support.tolist()
    whole = np.diag(np.bincount(truth[truth == answer], minlength=7))
    for t, a, n in metrics.confusions(truth, answer, 7):
        whole[t, a] = n
    assert whole.tolist() == reference.confusion_matrix(truth, answer, labels=range(7)).tolist()


def test_confusions_come_by_frequency_then_class() -> None:
    truth, answer = np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 2, 0, 0, 1, 1, 2])
    assert metrics.confusions(truth, answer, 3) == [(1, 0, 2), (2, 1, 2), (0, 2, 1)]


def test_intervals_equal_resampling_pictures(random: np.random.Generator) -> None:
    hits = random.random(300) < 0.7
    slow = [random.choice(hits, 300).mean() for _ in range(4000)]
    assert metrics.share(hits) == pytest.approx((hits.mean(), *np.percentile(slow, (2.5, 97.5))), abs=0.01)
    other = hits ^ (random.random(300) < 0.2)
    rows = random.integers(300, size=(4000, 300))
    slow = other[rows].mean(axis=1) - hits[rows].mean(axis=1)
    wanted = (other.mean() - hits.mean(), *np.percentile(slow, (2.5, 97.5)))
    assert metrics.paired_gap(hits, other) == pytest.approx(wanted, abs=0.01)
    slow = other[random.integers(300, size=(4000, 300))].mean(axis=1) - hits[rows].mean(axis=1)
    found = metrics.gap(hits, other)
    assert found == pytest.approx((wanted[0], *np.percentile(slow, (2.5, 97.5))), abs=0.01)
    assert found == metrics.gap(hits, other)  # seeded


def test_the_mean_per_class_counts_classes_alike_and_leaves_empty_ones_out() -> None:
    found = metrics.mean_share(np.array([9, 1, 0]), np.array([10, 2, 0]))
    assert found.value == pytest.approx((0.9 + 0.5) / 2)
    assert found.low == pytest.approx(0.4, abs=0.05) and found.high <= 1


def test_mcnemar_by_hand() -> None:
    assert metrics.mcnemar(10, 3) == pytest.approx(2 * (1 + 13 + 78 + 286) / 2**13)
    assert metrics.mcnemar(3, 10) == metrics.mcnemar(10, 3)
    assert (metrics.mcnemar(0, 0), metrics.mcnemar(4, 4)) == (1, 1)
    assert metrics.mcnemar(6000, 5000) == pytest.approx(math.erfc(999 / math.sqrt(11000) / math.sqrt(2)), rel=1e-2)


def test_calibration_error_by_hand() -> None:
    score, hit = np.array([0.95, 0.95, 0.9, 0.3]), np.array([True, False, True, False])
    assert metrics.reliability(score, hit, 2) == [(1, 0.3, 0.0), (3, pytest.approx(2.8 / 3), pytest.approx(2 / 3))]
    assert metrics.calibration_error(score, hit, 2) == pytest.approx((0.3 + 3 * (2.8 / 3 - 2 / 3)) / 4)
    assert metrics.reliability(np.array([0.0, 0.5, 1.0]), np.ones(3, bool), 2) == [(2, 0.25, 1), (1, 1, 1)]


def test_temperature_is_found_again(random: np.random.Generator) -> None:
    logits = 3 * random.normal(size=(5000, 10)).astype(np.float32)
    p = np.exp(metrics.log_softmax(logits / 2))
    truth = (p.cumsum(axis=1) > random.random((5000, 1))).argmax(axis=1)
    fitted = metrics.fit_temperature(logits, truth)
    assert fitted == pytest.approx(2, rel=0.05)

    def loss(temperature: float) -> float:
        return float(-metrics.log_softmax(logits / temperature)[np.arange(5000), truth].mean(dtype=np.float64))

    assert loss(fitted) <= min(loss(fitted * 0.98), loss(fitted * 1.02))
    assert loss(fitted) == pytest.approx(reference.log_loss(truth, np.exp(metrics.log_softmax(logits / fitted))))


def test_temperature_stops_at_its_bounds(random: np.random.Generator) -> None:
    logits = random.normal(size=(50, 4)).astype(np.float32)
    most = metrics.MOST_TEMPERATURE
    assert metrics.fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(1 / most, rel=1e-3)
    assert metrics.fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(most, rel=1e-3)
    assert math.isfinite(metrics.fit_temperature(np.zeros((5, 3), np.float32), np.zeros(5, np.intp)))


def test_thresholds_by_hand() -> None:
    score = np.array([0.9, 0.8, 0.8, 0.6, 0.4])
    right = np.array([True, True, False, True, False])
    assert metrics.threshold_for(0.75, score, right) == metrics.Threshold(0.5, 0.75, 0.8)
    assert metrics.threshold_for(1.0, score, right) == metrics.Threshold(pytest.approx(0.85), 1.0, 0.2)
    assert metrics.threshold_for(0.5, score, right) == metrics.Threshold(pytest.approx(0.4 - metrics.HAIR), 0.6, 1.0)
    assert metrics.threshold_for(0.1, score, ~right) == metrics.Threshold(pytest.approx(0.4 - metrics.HAIR), 0.4, 1.0)
    assert metrics.threshold_for(0.9, score, ~right) is None
    nothing = metrics.at_threshold(1.5, score, right)
    assert nothing.coverage == 0 and math.isnan(nothing.precision)


def test_unknown_pictures_equal_scikit_learn(random: np.random.Generator) -> None:
    known, unknown = np.round(random.normal(1, 1, 300), 1), np.round(random.normal(0, 1, 200), 1)  # some are equal
    truth, value = np.r_[np.ones(300), np.zeros(200)], np.r_[known, unknown]
    assert metrics.auroc(known, unknown) == pytest.approx(reference.roc_auc_score(truth, value))
    fpr, tpr, _ = reference.roc_curve(truth, value, drop_intermediate=False)
    assert metrics.fpr_at_tpr(known, unknown) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
