"""From labelled pictures to a classifier that knows what its scores are worth, and when not to answer.

In: a classifier and a `LabelledSet`, perhaps pictures of no label. Out: the same classifier with a temperature, and for
each label the least score from which its answers are right as often as wanted. `classify` uses both only where it is
asked for (`--calibrated`). Class vectors stay as they are, and so does every answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clipcli.errors import UsageError
from clipcli.output.text import counted
from clipcli.tasks import metrics
from clipcli.tasks.evaluate import Vectors, evaluate, judge
from clipcli.tasks.labelled import LabelledSet
from clipcli.tasks.metrics import Threshold
from clipcli.zeroshot.classifier import Classifier

_log = logging.getLogger("clipcli")

ENOUGH = 20  # answers of one label from which its threshold is its own, not that of all


@dataclass(frozen=True)
class Calibrated:
    """A classifier with temperature and thresholds, and what they do to the pictures they are from."""

    classifier: Classifier
    error: float  # expected calibration error before
    fitted_error: float  # and at a temperature from the other half of the pictures
    outcome: Threshold  # value: the common threshold; precision and coverage with all thresholds in place
    own: int  # labels with a threshold of their own


def calibrate(
    pictures: LabelledSet,
    classifier: Classifier,
    *,
    unknown: tuple[Sequence[str], Vectors] | None = None,
    ignore_missing: bool = False,
    want_precision: float = 0.95,
) -> Calibrated:
    """Fit temperature and thresholds.

    `unknown` pictures count as wrong answers. Raises UsageError where no threshold gives the precision, and as
    `evaluate` does.
    """
    found = evaluate(
        pictures, classifier, unknown=unknown, ignore_missing=ignore_missing, want_precision=want_precision
    )
    temperature = found.calibration.temperature
    if not 1.01 / metrics.MOST_TEMPERATURE < temperature < metrics.MOST_TEMPERATURE / 1.01:
        _log.warning("too few pictures, or all answers right, or none: no temperature but the bound %.4g", temperature)
    vectors = np.concatenate([found.vectors, *([unknown[1]] if unknown else [])])
    right = np.concatenate([found.hits, np.zeros(len(vectors) - len(found.hits), bool)])
    values, verdicts = judge(vectors, classifier)
    score = np.exp(metrics.log_softmax(values / temperature).max(axis=1))
    common = metrics.threshold_for(want_precision, score, right)
    if common is None:
        what = f"no least score gives {want_precision:.0%} right answers on {counted(len(score), 'picture')}"
        raise UsageError(what, hint="lower --want-precision, or look at what is wrong with: clipcli eval")
    thresholds = np.full(len(classifier.labels), common.value)
    answered = [np.flatnonzero(verdicts.label == index) for index in range(len(classifier.labels))]
    own = [index for index, rows in enumerate(answered) if len(rows) >= ENOUGH]
    for index in own:
        least = metrics.threshold_for(want_precision, score[answered[index]], right[answered[index]])
        thresholds[index] = 1.0 if least is None else least.value
    kept = score >= thresholds[verdicts.label]
    labels = zip(classifier.labels, thresholds.tolist(), strict=True)
    return Calibrated(
        replace(
            classifier,
            temperature=temperature,
            labels=tuple(replace(label, threshold=value) for label, value in labels),
            how={**classifier.how, "calibration_pictures": len(score), "calibration_precision": want_precision},
        ),
        found.calibration.error,
        found.calibration.fitted_error,
        Threshold(common.value, float(right[kept].mean()) if kept.any() else math.nan, float(kept.mean())),
        len(own),
    )
