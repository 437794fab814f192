"""`clipcli compare`: what another label, template or model did, from the rows of two runs.

A report on a terminal; in a pipe or a file the labels that changed, by pairs. No picture is opened, no model loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.cli.streams import check_new_file
from clipcli.errors import UsageError, writing

if TYPE_CHECKING:
    from clipcli.tasks.compare import Run

EXAMPLES = opt.epilog(
    "clipcli compare seven.jsonl eighty.jsonl",
    "clipcli compare old.csv new.csv | head",
    "clipcli compare old.csv new.csv --changed --print0 | xargs -0 -r cp -t look-at/",
    'clipcli compare old.tsv new.tsv --json | jq ".agreement, .kappa"',
    "clipcli classify photos/ -l labels.txt -m ViT-B-16-openai -f jsonl | clipcli compare old.jsonl -",
)

A = Annotated[str, typer.Argument(metavar="A", help="Rows of a run: jsonl, csv or tsv.")]
B = Annotated[str, typer.Argument(metavar="B", help="Rows of another; - for stdin.")]
Top = Annotated[int, opt.OUTPUT.option("--top", metavar="N", min=1, help="Lines of each kind in a report.")]
Changed = Annotated[bool, opt.OUTPUT.flag("--changed", help="Print the paths alone whose label changed.")]
Print0 = Annotated[bool, opt.OUTPUT.flag("--print0", help="With --changed: NUL after each path, for xargs -0.")]
Json = Annotated[bool, opt.OUTPUT.flag("--json", help="One JSON object.")]
Output = Annotated[
    Path | None, opt.OUTPUT.option("--output", "-o", metavar="FILE", help="Write to FILE, not to stdout.")
]


def compare(
    a: A,
    b: B,
    top: Top = 10,
    changed: Changed = False,
    print0: Print0 = False,
    as_json: Json = False,
    output: Output = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Compare the rows of two runs over the same pictures, matched by path.

    On a terminal a report. In a pipe a line for each pair of labels, the most
    frequent first: COUNT, LABEL in A, LABEL in B, and the path of an example,
    with tabs between. Exit code 0, however much differs.
    """
    output = None if output == Path("-") else output
    if print0 and not changed:
        raise UsageError("--print0 is for paths alone", hint="add --changed")
    if changed and as_json:
        raise UsageError("--changed and --json exclude each other", hint="the object has the paths too: .changed")
    if a == b == "-":
        raise UsageError("stdin can't be read twice", hint="give - once, and a file")
    if output is not None:
        check_new_file(output, force=force, read=["/dev/stdin" if name == "-" else name for name in (a, b)])
    from clipcli.cli import comparison as show
    from clipcli.tasks.compare import compare as task

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        with talk.working("comparing"):
            found = task(_run(a), _run(b), top=top)
        end = b"\0" if print0 else b"\n"
        if as_json or (output and output.suffix == ".json" and not changed):
            _write([show.as_json(found, a, b).encode()], end, output)
        elif changed:
            _write((os.fsencode(one.path) for one in found.changed), end, output)
        elif output or not sys.stdout.isatty():
            _write(map(show.columns, found.flips), end, output)
        else:
            painted = wants_color(sys.stdout, color)
            _write((line.encode() for line in show.report(found, a, b, top, painted)), end, None)
            return
        for line in show.summary(found, a, b):
            talk.notice(line)


def _run(name: str) -> Run:
    from clipcli.output.rows import read_rows

    return read_rows(sys.stdin.buffer, name="stdin") if name == "-" else name


def _write(lines: Iterable[bytes], end: bytes, output: Path | None) -> None:
    """Write lines to `output`, or to stdout. Raises OutputError."""
    with writing(output or "stdout"), output.open("wb") if output else nullcontext(sys.stdout.buffer) as stream:
        stream.writelines(line + end for line in lines)
        stream.flush()
