"""What the commands that look at labelled pictures share: their options, and who reads the sets.

In: paths, labels and models as typed. Out: models with their classifiers, embedded sets. Pictures that fail are told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.errors import UsageError
from clipcli.output.text import printable
from clipcli.records import Failure, Label

if TYPE_CHECKING:
    from clipcli.tasks.embed import EmbedOptions, Input
    from clipcli.tasks.evaluate import Vectors
    from clipcli.tasks.labelled import LabelledSet
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

SHOWN = 5  # failures that are listed without --verbose

IgnoreMissing = Annotated[
    bool,
    typer.Option(
        "--ignore-missing",
        metavar="",
        help="Leave out pictures whose class is no label, where that is an error otherwise.",
        rich_help_panel=opt.INPUT,
    ),
]
UnknownSet = Annotated[
    list[str] | None,
    typer.Option(
        "--unknown",
        metavar="INPUT",
        help="Pictures that belong to no label (repeatable): can they be told from the others?",
        rich_help_panel=opt.INPUT,
    ),
]
WantPrecision = Annotated[
    float,
    typer.Option(
        metavar="P",
        min=0,
        max=1,
        help="Find least scores, cosines and margins at which so many of the answers are right.",
        rich_help_panel=opt.OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="One JSON object with everything.", rich_help_panel=opt.OUTPUT)
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="Lines of each table.", rich_help_panel=opt.OUTPUT)]


def wanted_labels(words: Words, data: Sequence[str], talk: Talk) -> list[Label]:
    """The labels as typed, else the classes of `data`, if there is any. Raises LabelError, UsageError."""
    if words.are_given or not data:
        return words.labels()
    from clipcli.tasks.labelled import classes_of

    with talk.working("looking for classes"):
        found = classes_of(data)
    talk.notice(f"labels: the {len(found):,} classes of {', '.join(map(printable, data))}; -l gives others")
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
    include: Sequence[str]
    exclude: Sequence[str]
    talk: Talk
    failed: int = field(default=0, init=False)

    def sets(self, data: Mapping[str, str]) -> Iterator[tuple[str, LabelledSet]]:
        """All sets, split where `include` names parts. Raises UsageError."""
        from clipcli.tasks.labelled import matching

        parts: dict[str, list[str]] = {}
        for text in self.include:
            part, equals, glob = text.partition("=")
            parts.setdefault(part if equals else "", []).append(glob if equals else text)
        if len(parts) > 1 and "" in parts:
            raise UsageError("--include with a name and without one", hint="give each GLOB a name, or none")
        for name, path in data.items():
            whole = self.whole([path], [glob for own in parts.values() for glob in own])
            if not any(parts):
                yield name, whole
                continue
            for part, own in parts.items():
                called = part if len(data) == 1 else f"{name} {part}"
                yield called, whole.only(matching([path], own), f"--include {part}")

    def whole(self, paths: Sequence[str], include: Sequence[str] = ()) -> LabelledSet:
        """One set. Raises UsageError."""
        from clipcli.tasks.labelled import embed_set, matching

        words = {label.name: label for label in self.labels}
        wanted = matching(paths, include, self.exclude)
        with self.talk.working(f"looking at {', '.join(map(printable, paths))}") as tick:
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
        with self.talk.working(f"looking at {', '.join(map(printable, names))}") as tick:
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
