"""What was typed, turned into what it means: a model, a classifier, a place for the rows.

Each class holds the options of one panel, checks what can be checked cheaply, and builds its object on demand.
Cheap checks come first, so that a typing error costs no loading of models.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from clipcli.cli.console import Talk, wants_color
from clipcli.errors import OutputError, UsageError
from clipcli.images.find import Walk, check_inputs, read_list
from clipcli.output.text import counted
from clipcli.records import Failure, Label, Source, Template

if TYPE_CHECKING:
    from clipcli.model.device import Precision
    from clipcli.output.sink import Sink
    from clipcli.weights.fetch import Located
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Built


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

    def check(self) -> None:
        """Raise ModelError for a name that can't be a model's."""
        from clipcli.weights.fetch import exists, parse

        if self.name is not None and not exists(self.name):
            parse(self.name)

    def locate(self, talk: Talk) -> Located:
        """Where it lies on this disk; it is downloaded if it isn't there yet."""
        from clipcli.weights.catalog import DEFAULT
        from clipcli.weights.fetch import resolve

        with talk.standing_aside():
            return resolve(self.name or DEFAULT, offline=self.offline, vocabulary=self.vocabulary, progress=talk.live)

    def open(self, talk: Talk) -> Model:
        """The model, its towers not read yet."""
        from clipcli.paths import store_file
        from clipcli.store.database import Store
        from clipcli.weights.model import load_model

        model = load_model(
            self.locate(talk),
            device=self.device,
            precision=self.precision,
            activation=self.activation,
            head_width=self.head_width,
            store=Store(None if self.no_cache else store_file()),
        )
        if talk.verbose:  # where it runs, only torch can say
            talk.detail(f"model: {model.name} ({model.checkpoint.layout}), on {model.placement}")
        return model


@dataclass(frozen=True)
class Words:
    """Labels and templates, or a classifier file in their place."""

    file: str | None
    inline: Sequence[str] | None
    prompts: Path | None
    templates: Sequence[str] | None
    truncate: bool
    classifier: Path | None = None

    def labels(self) -> list[Label]:
        """All labels, from file and command line. Raises LabelError, UsageError (none, or two kinds at once)."""
        from clipcli.zeroshot import labels

        given = [self.file or self.inline, self.prompts, self.classifier]
        if sum(map(bool, given)) != 1:
            what = "no labels" if not any(given) else "labels, prompts and a classifier file exclude each other"
            raise UsageError(what, hint="give --labels FILE or --label NAME, or --prompts FILE, or --classifier FILE")
        if self.prompts:
            return labels.read_descriptions(str(self.prompts))
        found = labels.read(self.file) if self.file else []
        return labels.join(found, labels.from_names(self.inline)) if self.inline else found

    def expanded(self) -> list[Template]:
        """The templates, expanded; none where whole prompts are given."""
        from clipcli.zeroshot import templates

        return [] if self.prompts else templates.read(self.sets)

    @property
    def sets(self) -> list[str]:
        """What was asked for as templates."""
        from clipcli.zeroshot.templates import DEFAULT

        return list(self.templates or [DEFAULT])

    def build(self, model: Model, labels: list[Label], templates: list[Template], talk: Talk) -> Built:
        """The classifier, made or found."""
        from clipcli.zeroshot.classifier import build

        with talk.working("encoding prompts") as tick:
            sets = " ".join(self.sets) if templates else ""
            built = build(model, labels, templates, template_set=sets, truncate=self.truncate, progress=tick)
        talk.detail(describe(built))
        return built


def describe(built: Built) -> str:
    """One line: how large the classifier is and what it cost."""
    classifier = built.classifier
    size = f"{counted(len(classifier.labels), 'label')} × {counted(len(classifier.templates), 'template')}"
    if not built.prompts:
        return f"classifier: {size}, from the store"
    reused = built.prompts - built.encoded
    return f"classifier: {size}, {counted(built.encoded, 'prompt')} encoded, {reused:,} reused"


