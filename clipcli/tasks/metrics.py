"""Figures of merit: how right a classifier's answers are, how sure it should be of them, and what it doesn't know.

In: plain arrays (logits, indices of classes, scores). Out: numbers. It knows no pictures, labels or files. What
scikit-learn has too is equal to it (tested); its definitions are a line or two each and not worth the import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]

RESAMPLES = 2000  # of a bootstrap
BINS = 15  # of the calibration error
MOST_TEMPERATURE = 100.0  # and its inverse is the least: beyond, all answers are right, or none
HAIR = 1e-4  # more than another batch or runtime changes a score
_LEVEL = (2.5, 97.5)  # percentiles of an interval


# Right or wrong


def ranks(logits: Floats, truth: Indices) -> Indices:
    """How many labels [n] come before the true one, by logits [n, labels]; of equals the earlier label is first."""
    own = np.take_along_axis(logits, truth[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < truth[:, None]
    before: Indices = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return before


class ByClass(NamedTuple):
    """Arrays [classes]; nan where a ratio is of nothing."""

    pictures: Indices
    answers: Indices
    precision: Floats
    recall: Floats
    f1: Floats


def by_class(truth: Indices, answer: Indices, classes: int) -> ByClass:
    """Precision, recall and F1 of each class."""
    pictures, answers = np.bincount(truth, minlength=classes), np.bincount(answer, minlength=classes)
    hits = np.bincount(truth[truth == answer], minlength=classes)
    with np.errstate(invalid="ignore"):
        return ByClass(pictures, answers, hits / answers, hits / pictures, 2 * hits / (pictures + answers))


def confusions(truth: Indices, answer: Indices, classes: int) -> list[tuple[int, int, int]]:
    """What is taken for what: (truth, answer, times), the most frequent first, equal ones by class."""
    wrong = truth != answer
    pairs, counts = np.unique(truth[wrong] * classes + answer[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(p // classes), int(p % classes), int(n)) for p, n in zip(pairs[order], counts[order], strict=True)]


# How sure one may be of a figure


class Estimate(NamedTuple):
    """A figure and its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


def share(hits: Flags, seed: int = 0) -> Estimate:
    """The share of hits; resampling pictures that are right or wrong is drawing from a binomial distribution."""
    draws = np.random.default_rng(seed).binomial(len(hits), hits.mean(), RESAMPLES) / len(hits)
    return _estimate(float(hits.mean()), draws)


def mean_share(hits: Indices, of: Indices) -> Estimate:
    """The mean over classes of `hits` among `of` pictures, resampled within each class; empty classes don't count."""
    hits, of = hits[of > 0], of[of > 0]
    draws = np.random.default_rng(0).binomial(of, hits / of, (RESAMPLES, len(of))) / of
    return _estimate(float((hits / of).mean()), draws.mean(axis=1))


def gap(a: Flags, b: Flags) -> Estimate:
    """The share of hits in `b` less that in `a`, on different pictures."""
    random = np.random.default_rng(0)
    draws = [random.binomial(len(hits), hits.mean(), RESAMPLES) / len(hits) for hits in (a, b)]
    return _estimate(float(b.mean() - a.mean()), draws[1] - draws[0])


