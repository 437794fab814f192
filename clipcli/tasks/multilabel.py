"""Labels that don't compete: is each, by itself, in the picture? Scores, the rows they make, and how good they are.

    score = sigmoid(scale · (cosine − neutral)),   neutral = log mean exp(scale · cosines with neutral prompts) / scale

which is the softmax over two: the label, and the mean neutral prompt. Those (prompts/neutral.txt) are sentences that
fit every picture, so that the score says how much better than nothing in particular a label fits. It is a rank with a
fixed middle and no probability: thresholds belong to a label, and are found with pictures whose labels are known
(`fit_thresholds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import LabelError, UsageError
from clipcli.paths import prompt_dirs
from clipcli.records import Candidate, Embedded, Label, Prediction
from clipcli.tasks.classify import ClassifyOptions, check_words, scale_of, stacked
from clipcli.tasks.embed_texts import embed_texts
from clipcli.tasks.evaluate import listed
from clipcli.tasks.metrics import Flags, Floats, falling
from clipcli.tasks.pairs import folded
from clipcli.weights.model import Model, Vectors
from clipcli.zeroshot.classifier import Classifier
from clipcli.zeroshot.files import checked, read_text
from clipcli.zeroshot.templates import NEUTRAL

LEAST = 0.5  # where a label has no threshold: it fits as well as the neutral prompts do

_FOLDS = 5


# Scores and rows


def neutral_prompts() -> list[str]:
    """Sentences that fit every picture: the user's own `neutral.txt` among the template sets, else the shipped one."""
    path = next(path for folder in prompt_dirs() if (path := folder / NEUTRAL).is_file())
    lines = enumerate(read_text(path).split("\n"), 1)
    prompts = [checked(line, "prompt", f"{path}:{n}") for n, line in lines if line.strip() and line.strip()[0] != "#"]
    if not prompts:
        raise LabelError(f"{path}: no prompts in it", hint='write one a line, such as "a photo."')
    return prompts


def presence(cosines: Floats, neutral: Floats, scale: float) -> Floats:
    """Scores [n, labels] of cosines with the labels [n, labels] and with the neutral prompts [n, prompts]."""
    highest = neutral.max(axis=1, keepdims=True)
    level = highest + np.log(np.exp((neutral - highest) * scale).mean(axis=1, keepdims=True)) / scale
    scores: Floats = np.exp(-np.logaddexp(0, (level - cosines) * scale))
    return scores


def thresholds(labels: Sequence[Label], least: float | None = None) -> Floats:
    """The score from which on each label holds: its own, else `least`, else LEAST."""
    default = LEAST if least is None else least
    return np.array([default if label.threshold is None else label.threshold for label in labels])


class Presence:
    """The labels, each by itself."""

    def __init__(self, classifier: Classifier, model: Model, options: ClassifyOptions) -> None:
        check_words(classifier, model, "--multi-label")
        self.neutral = stacked([*embed_texts(neutral_prompts(), model, truncate=True)])  # [prompts, dim]
        self.classifier = classifier
        self.options = options
        self.scale = scale_of(classifier, options)
        labels = classifier.labels
        if classifier.is_calibrated:  # its thresholds are for scores of labels that compete
            labels = tuple(replace(label, threshold=None) for label in labels)
        self.thresholds = thresholds(labels, options.min_score)

    def scores(self, vectors: Vectors) -> tuple[Floats, Floats]:
        """Scores and cosines [n, labels] of unit embeddings [n, dim]."""
        cosines = vectors @ self.classifier.weight.T
        return presence(cosines, vectors @ self.neutral.T, self.scale), cosines

    def decide(self, pictures: Sequence[Embedded]) -> Iterator[Prediction]:
        """A row a picture: every label that holds, the best first, or abstaining the best alone."""
        scores, cosines = self.scores(stacked(pictures))
        holds = scores >= self.thresholds
        if self.options.min_cosine is not None:
            holds &= cosines >= self.options.min_cosine
        order = np.argsort(-scores, axis=1, kind="stable")
        for row, picture in enumerate(pictures):
            best = order[row]
            held = best[holds[row, best]][: self.options.top_k]
            second = float(scores[row, best[1]]) if len(best) > 1 else 0.0
            shown = held if len(held) else best[:1]
            names = map(self.classifier.names.__getitem__, shown)
            top = tuple(map(Candidate, names, scores[row, shown].tolist(), cosines[row, shown].tolist()))
            yield Prediction(
                path=picture.path,
                label=top[0].label if len(held) else self.options.unknown_label,
                score=top[0].score,
                cosine=top[0].cosine,
                margin=float(scores[row, best[0]]) - second,
                abstained=not len(held),
                top=top,
                several=True,
            )


