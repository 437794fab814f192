"""Labels and templates in, a classifier out: what `clipcli build-classifier` and `classify -l` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipcli.records import Label, Template
from clipcli.weights.model import Model
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_sets
from clipcli.zeroshot.classifier import Classifier, build

Words = str | Path | Sequence[str | Label]


def build_classifier(
    model: Model,
    labels: Words,
    *,
    templates: str | Sequence[str] = template_sets.DEFAULT,
    truncate: bool = False,
) -> Classifier:
    """Make a zero-shot classifier for `model`.

    `labels`: a label file's path, or a list of names (in the label file's notation) or `Label`s. `templates`: names
    of sets, template files or literals such as "a photo of a <>.". `truncate` cuts prompts that are too long
    instead of raising LabelError.
    """
    specs = [templates] if isinstance(templates, str) else list(templates)
    expanded: list[Template] = template_sets.read(specs)
    return build(model, read_labels(labels), expanded, template_set=" ".join(specs), truncate=truncate).classifier


def read_labels(labels: Words) -> list[Label]:
    """`Label`s from whatever stands for them. Raises LabelError."""
    if isinstance(labels, str | Path):
        return label_files.read(str(labels))
    return [
        label if isinstance(label, Label) else label_files.from_names([label], where="labels")[0] for label in labels
    ]
