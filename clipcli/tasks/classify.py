"""Pictures meet words: the file to read first.

    inputs --tasks.embed--> embeddings --Ranking.decide--> rows

`classify` yields one row for every input, in order: a `Prediction` or a `Failure`. It neither prints nor exits. Labels
that are scored each by itself are `multilabel`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import ClassifierError, LabelError, UsageError
from clipcli.records import Candidate, Embedded, Failure, Label, Prediction, Predictions, Row
from clipcli.tasks.embed import EmbedOptions, Input, embed_in_bursts
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier

_FEW = 16  # labels a row up to which the best are looked for one by one
_SHARPEST = 1e30  # scale beyond which no score can change, but float32 could overflow

Burst = Sequence[Embedded | Failure]
Floats = NDArray[np.floating[Any]]
Decide = Callable[[Sequence[Embedded]], Iterable[Prediction]]


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(EmbedOptions):
    """How pictures are prepared, and when an answer counts."""

    top_k: int | None = None  # candidates a row at most; None: five, or all that hold of a multi-label row
    temperature: float = 1.0  # divides the logits
    min_score: float | None = None  # below any minimum the row abstains
    min_cosine: float | None = None
    min_margin: float | None = None
    unknown_label: str = "unknown"  # the label of a row that abstains
    calibrated: bool = False  # the classifier's temperature counts, and its labels' least scores
    by_group: bool = False  # groups compete in place of labels: a group's score is the sum of its labels'
    multi_label: bool = False  # each label by itself; `min_score`, or 0.5, is for labels without a threshold

    def __post_init__(self) -> None:
        for name in ("min_score", "min_cosine", "min_margin"):
            if getattr(self, name) is not None and math.isnan(getattr(self, name)):
                raise UsageError(f"--{name.replace('_', '-')} is not a number", hint="it is one, or left out")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the temperature is {self.temperature}", hint="it is a finite number above 0")
        if not self.unknown_label.strip():
            raise UsageError("the label of rows that abstain is empty", hint="give a name: --unknown-label NAME")
        if self.calibrated and (self.by_group or self.multi_label):
            other = "--by-group" if self.by_group else "--multi-label"
            raise UsageError(f"--calibrated and {other} exclude each other", hint="leave one out")
        if self.multi_label and (self.by_group or self.min_margin is not None):
            other = "--by-group" if self.by_group else "--min-margin"
            raise UsageError(
                f"{other} is about labels that compete, with --multi-label none does", hint="leave one out"
            )


def classify(
    inputs: Input | Iterable[Input],
    classifier: Classifier,
    model: Model,
    options: ClassifyOptions | None = None,
    *,
    background: Classifier | None = None,
) -> Iterator[Row]:
    """Classify pictures: paths of pictures and folders, or `Source`s, or one of these. A row each, in input order.

    `background` holds further labels of the same model for the softmax; where one of them wins, the row abstains.
    Raises ClassifierError (another model's classifier), LabelError, UsageError before the first row.
    """
    return chain.from_iterable(classify_in_bursts(inputs, classifier, model, options, background=background))


def classify_in_bursts(
    inputs: Input | Iterable[Input],
    classifier: Classifier,
    model: Model,
    options: ClassifyOptions | None = None,
    *,
    background: Classifier | None = None,
) -> Iterator[Iterable[Row]]:
    """The same, those rows together that are ready together: `Predictions`, where they can be."""
    options = options or ClassifyOptions()
    model = classifier.suited(model)
    rows = make_rows(classifier, background, model, options)
    return map(rows, embed_in_bursts(inputs, model, options))


def make_rows(
    classifier: Classifier, background: Classifier | None, model: Model, options: ClassifyOptions
) -> Callable[[Burst], Iterable[Row]]:
    """What makes rows of embeddings, in their order. Raises as `classify` does."""
    for part in filter(None, (classifier, background)):
        part.check_model(model)
    if background is not None:
        check_words(classifier, model, "--background")
    check_names(classifier.labels, background.labels if background else (), options)
    if options.calibrated:
        if not classifier.is_calibrated:
            raise ClassifierError("the classifier isn't calibrated", hint="clipcli calibrate makes one that is")
        options = replace(options, temperature=options.temperature * classifier.temperature)
    if options.multi_label:
        from clipcli.tasks.multilabel import Presence

        decide: Decide = Presence(classifier, model, options).decide
    else:
        decide = (GroupRanking if options.by_group else Ranking)(classifier, background, options).decide

    return partial(in_order, decide)


def in_order(decide: Decide, burst: Burst) -> Iterable[Row]:
    """What is decided about pictures, and the failures between them, in their places."""
    if Failure not in set(map(type, burst)):
        return decide(cast("Sequence[Embedded]", burst)) if burst else ()
    pictures = [item for item in burst if isinstance(item, Embedded)]
    answers = iter(decide(pictures) if pictures else ())
    return (item if isinstance(item, Failure) else next(answers) for item in burst)


def stacked(pictures: Sequence[Embedded]) -> NDArray[np.float32]:
    """Their vectors as rows [pictures, dim]: what np.stack does, in a third of its time."""
    return np.concatenate([picture.vector for picture in pictures]).reshape(len(pictures), -1)


def candidates(labels: Sequence[Label], options: ClassifyOptions) -> tuple[str, ...]:
    """What a row's label may be, in order: the labels' names, or by group the groups', each once.

    A label without a group is a group of its own; of `tabby|cat|animal`, the first counts. Raises UsageError where no
    label has one.
    """
    if not options.by_group:
        return tuple(label.name for label in labels)
    if not any(label.group for label in labels):
        raise UsageError("no label has a group", hint="give them one in the column group of a CSV, or leave --by-group")
    return tuple(dict.fromkeys(map(group_of, labels)))


def group_of(label: Label) -> str:
    """The group that a label belongs to: the first it names, else itself alone."""
    return (label.group or "").split("|")[0].strip() or label.name


def check_names(labels: Sequence[Label], background: Sequence[Label], options: ClassifyOptions) -> None:
    """Raise UsageError or LabelError for labels among which no picture can be classified.

    That is one alone (which multi-label allows), one that stands on both sides, or the name of rows that abstain.
    """
    names, others = candidates(labels, options), tuple(label.name for label in background)
    if options.multi_label and others:
        raise UsageError(
            "--background is for labels that compete, with --multi-label none does", hint="leave one of them out"
        )
    if len(names) + len(others) < 2 and not options.multi_label:
        kind, option = ("group", "--by-group") if options.by_group else ("label", "--multi-label")
        hint = "leave --by-group out" if options.by_group else f"add labels, {option}, or --background FILE"
        raise UsageError(f'one {kind} alone ("{"".join(names)}"): a softmax over one {kind} says nothing', hint=hint)
    for name in others:
        if name in names:
            raise LabelError(f'label "{name}" stands among the labels and in the background', hint="take one out")
    if options.unknown_label in names + others:
        raise LabelError(
            f'the label "{options.unknown_label}" is also that of rows that abstain',
            hint="choose another with --unknown-label NAME",
        )


def check_words(classifier: Classifier, model: Model, option: str) -> None:
    """Raise ClassifierError unless the class vectors are those of prompts that `model`'s text tower encodes."""
    if classifier.made_by != "zero-shot":
        what = f"a classifier made by {classifier.made_by} is not made of prompts alone, as {option} needs it"
        raise ClassifierError(what, hint=f"give the labels with --labels, or leave {option} out")
    if classifier.text_fingerprint != model.text_fingerprint:
        what = f'{option} needs the text tower that the classifier was built with, and that of "{model.name}" differs'
        raise ClassifierError(what, hint="build it again with this model")


class Ranking:
    """The labels that compete for a picture, and the rules by which one wins."""

    def __init__(self, classifier: Classifier, background: Classifier | None, options: ClassifyOptions) -> None:
        parts = [part for part in (classifier, background) if part is not None]
        self.options = options
        self.top_k = options.top_k or 5
        self.names = candidates(classifier.labels, options) + (background.names if background else ())
        self.foreground = len(self.names) - (len(background.names) if background else 0)
        self.scale = scale_of(classifier, options)
        weight = np.concatenate([part.weight for part in parts])
        lengths = np.linalg.norm(weight, axis=1, keepdims=True)
        self.is_plain = all(part.made_by == "zero-shot" for part in parts)  # rows of unit length, no bias
        self.weight = weight if self.is_plain else weight / lengths
        self.gain = self.scale * lengths[:, 0]
        bias = [np.zeros(len(part.names), np.float32) if part.bias is None else part.bias for part in parts]
        self.bias = np.concatenate(bias) / np.float32(options.temperature)
        own = [math.nan if label.threshold is None else label.threshold for label in classifier.labels]
        self.own_leasts = np.array([*own, *[math.nan] * (len(self.names) - self.foreground)])  # [labels]

    def decide(self, pictures: Sequence[Embedded]) -> Iterable[Prediction]:
        """The answers for some pictures: one matrix product for all of them."""
        cosines = stacked(pictures) @ self.weight.T  # [pictures, labels]
        return self._rank([picture.path for picture in pictures], cosines)

    def _rank(self, paths: list[str], cosines: Floats) -> Iterable[Prediction]:
        logits, scale = (cosines, self.scale) if self.is_plain else (cosines * self.gain + self.bias, 1.0)
        best, highest = _top(logits, max(self.top_k, 2))  # [pictures, k]
        seen = np.take_along_axis(cosines, best, 1)
        logits -= highest[:, :1]
        logits *= scale
        total = np.exp(logits, out=logits).sum(axis=1, keepdims=True)
        scores = np.exp((highest - highest[:, :1]) * scale) / total
        return self._predictions(paths, best, scores, seen)

    def _predictions(self, paths: list[str], best: NDArray[np.intp], scores: Floats, cosines: Floats) -> Predictions:
        shown, near = (values[:, : self.top_k].astype(np.float64) for values in (scores, cosines))
        margins = scores[:, 0].astype(np.float64) - scores[:, 1]
        options, abstained = self.options, best[:, 0] >= self.foreground
        leasts = (options.min_score, options.min_cosine, options.min_margin)
        for values, least in zip((shown[:, 0], near[:, 0], margins), leasts, strict=True):
            if least is not None:
                abstained |= values < least
        if options.calibrated:
            abstained |= shown[:, 0] < self.own_leasts[best[:, 0]]
        return Predictions(
            paths, self.names, best[:, : self.top_k], shown, near, margins, abstained, options.unknown_label
        )


class GroupRanking(Ranking):
    """Groups that compete: a group's score is the sum of its labels', its cosine the highest of theirs."""

    def __init__(self, classifier: Classifier, background: Classifier | None, options: ClassifyOptions) -> None:
        super().__init__(classifier, background, options)
        self.labels = classifier.names + (background.names if background else ())
        place = {name: index for index, name in enumerate(self.names[: self.foreground])}
        own = [place[group_of(label)] for label in classifier.labels]
        self.group = np.array([*own, *range(self.foreground, len(self.names))], np.intp)  # [labels]
        self.order = np.argsort(self.group, kind="stable")
        self.starts = np.searchsorted(self.group[self.order], np.arange(len(self.names)))

    def _rank(self, paths: list[str], cosines: Floats) -> Iterable[Prediction]:
        logits = cosines * self.gain + self.bias
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        sums = np.add.reduceat(scores[:, self.order], self.starts, axis=1)  # [pictures, groups]
        nearest = np.maximum.reduceat(cosines[:, self.order], self.starts, axis=1)
        best, highest = _top(sums, max(self.top_k, 2))
        of_best = (highest, np.take_along_axis(nearest, best, 1))
        members = np.where(self.group == best[:, :1], scores, -1).argmax(axis=1)
        for place, row in enumerate(self._predictions(paths, best, *of_best)):
            label = members[place]
            member = Candidate(self.labels[label], float(scores[place, label]), float(cosines[place, label]))
            yield replace(row, member=member)


def scale_of(classifier: Classifier, options: ClassifyOptions) -> float:
    """What cosines are multiplied by. Raises UsageError."""
    scale = classifier.logit_scale / options.temperature
    if not math.isfinite(scale):
        raise UsageError(f"the temperature {options.temperature} is too small", hint="take one near 1")
    return min(scale, _SHARPEST)


def _top(values: Floats, k: int) -> tuple[NDArray[np.intp], Floats]:
    """Indices [n, k] of each row's `k` largest, best first, of equals the earlier one; and those values [n, k]."""
    k = min(k, values.shape[1])
    if k > _FEW:
        best = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return best, np.take_along_axis(values, best, 1)
    rows, columns, found = np.arange(len(values)), [], []
    for _ in range(k):  # a few passes are several times faster than a partition
        columns.append(values.argmax(axis=1))
        found.append(values[rows, columns[-1]])
        values[rows, columns[-1]] = -np.inf
    best, highest = np.stack(columns, axis=1), np.stack(found, axis=1)
    np.put_along_axis(values, best, highest, 1)  # as they were
    return best, highest
