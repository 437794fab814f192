"""`clipcli cache`: what is kept between runs, and how to get rid of it."""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.columns import aligned
from clipcli.cli.console import Talk
from clipcli.cli.usage import propose
from clipcli.errors import ExitCode, UsageError
from clipcli.paths import store_file

if TYPE_CHECKING:
    from clipcli.store.inspect import Selection, Survey

EXAMPLES = opt.epilog(
    "clipcli cache info",
    "clipcli cache clear --older-than 30d --dry-run",
    "clipcli cache clear --kind prompt --model 3f9a --yes",
    "clipcli cache prune --max-size 500MB --yes",
    "du -h $(clipcli cache path)",
)

KINDS = {
    "classifier": "class weights of label lists",
    "digest": "fingerprints of weight files",
    "embedding": "embeddings of pictures",
    "picture": "digests of pictures' files",
    "prompt": "prompt vectors",
    "damaged": "a damaged store that was set aside",
    "int8": "image towers for --precision int8",
}
_DAYS = {"h": 1 / 24, "d": 1, "w": 7, "y": 365}

Kind = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Only entries of this kind, as info lists them.",
        autocompletion=lambda incomplete: [kind for kind in KINDS if kind.startswith(incomplete)],
    ),
]
Fingerprint = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="DIGITS", help="Only what the tower made whose fingerprint (models info) begins so."
    ),
]
OlderThan = Annotated[
    str | None, typer.Option(metavar="AGE", help="Only what wasn't used for so long: 12h, 30d, 8w, 1y.")
]
MaxSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Keep values of so many bytes (500MB, 2GiB); those not used for longest go."),
]
Yes = Annotated[bool, opt.flag("--yes", "-y", help="Don't ask.")]
DryRun = Annotated[bool, opt.flag("--dry-run", help="Say what would go, and delete nothing.")]

app = typer.Typer(
    help="What is kept between runs: classifiers, prompt vectors, embeddings, fingerprints of files.",
    epilog=EXAMPLES,
    no_args_is_help=True,
)


@app.command(epilog=EXAMPLES)
def info(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """List what is kept, by kind and model."""
    from clipcli.store.inspect import survey
    from clipcli.weights.catalog import size_text

    found = survey(store_file())
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
        return
    typer.echo("\n".join(aligned([[str(found.path), size_text(found.size)]])))
    typer.echo("\n".join(_table(found)) or "nothing is kept yet")


@app.command(epilog=EXAMPLES)
def path() -> None:
    """Print where the store lies. CLIPCLI_CACHE_DIR moves it."""
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes(store_file()) + b"\n")


@app.command(epilog=EXAMPLES)
def clear(
    kind: Kind = None,
    model: Fingerprint = None,
    older_than: OlderThan = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Delete what is kept: all of it, or what meets every condition given."""
    from clipcli.store.inspect import Selection, survey

    chosen = Selection(kind, model.lower() if model else None, _before(older_than))
    if kind is not None and kind not in KINDS:
        known = dict.fromkeys([*KINDS, *(group.kind for group in survey(store_file()).groups)])
        if kind not in known:
            raise UsageError(f'no kind "{kind}"', hint=propose(kind, known) or f"there are: {', '.join(known)}")
    _delete(chosen, yes, dry_run, Talk(quiet=quiet, color=color))


@app.command(epilog=EXAMPLES)
def prune(
    max_size: MaxSize = None,
    older_than: OlderThan = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Delete what wasn't used for long, until little enough is left."""
    from clipcli.store.inspect import Selection

    if max_size is None and older_than is None:
        raise UsageError("nothing says what to delete", hint="give --max-size 500MB or --older-than 30d")
    keep = None if max_size is None else opt.byte_count(max_size, "--max-size")
    _delete(Selection(before=_before(older_than), keep=keep), yes, dry_run, Talk(quiet=quiet, color=color))


def _delete(chosen: Selection, yes: bool, dry_run: bool, talk: Talk) -> None:
    """Ask, delete and say what became of it."""
    from clipcli.store.inspect import remove, survey
    from clipcli.weights.catalog import size_text

    if dry_run or not yes:
        found = survey(store_file(), chosen)
        what = f"{_what(found.entries, len(found.beside))}, {size_text(found.value_bytes)}"
        if not (found.entries or found.beside):
            talk.notice("nothing to delete")
            return
        if dry_run:
            typer.echo("\n".join(_table(found)))
            talk.notice(f"would delete {what}")
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            hint = "add --yes, or --dry-run to see what it is"
            raise UsageError(f"can't ask whether to delete {what}: this is no terminal", hint=hint)
        if not _confirmed(f"delete {what}?"):
            talk.notice("nothing was deleted")
            raise typer.Exit(ExitCode.FAILED)
    with talk.listening(), talk.working("deleting"):
        removed = remove(store_file(), chosen)
    if removed.entries or removed.files:
        what = _what(removed.entries, removed.files)
        talk.notice(f"{what} deleted, {size_text(removed.freed)} given back to the disk")
    else:
        talk.notice("nothing to delete")


def _confirmed(question: str) -> bool:
    """The answer of whoever sits there. typer.confirm won't do: a part of it goes to stdout."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer:
        raise typer.Abort
    return answer.strip().lower() in ("y", "yes")


def _what(entries: int, files: int) -> str:
    """`3 entries and 1 file`."""
    parts = [(entries, "entry", "entries"), (files, "file", "files")]
    return " and ".join(f"{number:,} {one if number == 1 else many}" for number, one, many in parts if number)


def _table(found: Survey) -> list[str]:
    """Kind, entries, bytes, model and last use; nothing where nothing is."""
    from clipcli.weights.catalog import size_text

    rows = [
        [group.kind, f"{group.entries:,}", size_text(group.size), group.model[:8] or "-", _day(group.newest)]
        for group in found.groups
    ] + [[other.kind, "-", size_text(other.size), other.model[:8] or "-", _day(other.used)] for other in found.beside]
    for row in rows:
        row.append(KINDS.get(row[0], ""))
    head = ["kind", "entries", "values", "model", "last used", ""]
    return list(aligned([head, *rows], right=frozenset({1, 2}))) if rows else []


def _plain(found: Survey) -> dict[str, object]:
    """The same for programs."""
    return {
        "path": str(found.path),
        "size": found.size,
        "groups": [
            {
                "kind": group.kind,
                "model": group.model or None,
                "entries": group.entries,
                "size": group.size,
                "first_used": _moment(group.oldest),
                "last_used": _moment(group.newest),
            }
            for group in found.groups
        ],
        "beside": [
            {
                "kind": other.kind,
                "model": other.model or None,
                "path": str(other.files[0]),
                "size": other.size,
                "last_used": _moment(other.used),
            }
            for other in found.beside
        ],
    }


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).isoformat()


def _before(age: str | None) -> float | None:
    """`30d` as the moment that lies so far back."""
    if age is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdwy])", age.strip().lower())
    if not found:
        raise UsageError(f'--older-than "{age}" is no age', hint="write 12h, 30d, 8w or 1y")
    return time.time() - float(found[1]) * _DAYS[found[2]] * 86_400