# How good they are


@dataclass(frozen=True, eq=False)
class MultiLabelEvaluation:
    """Labels on pictures of which each has any number of them. Arrays [labels]; nan for a label that no picture has."""

    labels: tuple[str, ...]
    pictures: int
    positives: NDArray[np.intp]  # pictures that have the label
    precision: Floats  # average precision
    f1: Floats  # at the labels' own thresholds, else LEAST
    fitted_f1: Floats  # at thresholds that were fitted on other pictures
    fitted: Floats  # thresholds, fitted on all pictures
    micro_f1: float
    fitted_micro_f1: float

    @property
    def mean_average_precision(self) -> float:
        """Over the labels that a picture has."""
        return float(np.nanmean(self.precision))


def evaluate_multi_label(scores: Floats, truth: Flags, labels: Sequence[Label]) -> MultiLabelEvaluation:
    """What scores [n, labels] are worth where `truth` [n, labels] is known. Raises UsageError where none holds."""
    if not truth.any():
        raise UsageError("no picture has any of the labels", hint="are the names those of the label file?")
    plain, crossed = scores >= thresholds(labels), _crossed(scores, truth)
    return MultiLabelEvaluation(
        labels=tuple(label.name for label in labels),
        pictures=len(scores),
        positives=truth.sum(axis=0),
        precision=average_precision(scores, truth),
        f1=f1(plain, truth),
        fitted_f1=f1(crossed, truth),
        fitted=fit_thresholds(scores, truth),
        micro_f1=float(f1(plain.reshape(-1, 1), truth.reshape(-1, 1))[0]),
        fitted_micro_f1=float(f1(crossed.reshape(-1, 1), truth.reshape(-1, 1))[0]),
    )


def truth_of(names: Sequence[str], labels: Sequence[Label], *, ignore_missing: bool = False) -> Flags:
    """Which labels [n, labels] hold by lists such as `cat|dog`, in which a label goes by its name or an alias.

    Raises LabelError for names that no label has, unless they are ignored.
    """
    known = {folded(alias): place for place, label in enumerate(labels) for alias in label.aliases}
    known |= {folded(label.name): place for place, label in enumerate(labels)}
    exact = {label.name: place for place, label in enumerate(labels)}  # names may differ in case only
    split = [
        [name for part in several.split("|") if (name := part.strip() if part.strip() in exact else folded(part))]
        for several in names
    ]
    known |= exact
    unknown = sorted({name for several in split for name in several if name not in known})
    if unknown and not ignore_missing:
        what = f"pictures have labels that are not among yours: {listed(unknown)}"
        raise LabelError(what, hint="add them, or use --ignore-missing")
    truth = np.zeros((len(names), len(labels)), bool)
    for row, several in enumerate(split):
        truth[row, [known[name] for name in several if name in known]] = True
    return truth


def average_precision(scores: Floats, truth: Flags) -> Floats:
    """The mean precision at each true picture, by falling score, [labels]; equal scores count together."""
    found = np.full(truth.shape[1], np.nan)
    for label in np.flatnonzero(truth.any(axis=0)):
        hits, kept, _ = falling(scores[:, label], truth[:, label])
        found[label] = (np.diff(hits, prepend=0) * hits / kept).sum() / hits[-1]
    return found


def fit_thresholds(scores: Floats, truth: Flags) -> Floats:
    """The threshold [labels] that gives each label its best F1: halfway between two scores, the highest of equals."""
    found = np.full(truth.shape[1], np.nan)
    for label in np.flatnonzero(truth.any(axis=0)):
        hits, kept, values = falling(scores[:, label], truth[:, label])
        best = int(np.argmax(2 * hits / (kept + hits[-1])))
        found[label] = values[best : best + 2].mean(dtype=np.float64)
    return found


def f1(holds: Flags, truth: Flags) -> Floats:
    """The harmonic mean of precision and recall, [labels]; nan for a label that no picture has."""
    hits, total = (holds & truth).sum(axis=0), holds.sum(axis=0) + truth.sum(axis=0)
    return np.where(truth.any(axis=0), 2 * hits / np.maximum(total, 1), np.nan)


def _crossed(scores: Floats, truth: Flags) -> Flags:
    """What holds by thresholds that were fitted on the other pictures, in turns over _FOLDS parts."""
    fold = np.random.default_rng(0).permutation(len(scores)) % _FOLDS
    holds = np.zeros_like(truth)
    for part in np.unique(fold):
        fitted = fit_thresholds(scores[fold != part], truth[fold != part])
        holds[fold == part] = scores[fold == part] >= np.where(np.isnan(fitted), LEAST, fitted)
    return holds
