"""Labels and templates in, a classifier out: what `clipcli build-classifier` and `classify -l` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipcli.errors import LabelError
from clipcli.records import Label, Template
from clipcli.weights.model import Model
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_sets
from clipcli.zeroshot.classifier import Classifier, build

Words = str | Path | Sequence[str | Label] | Mapping[str, Sequence[str]]


def build_classifier(
    model: Model,
    labels: Words,
    *,
    templates: str | Sequence[str] = template_sets.DEFAULT,
    truncate: bool = False,
) -> Classifier:
    """Make a zero-shot classifier for `model`.

    `labels`: a label file's path, a list of names (in the label file's notation) or `Label`s, or a mapping of names to
    aliases. `templates`: names of sets, template files or literals such as "a photo of a <>.". `truncate` cuts prompts
    that are too long instead of raising LabelError.
    """
    specs = [templates] if isinstance(templates, str) else list(templates)
    expanded: list[Template] = template_sets.read(specs)
    return build(model, read_labels(labels), expanded, template_set=" ".join(specs), truncate=truncate).classifier


def read_labels(labels: Words) -> list[Label]:
    """`Label`s from whatever stands for them. Raises LabelError."""
    if isinstance(labels, str | Path):
        return label_files.read(str(labels))
    if isinstance(labels, Mapping):
        labels = [Label(name, tuple(words) or (name,), where="labels") for name, words in labels.items()]
    parts = [[x] if isinstance(x, Label) else label_files.from_names([x], where="labels") for x in labels]
    if not parts:
        raise LabelError("there are no labels", hint='give a list such as ["cat", "dog"]')
    return label_files.join(*parts)
