"""Typer's sentences about wrong use, in our form: one lower-case line, the nearest name in the hint.

In: what Typer raised, or the sentence of one of its checks. Out: UsageError. Prints nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import typer

from clipcli.errors import UsageError


def usage_error(error: typer.TyperException) -> UsageError:
    """What is wrong on one line; in the hint the nearest name, or where to look."""
    what, near = explain(error.format_message())
    context = getattr(error, "ctx", None)
    page = context.command_path if context else "clipcli"
    return UsageError(what, hint=did_you_mean(near) or f"see {page} --help")


def explain(message: str) -> tuple[str, list[str]]:
    """A sentence of Typer without capital letter and final stop, and the names it may have meant."""
    message = re.sub("is not a valid (int|float)(eger)?( range)?", _number, message).strip().rstrip(".")
    message = " ".join((message[:1].lower() + message[1:]).split()).replace(". Choose from:", ": choose from")
    if found := re.fullmatch(r"(.*?)\.? (?:\(Possible options: (.*)\)|Did you mean (.*)\?)", message):
        return found[1], (found[2] or found[3]).replace("'", "").split(", ")
    if found := re.search(r"'([^']*)' is not one of (.*)$", message):
        return message, difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]))
    return message, []


def _number(found: re.Match[str]) -> str:
    return "is no whole number" if found[1] == "int" else "is no number"


def did_you_mean(names: Iterable[str]) -> str | None:
    """The hint that proposes `names`; None without any."""
    listed = " or ".join(names)
    return f"did you mean {listed}?" if listed else None


def propose(name: str, known: Iterable[str], most: int = 1) -> str | None:
    """The hint that proposes what comes nearest to `name` among `known`, if anything does."""
    return did_you_mean(difflib.get_close_matches(name, list(known), most))
