"""Linear classifiers against scikit-learn and against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from clipcli.tasks import linear
from clipcli.tasks.linear import ROUGH, Examples, Linear, blend, gaussian, leave_one_out, logistic, sweep, unit


def examples(n: int, dim: int = 8, classes: int = 3, seed: int = 0, spread: float = 0.5) -> Examples:
    """Unit vectors about a centre a class, all of them about a common direction, as CLIP's are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) + 2
    truth = np.arange(n) % classes
    return Examples(unit(centres[truth] + spread * rng.normal(size=(n, dim)) * 2), truth)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("c", [1e-6, 1e-2, 0.316, 30.0, 1e4])
def test_logistic_regression_equals_scikit_learns(classes: int, c: float) -> None:
    train, held = examples(90, classes=classes), examples(30, classes=classes, seed=1)
    ours = softmax(logistic(train, c).logits(held.vectors), axis=1)
    theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-9).fit(train.vectors, train.truth)
    np.testing.assert_allclose(ours, theirs.predict_proba(held.vectors), atol=1e-3)


def test_logistic_regression_where_features_are_more_than_examples() -> None:
    train, held = examples(6, dim=40), examples(30, dim=40, seed=1)
    ours = softmax(logistic(train, 10.0).logits(held.vectors), axis=1)
    theirs = LogisticRegression(C=10.0, max_iter=10_000, tol=1e-9).fit(train.vectors, train.truth)
    np.testing.assert_allclose(ours, theirs.predict_proba(held.vectors), atol=1e-3)


def test_the_sweep_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven values two decades apart, then two about the best at each of 1, 1/2, 1/4 and 1/8 decade."""
    tried: list[float] = []

    def fit(examples: Examples, c: float, *_: object) -> Linear:
        """Best at C = 10 ** 0.6, the worse the farther from it."""
        tried.append(float(np.log10(c)))
        off = abs(tried[-1] - 0.6)
        return Linear(np.zeros((2, 1)), np.array([0.0, off]))

    monkeypatch.setattr(linear, "logistic", fit)
    c, _ = sweep(Examples(np.ones((1, 1)), np.array([0])), Examples(np.ones((1, 1)), np.array([0])))
    assert tried[:7] == [-6, -4, -2, 0, 2, 4, 6]
    assert tried[7:] == pytest.approx([-1, 1, 0.5, 1.5, 0.25, 0.75, 0.375, 0.625])
    assert np.log10(c) == pytest.approx(0.625)


def test_the_sweep_stays_between_its_ends_and_prefers_the_weakest(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def fit(examples: Examples, c: float, *_: object) -> Linear:
        tried.append(c)
        return Linear(np.zeros((2, 1)))

    monkeypatch.setattr(linear, "logistic", fit)
    one = Examples(np.ones((1, 1)), np.array([0]))
    assert sweep(one, one)[0] == pytest.approx(1e-6)
    assert min(tried) == pytest.approx(1e-6)


def test_where_it_begins_changes_nothing() -> None:
    train = examples(24, dim=30, spread=1.5)
    start = logistic(train, 0.01)
    again = logistic(train, 3.0, start=start)
    plain, rough = logistic(train, 3.0), logistic(train, 3.0, ROUGH, start)
    assert not np.allclose(start.weight, plain.weight, atol=1e-2)
    np.testing.assert_allclose(again.weight, plain.weight, atol=1e-6)
    np.testing.assert_allclose(rough.weight, plain.weight, atol=2e-2)


def test_the_sweep_finds_a_better_c_than_its_ends() -> None:
    train, held = examples(24, dim=30, spread=1.5), examples(300, dim=30, seed=1, spread=1.5)
    c, found = sweep(train, held)
    assert 1e-6 < c < 1e6
    for end in (1e-6, 1e6):
        assert found.quality(held) > logistic(train, end).quality(held)


def test_gaussian_discriminants_by_hand() -> None:
    """d · ((n - 1) Σ + tr(Σ) I)⁻¹ between class means, and the bias of Bayes' rule."""
    train = examples(20, dim=4)
    found = gaussian(train)
    assert found is not None
    means = np.stack([train.vectors[train.truth == k].mean(axis=0) for k in range(3)])
    covariance = np.cov((train.vectors - means[train.truth]).T)
    inverse = 4 * np.linalg.inv(19 * covariance + np.trace(covariance) * np.eye(4))
    prior = np.log(np.bincount(train.truth) / 20)
    np.testing.assert_allclose(found.weight, means @ inverse, rtol=1e-9)
    np.testing.assert_allclose(found.bias, prior - 0.5 * np.einsum("kd,de,ke->k", means, inverse, means), rtol=1e-9)


def test_gaussian_discriminants_answer_like_lda_where_examples_are_many() -> None:
    train, held = examples(3000), examples(600, seed=1)
    theirs = LinearDiscriminantAnalysis().fit(train.vectors, train.truth).predict(held.vectors)
    found = gaussian(train)
    assert found is not None
    assert (found.logits(held.vectors).argmax(axis=1) == theirs).mean() > 0.98


@pytest.mark.parametrize("copies", [1, 3])
def test_no_spread_no_gaussian(copies: int) -> None:
    one_each = examples(3)
    assert gaussian(Examples(np.repeat(one_each.vectors, copies, 0), np.repeat(one_each.truth, copies))) is None


def test_blending_by_hand() -> None:
    text, means = np.array([[1.0, 0], [0, 1]]), np.array([[0, 2.0], [0, 0.5]])
    found = blend(text, means, alpha=1, scale=10)
    np.testing.assert_allclose(found.weight, [[10 / 2**0.5, 10 / 2**0.5], [0, 10]])
    np.testing.assert_allclose(blend(text, means, 0, 1).weight, text)
    np.testing.assert_allclose(blend(text, means, 1e9, 1).weight, [[0, 1], [0, 1]], atol=1e-8)


@pytest.mark.parametrize("alpha", [0, 0.5, 4])
def test_leaving_one_out_equals_doing_it(alpha: float) -> None:
    few = examples(11, spread=1.0)
    text = unit(np.random.default_rng(3).normal(size=(3, 8)))
    hits, logs = [], []
    for i in range(11):
        rest = Examples(np.delete(few.vectors, i, 0), np.delete(few.truth, i))
        logits = blend(text, rest.means, alpha, 1).logits(few.vectors[i])
        hits.append(logits.argmax() == few.truth[i])
        logs.append(np.log(softmax(logits)[few.truth[i]]))
    assert leave_one_out(text, few, alpha) == pytest.approx((np.mean(hits), np.mean(logs)))


def test_mixing_is_mixing_logits() -> None:
    rng = np.random.default_rng(0)
    a, b = Linear(rng.normal(size=(3, 4))), Linear(rng.normal(size=(3, 4)), rng.normal(size=3))
    x = rng.normal(size=(5, 4))
    np.testing.assert_allclose(a.mixed(b, 0.3, 0.7).logits(x), 0.3 * a.logits(x) + 0.7 * b.logits(x))
