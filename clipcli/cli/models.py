"""`clipcli models`: which there are, getting them, what they are, and whether this machine computes them right."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipcli.cli import complete, export
from clipcli.cli import options as opt
from clipcli.cli.columns import aligned
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice
from clipcli.errors import ExitCode, ModelError

if TYPE_CHECKING:
    from clipcli.tasks.verify import Check
    from clipcli.weights.describe import Fact

EXAMPLES = opt.epilog(
    "clipcli models list",
    "clipcli models pull ViT-L-14-datacomp",
    "clipcli models pull laion/CLIP-ViT-B-32-laion2B-s34B-b79K@main",
    "clipcli models info ViT-B/32",
    "clipcli models verify --device cuda --precision fp16",
    "clipcli models verify --precision int8",
)

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME",
        help="A name of models list, or org/name of a model on the Hub, perhaps with @revision.",
        autocompletion=complete.models,
    ),
]
Name = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME|DIR",
        envvar="CLIPCLI_MODEL",
        help="As --model elsewhere: a name, org/name on the Hub, or a path. Without it, the default model.",
        autocompletion=complete.models,
    ),
]
Pictures = Annotated[
    Path | None,
    opt.INPUT.option(
        "--picture",
        metavar="DIR",
        help="Compare with published outputs too, for the pictures in DIR (CLIP.png, franz-kafka.jpg).",
    ),
]

app = typer.Typer(
    help="Models by name: list them, get them, look into them, check them.", epilog=EXAMPLES, no_args_is_help=True
)


@app.command("list", epilog=EXAMPLES)
def list_models(
    as_json: opt.Json = False, quiet: opt.Quiet = False, color: opt.Color = "auto", debug: opt.Debug = False
) -> None:
    """List the models that have a short name. "here": it is downloaded, or shipped with clipcli."""
    from clipcli.weights.catalog import DEFAULT, MODELS
    from clipcli.weights.describe import overview

    talk, rows = Talk(quiet=quiet, color=color), [overview(entry) for entry in MODELS]
    if as_json:
        typer.echo(json.dumps([row | {"default": row["name"] == DEFAULT} for row in rows], indent=2))
        return
    titles = ("name", "parameters", "download", "pixels", "top-1", "licence", "here")
    typer.echo("\n".join(aligned([titles, *map(_cells, rows)], right=frozenset({1, 2, 3, 4}))))
    here = sum(row["path"] is not None for row in rows)
    talk.notice(
        f"{len(rows)} models, {here} here; without --model it is {DEFAULT}. Any CLIP on the Hub works: org/name"
    )


@app.command(epilog=EXAMPLES)
def pull(
    names: Names,
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Download models, and print where each lies. What is here already is not looked up again."""
    from clipcli.weights.fetch import resolve

    for name in names:
        ModelChoice(name, "cpu", "fp32", None, None, None, no_cache=True).check()
    with Talk(quiet=quiet, color=color).listening() as talk:
        for name in names:
            found = resolve(name, progress=talk.live)
            if found.entry and found.entry.shipped:
                talk.notice(f"{found.name} comes with clipcli: nothing to download")
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(found.path) + b"\n")


@app.command(epilog=EXAMPLES)
def info(
    name: Name = None,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    as_json: opt.Json = False,
    no_cache: opt.NoCache = False,
    cache_size: opt.CacheSize = None,
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Say what a model is, and where each fact was read. Nothing is downloaded for it."""
    choice = ModelChoice(name, "cpu", "fp32", activation, head_width, vocabulary, no_cache, True, cache_size)
    with Talk(quiet=quiet, color=color).listening() as talk:
        facts = list(_facts(choice, talk))
    if as_json:
        sources = {fact.name: fact.source for fact in facts}
        typer.echo(json.dumps({fact.name: fact.value for fact in facts} | {"sources": sources}, indent=2))
    else:
        typer.echo("\n".join(aligned([(fact.name.replace("_", " "), fact.source, str(fact)) for fact in facts])))


@app.command(epilog=EXAMPLES)
def verify(
    name: Name = None,
    picture: Pictures = None,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    runtime: opt.RuntimeOf = "auto",
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Check that this machine computes a model right: against fp32 on the CPU, one input at a time.

    The inputs are made here: pictures and token ids from fixed seeds. Exit code 1: a deviation is larger than rounding
    explains.
    """
    choice = ModelChoice(name, device, precision, activation, head_width, vocabulary, True, offline, runtime=runtime)
    choice.check()
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        from clipcli.tasks import verify as task

        with talk.working("loading the model"):
            model = choice.open(talk)
        published = task.published_for(model) if picture else ()
        with talk.working("computing everything twice"):
            checks = list(task.verify(model))
            checks += task.verify_pictures(model, published, picture) if picture else ()
        on = model.where
    passed = all(check.passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"deviation": _finite(check.deviation), "passed": check.passed} for check in checks]
        typer.echo(json.dumps({"model": model.name, "on": on, "checks": rows, "passed": passed}, indent=2))
    else:
        typer.echo("\n".join(aligned([("", "largest deviation", "allowed", ""), *map(_verdict, checks)])))
        talk.notice(f"{model.name} on {on}: {'right' if passed else 'NOT right'}, against fp32 on the CPU")
    raise typer.Exit(ExitCode.OK if passed else ExitCode.FAILED)


app.command(epilog=export.EXAMPLES)(export.export)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no other numbers


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from clipcli.weights.catalog import size_text

    return (
        row["name"],
        f"{row['parameters'] / 1e6:,.0f} M" if row["parameters"] else "-",
        size_text(row["download"]) if row["download"] else "-",
        str(row["image_size"] or "-"),
        f"{row['imagenet_top1']:.2f}" if row["imagenet_top1"] else "-",
        row["licence"],
        ("shipped" if row["shipped"] else "yes") if row["path"] else "",
    )


def _verdict(check: Check) -> tuple[str, ...]:
    return check.what, f"{check.deviation:.1e}", f"{check.allowed:.0e}", "ok" if check.passed else "TOO LARGE"


def _facts(choice: ModelChoice, talk: Talk) -> Iterable[Fact]:
    """All about a model that is here, or what the catalogue knows of it."""
    from clipcli.weights import catalog
    from clipcli.weights.describe import describe, describe_entry
    from clipcli.weights.fetch import exists, here, parse

    name = choice.name or catalog.DEFAULT
    if not exists(name) and here(wanted := parse(name)) is None:
        entry = catalog.find_repo(wanted.repo)
        if entry is None:
            raise ModelError(f"{wanted.name}: not downloaded, and not in the list", hint=f"clipcli models pull {name}")
        return describe_entry(entry)
    located = choice.locate(talk)
    return describe(choice.open(talk, located), located)
