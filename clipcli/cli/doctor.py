"""`clipcli doctor`: what is found on this machine, and a warning of what is known to go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipcli import settings
from clipcli.cli import options as opt
from clipcli.cli.columns import aligned
from clipcli.errors import ExitCode
from clipcli.output.text import counted, printable, tilde
from clipcli.paths import config_dir

if TYPE_CHECKING:
    from clipcli.cli.checkup import Checkup

EXAMPLES = opt.epilog(
    "clipcli doctor",
    "clipcli doctor --devices",
    "clipcli doctor --json > report.json",
    'clipcli doctor --json | jq ".settings[] | select(.source != \\"built-in\\")"',
)

Devices = Annotated[bool, opt.flag("--devices", help="Ask torch which devices are there (slow).")]
Json = Annotated[bool, opt.OUTPUT.flag("--json", help="Print JSON, for a bug report.")]


def doctor(
    context: typer.Context,
    model: opt.Model = None,
    device: opt.Device = "auto",
    devices: Devices = False,
    as_json: Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show versions, devices, caches and every setting with its source, and warn of what is known to go wrong.

    Exit code 1: something is broken (the store, a settings file, a package that is missing).
    """
    typed = {name: context.params[name] for name in ("model", "device") if opt.came_from(context, name, "COMMANDLINE")}
    from clipcli.cli.checkup import examine

    found = examine(context.find_root().command, typed, devices=devices or "device" in typed)
    typer.echo(json.dumps(_plain(found), indent=2) if as_json else "\n".join(_page(found)))
    raise typer.Exit(ExitCode.FAILED if found.is_broken else ExitCode.OK)


def _plain(found: Checkup) -> dict[str, Any]:
    """The report for programs."""
    report = {**vars(found), "findings": [finding._asdict() for finding in found.findings]}
    report["settings"] = [
        {"name": one.name, "value": _text(one.value), "source": tilde(one.source)} for one in found.settings
    ]
    return report


def _page(found: Checkup) -> Iterator[str]:
    """The report for people."""
    from clipcli.weights.catalog import size_text

    yield f"clipcli {found.clipcli}, Python {found.python}, {found.platform}"
    memory = size_text(found.memory) if found.memory else "unknown"
    yield f"{counted(found.cpus['usable'], 'CPU')} of {found.cpus['all']}, {memory} of memory"
    yield from _section("packages", [[name, version or "-"] for name, version in found.packages.items()])
    seen = found.devices
    devices = [["found", device] for device in seen["found"]] if seen else [["not looked at; use --devices"]]
    yield from _section("devices", [*devices, *([[seen["asked"], f"-> {seen['chosen']}"]] if seen else [])])
    store, models = found.caches["store"], found.caches["models"]
    held = "unreadable" if store["size"] is None else f"{size_text(store['size'])}, {store['entries']:,} entries"
    hub = f"{size_text(models['size'])}, {models['repositories']:,} repositories, {size_text(models['free'])} free"
    yield from _section("caches", [["store", store["path"], held], ["models", models["path"], hub]])
    yield from _section("environment", [[name, value] for name, value in found.environment.items()])
    order = f"option > environment > {settings.LOCAL} > {tilde(config_dir() / 'config.toml')}"
    shown = [one for one in found.settings if one.source != "built-in" or one.variable]
    yield from _section(f"settings ({order})", [[one.name, _shown(one.value), tilde(one.source)] for one in shown])
    yield f"  and {len(found.settings) - len(shown)} more as built in; --json lists them"
    if found.findings:
        yield ""
    for finding in found.findings:
        yield printable(f"{finding.level}: {finding.text}")


def _section(title: str, rows: list[list[str]]) -> Iterator[str]:
    if rows:
        yield from ("", title, *aligned(rows, indent="  "))


def _text(value: Any) -> Any:
    """A value as a settings file would have it; None where there is none."""
    if isinstance(value, list | tuple):
        return [_text(item) for item in value] or None
    return value if value is None or isinstance(value, bool | int | float) else tilde(str(value))


def _shown(value: Any) -> str:
    """A value for people: lists as they would be typed."""
    plain = _text(value)
    if plain is None or isinstance(plain, bool):
        return {None: "-", True: "yes", False: "no"}[plain]
    return " ".join(map(str, plain)) if isinstance(plain, list) else str(plain)
