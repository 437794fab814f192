"""`clipcli demo`: sample photos, sample labels, and the command that sorts the ones by the others, typed for you."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.errors import ExitCode
from clipcli.output.text import counted

EXAMPLES = opt.epilog(
    "clipcli demo",
    "clipcli demo my-demo",
    "clipcli demo -q | cut -f 1,2",
)
NEXT = """
next:
  # your own pictures and words
  clipcli classify YOUR-FOLDER -L cat -L dog -m {model}
  # the default model knows far more: {size}, downloaded once
  clipcli classify {folder} --labels {labels}
  # a classifier to keep, for clipcli classify -c my.safetensors
  clipcli build-classifier {labels} -m {model} -o my.safetensors
  # everything else
  clipcli --help"""

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where photos and labels go; made if it isn't there.")]
Force = Annotated[
    bool, opt.flag("--force", help="Put them into a folder that holds other things. Nothing is overwritten.")
]


def demo(
    folder: Folder = Path("clipcli-demo"),
    force: Force = False,
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Try it: sample photos and labels, classified by tiny, the small model that is part of clipcli.

    They are put into DIR. What lies there from an earlier demo is used again,
    with your changes of the labels and pictures of your own.
    """
    from clipcli.cli.main import run
    from clipcli.tasks.samples import LABEL_FILE, lay_out
    from clipcli.weights.catalog import MODELS, TINY, size_text
    from clipcli.weights.fetch import exists

    talk = Talk(quiet=quiet, color=color)
    photos = lay_out(folder, force=force)
    where = os.path.join(os.curdir, folder) if str(folder).startswith("-") else str(folder)
    labels = os.path.join(where, LABEL_FILE)
    model = TINY.repo if exists(TINY.name) else TINY.name  # a folder of that name hides it
    talk.notice(f"{counted(len(photos), 'photo')} and {LABEL_FILE} are in {folder}")
    if not quiet:
        _show(photos, color)
    command = ["classify", where, "--labels", labels, "-m", model]
    talk.notice(f"$ {shlex.join(['clipcli', *command])}", name=False)
    code = run([*command, "--color", color, *["--quiet"] * quiet, *["--debug"] * debug])
    if code in (ExitCode.OK, ExitCode.SOME_PICTURES_FAILED):
        places = {"folder": shlex.quote(where), "labels": shlex.quote(labels)}
        size = size_text(MODELS[0].download or 0)  # the default's
        for line in NEXT.format(**places, model=model, size=size).splitlines():
            talk.notice(line, name=False)
    raise typer.Exit(code)


def _show(photos: list[Path], color: str) -> None:
    """Draw the photos, if a person sits at a terminal that can."""
    if not (sys.stdout.isatty() and sys.stderr.isatty() and wants_color(sys.stderr, color)):
        return
    from rich.console import Console

    from clipcli.images.thumbnail import thumbnail
    from clipcli.output.preview import HEIGHT, WIDTH, can_draw, sheet
    from clipcli.records import Source

    console = Console(stderr=True, no_color=False)
    if can_draw(console):
        small = [(photo.stem, thumbnail(Source(str(photo)), WIDTH, HEIGHT)) for photo in photos]
        drawn = [(name, pixels) for name, pixels in small if pixels is not None]
        console.print("", sheet(drawn, console.width), "", sep="\n")
