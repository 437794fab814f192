"""Pictures meet words: the file to read first.

    inputs --find.walk--> sources --stream.batches--> pixels --encode_image--> embeddings --_decide--> rows

`classify` yields one row for every input, in order: a `Prediction` or a `Failure`. It neither prints nor exits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import LabelError, UsageError
from clipcli.images.find import Walk
from clipcli.images.stream import Batch, batches, default_workers, make_prepare
from clipcli.images.transform import Crop, Pixels
from clipcli.records import Candidate, Failure, FailureKind, Prediction, Row, Source
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier


@dataclass(frozen=True)
class ClassifyOptions:
    """How pictures are prepared and when an answer counts."""

    top_k: int = 5
    temperature: float = 1.0  # divides the logits
    min_score: float | None = None  # below any minimum the row abstains
    min_cosine: float | None = None
    min_margin: float | None = None
    unknown_label: str = "unknown"  # the label of a row that abstains
    pixels: Pixels = "auto"
    crop: Crop = "model"
    batch_size: int | None = None  # None: chosen by device
    workers: int | None = None  # decoding threads; None: one a CPU
    flush_after: float | None = None  # seconds of silent input after which a partial batch goes through

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the temperature is {self.temperature}", hint="it is a finite number above 0")
        if not self.unknown_label.strip():
            raise UsageError("the label of rows that abstain is empty", hint="give a name: --unknown-label NAME")


Input = str | os.PathLike[str] | Source | Failure


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
    return _rows(inputs, ranking, model, options)


def speed(options: ClassifyOptions, model: Model) -> tuple[int, int]:
    """Batch size and decoding threads of a run: what was asked for, else what suits the device."""
    size = 128 if model.placement.device.type == "cuda" else 16
    return options.batch_size or size, options.workers or default_workers()


def _rows(inputs: Input | Iterable[Input], ranking: Ranking, model: Model, options: ClassifyOptions) -> Iterator[Row]:
    model.read_image_tower()  # while a list that is still growing has not named its first picture
    size = model.config.vision.image_size
    batch_size, workers = speed(options, model)
    stream = batches(
        _sources(inputs),
        make_prepare(model.config.preprocess, size, pixels=options.pixels, crop=options.crop),
        batch_size=batch_size,
        workers=workers,
        flush_after=options.flush_after,
    )
    for batch in stream:
        yield from _classify_batch(batch, ranking, model)


def _sources(inputs: Input | Iterable[Input]) -> Iterator[Source | Failure]:
    for item in [inputs] if isinstance(inputs, str | os.PathLike | Source | Failure) else inputs:
        yield from [item] if isinstance(item, Source | Failure) else Walk([os.fspath(item)])


def _classify_batch(batch: Batch, ranking: Ranking, model: Model) -> Iterator[Row]:
    embeddings = iter(model.encode_image(batch.pixels)) if len(batch.pixels) else iter(())
    for item in batch.items:
        yield item if isinstance(item, Failure) else ranking.decide(item.path, next(embeddings))


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

    def decide(self, path: str, embedding: NDArray[np.float32]) -> Row:
        """The row of one picture, from its unit embedding [dim]."""
        if not np.isfinite(embedding).all():
            return Failure(path, FailureKind.MODEL, "the image tower gave numbers that are not finite")
        cosines = self.weight @ embedding
        logits = self.scale * cosines.astype(np.float64)
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = _top(scores, max(self.options.top_k, 2))
        top = tuple(Candidate(self.names[i], float(scores[i]), float(cosines[i])) for i in best)
        margin = top[0].score - top[1].score
        abstained = int(best[0]) >= self.foreground or self._too_weak(top[0], margin)
        return Prediction(
            path=path,
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
