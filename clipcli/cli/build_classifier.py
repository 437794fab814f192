"""`clipcli build-classifier`: labels × templates into a cached weight matrix."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.cli.streams import check_new_file
from clipcli.errors import UsageError

EXAMPLES = opt.epilog(
    "clipcli build-classifier labels.txt -o my.safetensors",
    "clipcli build-classifier labels.txt -t imagenet80 -o my.safetensors",
    "clipcli build-classifier more.txt --extend my.safetensors -o larger.safetensors",
    "clipcli classify photos/ -c my.safetensors",
)

Labels = Annotated[
    str | None,
    typer.Argument(metavar="LABELS", help="A label file: text, CSV, TSV or JSON.", show_default=False),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The classifier file (.safetensors). Without it only the store is filled.",
        rich_help_panel=opt.OUTPUT,
    ),
]
Extend = Annotated[
    Path | None,
    typer.Option(
        metavar="OLD",
        help="Add LABELS to this classifier; only they are encoded.",
        rich_help_panel=opt.CLASSIFIER,
    ),
]


def build_classifier(
    context: typer.Context,
    file: Labels = None,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    extend: Extend = None,
    model: opt.Model = None,
    offline: opt.Offline = False,
    truncate: opt.Truncate = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    output: OutputFile = None,
    force: opt.Force = False,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    no_cache: opt.NoCache = False,
    cache_size: opt.CacheSize = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Make a classifier of labels once, to use it many times with classify -c."""
    began = time.monotonic()
    choice = ModelChoice(model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size)
    words = Words([*([file] if file else []), *(labels or [])], label, prompts, templates, truncate)
    if output is not None:
        if output.name == "-":
            raise UsageError("a classifier can't be written to stdout", hint="name a file: -o my.safetensors")
        check_new_file(output, force=force, read=[*words.files, prompts, *(templates or [])])

    from clipcli.zeroshot.classifier_file import load_classifier, save_classifier

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        found = words.labels()
        old = load_classifier(extend) if extend else None
        own = old is not None and not opt.came_from(context, "templates", "COMMANDLINE")
        sets = old.templates if old and own else words.expanded()
        with talk.working("loading the model"):
            opened = choice.open(talk)
        if output is not None:
            check_new_file(output, force=force, read=opened.files)
        built = words.build(opened, found, sets, talk, old)
        if output is not None:
            save_classifier(built.classifier, output)
        kept = f"written to {output}" if output else "kept in the store alone (-o FILE writes it)"
        talk.notice(f"{describe(built)}, {kept}, {time.monotonic() - began:.1f} s")
