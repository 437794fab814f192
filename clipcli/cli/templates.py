"""`clipcli templates`: the sets of templates there are, and what they hold.

Comes in: names of sets, template files, literals. Goes out: a table of sets, or expanded templates, on stdout.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcli.cli import complete
from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.cli.labels import Json, put, put_json
from clipcli.errors import LabelError
from clipcli.output.text import counted, printable

log = logging.getLogger("clipcli")

LIST_EXAMPLES = opt.epilog(
    "clipcli templates list",
    "clipcli templates list | cut -f 1",
    'clipcli templates list --json | jq -r ".[] | select(.own) | .file"',
)
SHOW_EXAMPLES = opt.epilog(
    "clipcli templates show imagenet80",
    'clipcli templates show pets simple --label "tabby | tabby cat"',
    'clipcli templates show "a {bad|good} photo of {a|the} <>." > my.txt',
)

app = typer.Typer(help="List sets of templates, and see what they hold.", epilog=SHOW_EXAMPLES, no_args_is_help=True)

Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="SET",
        autocompletion=complete.templates,
        help='Template sets, files, or literals such as "a photo of a <>."',
    ),
]
Filling = Annotated[
    str | None,
    opt.OUTPUT.option("--label", "-L", metavar="LABEL", help="Fill them with this label, written as in a label file."),
]


@app.command("list", epilog=LIST_EXAMPLES)
def list_(
    as_json: Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """List the template sets: how many templates, from where, and what for.

    In a pipe: NAME, tab, number, tab, "shipped" or the file, tab, purpose.
    """
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        sets = list(_sets())
        if as_json:
            put_json(sets)
        elif sys.stdout.isatty():
            _print_table(sets, color)
        else:
            put("\t".join(_columns(one)) for one in sets)
        talk.detail(f"{counted(len(sets), 'set')}, your own go to {_own_folder()}")


@app.command(epilog=SHOW_EXAMPLES)
def show(
    sets: Specs,
    filling: Filling = None,
    as_json: Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Show templates, expanded, one a line; or the prompts of a label.

    A weight other than 1 stands before its template, with a tab between: what
    comes out is a template file again.
    """
    from clipcli.zeroshot import labels, templates
    from clipcli.zeroshot.prompts import fill

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        found = templates.read(sets)
        expanded = found if filling is None else fill(labels.from_names([filling]), found)
        if as_json:
            put_json({"text": one.text, "weight": one.weight} for one in expanded)
        else:
            shown = printable if sys.stdout.isatty() else str
            put(templates.as_line(shown(one.text), one.weight) for one in expanded)
        talk.detail(counted(len(expanded), "template" if filling is None else "prompt"))


def _own_folder() -> Path:
    from clipcli.paths import config_dir

    return config_dir() / "prompts"


def _sets() -> Iterator[dict[str, Any]]:
    """Every set; one that can't be read has no number, and a notice."""
    from clipcli.zeroshot import templates
    from clipcli.zeroshot.files import read_text

    for name, path in templates.sets().items():
        number = purpose = None
        try:
            number = len(templates.read([name]))
            purpose = re.search(r"\A\s*#[ \t]*(.*?)[ \t]*$", read_text(path), re.MULTILINE)
        except LabelError as error:
            log.warning("%s", error.message)
        yield {
            "name": name,
            "templates": number,
            "own": path.parent == _own_folder(),
            "file": str(path),
            "purpose": purpose[1] if purpose else "",
        }


def _columns(one: dict[str, Any]) -> list[str]:
    number = "?" if one["templates"] is None else str(one["templates"])
    where = one["file"] if one["own"] else "shipped"
    return [re.sub(r"[\t\n\r]", " ", column) for column in (one["name"], number, where, one["purpose"])]


def _print_table(sets: list[dict[str, Any]], color: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("set", style="bold", no_wrap=True)
    table.add_column("templates", justify="right")
    table.add_column("from", style="dim")
    table.add_column("for")
    for one in sets:
        table.add_row(*(Text(printable(column)) for column in _columns(one)))
    painted = wants_color(sys.stdout, color)
    Console(file=sys.stdout, color_system="standard" if painted else None).print(table)
