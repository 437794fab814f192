"""What the shell may complete a word to, beyond commands, options and fixed choices.

In: the word so far. Out: what fits; nothing where the shell's own completion of paths serves better. Called at every
press of a key: nothing heavy is imported. A shell evaluates what it gets, so names out of files are offered only if
no shell could take a character of them for anything else.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

import typer

_HARMLESS = re.compile(r"[\w ./+,=@-]+")
_CHECKPOINTS = (".safetensors", ".pt", ".bin")
_CONFIGS = ("open_clip_config.json", "config.json")


def models(incomplete: str) -> list[str]:
    """Short names of the catalogue, other names where those don't fit, and checkpoints on this disk beside them."""
    from clipcli.weights.catalog import MODELS

    names = _offer((entry.name for entry in MODELS), incomplete)
    names = names or _offer((alias for entry in MODELS for alias in entry.aliases), incomplete)
    return names + _offer(_checkpoints(incomplete), incomplete) if names else []


def templates(incomplete: str) -> list[str]:
    """Template sets, shipped and the user's own."""
    from clipcli.zeroshot.templates import sets

    return _offer(sets(), incomplete)


def devices(incomplete: str) -> list[str]:
    """Devices by name; which of them are there, only torch could say."""
    return _offer(("auto", "cpu", "cuda", "mps"), incomplete)


def labels(context: typer.Context, incomplete: str) -> list[str]:
    """The labels that were given before on the same line."""
    from clipcli.errors import ClipcliError
    from clipcli.zeroshot.labels import from_names, read

    logging.disable(logging.WARNING)  # this process completes one word and ends
    try:
        found = [label for file in context.params.get("labels") or [] for label in read(file)]
        found += from_names(context.params.get("label") or [])
    except ClipcliError:  # said by the run itself; a press of a key is no place for it
        return []
    return _offer((label.name for label in found), incomplete)


def _checkpoints(incomplete: str) -> Iterable[str]:
    """Files and folders in the folder of `incomplete` that look like checkpoints."""
    folder = os.path.dirname(incomplete)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.endswith(_CHECKPOINTS) or any(
            os.path.isfile(os.path.join(entry.path, name)) for name in _CONFIGS
        ):
            yield os.path.join(folder, entry.name)


def _offer(names: Iterable[str], incomplete: str) -> list[str]:
    fitting = [name for name in names if name.startswith(incomplete) and _HARMLESS.fullmatch(name)]
    if os.environ.get("_CLIPCLI_COMPLETE") == "complete_bash":  # the other shells quote by themselves
        return [name.replace(" ", "\\ ") for name in fitting]
    return fitting
