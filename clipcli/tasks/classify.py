"""Pictures meet words: the file to read first.

    inputs --tasks.embed--> embeddings --Ranking.decide--> rows

`classify` yields one row for every input, in order: a `Prediction` or a `Failure`. It neither prints nor exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import LabelError, UsageError
from clipcli.records import Candidate, Embedded, Failure, Prediction, Row
from clipcli.tasks.embed import EmbedOptions, Input, embed_in_bursts
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier

_FEW = 16  # labels a row up to which the best are looked for one by one
_SHARPEST = 1e30  # scale beyond which the softmax can't change, but float32 could overflow


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(EmbedOptions):
    """How pictures are prepared, and when an answer counts."""

    top_k: int = 5
    temperature: float = 1.0  # divides the logits
    min_score: float | None = None  # below any minimum the row abstains
    min_cosine: float | None = None
    min_margin: float | None = None
    unknown_label: str = "unknown"  # the label of a row that abstains

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the temperature is {self.temperature}", hint="it is a finite number above 0")
        if not self.unknown_label.strip():
            raise UsageError("the label of rows that abstain is empty", hint="give a name: --unknown-label NAME")


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
) -> Iterator[Iterator[Row]]:
    """The same, those rows together that are ready together."""
    options = options or ClassifyOptions()
    ranking = Ranking(classifier, background, options)
    for part in filter(None, (classifier, background)):
        part.check_model(model)
    return map(ranking.rows, embed_in_bursts(inputs, model, options))


def check_names(names: tuple[str, ...], background: tuple[str, ...], unknown_label: str) -> None:
    """Raise UsageError or LabelError for names among which no picture can be classified.

    That is one alone, one that stands on both sides, or the name of rows that abstain.
    """
    if len(names) + len(background) < 2:
        raise UsageError(
            f'one label alone ("{"".join(names)}"): a softmax over one label says nothing',
            hint="add labels, or give what else may be seen as --background FILE",
        )
    for name in background:
        if name in names:
            raise LabelError(f'label "{name}" stands among the labels and in the background', hint="take one out")
    if unknown_label in names + background:
        raise LabelError(
            f'the label "{unknown_label}" is also that of rows that abstain',
            hint="choose another with --unknown-label NAME",
        )


class Ranking:
    """The labels that compete for a picture, and the rules by which one wins."""

    def __init__(self, classifier: Classifier, background: Classifier | None, options: ClassifyOptions) -> None:
        others = background.names if background else ()
        check_names(classifier.names, others, options.unknown_label)
        self.options = options
        self.names = classifier.names + others
        self.foreground = len(classifier.names)
        self.weight = (
            classifier.weight if background is None else np.concatenate([classifier.weight, background.weight])
        )
        self.scale = classifier.logit_scale / options.temperature
        if not math.isfinite(self.scale):
            raise UsageError(f"the temperature {options.temperature} is too small", hint="take one near 1")

    def rows(self, burst: Sequence[Embedded | Failure]) -> Iterator[Row]:
        """The rows of some pictures, in their order."""
        decided = iter(self.decide([item for item in burst if isinstance(item, Embedded)]))
        return (item if isinstance(item, Failure) else next(decided) for item in burst)

    def decide(self, pictures: Sequence[Embedded]) -> list[Prediction]:
        """The answers for some pictures: one matrix product for all of them."""
        if not pictures:
            return []
        cosines = np.stack([picture.vector for picture in pictures]) @ self.weight.T  # [pictures, labels]
        best = _top(cosines, max(self.options.top_k, 2))  # [pictures, k]
        highest = np.take_along_axis(cosines, best, 1)
        scale = min(self.scale, _SHARPEST)
        cosines -= highest[:, :1]
        cosines *= scale
        total = np.exp(cosines, out=cosines).sum(axis=1, keepdims=True)
        scores = np.exp((highest - highest[:, :1]) * scale) / total
        answers = zip(pictures, best.tolist(), scores.tolist(), highest.tolist(), strict=True)
        return [self._answer(*answer) for answer in answers]

    def _answer(self, picture: Embedded, best: list[int], scores: list[float], cosines: list[float]) -> Prediction:
        top = tuple(map(Candidate, map(self.names.__getitem__, best), scores, cosines))
        margin = scores[0] - scores[1]
        abstained = best[0] >= self.foreground or self._too_weak(top[0], margin)
        return Prediction(
            path=picture.path,
            label=self.options.unknown_label if abstained else top[0].label,
            score=scores[0],
            cosine=cosines[0],
            margin=margin,
            abstained=abstained,
            top=top[: self.options.top_k],
        )

    def _too_weak(self, best: Candidate, margin: float) -> bool:
        options = self.options
        return (
            (options.min_score is not None and best.score < options.min_score)
            or (options.min_cosine is not None and best.cosine < options.min_cosine)
            or (options.min_margin is not None and margin < options.min_margin)
        )


def _top(cosines: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """[n, k]: each row's indices of the `k` largest, best first; of equals the earlier label first."""
    k = min(k, cosines.shape[1])
    if k > _FEW:
        return np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    rows, left, best = np.arange(len(cosines)), cosines.copy(), []
    for _ in range(k):  # a few passes are several times faster than a partition
        best.append(left.argmax(axis=1))
        left[rows, best[-1]] = -np.inf
    return np.stack(best, axis=1)
