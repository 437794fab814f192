"""`clipcli eval --multi-label`: what scores of labels that don't compete are worth, and the thresholds for them.

In: sets and models as `eval` has them. Out: figures on stdout, and perhaps the labels with fitted thresholds as a table
that -l reads. What is measured, and how, is `tasks.multilabel`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcli.cli.evaluation import percent, plain, table
from clipcli.cli.labelled import Reader, write_table
from clipcli.cli.labels import put
from clipcli.errors import ExitCode, UsageError
from clipcli.output.text import counted, printable
from clipcli.records import Label

if TYPE_CHECKING:
    from clipcli.tasks.multilabel import MultiLabelEvaluation
    from clipcli.zeroshot.classifier import Classifier

_HEADER = ["label", "pictures", "AP", "F1", "fitted F1", "threshold"]


def measure(
    readers: Iterable[tuple[Reader, Classifier]],
    data: Mapping[str, str],
    ignore_missing: bool,
    top: int,
    as_json: bool,
    written: Path | None,
) -> ExitCode:
    """Write the figures of all sets and models to stdout. Raises UsageError, ClassifierError."""
    from clipcli.tasks.classify import ClassifyOptions
    from clipcli.tasks.multilabel import Presence, evaluate_multi_label, truth_of

    found: list[tuple[str, str, MultiLabelEvaluation]] = []
    failed = 0
    for reader, classifier in readers:
        labels = classifier.labels
        presence = Presence(classifier, reader.model, ClassifyOptions(multi_label=True))
        for name, pictures in reader.sets(data):
            truth = truth_of(pictures.classes, labels, ignore_missing=ignore_missing)[pictures.truth]
            one = evaluate_multi_label(presence.scores(pictures.vectors)[0], truth, labels)
            found.append((name, reader.model.name, one))
        failed += reader.failed
    if written is not None:  # there is one set and one model
        _write(written, labels, found[0][2].fitted.tolist())
        reader.talk.notice(f"written to {written}, for classify -l with --multi-label")
    if as_json:
        put([json.dumps(plain([_as_object(*one) for one in found]), indent=2)])
    else:
        put(line for one in found for line in _lines(*one, top))
    return ExitCode.SOME_PICTURES_FAILED if failed else ExitCode.OK


def _lines(name: str, model: str, found: MultiLabelEvaluation, top: int) -> Iterator[str]:
    """The figures of the whole, then of the labels, the least precise first."""
    yield f"{printable(name)}, {printable(model)}: {counted(found.pictures, 'picture')}, in percent"
    mean, micro, fitted = map(percent, (found.mean_average_precision, found.micro_f1, found.fitted_micro_f1))
    yield f"mAP {mean}, micro F1 {micro}, at thresholds fitted on other pictures {fitted}"
    columns = (found.positives, found.precision, found.f1, found.fitted_f1, found.fitted)
    order = sorted(zip(found.labels, *columns, strict=True), key=lambda row: (math.isnan(row[2]), row[2]))
    rows = [  # labels without pictures come last
        [label, f"{count:,}", *map(percent, shares), "-" if math.isnan(least) else f"{least:.4f}"]
        for label, count, *shares, least in order
    ]
    yield from table([_HEADER, *rows], frozenset(range(1, len(_HEADER))), top)


def _as_object(name: str, model: str, found: MultiLabelEvaluation) -> dict[str, Any]:
    columns = (found.positives, found.precision, found.f1, found.fitted_f1, found.fitted)
    rows = zip(found.labels, *(column.tolist() for column in columns), strict=True)
    keys = ("label", "pictures", "average_precision", "f1", "fitted_f1", "fitted_threshold")
    return {
        "set": name,
        "model": model,
        "pictures": found.pictures,
        "mean_average_precision": found.mean_average_precision,
        "micro_f1": found.micro_f1,
        "fitted_micro_f1": found.fitted_micro_f1,
        "labels": [dict(zip(keys, row, strict=True)) for row in rows],
    }


def _write(path: Path, labels: Sequence[Label], fitted: Sequence[float]) -> None:
    """The labels as a CSV that `-l` reads, with their thresholds; a label that no picture has keeps its own."""
    if any(not label.aliases for label in labels):
        raise UsageError("labels made of whole prompts alone fit no table", hint="give them with --labels")
    rows: list[list[object]] = [["label", "aliases", "descriptions", "group", "threshold"]]
    for label, value in zip(labels, fitted, strict=True):
        threshold = label.threshold if math.isnan(value) else round(value, 6)
        rows.append([label.name, _listed(label.aliases), _listed(label.descriptions), label.group, threshold])
    write_table(path, rows)


def _listed(texts: Sequence[str]) -> str:
    return "|".join(text.replace("\\", r"\\").replace("|", r"\|") for text in texts)
