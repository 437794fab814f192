"""Settings files meet the commands' options: the defaults that Typer gets, and where each value came from.

In: the root command, `clipcli.toml` and `config.toml`. Out: a map of defaults by command, and for `doctor` every
option's value with its source. What no command has, or takes, is a UsageError with file:line: nothing is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from clipcli import settings
from clipcli.cli.usage import did_you_mean, explain, propose
from clipcli.errors import UsageError
from clipcli.settings import SettingsFile

UNSET = frozenset({"cache"})  # what deletes takes nothing from a file, and its --model is a fingerprint

APART = "train"  # its options are a run's recipe: what is set for all commands isn't meant for it, but for these
APART_BUT_FOR = frozenset({"device", "workers", "offline", "color", "quiet", "verbose", "debug"})

Address = tuple[str, ...]  # of a command: ("models", "list")
Node = Any  # a command, group or option: classes that Typer doesn't export


@dataclass(frozen=True)
class Given:
    """A value and the place where it was written."""

    value: Any
    source: str


@dataclass(frozen=True)
class Effective:
    """What an option is when nobody types it; `name` is `classify.templates` where commands differ."""

    name: str
    value: Any
    source: str
    variable: str | None


def read_defaults(root: Node) -> dict[Address, dict[str, Given]]:
    """By command, the options that the settings files set, under their long names. Raises UsageError."""
    found: dict[Address, dict[str, Given]] = {address: {} for address in _commands(root)}
    for path in settings.places():
        if file := settings.read(path):
            for address, name, value in _settle(file, file.table, (), dict(_commands(root))):
                found[address][name] = value
    return found


def default_map(root: Node) -> dict[str, Any]:
    """The same, as Typer takes it. Raises UsageError."""
    nested: dict[str, Any] = {}
    given = read_defaults(root)
    for address, command in _commands(root).items():
        level = nested
        for name in address:
            level = level.setdefault(name, {})
        level.update({_options(command)[name].name: one.value for name, one in given[address].items()})
    return nested


def effective(root: Node, typed: Mapping[str, Any], given: dict[Address, dict[str, Given]]) -> list[Effective]:
    """Every option that may be set: its value and source, for one run in which `typed` were typed."""
    known: dict[str, dict[Address, tuple[Any, str, str | None]]] = {}
    for address, command in _commands(root).items():
        for name, option in _options(command).items():
            variable = option.envvar if isinstance(option.envvar, str) else None
            if name in typed:
                value, source = typed[name], "option"
            elif variable and os.environ.get(variable):
                value, source = os.environ[variable], f"environment {variable}"
            elif name in given.get(address, {}):
                value, source = given[address][name].value, given[address][name].source
            else:
                value, source = option.default, "built-in"
            shared = name if _is_shared(address, name) else f"{APART}.{name}"
            known.setdefault(shared, {})[address] = (value, source, variable)
    found = []
    for name, by_command in sorted(known.items()):
        alike = len({repr(_alone(value)) + repr(rest) for value, *rest in by_command.values()}) == 1
        for address, entry in list(by_command.items())[: 1 if alike else None]:
            found.append(Effective(".".join([*([] if alike else address), name.replace("_", "-")]), *entry))
    return found


def _alone(value: Any) -> Any:
    """A list of one as that one: where it may be repeated, an option means the same."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def variables(root: Node) -> set[str]:
    """The names of all environment variables that stand for an option."""
    options = (option for command in _commands(root).values() for option in _options(command).values())
    return {option.envvar for option in options if isinstance(option.envvar, str)}


def _commands(node: Node, address: Address = ()) -> dict[Address, Node]:
    """All commands below a group that may have defaults, sub-commands of groups included."""
    found: dict[Address, Node] = {}
    for name, child in node.commands.items():
        here = (*address, name)
        if here[0] not in UNSET:
            found |= _commands(child, here) if hasattr(child, "commands") else {here: child}
    return found


