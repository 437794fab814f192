"""The table of contents of the command line, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from clipcli import __version__
from clipcli.cli import build_classifier, classify
from clipcli.cli.console import say_error
from clipcli.cli.options import epilog
from clipcli.errors import ClipcliError, ExitCode, UsageError

app = typer.Typer(
    name="clipcli",
    help="Sort pictures by words: zero-shot image classification with CLIP.",
    epilog=epilog(
        "clipcli classify photos/ -m models/ViT-B-32 -L cat -L dog",
        "clipcli build-classifier labels.txt -m models/ViT-B-32 -o my.safetensors",
        'find . -name "*.jpg" -print0 | clipcli classify -0 -l labels.txt -f jsonl | jq .label',
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("classify", epilog=classify.EXAMPLES)(classify.classify)
app.command("build-classifier", epilog=build_classifier.EXAMPLES)(build_classifier.build_classifier)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"clipcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None: ...


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run `args` and return the exit code; known errors become one line on stderr."""
    try:
        result = app(args, prog_name="clipcli", standalone_mode=False)
        sys.stdout.flush()
        return int(result or ExitCode.OK)
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        if message:  # empty: the help page has been shown in its place
            say_error(UsageError(message[:1].lower() + message[1:], hint="see clipcli --help"))
        return error.exit_code
    except ClipcliError as error:
        if "--debug" in args:
            traceback.print_exc()
        say_error(error)
        return error.exit_code
    except Exception:  # a bug: its traceback is what we need to mend it
        traceback.print_exc()
        say_error(ClipcliError("this is a bug in clipcli: please report it with the lines above"))
        return ExitCode.FAILED
