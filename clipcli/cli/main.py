"""The table of contents of the command line, and the one place where errors become exit codes.

Where only one command can be meant, no other is imported: building all takes as long as answering for a picture.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer

from clipcli import __version__, settings
from clipcli.cli.console import say_error
from clipcli.cli.defaults import default_map
from clipcli.cli.options import epilog
from clipcli.cli.usage import usage_error
from clipcli.errors import ClipcliError, ExitCode, UsageError, cannot_write

# In the order of the help page. Each has a module of its name, which holds a group (`app`) or a function of that name.
COMMANDS = (
    "classify",
    "build-classifier",
    "embed",
    "compare",
    "eval",
    "calibrate",
    "probe",
    "advise",
    "demo",
    "train",
    "models",
    "labels",
    "templates",
    "cache",
    "bench",
    "doctor",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"clipcli {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None: ...


def application(*names: str) -> typer.Typer:
    """The whole command line, or so much of it as these commands are."""
    app = typer.Typer(
        name="clipcli",
        help="Sort pictures by words: zero-shot image classification with CLIP.",
        epilog=epilog(
            "clipcli demo  # nine photos and a small model: no download",
            "clipcli classify photos/ -L cat -L dog",
            "clipcli build-classifier labels.txt -o my.safetensors",
            'find . -name "*.jpg" -print0 | clipcli classify -0 -l labels.txt -f jsonl | jq .label',
        ),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for name in names or COMMANDS:
        called = name.replace("-", "_")
        module = import_module(f"clipcli.cli.{called}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name, epilog=module.EXAMPLES)(getattr(module, called))
    return app


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    gc.disable()  # what starting up makes lives on; `Talk.listening` turns it on again for work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch is imported: no spinning beside other work
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # as numpy is: wait 2^20 cycles for a product, not 2^26
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: its number must not become another file's
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- for as long as we live
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run `args` and return the exit code; known errors become one line on stderr."""
    color = next((b for a, b in pairwise([*args, "auto"]) if a == "--color" and b in ("always", "never")), "auto")
    try:
        root = typer.main.get_command(application(*_meant(args)))
        result = root(args, prog_name="clipcli", standalone_mode=False, default_map=_defaults(root, args))
        sys.stdout.flush()
        return int(result or ExitCode.OK)
    except SystemExit as error:  # Typer leaves so when completion is done, and with 1 when the pipe was closed
        if error.code != 1 or "_CLIPCLI_COMPLETE" in os.environ:  # fish asks by exit code
            raise
        _drop_stdout()
        return ExitCode.OK
    except BrokenPipeError:
        _drop_stdout()
        return ExitCode.OK
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except typer.TyperException as error:
        if error.format_message():  # empty: the help page has been shown in its place
            say_error(usage_error(error), color)
        return error.exit_code
    except ClipcliError as error:
        if "--debug" in args:
            traceback.print_exc()
        say_error(error, color)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _bug()
        say_error(cannot_write("stdout", error), color)
        _drop_stdout()
        return ExitCode.FAILED
    except Exception:
        return _bug()


def _bug() -> int:
    """An unknown error: its traceback is what we need to mend it."""
    traceback.print_exc()
    say_error(ClipcliError("this is a bug in clipcli: please report it with the lines above"))
    return ExitCode.FAILED


def _meant(args: list[str]) -> list[str]:
    """The one command that is needed; none where all of them are, to be listed, proposed, or given their settings."""
    alone = args and args[0] in COMMANDS and args[0] != "doctor" and not any(map(os.path.lexists, settings.places()))
    return args[:1] if alone else []


def _defaults(root: Any, args: list[str]) -> dict[str, Any]:
    """What settings files say. A broken one keeps nobody from reading help, or from asking the doctor."""
    try:
        return default_map(root)
    except UsageError:
        if not args or args[0].startswith("-") or args[0] == "doctor" or {"--help", "-h"} & {*args}:
            return {}
        raise


def _drop_stdout() -> None:
    """Let the rest go nowhere: the interpreter must not flush it into a closed pipe or onto a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