@dataclass(frozen=True)
class Destination:
    """Where rows go, and in which format."""

    path: Path | None
    format: str
    force: bool
    top_k: int | None
    print0: bool
    color: str

    def check(self) -> None:
        """Raise UsageError or OutputError for what would fail only after the work is done."""
        if self.path is not None:
            check_new_file(self.path, force=self.force)
        if self.print0 and self.chosen != "paths":
            raise UsageError("--print0 is for paths alone", hint="add --format paths")

    @property
    def chosen(self) -> str:
        """The format that `auto` stands for."""
        from clipcli.output.sink import format_for

        if self.format != "auto":
            return self.format
        return format_for(str(self.path) if self.path else None, self.is_terminal)

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches the rows come."""
        return self.path is None and sys.stdout.isatty()

    @contextmanager
    def open(self, labels: Sequence[str]) -> Iterator[Sink]:
        """The sink; an output file is created with the first row, so that a run that fails early leaves none."""
        from clipcli.output.sink import SinkOptions, open_sink

        stream = sys.stdout.buffer if self.path is None else _open(self.path, force=self.force)
        color = self.path is None and wants_color(sys.stdout, self.color)
        options = SinkOptions(top_k=self.top_k, null=self.print0, color=color, labels=tuple(labels))
        sink = open_sink(self.chosen, stream, options)
        try:
            yield sink
            sink.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            hint = "make room, and run it again" if error.errno == errno.ENOSPC else None
            raise OutputError(f"{self.path or 'stdout'}: can't be written: {error.strerror}", hint=hint) from error
        finally:
            if self.path is not None:
                with suppress(OSError):  # every row was flushed: what fails here has failed before
                    stream.close()


def check_new_file(path: Path, *, force: bool) -> None:
    """Raise UsageError where `path` exists, OutputError where it can't be created."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder", hint="name a file")
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already", hint="use --force to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path}: no permission to write there", hint="choose another place with --output")


def _open(path: Path, *, force: bool) -> BinaryIO:
    try:
        return path.open("wb" if force else "xb")
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


@dataclass
class Pictures:
    """What is to be looked at; `passed_over` counts what folders held besides pictures."""

    inputs: Sequence[str]
    files_from: str | None
    null: bool
    include: Sequence[str]
    exclude: Sequence[str]
    follow: bool
    passed_over: int = field(default=0, init=False)

    @property
    def given(self) -> bool:
        """Whether there is anything to look at: something typed, or a list on stdin."""
        return bool(self.inputs or self.files_from) or not sys.stdin.isatty()

    @property
    def listed(self) -> str | None:
        """The file that holds the list of paths, `-` for stdin."""
        return self.files_from or (None if self.inputs else "-")

    @property
    def live(self) -> bool:
        """Whether the list may still be growing while we read it."""
        return self.listed == "-"

    def check(self) -> None:
        """Raise UsageError for an INPUT that isn't there."""
        check_inputs([path for path in self.inputs if path != "-"])
        if self.listed == "-" and "-" in self.inputs:
            raise UsageError("stdin can't be a picture and a list at once", hint="leave out - or --files-from -")
        if self.listed not in (None, "-") and not Path(str(self.listed)).is_file():
            raise UsageError(f"{self.listed}: no such file", hint="--files-from takes a file with a path a line")

    def walk(self) -> Iterator[Source | Failure]:
        """Every picture, in order: the INPUTs, then the list."""
        for path in self.inputs:
            yield from [Source("-", sys.stdin.buffer.read())] if path == "-" else self._walk([path])
        if self.listed == "-":
            yield from self._walk(read_list(sys.stdin.buffer, self.null), folders=False)
        elif self.listed is not None:
            with Path(self.listed).open("rb") as stream:
                yield from self._walk(read_list(stream, self.null), folders=False)

    def _walk(self, names: Iterable[str], *, folders: bool = True) -> Iterator[Source | Failure]:
        walk = Walk(names, self.include, self.exclude, self.follow, folders)
        yield from walk
        self.passed_over += walk.passed_over
