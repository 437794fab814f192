"""Pictures whose label is known, as unit embeddings: what evaluation, probes and prompt advice begin with.

    labelled data --tasks.pairs--> pictures and labels --tasks.embed--> LabelledSet

Embeddings come from the store where it knows them, so that looking at a set again costs a matrix product.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.records import Failure, Item, Label
from clipcli.tasks.embed import EmbedOptions, embed
from clipcli.tasks.pairs import Pair, read_pairs, shards
from clipcli.weights.model import Model

Wanted = Callable[[str], bool]

_log = logging.getLogger("clipcli")


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Unit embeddings [n, dim] (float32), the class of each as an index [n] into `classes`, and where it lay."""

    vectors: NDArray[np.float32]
    truth: NDArray[np.intp]
    classes: tuple[str, ...]  # sorted; each has a picture
    paths: tuple[str, ...]
    failures: tuple[Failure, ...]  # pictures that have no embedding

    def only(self, wanted: Wanted, name: str = "the set") -> LabelledSet:
        """The pictures, and the failures, whose paths are `wanted`. Raises UsageError where no picture is."""
        rows = [row for row, path in enumerate(self.paths) if wanted(path)]
        if not rows:
            raise UsageError(f"{name}: no picture of {len(self.paths):,} matches", hint=_GLOBS)
        kept, truth = np.unique(self.truth[rows], return_inverse=True)
        return LabelledSet(
            self.vectors[rows],
            truth,
            tuple(self.classes[index] for index in kept),
            tuple(self.paths[row] for row in rows),
            tuple(failure for failure in self.failures if wanted(failure.path)),
        )


_GLOBS = "globs see a picture's name, and its path below the folder, table or archive"


def matching(data: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Wanted:
    """Whether a picture of `data` is meant: its name or its path below them matches one of `include`, if there are
    any, and none of `exclude`."""
    roots = sorted({root for shard in shards(data) for root in (shard, os.path.dirname(shard))}, key=len, reverse=True)

    def wanted(path: str) -> bool:
        root = next(filter(path.startswith, roots), "")
        below = path.removeprefix(root).lstrip(":" + os.sep)
        names = (os.path.basename(below), below)
        return not any(fnmatchcase(name, glob) for name in names for glob in exclude) and (
            not include or any(fnmatchcase(name, glob) for name in names for glob in include)
        )

    return wanted


def embed_set(
    data: Sequence[str],
    model: Model,
    options: EmbedOptions | None = None,
    words: Mapping[str, Label] | None = None,
    wanted: Wanted = lambda path: True,
    progress: Callable[[int], None] = lambda done: None,
) -> LabelledSet:
    """Embed all `wanted` pictures of folders of class folders, tables with a label column, or archives of samples.

    `words` are the user's labels: a class is found among them by name or alias, and goes by the label's name then.
    Raises UsageError where pictures have captions and no label, or where there is no picture.
    """
    labels: deque[str] = deque()
    is_left_out = False

    def items() -> Iterator[Item]:
        nonlocal is_left_out
        for pair in read_pairs(data, words):
            if not wanted(pair.path if isinstance(pair, Failure) else pair.source.path):
                is_left_out = True
                continue
            if isinstance(pair, Failure):
                labels.append("")
                yield pair
                continue
            if pair.label is None:
                hint = "give class folders, path,label in a table, or samples with a .cls"
                raise UsageError(f"{pair.source.path}: has a caption, but no label", hint=hint)
            labels.append(pair.label)
            yield pair.source

    rows, truth, failures = [], [], []
    for done, row in enumerate(embed(items(), model, options), 1):
        progress(done)
        label = labels.popleft()
        if isinstance(row, Failure):
            failures.append(row)
        else:
            rows.append(row)
            truth.append(label)
    if not rows:
        reason = f"; the first: {failures[0].path}: {failures[0].message}" if failures else ""
        raise UsageError(f"no picture in {', '.join(data)} can be used{reason}", hint=_GLOBS if is_left_out else None)
    paths = tuple(row.path for row in rows)
    _tell_empty(data, [*paths, *(failure.path for failure in failures)], wanted)
    classes, indices = np.unique(np.array(truth, dtype=object), return_inverse=True)
    return LabelledSet(np.stack([row.vector for row in rows]), indices, tuple(classes.tolist()), paths, tuple(failures))


def classes_of(data: Sequence[str]) -> list[Label]:
    """The classes of labelled data as labels, sorted; `tench, Tinca tinca` has two words. Raises UsageError."""
    pairs = (pair for pair in read_pairs(data) if isinstance(pair, Pair))
    found = {pair.label: pair.phrases for pair in pairs if pair.label is not None}
    return [Label(name, found[name], where=data[0]) for name in sorted(found)]


def _tell_empty(data: Sequence[str], paths: Sequence[str], wanted: Wanted) -> None:
    """A notice about class folders without any picture: their class is missing from every figure."""
    for folder in filter(os.path.isdir, data):
        met = {path.removeprefix(folder).lstrip(os.sep).partition(os.sep)[0] for path in paths}
        with os.scandir(folder) as entries:
            empty = sorted(one.name for one in entries if one.is_dir() and one.name[0] != "." and one.name not in met)
        for name in empty:
            if wanted(os.path.join(folder, name, "")):
                _log.warning("%s: no picture in it: its class doesn't count", os.path.join(folder, name))
