"""All prompts of some labels as embeddings, so that any choice of templates is a matrix product away.

    labels x templates --encode_prompts--> [prompts, dim] --averaged over aliases--> Bank [labels, templates, dim]

Each prompt is encoded once, or comes from the store. Which choice is good is `advise`'s question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.records import Label, Template
from clipcli.tasks.linear import unit
from clipcli.tasks.metrics import Flags, Indices
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Progress, encode_prompts
from clipcli.zeroshot.prompts import fill, tokenize

_CHUNK = 4096  # pictures whose cosines are in memory at once
_BARE = Template("<>")

Array = NDArray[np.float32]
Answers = tuple[Flags, Array]  # of n pictures: which are right [n], and their losses [n]


@dataclass(frozen=True, eq=False)
class Bank:
    """Class vectors for every choice of templates: those that `classifier.average` makes of the same prompts."""

    labels: tuple[Label, ...]
    templates: tuple[Template, ...]
    scale: float  # the model's, for losses and scores
    by_template: Array  # [labels, templates, dim]: means over aliases
    bare: Array  # [labels, dim]: the same of the words alone
    descriptions: Array  # [labels, dim]: means; zeros where there are none
    by_alias: tuple[Array, ...]  # of each label [aliases, dim]: weighted means over templates

    @property
    def weights(self) -> Array:
        """The templates' own weights [templates]."""
        return np.array([template.weight for template in self.templates], np.float32)

    def classes(self, weights: Array) -> Array:
        """The class vectors [labels, dim] of templates so weighted [templates]."""
        return unit(weights / weights.sum() @ self.by_template + self.descriptions)

    def some(self, chosen: Sequence[int]) -> Array:
        """The class vectors [labels, dim] of these templates alone, by their own weights."""
        share = self.weights[chosen] / self.weights[chosen].sum()
        return unit(share @ self.by_template[:, chosen] + self.descriptions)

    def without_template(self) -> Array:
        """The class vectors [labels, dim] of the bare words."""
        return unit(self.bare + self.descriptions)

    def without_alias(self, label: int, alias: int) -> Array:
        """The vector [dim] of a label with several aliases, but for one of them."""
        return unit(np.delete(self.by_alias[label], alias, axis=0).mean(axis=0) + self.descriptions[label])


def encode_bank(
    model: Model,
    labels: Sequence[Label],
    templates: Sequence[Template],
    *,
    truncate: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """Encode every label in every template.

    Raises UsageError where there is nothing to compare, LabelError, VocabularyError, ModelError.
    """
    if len(labels) < 2:
        raise UsageError(
            f'one label alone ("{labels[0].name}"): there is nothing to confuse it with', hint="add labels"
        )
    if len(templates) < 2:
        what = f'one template alone ("{templates[0].text}"): there is nothing to choose from'
        raise UsageError(what, hint="name a larger set: -t imagenet80")
    if not any(label.aliases for label in labels):
        raise UsageError("the labels are whole prompts, which take no template", hint="give labels with words")
    each = len(templates) + 1
    prompts = fill(labels, [*templates, _BARE])
    ids = tokenize(prompts, labels, model.tokenizer, model.config.text.context_length, truncate)
    vectors = encode_prompts(model, ids, progress)[0]
    dim = vectors.shape[1]
    means, descriptions = np.zeros((len(labels), each, dim), np.float32), np.zeros((len(labels), dim), np.float32)
    share = np.array([template.weight for template in templates], np.float32)
    share /= share.sum()
    by_alias, start = [], 0
    for index, label in enumerate(labels):  # their prompts follow each other: each alias in all templates, descriptions
        middle = start + each * len(label.aliases)
        words = vectors[start:middle].reshape(len(label.aliases), each, dim)
        start = middle + len(label.descriptions)
        by_alias.append(share @ words[:, :-1])
        if label.aliases:
            means[index] = words.mean(axis=0)
        if label.descriptions:
            descriptions[index] = vectors[middle:start].mean(axis=0)
    scale = model.checkpoint.logit_scale
    return Bank(tuple(labels), tuple(templates), scale, means[:, :-1], means[:, -1], descriptions, tuple(by_alias))


def cosines_of(vectors: Array, classes: Array) -> Iterator[tuple[slice, Array]]:
    """The product in parts: which pictures, and their cosines [some, labels]."""
    for start in range(0, len(vectors), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, vectors[part] @ classes.T


def answers(vectors: Array, classes: Array, truth: Indices, scale: float) -> Answers:
    """Of each picture whether the nearest class is the true one [n], and -log of the true one's score [n]."""
    right, loss = np.empty(len(vectors), np.bool_), np.empty(len(vectors), np.float32)
    for part, cosines in cosines_of(vectors, classes):
        true = cosines[np.arange(len(cosines)), truth[part]]
        highest = cosines.max(axis=1)
        right[part] = cosines.argmax(axis=1) == truth[part]
        total = np.exp((cosines - highest[:, None]) * scale).sum(axis=1)
        loss[part] = np.log(total) + (highest - true) * scale
    return right, loss


def two_nearest(vectors: Array, classes: Array) -> tuple[Indices, Array]:
    """Each picture's nearest and second label [2, n], and their cosines [2, n]."""
    labels, reached = np.empty((2, len(vectors)), np.intp), np.empty((2, len(vectors)), np.float32)
    for part, cosines in cosines_of(vectors, classes):
        rows = np.arange(len(cosines))
        for place in range(2):
            best = cosines.argmax(axis=1)
            labels[place, part], reached[place, part] = best, cosines[rows, best]
            cosines[rows, best] = -np.inf
    return labels, reached
