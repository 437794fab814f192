"""What the commands that look at labelled pictures share: their options, and who reads the sets.

In: paths, labels and models as typed. Out: models with their classifiers, embedded sets. Pictures that fail are told.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.cli.streams import check_whole_file
from clipcli.errors import UsageError
from clipcli.records import Failure, Label

if TYPE_CHECKING:
    from clipcli.tasks.embed import EmbedOptions, Input
    from clipcli.tasks.evaluate import Vectors
    from clipcli.tasks.labelled import LabelledSet
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

SHOWN = 5  # failures that are listed without --verbose

SETS = "Labelled pictures: a folder of class folders, .csv, .tsv or .jsonl with path and label, or webdataset archives."

IgnoreMissing = Annotated[
    bool,
    opt.INPUT.flag(
        "--ignore-missing",
        help="Leave out pictures whose class is no label, where that is an error otherwise.",
    ),
]
UnknownSet = Annotated[
    list[str] | None,
    opt.INPUT.option(
        metavar="INPUT",
        help="Pictures that belong to no label (repeatable): can they be told from the others?",
    ),
]
WantPrecision = Annotated[
    float,
    opt.OUTPUT.option(
        metavar="P",
        min=0,
        max=1,
        help="Find least scores, cosines and margins at which so many of the answers are right.",
    ),
]
Json = Annotated[bool, opt.OUTPUT.flag("--json", help="One JSON object with everything.")]
Top = Annotated[int, opt.OUTPUT.option(metavar="N", min=1, help="Lines of each table.")]


def check_written(files: Sequence[Path | None], force: bool, read: Sequence[object]) -> None:
    """Raise UsageError or OutputError for files that can't be written, or are one; `read` are those that are read."""
    places = [file for file in files if file is not None]
    for file in places:
        check_whole_file(file, force=force, read=read)
    if len({os.path.realpath(file) for file in places}) < len(places):
        raise UsageError(f"{places[0]}: is to hold two things", hint="give each a file of its own")


def write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, whole or not at all; bytes of names as they are. Raises OutputError."""
    from clipcli.weights.folder import whole_file

    with whole_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
        csv.writer(text).writerows(rows)
        text.detach()


def wanted_labels(words: Words, data: Sequence[str], talk: Talk) -> list[Label]:
    """The labels as typed, else the classes of `data`, if there is any. Raises LabelError, UsageError."""
    if words.are_given or not data:
        return words.labels()
    from clipcli.tasks.labelled import classes_of

    with talk.working("looking for classes"):
        found = classes_of(data)
    talk.notice(f"labels: the {len(found):,} classes of {', '.join(data)}; -l gives others")
    return found


def prepared(
    choices: Sequence[ModelChoice], words: Words, talk: Talk, data: Sequence[str] = (), *, alone: bool = False
) -> Iterator[tuple[Model, Classifier]]:
    """Each model with the classifier, of the classes of `data` where no labels are given.

    What can be wrong with words is told before weights are read. One label `alone` is an error otherwise.
    """
    from clipcli.tasks.evaluate import check_labels
    from clipcli.zeroshot.classifier_file import load_classifier

    labels = wanted_labels(words, data, talk)
    loaded = load_classifier(words.classifier) if words.classifier else None
    if not alone:
        check_labels(loaded.labels if loaded else labels)
    templates = [] if loaded else words.expanded()
    for choice in choices:
        with talk.working("loading the model"):
            model = choice.open(talk)
        if loaded is None:
            built = words.build(model, labels, templates, talk)
            talk.detail(describe(built))
            yield model, built.classifier
        else:
            yield loaded.suited(model), loaded


@dataclass
class Reader:
    """Embeds sets for one model. Pictures that fail are told, and counted."""

    model: Model
    labels: Sequence[Label]
    options: EmbedOptions
    parts: Mapping[str, Sequence[str]]  # globs of the pictures that are wanted, by the name of the part they make
    exclude: Sequence[str]
    talk: Talk
    failed: int = field(default=0, init=False)

    def sets(self, data: Mapping[str, str]) -> Iterator[tuple[str, LabelledSet]]:
        """All sets, split where parts have names. Raises UsageError."""
        from clipcli.tasks.labelled import matching

        for name, path in data.items():
            whole = self.whole([path])
            if not any(self.parts):
                yield name, whole
                continue
            for part, own in self.parts.items():
                called = part if len(data) == 1 else f"{name} {part}"
                yield called, whole.only(matching([path], own), f"--include {part}")

    def whole(self, paths: Sequence[str]) -> LabelledSet:
        """One set. Raises UsageError."""
        from clipcli.tasks.labelled import embed_set, matching

        words = {label.name: label for label in self.labels}
        wanted = matching(paths, [glob for own in self.parts.values() for glob in own], self.exclude)
        with self.talk.working(f"looking at {', '.join(paths)}") as tick:
            found = embed_set(paths, self.model, self.options, words, wanted, tick)
        self._tell(found.failures)
        return found

    def tell_idle(self, pictures: LabelledSet) -> None:
        """A notice of labels that none of the pictures has."""
        from clipcli.tasks.evaluate import listed

        if idle := [label.name for label in self.labels if label.name not in pictures.classes]:
            self.talk.notice(f"labels without pictures: {listed(idle)}")

    def unknown(self, inputs: Sequence[str] | None) -> tuple[Sequence[str], Vectors] | None:
        """Paths and embeddings of pictures that belong to no label, if there are any. Raises UsageError."""
        return self.unlabelled(inputs, inputs) if inputs else None

    def unlabelled(self, pictures: Iterable[Input], names: Sequence[str]) -> tuple[Sequence[str], Vectors]:
        """Paths [n] and unit embeddings [n, dim] of pictures of any kind. Raises UsageError where there are none."""
        import numpy as np

        from clipcli.tasks.embed import embed

        rows = []
        with self.talk.working(f"looking at {', '.join(names)}") as tick:
            for row in embed(pictures, self.model, self.options):
                rows.append(row)
                tick(len(rows))
        found = [row for row in rows if not isinstance(row, Failure)]
        self._tell([row for row in rows if isinstance(row, Failure)])
        if not found:
            raise UsageError(f"no picture in {', '.join(names)} can be used")
        return [row.path for row in found], np.stack([row.vector for row in found])

    def _tell(self, failures: Sequence[Failure]) -> None:
        self.failed += len(failures)
        for failure in failures[: None if self.talk.verbose else SHOWN]:
            self.talk.failed(failure)
        if len(failures) > SHOWN and not self.talk.verbose:
            self.talk.failure(f"{len(failures) - SHOWN:,} more failed; -v lists all")
