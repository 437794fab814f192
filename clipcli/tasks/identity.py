"""What decides the rows of a run, besides its inputs: values that can be kept, compared, and shown to a person.

In: what `classify` works with. Out: settings by name. Two runs with the same settings write the same row for the same
picture; batch size, workers and what the store holds are not among them.
"""

from __future__ import annotations

from hashlib import blake2b

from clipcli.store import keys
from clipcli.tasks.classify import ClassifyOptions
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier


def row_settings(
    model: Model,
    classifier: Classifier,
    background: Classifier | None,
    options: ClassifyOptions,
    *,
    truncate: bool = False,
    is_file: bool = False,
) -> dict[str, object]:
    """Settings under the names of their options where they have one. `is_file`: the classifier came as a file.

    Of a classifier made here, the words count and not its numbers, whose last bits depend on what was kept of them.
    """
    bias = b"" if classifier.bias is None else classifier.bias.tobytes()
    made_of = blake2b(classifier.weight.tobytes() + bias).hexdigest() if is_file else model.vocabulary_digest
    return {
        "model": model.image_fingerprint[:12],
        "precision": model.arithmetic,
        "labels": _identity(classifier, model, made_of, truncate),
        "--background": background and _identity(background, model, model.vocabulary_digest, truncate),
        "logit scale": classifier.logit_scale,
        "--temperature": options.temperature,
        "--min-score": options.min_score,
        "--min-cosine": options.min_cosine,
        "--min-margin": options.min_margin,
        "--unknown-label": options.unknown_label,
        "--calibrated": _digest([classifier.temperature, *(x.threshold for x in classifier.labels)])
        if options.calibrated
        else None,
        "--by-group": _digest([x.group for x in classifier.labels]) if options.by_group else None,
        "--multi-label": _digest([x.threshold for x in classifier.labels]) if options.multi_label else None,
        "--pixels": options.pixels,
        "--crop": options.crop,
        "--decode": "exact" if options.pixels == "reference" else options.decode,
    }


def _digest(values: list[str | None] | list[float | None]) -> str:
    return blake2b(repr(values).encode(), digest_size=4).hexdigest()


def _identity(classifier: Classifier, model: Model, made_of: str, truncate: bool) -> str:
    """How many labels, and a digest of everything that their vectors depend on."""
    key = keys.classifier_key(
        classifier.labels, classifier.templates, classifier.text_fingerprint, made_of, model.arithmetic, truncate
    )
    templates = f" × {len(classifier.templates)} templates" if classifier.templates else ""
    return f"{len(classifier.labels)} labels{templates} ({key.hex()[:8]})"