def paired_gap(a: Flags, b: Flags, seed: int = 0) -> Estimate:
    """The share of hits in `b` less that in `a`, on the same pictures."""
    shares = np.array([(b & ~a).mean(), (a & ~b).mean(), (a == b).mean()])
    draws = np.random.default_rng(seed).multinomial(len(a), shares, RESAMPLES) / len(a)
    return _estimate(float(shares[0] - shares[1]), draws[:, 0] - draws[:, 1])


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value (McNemar 1947) for pictures that one of two classifiers alone answers right."""
    total = only_a + only_b
    if not total:
        return 1.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])  # of factorials
    k = np.arange(min(only_a, only_b) + 1)
    tail = np.exp(logs[total] - logs[k] - logs[total - k] - total * math.log(2)).sum()
    return min(1.0, 2 * float(tail))


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = np.percentile(draws, _LEVEL)
    return Estimate(value, float(low), float(high))


# What a score is worth


def softmax(logits: Floats) -> Floats:
    """Scores [..., labels]."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return scores


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of the scores, [n, labels]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def fit_temperature(logits: Floats, truth: Indices) -> float:
    """The temperature that gives the true labels the least cross-entropy (Guo et al. 2017, section 4.2).

    The loss is convex in the inverse temperature; its derivative's zero is found by Newton's method, bracketed. Where
    there is none (every answer right, say), one of the bounds 1 / MOST_TEMPERATURE and MOST_TEMPERATURE.
    """
    low, high = 1 / MOST_TEMPERATURE, MOST_TEMPERATURE
    beta = 1.0
    own = np.take_along_axis(logits, truth[:, None], axis=1).mean(dtype=np.float64)
    for _ in range(50):
        p = np.exp(log_softmax(beta * logits))
        means = (p * logits).sum(axis=1)
        slope = means.mean(dtype=np.float64) - own
        low, high = (low, beta) if slope > 0 else (beta, high)
        curve = ((p * np.square(logits)).sum(axis=1) - np.square(means)).mean(dtype=np.float64)
        following = beta - slope / curve if curve > 0 else math.nan
        following = following if low < following < high else math.sqrt(low * high)
        if abs(following - beta) < 1e-6 * beta:
            break
        beta = following
    return float(1 / beta)


class Bin(NamedTuple):
    """The pictures whose scores lie in one step."""

    pictures: int
    score: float  # mean
    accuracy: float


def reliability(score: Floats, hit: Flags, bins: int = BINS) -> list[Bin]:
    """Scores against accuracy in equal steps of the score; steps without pictures are left out."""
    step = np.clip(np.ceil(score * bins) - 1, 0, bins - 1).astype(np.intp)  # each holds its upper end
    return [
        Bin(int(own.sum()), float(score[own].mean()), float(hit[own].mean()))
        for own in (step == index for index in np.unique(step))
    ]


def calibration_error(score: Floats, hit: Flags, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, section 2): the mean distance of score and accuracy, by pictures."""
    found = reliability(score, hit, bins)
    return sum(one.pictures * abs(one.score - one.accuracy) for one in found) / len(score)


# When to answer


@dataclass(frozen=True)
class Threshold:
    """A least value for an answer to count, and what comes of it."""

    value: float
    precision: float  # of the answers that count, how many are right; nan where none does
    coverage: float  # of all pictures, how many get an answer


def at_threshold(value: float, score: Floats, right: Flags) -> Threshold:
    """What comes of answering from `value` on."""
    kept = score >= value
    return Threshold(value, float(right[kept].mean()) if kept.any() else math.nan, float(kept.mean()))


def threshold_for(precision: float, score: Floats, right: Flags) -> Threshold | None:
    """The least threshold at which so many of the answers are right; None where there is none.

    It lies halfway to the next lower score, or where there is none a hair below.
    """
    hits, kept, values = falling(score, right)
    reached = np.flatnonzero(hits >= precision * kept)
    if not len(reached):
        return None
    last = int(reached[-1])
    following = float(values[last + 1]) if last + 1 < len(values) else float(values[last]) - 2 * HAIR
    return at_threshold((float(values[last]) + following) / 2, score, right)


def falling(score: Floats, truth: Flags) -> tuple[Indices, Indices, Floats]:
    """For each distinct score, falling: the true pictures from it on, all pictures from it on, and the score itself."""
    order = np.argsort(-score, kind="stable")
    values = score[order]
    last = np.flatnonzero(np.append(values[:-1] > values[1:], True))
    return np.cumsum(truth[order], dtype=np.intp)[last], last + 1, values[last]


# What belongs to no label


def auroc(known: Floats, unknown: Floats) -> float:
    """How often a known picture's value lies above an unknown one's; equal values count half."""
    ordered = np.sort(unknown)
    below, up_to = np.searchsorted(ordered, known, "left"), np.searchsorted(ordered, known, "right")
    return float((below + up_to).mean() / 2 / len(unknown))


def fpr_at_tpr(known: Floats, unknown: Floats) -> float:
    """The share of unknown pictures that pass where at least 95 % of the known ones do."""
    least = np.sort(known)[::-1][math.ceil(0.95 * len(known)) - 1]
    return float((unknown >= least).mean())
