"""How good a classifier is on labelled pictures, and when it should say "none of these".

    LabelledSet, Classifier --judge--> what is answered, how surely --metrics--> Evaluation

Truth and labels are matched by name (`labelled`), never by place. Pictures that belong to no label may be added: they
have no truth, and the question is whether their answers can be told from the others. `compare_models` sets two
evaluations of the same pictures side by side. Nothing is printed, embedded or written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.output.text import counted
from clipcli.records import Label
from clipcli.tasks import metrics
from clipcli.tasks.classify import group_of
from clipcli.tasks.labelled import LabelledSet
from clipcli.tasks.metrics import Bin, ByClass, Estimate, Flags, Floats, Indices, Threshold
from clipcli.zeroshot.classifier import Classifier
from clipcli.zeroshot.prompts import short

STEPS = (*(step / 10 for step in range(10)), 0.95, 0.99)  # scores at which coverage and accuracy are reported
OPTIONS = ("score", "cosine", "margin")  # what `classify` has a minimum for
LISTED = 10  # names in a message

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What a classifier says of n pictures: an array [n] each."""

    label: Indices  # the best one's index
    score: Floats  # its softmax
    cosine: Floats
    margin: Floats  # its score less the next one's
    entropy: Floats  # of all scores, in nats
    mcm: Floats  # maximum concept matching: the largest softmax of the bare cosines (arXiv 2211.13445)

    def surest_first(self) -> dict[str, Floats]:
        """Five values, each large where the picture is likely to belong to a label."""
        return {
            "score": self.score,
            "cosine": self.cosine,
            "margin": self.margin,
            "entropy": -self.entropy,
            "mcm": self.mcm,
        }


class Calibration(NamedTuple):
    """What a score is worth, as it is and at the temperature that suits these pictures best."""

    temperature: float
    error: float  # expected calibration error of the scores as they are
    fitted_error: float  # at the temperature fitted on the other half of the pictures
    steps: list[Bin]
    fitted_steps: list[Bin]


class Telling(NamedTuple):
    """How well one value tells pictures of the labels from pictures of none."""

    auroc: float
    fpr95: float  # the share of unknown pictures that pass where 95 % of the known ones do


@dataclass(frozen=True, eq=False)
class Unknown:
    """Pictures that belong to no label."""

    paths: tuple[str, ...]
    verdicts: Verdicts
    telling: dict[str, Telling]  # by the names of `Verdicts.surest_first`


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One classifier on one set. `truth` and the answers are indices into `labels`."""

    name: str
    model: str
    labels: tuple[str, ...]
    paths: tuple[str, ...]
    vectors: Vectors
    truth: Indices
    ranks: Indices  # labels before the true one, [n]
    verdicts: Verdicts
    failed: int  # pictures without an embedding
    left_out: int  # pictures of classes that are no label
    top1: Estimate
    top5: Estimate | None  # None where there are no more than five labels
    mean_per_class: Estimate  # of the classes' recall
    by_group: Estimate | None  # top-1 of groups, whose scores are their labels' sums; None where no label has one
    classes: ByClass
    confusions: list[tuple[int, int, int]]
    calibration: Calibration
    coverage: tuple[Threshold, ...]
    unknown: Unknown | None
    wanted_precision: float
    proposals: dict[str, Threshold | None]  # least values that give it, by the names of OPTIONS

    @property
    def hits(self) -> Flags:
        """Which answers are right."""
        hits: Flags = self.ranks == 0
        return hits


class Paired(NamedTuple):
    """Two classifiers on the same pictures."""

    name: str  # of the set
    a: str
    b: str
    pictures: int
    gap: Estimate  # top-1 of b less that of a
    only_a: int  # pictures that a alone answers right
    only_b: int
    p: float  # McNemar's exact test


def check_labels(labels: Sequence[Label]) -> None:
    """Raise UsageError for one label alone: whatever the pictures show, its score is 1."""
    if len(labels) < 2:
        raise UsageError(f'one label alone ("{labels[0].name}"): every answer would be right', hint="add labels")


def check_finite(vectors: Vectors) -> None:
    """Raise UsageError unless all numbers are finite."""
    if broken := len(vectors) - int(np.isfinite(vectors).all(axis=1).sum()):
        what = f"{counted(broken, 'embedding')} of {len(vectors):,} not finite"
        raise UsageError(what, hint="embed the pictures again")


def judge(vectors: Vectors, classifier: Classifier) -> tuple[Floats, Verdicts]:
    """The logits [n, labels], and what follows from them. Raises UsageError for vectors that aren't finite."""
    check_finite(vectors)
    lengths = np.linalg.norm(classifier.weight, axis=1)  # 1, but for classifiers made of pictures
    values, cosines = classifier.logits(vectors), vectors @ classifier.weight.T / lengths
    rows, best = np.arange(len(values)), values.argmax(axis=1)
    logs = metrics.log_softmax(values)
    scores = np.exp(logs)
    score = scores[rows, best]
    entropy = -(scores * logs).sum(axis=1)
    scores[rows, best] = -1
    mcm = np.exp(metrics.log_softmax(cosines).max(axis=1))
    return values, Verdicts(best, score, cosines[rows, best], score - scores.max(axis=1), entropy, mcm)