def _is_shared(address: Address, name: str) -> bool:
    """Whether a setting for all commands reaches this one's option."""
    return address[0] != APART or name in APART_BUT_FOR


def _options(command: Node) -> dict[str, Node]:
    """The options of a command that may be set, under their long names with _ for -."""
    options = (param for param in command.params if param.param_type_name == "option" and param.name != "help")
    named = {max(option.opts, key=len).lstrip("-").replace("-", "_"): option for option in options}
    return {name: option for name, option in named.items() if name not in settings.TYPED_ONLY}


def _settle(
    file: SettingsFile, table: dict[str, Any], keys: Address, commands: dict[Address, Node]
) -> Iterator[tuple[Address, str, Given]]:
    """Each value of a table for each command that takes it; tables of commands after the values that all share."""
    for key, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
        name, where = key.replace("-", "_"), file.where(*keys, key)
        below = {address: node for address, node in commands.items() if address[len(keys) : len(keys) + 1] == (key,)}
        apart = {address for address in commands if not (keys or _is_shared(address, name))}
        takers = {
            address: node for address, node in commands.items() if name in _options(node) and address not in apart
        }
        if isinstance(value, dict) and below:
            yield from _settle(file, value, (*keys, key), below)
        elif name in settings.TYPED_ONLY or (*keys, key)[0] in UNSET:
            what = f"{key} can't be set in a file: it lets a run write or delete"
            raise UsageError(f"{where}: {what}", hint="leave it out; such things are typed")
        elif isinstance(value, dict):
            hint = propose(key, {address[len(keys)] for address in commands if len(address) > len(keys)})
            raise UsageError(
                f"{where}: there is no command {' '.join((*keys, key))}", hint=hint or "see clipcli --help"
            )
        elif not takers:
            known = {
                option.replace("_", "-")
                for address, node in commands.items()
                for option in _options(node)
                if keys or _is_shared(address, option)
            }
            owner = " ".join(keys)
            what = f"{owner or 'clipcli'} has no option {key}"
            raise UsageError(f"{where}: {what}", hint=propose(key, known) or f"see clipcli {owner or 'COMMAND'} --help")
        else:
            yield from _accepted(name, file.at_home(name, value), where, takers)


def _accepted(name: str, value: Any, where: str, takers: dict[Address, Node]) -> Iterator[tuple[Address, str, Given]]:
    """`value` for each command that takes it. Raises UsageError where none does."""
    refused: list[UsageError] = []
    for address, command in takers.items():
        try:
            checked = _checked(address, command, _options(command)[name], value, where)
        except UsageError as error:
            refused.append(error)
        else:
            yield address, name, Given(checked, where)
    if len(refused) == len(takers):
        raise refused[0]


def _checked(address: Address, command: Node, option: Node, value: Any, where: str) -> Any:
    """`value` as Typer takes it as a default. Raises UsageError where it isn't of the option's type."""
    name = max(option.opts, key=len).lstrip("-")
    page = f"see clipcli {' '.join(address)} --help"
    if isinstance(value, list) and not option.multiple:
        raise UsageError(f"{where}: {name} takes one value, not a list", hint="leave out the brackets")
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) != option.is_flag for item in items):
        kind = "true or false" if option.is_flag else "a value, not true or false"
        raise UsageError(f"{where}: {name} takes {kind}", hint=page)
    typed = [str(item) if isinstance(item, float) else item for item in items]  # else 2.5 would become 2 in silence
    value = typed if option.multiple else typed[0]
    try:
        result = option.process_value(typer.Context(command), value)
    except typer.BadParameter as error:
        what, near = explain(error.message)
        raise UsageError(f"{where}: {name}: {what}", hint=did_you_mean(near) or page) from error
    results = result if isinstance(result, list | tuple) else [result]
    for item, as_typed in zip(items, results, strict=True):
        if isinstance(as_typed, str | os.PathLike) and not isinstance(item, str):
            raise UsageError(f"{where}: {name} takes text", hint=f'write "{item}"')
    return value
