"""Labels and templates in, a classifier out: what `clipcli build-classifier` and `classify -l` do.

`build_classifier` is for programs and takes names; `make` is what it and the commands share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clipcli.errors import LabelError
from clipcli.records import Label, Template
from clipcli.weights.model import Model
from clipcli.zeroshot import classifier as zeroshot
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_sets
from clipcli.zeroshot.classifier import Built, Classifier, Progress

Labels = str | Path | Sequence[str | Label] | Mapping[str, Sequence[str]]


def build_classifier(
    model: Model,
    labels: Labels,
    *,
    templates: str | Sequence[str] = template_sets.DEFAULT,
    truncate: bool = False,
    extend: Classifier | None = None,
) -> Classifier:
    """Make a zero-shot classifier for `model`.

    `labels`: a label file's path, a list of names (in the label file's notation) or `Label`s, or a mapping of names to
    aliases. `templates`: names of sets, template files or literals such as "a photo of a <>."; none for labels that
    are described by whole prompts. `truncate` cuts prompts that are too long instead of raising LabelError. The
    labels are added to those of `extend`, which must be this model's and have the same templates.
    """
    specs = [templates] if isinstance(templates, str) else list(templates)
    expanded = template_sets.read(specs) if specs else []
    words = read_labels(labels)
    return make(model, words, expanded, template_set=" ".join(specs), truncate=truncate, extend=extend).classifier


def make(
    model: Model,
    labels: Sequence[Label],
    templates: Sequence[Template],
    *,
    template_set: str = "",
    truncate: bool = False,
    extend: Classifier | None = None,
    progress: Progress | None = None,
) -> Built:
    """The classifier and what it cost. Raises LabelError, UsageError, ClassifierError, VocabularyError, ModelError."""
    if extend is not None:
        extend.check_model(model)
    built = zeroshot.build(model, labels, templates, template_set=template_set, truncate=truncate, progress=progress)
    return built if extend is None else replace(built, classifier=zeroshot.extend(extend, built.classifier))


def read_labels(labels: Labels) -> list[Label]:
    """`Label`s from whatever stands for them. Raises LabelError."""
    if isinstance(labels, str | Path):
        return label_files.read(str(labels))
    if isinstance(labels, Mapping):
        labels = [Label(name, tuple(words) or (name,), where="labels") for name, words in labels.items()]
    parts = [[x] if isinstance(x, Label) else label_files.from_names([x], where="labels") for x in labels]
    if not parts:
        raise LabelError("there are no labels", hint='give a list such as ["cat", "dog"]')
    return label_files.join(*parts)