def evaluate(
    pictures: LabelledSet,
    classifier: Classifier,
    *,
    name: str = "",
    unknown: tuple[Sequence[str], Vectors] | None = None,
    ignore_missing: bool = False,
    want_precision: float = 0.95,
) -> Evaluation:
    """Measure a classifier of two labels or more.

    `unknown` are paths and embeddings of pictures that belong to no label. Raises UsageError where classes of the set
    are no labels, unless their pictures are to be left out, for embeddings that aren't finite, and for a
    `want_precision` that no share can be.
    """
    check_labels(classifier.labels)
    if not 0 <= want_precision <= 1:
        raise UsageError(f"the wanted precision is {want_precision}", hint="it is a number from 0 to 1")
    vectors, truth, paths = matched(pictures, classifier.names, name, ignore_missing)
    values, verdicts = judge(vectors, classifier)
    ranks = metrics.ranks(values, truth)
    hits, size = ranks == 0, len(classifier.names)
    classes = metrics.by_class(truth, verdicts.label, size)
    others = None
    if unknown is not None:
        found = judge(unknown[1], classifier)[1]
        both = zip(verdicts.surest_first().items(), found.surest_first().values(), strict=True)
        telling = {key: Telling(metrics.auroc(a, b), metrics.fpr_at_tpr(a, b)) for (key, a), b in both}
        others = Unknown(tuple(unknown[0]), found, telling)
    return Evaluation(
        name=name,
        model=classifier.model,
        labels=classifier.names,
        paths=paths,
        vectors=vectors,
        truth=truth,
        ranks=ranks,
        verdicts=verdicts,
        failed=len(pictures.failures),
        left_out=len(pictures.paths) - len(paths),
        top1=metrics.share(hits),
        top5=metrics.share(ranks < 5) if size > 5 else None,
        mean_per_class=metrics.mean_share(np.bincount(truth[hits], minlength=size), classes.pictures),
        by_group=_by_group(values, truth, classifier),
        classes=classes,
        confusions=metrics.confusions(truth, verdicts.label, size),
        calibration=_calibration(values, truth, verdicts.score, hits),
        coverage=tuple(metrics.at_threshold(step, verdicts.score, hits) for step in STEPS),
        unknown=others,
        wanted_precision=want_precision,
        proposals={key: _proposal(key, verdicts, hits, others, want_precision) for key in OPTIONS},
    )


def compare_models(a: Evaluation, b: Evaluation) -> Paired:
    """Whether `b` is better than `a` on the pictures that both have answered, matched by path."""
    place = {path: row for row, path in enumerate(a.paths)}
    rows = [(place[path], row) for row, path in enumerate(b.paths) if path in place]
    if not rows:
        raise UsageError(f"{a.name}: {a.model} and {b.model} have answered no picture in common")
    in_a, in_b = (evaluation.hits[list(own)] for evaluation, own in zip((a, b), zip(*rows, strict=True), strict=True))
    only_a, only_b = int((in_a & ~in_b).sum()), int((in_b & ~in_a).sum())
    gap = metrics.paired_gap(in_a, in_b)
    return Paired(a.name, a.model, b.model, len(rows), gap, only_a, only_b, metrics.mcnemar(only_a, only_b))


def matched(
    pictures: LabelledSet, labels: tuple[str, ...], name: str, ignore_missing: bool
) -> tuple[Vectors, Indices, tuple[str, ...]]:
    """Vectors, truth as indices into `labels`, and paths, of the pictures whose class is a label.

    Raises UsageError where classes of the set are no labels, unless they are to be ignored and some class is one.
    """
    place = {label: index for index, label in enumerate(labels)}
    foreign = [one for one in pictures.classes if one not in place]
    if len(foreign) == len(pictures.classes) or (foreign and not ignore_missing):
        idle = [label for label in labels if label not in pictures.classes]
        said = f"; labels without pictures: {listed(idle)}" if idle else ""
        hint = "make them aliases of labels, or --ignore-missing leaves their pictures out"
        if len(foreign) == len(pictures.classes):
            hint = "not one of them is: are these the labels of this set?"
        raise UsageError(f"{name or 'the set'}: classes that are no labels: {listed(foreign)}{said}", hint=hint)
    truth = np.array([place.get(one, -1) for one in pictures.classes])[pictures.truth]
    rows = np.flatnonzero(truth >= 0)
    return pictures.vectors[rows], truth[rows], tuple(pictures.paths[row] for row in rows)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(map(short, names[:LISTED])) + more


def _by_group(values: Floats, truth: Indices, classifier: Classifier) -> Estimate | None:
    if not any(label.group for label in classifier.labels):
        return None
    names = np.array([group_of(label) for label in classifier.labels], dtype=object)
    groups, group = np.unique(names, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(groups)))
    scores = np.add.reduceat(np.exp(metrics.log_softmax(values))[:, order], starts, axis=1)  # [n, groups]
    return metrics.share(scores.argmax(axis=1) == group[truth])


def _calibration(values: Floats, truth: Indices, score: Floats, hits: Flags) -> Calibration:
    fitted = score.copy()
    halves = np.array_split(np.random.default_rng(0).permutation(len(truth)), 2)
    if len(truth) > 1:
        for own, other in (halves, halves[::-1]):
            temperature = metrics.fit_temperature(values[other], truth[other])
            fitted[own] = np.exp(metrics.log_softmax(values[own] / temperature).max(axis=1))
    return Calibration(
        metrics.fit_temperature(values, truth),
        metrics.calibration_error(score, hits),
        metrics.calibration_error(fitted, hits),
        metrics.reliability(score, hits),
        metrics.reliability(fitted, hits),
    )


def _proposal(key: str, verdicts: Verdicts, hits: Flags, unknown: Unknown | None, precision: float) -> Threshold | None:
    values = verdicts.surest_first()[key]
    if unknown is not None:  # no answer is right for these
        values = np.concatenate([values, unknown.verdicts.surest_first()[key]])
        hits = np.concatenate([hits, np.zeros(len(unknown.paths), bool)])
    return metrics.threshold_for(precision, values, hits)
