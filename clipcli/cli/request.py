"""What was typed, turned into what it means: a model, and the words of a classifier.

Each class holds the options of one panel, checks what can be checked cheaply, and builds its object on demand.
Pictures and rows have theirs in `streams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.errors import UsageError
from clipcli.output.text import counted
from clipcli.records import Label, Template

if TYPE_CHECKING:
    from clipcli.model.device import Precision, Runtime
    from clipcli.weights.fetch import Located
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Built, Classifier


@dataclass(frozen=True)
class ModelChoice:
    """Which checkpoint, and where it runs."""

    name: str | None  # None: the default
    device: str
    precision: Precision
    activation: Literal["quick_gelu", "gelu"] | None
    head_width: int | None
    vocabulary: Path | None
    no_cache: bool
    offline: bool = False
    cache_size: str | None = None  # None: the store's own
    runtime: Runtime = "auto"

    def check(self) -> None:
        """Raise ModelError for a name that can't be a model's, UsageError for a size that is none."""
        from clipcli.weights.fetch import exists, parse

        if self.cache_size is not None:
            opt.byte_count(self.cache_size, "--cache-size")
        if self.name is not None and not exists(self.name):
            parse(self.name)

    def locate(self, talk: Talk) -> Located:
        """Where it lies on this disk; it is downloaded if it isn't there yet."""
        from clipcli.weights.catalog import DEFAULT
        from clipcli.weights.fetch import resolve

        with talk.standing_aside():
            return resolve(self.name or DEFAULT, offline=self.offline, vocabulary=self.vocabulary, progress=talk.live)

    def open(self, talk: Talk, located: Located | None = None) -> Model:
        """The model, where it is `located` if that is known already; its towers are not read yet."""
        from clipcli.paths import store_file
        from clipcli.store.database import SIZE_LIMIT, Store
        from clipcli.weights.model import load_model

        limit = SIZE_LIMIT if self.cache_size is None else opt.byte_count(self.cache_size, "--cache-size")
        model = load_model(
            located or self.locate(talk),
            device=self.device,
            precision=self.precision,
            runtime=self.runtime,
            activation=self.activation,
            head_width=self.head_width,
            store=Store(None if self.no_cache else store_file(), size_limit=limit),
        )
        if talk.verbose:  # on a GPU, only torch can say which
            talk.detail(f"model: {model.name} ({model.checkpoint.layout}), on {model.where}")
        return model


@dataclass(frozen=True)
class Words:
    """Labels and templates, or a classifier file in their place."""

    files: Sequence[str]  # label files
    inline: Sequence[str] | None
    prompts: Path | None
    templates: Sequence[str] | None
    truncate: bool
    classifier: Path | None = None

    @property
    def _given(self) -> tuple[object, ...]:
        return self.files or self.inline, self.prompts, self.classifier

    @property
    def are_given(self) -> bool:
        """Whether there is anything to classify by."""
        return any(self._given)

    def labels(self) -> list[Label]:
        """All labels, from file and command line. Raises LabelError, UsageError (none, or two kinds at once)."""
        from clipcli.zeroshot import labels

        if not self.are_given:
            raise UsageError("no labels", hint="give --labels FILE, or --label NAME for each")
        if sum(map(bool, self._given)) > 1:
            raise UsageError("labels, prompts and a classifier file exclude each other", hint="give one of the three")
        if self.prompts:
            return labels.read_descriptions(str(self.prompts))
        parts = [labels.read(file) for file in self.files]
        if self.inline:
            parts.append(labels.from_names(self.inline))
        return parts[0] if len(parts) == 1 else labels.join(*parts)

    def expanded(self) -> list[Template]:
        """The templates, expanded; none where whole prompts are given."""
        return [] if self.prompts else self.read_templates()

    def read_templates(self) -> list[Template]:
        """The templates, expanded."""
        from clipcli.zeroshot import templates

        return templates.read(self.sets)

    @property
    def read(self) -> list[object]:
        """All that may name a file."""
        return [*self.files, self.prompts, self.classifier, *(self.templates or [])]

    @property
    def sets(self) -> list[str]:
        """What was asked for as templates."""
        from clipcli.zeroshot.templates import DEFAULT

        return list(self.templates or [DEFAULT])

    def build(
        self,
        model: Model,
        labels: list[Label],
        templates: Sequence[Template],
        talk: Talk,
        extend: Classifier | None = None,
    ) -> Built:
        """The classifier, made or found."""
        from clipcli.tasks.build import make

        sets = " ".join(self.sets) if templates else ""
        with talk.working("encoding prompts") as tick:
            return make(
                model, labels, templates, template_set=sets, truncate=self.truncate, extend=extend, progress=tick
            )


def describe(built: Built) -> str:
    """One line: how large the classifier is and what it cost."""
    classifier = built.classifier
    templates = len(classifier.templates)
    size = counted(len(classifier.labels), "label") + (f" × {counted(templates, 'template')}" if templates else "")
    if not built.prompts:
        return f"classifier: {size}, from the store"
    reused = built.prompts - built.encoded
    return f"classifier: {size}, {counted(built.encoded, 'prompt')} encoded, {reused:,} reused"
