"""Pictures whose label is known, as unit embeddings: what evaluation, probes and prompt advice begin with.

    labelled data --tasks.pairs--> pictures and labels --tasks.embed--> LabelledSet

Embeddings come from the store where it knows them, so that looking at a set again costs a matrix product.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.records import Failure, Item, Label
from clipcli.tasks.embed import EmbedOptions, embed
from clipcli.tasks.pairs import read_pairs
from clipcli.weights.model import Model


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Unit embeddings [n, dim] (float32), the class of each as an index [n] into `classes`, and where it lay."""

    vectors: NDArray[np.float32]
    truth: NDArray[np.intp]
    classes: tuple[str, ...]  # sorted; each has a picture
    paths: tuple[str, ...]
    failures: tuple[Failure, ...]  # pictures that have no embedding


def embed_set(
    data: Sequence[str], model: Model, options: EmbedOptions | None = None, words: Mapping[str, Label] | None = None
) -> LabelledSet:
    """Embed all pictures of folders of class folders, tables with a label column, or archives of samples.

    `words` are the user's labels: a class is found among them by name or alias, and goes by the label's name then.
    Raises UsageError where pictures have captions and no label, or where there is no picture.
    """
    labels: deque[str] = deque()

    def items() -> Iterator[Item]:
        for pair in read_pairs(data, words):
            if isinstance(pair, Failure):
                labels.append("")
                yield pair
                continue
            if pair.label is None:
                hint = "give class folders, path,label in a table, or samples with a .cls"
                raise UsageError(f"{pair.source.path}: has a caption, but no label", hint=hint)
            labels.append(pair.label)
            yield pair.source

    vectors, truth, paths, failures = [], [], [], []
    for row in embed(items(), model, options):
        label = labels.popleft()
        if isinstance(row, Failure):
            failures.append(row)
        else:
            vectors.append(row.vector)
            truth.append(label)
            paths.append(row.path)
    if not vectors:
        reason = f"; the first: {failures[0].path}: {failures[0].message}" if failures else ""
        raise UsageError(f"no picture in {', '.join(data)} can be used{reason}")
    classes, indices = np.unique(np.array(truth, dtype=object), return_inverse=True)
    return LabelledSet(np.stack(vectors), indices, tuple(classes.tolist()), tuple(paths), tuple(failures))
