"""Pictures meet words: the file to read first.

    inputs --tasks.embed--> embeddings --Ranking.decide--> rows

`classify` yields one row for every input, in order: a `Prediction` or a `Failure`. It neither prints nor exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import LabelError, UsageError
from clipcli.records import Candidate, Embedded, Failure, Prediction, Row
from clipcli.tasks.embed import EmbedOptions, Input, embed
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier


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
    options = options or ClassifyOptions()
    ranking = Ranking(classifier, background, options)
    for part in filter(None, (classifier, background)):
        part.check_model(model)
    return (row if isinstance(row, Failure) else ranking.decide(row) for row in embed(inputs, model, options))


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

    def decide(self, picture: Embedded) -> Prediction:
        """The row of one picture."""
        cosines = self.weight @ picture.vector
        logits = self.scale * cosines.astype(np.float64)
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = _top(scores, max(self.options.top_k, 2))
        top = tuple(Candidate(self.names[i], float(scores[i]), float(cosines[i])) for i in best)
        margin = top[0].score - top[1].score
        abstained = int(best[0]) >= self.foreground or self._too_weak(top[0], margin)
        return Prediction(
            path=picture.path,
            label=self.options.unknown_label if abstained else top[0].label,
            score=top[0].score,
            cosine=top[0].cosine,
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


def _top(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Indices of the `k` largest, best first; of equals the earlier label first."""
    few = k < len(scores)
    candidates = np.sort(np.argpartition(-scores, k - 1)[:k]) if few else np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")]
