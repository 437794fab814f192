"""Where pictures come from, as typed, and the rules for files that are written: checked before anything is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clipcli.cli.options import came_from
from clipcli.errors import OutputError, UsageError, writing
from clipcli.images.find import HEAD, Walk, check_inputs, is_archive, sniff
from clipcli.images.lists import read_list
from clipcli.output.text import counted
from clipcli.records import Failure, FailureKind, Item, Source
from clipcli.zeroshot.files import split_key

if TYPE_CHECKING:
    from clipcli.output.embeddings import Embeddings
    from clipcli.weights.model import Model


def check_new_file(path: Path, *, force: bool, read: Sequence[object] = ()) -> None:
    """Raise UsageError where `path` exists or is among the files `read`, OutputError where it can't be created."""
    with writing(path):  # there may be no permission even to look
        if path.is_dir():
            raise UsageError(f"{path}: is a folder", hint="name a file")
        if path.is_file():
            if any(other and _is_same(path, other) for other in read):
                raise UsageError(f"{path}: is read by this very run", hint="name another file")
            if not force:
                raise UsageError(f"{path}: exists already", hint="use --force to replace it")
            if kind := _precious(path):  # maybe one of those that a folder or a list will name
                raise UsageError(f"{path}: is {kind}", hint="remove it first, or name another file")
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{path}: is a link to nothing", hint="remove it, or name another file")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"{path}: no permission to write there", hint="name another place")


def check_whole_file(path: Path, *, force: bool, read: Sequence[object] = ()) -> None:
    """The same for a file that appears once all of it is written, which no pipe or device can."""
    if str(path) == "-" or (os.path.exists(path) and not path.is_file() and not path.is_dir()):
        raise UsageError(f"{path}: must be a regular file", hint="name a file: no stdout, pipe or device will do")
    check_new_file(path, force=force, read=read)


def _precious(path: Path) -> str | None:
    if is_archive(str(path)):
        return "an archive"
    with path.open("rb") as file:
        return "a picture" if sniff(file.read(HEAD)) else None


def _is_same(path: Path, other: object) -> bool:
    try:
        return path.samefile(split_key(str(other))[0])
    except (OSError, ValueError):  # no file, or a literal such as a template
        return False


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
    embeddings: dict[str, Embeddings] = field(default_factory=dict, init=False)  # the INPUTs that are such files

    def demand(self, context: typer.Context) -> None:
        """Show the help and raise UsageError where there is nothing to look at."""
        if not (self.inputs or self.files_from) and sys.stdin.isatty():
            with redirect_stdout(sys.stderr):
                typer.echo(context.get_help())
            raise UsageError("no INPUT", hint="name pictures or folders, or send a list of paths on stdin")

    @property
    def listed(self) -> str | None:
        """The file that holds the list of paths, `-` for stdin."""
        return self.files_from or (None if self.inputs else "-")

    @property
    def live(self) -> bool:
        """Whether the list may still be growing while we read it."""
        return self.listed is not None and (self.listed == "-" or not Path(self.listed).is_file())

    def check(self) -> None:
        """Raise UsageError for an INPUT that isn't there, EmbeddingsError for one that holds broken embeddings."""
        check_inputs(self.inputs)
        for name in self.inputs:
            if name.lower().endswith((".safetensors", ".npz", ".parquet")):
                from clipcli.output.embeddings import kind_of, load_embeddings

                if kind_of(name):
                    self.embeddings[name] = load_embeddings(name)
        if [*self.inputs, self.listed].count("-") > 1:
            raise UsageError("stdin can't be read twice", hint="give - once, as INPUT or as --files-from -")
        if not self.files_from or self.files_from == "-":
            return
        listed = Path(self.files_from)
        wrong = "no such file" if not listed.exists() else "is a folder" if listed.is_dir() else None
        if wrong is None and not os.access(listed, os.R_OK):
            wrong = "permission denied"
        if wrong:
            raise UsageError(f"{listed}: {wrong}", hint="--files-from takes a file with a path a line")

    def check_embeddings(self, model: Model, prepared: dict[str, Any], context: typer.Context) -> Iterator[str]:
        """A line about each embeddings file. Raises EmbeddingsError for one of another model.

        Raises UsageError for one whose pictures were `prepared` in another way, if that was asked for, or if there are
        pictures besides, which will be.
        """
        mixed = self.listed is not None or any(name not in self.embeddings for name in self.inputs)
        for name, found in self.embeddings.items():
            found.check_model(model)
            for option, value in prepared.items():
                made = getattr(found, option)
                if made != value and (mixed or not came_from(context, option, "DEFAULT")):
                    what = f"{name}: its pictures were prepared with --{option} {made}, not {value}"
                    raise UsageError(what, hint=f"give --{option} {made}, or make it again with embed")
            size = f"{counted(len(found.names), 'embedding')}, {len(found.failures):,} failed"
            how = f"--pixels {found.pixels} --crop {found.crop} --decode {found.decode}"
            yield f"{name}: {size}, {how}, {found.arithmetic}"

    def walk(self) -> Iterator[Item]:
        """Every picture, in order: the INPUTs, then the list."""
        for kind, names in groupby(self.inputs, lambda name: name if name in ("-", *self.embeddings) else ""):
            if kind == "-":
                yield _picture_on_stdin()
            elif kind:
                for name in names:
                    yield from self.embeddings[name]
            else:
                yield from self._walk(names)
        if self.listed is not None:
            with nullcontext(sys.stdin.buffer) if self.listed == "-" else Path(self.listed).open("rb") as stream:
                yield from self._walk(read_list(stream, self.null), folders=False)

    def _walk(self, names: Iterable[str], *, folders: bool = True) -> Iterator[Source | Failure]:
        walk = Walk(names, self.include, self.exclude, self.follow, folders)
        yield from walk
        self.passed_over += walk.passed_over


def _picture_on_stdin() -> Source | Failure:
    from clipcli.images.read import MAX_BYTES

    # Raw: a buffered read holds a lock that the interpreter can't take back when Ctrl-C ends it.
    stream = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    data = bytearray()
    while chunk := stream.read(1 << 20):
        data += chunk
        if len(data) > MAX_BYTES:
            return Failure("-", FailureKind.TOO_LARGE, f"more than {MAX_BYTES >> 30} GiB came")
    return Source("-", bytes(data))
