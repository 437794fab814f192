"""`clipcli build-classifier`: labels × templates into a cached weight matrix."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.cli.streams import check_new_file
from clipcli.errors import ExitCode, UsageError
from clipcli.images.find import check_inputs
from clipcli.output.text import counted

if TYPE_CHECKING:
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

EXAMPLES = opt.epilog(
    "clipcli build-classifier labels.txt -o my.safetensors",
    "clipcli build-classifier labels.txt -t imagenet80 -o my.safetensors",
    "clipcli build-classifier more.txt --extend my.safetensors -o larger.safetensors",
    "clipcli build-classifier labels.txt --examples by-class/ -o my.safetensors  # a few pictures of each label",
    "clipcli classify photos/ -c my.safetensors",
)

Labels = Annotated[str | None, typer.Argument(metavar="LABELS", help="A label file: text, CSV, TSV or JSON.")]
OutputFile = Annotated[
    Path | None,
    opt.OUTPUT.option(
        "--output",
        "-o",
        metavar="FILE",
        help="The classifier file (.safetensors). Without it only the store is filled.",
    ),
]
Extend = Annotated[
    Path | None, opt.CLASSIFIER.option(metavar="OLD", help="Add LABELS to this classifier; only they are encoded.")
]

Examples = Annotated[
    list[str] | None,
    opt.CLASSIFIER.option(
        "--examples",
        metavar="DATA",
        help="Blend pictures of each label in: a folder of class folders, a table of path and label, or webdataset "
        "archives (repeatable). clipcli probe tells what they add.",
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
    examples: Examples = None,
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
    check_inputs(examples or [])
    if examples and extend:
        raise UsageError("--examples and --extend exclude each other", hint="build all labels with their examples")
    if output is None and examples:
        raise UsageError("a classifier of examples is a file", hint="name one: -o my.safetensors")
    if output is not None:
        if output.name == "-":
            raise UsageError("a classifier can't be written to stdout", hint="name a file: -o my.safetensors")
        check_new_file(output, force=force, read=[*words.read, extend, *(examples or [])])

    from clipcli.zeroshot.classifier_file import load_classifier, save_classifier

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        found = words.labels()
        old = load_classifier(extend) if extend else None
        typed = opt.came_from(context, "templates", "COMMANDLINE")
        sets = old.templates if old and not typed else words.expanded()
        with talk.working("loading the model"):
            opened = choice.open(talk)
        if output is not None:
            check_new_file(output, force=force, read=opened.files)
        built = words.build(opened, found, sets, talk, old)
        made, failed = _with_examples(built.classifier, opened, examples, talk)
        if output is not None:
            save_classifier(made, output)
        kept = f"written to {output}" if output else "kept in the store alone (-o FILE writes it)"
        talk.notice(f"{describe(built)}, {kept}, {time.monotonic() - began:.1f} s")
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if failed else ExitCode.OK)


def _with_examples(text: Classifier, model: Model, examples: list[str] | None, talk: Talk) -> tuple[Classifier, int]:
    """The classifier with the examples blended in, if there are any, and how many pictures failed."""
    if not examples:
        return text, 0
    from clipcli.tasks.labelled import embed_set
    from clipcli.tasks.probe import few_shot

    with talk.working("looking at examples") as tick:
        pictures = embed_set(examples, model, words={label.name: label for label in text.labels}, progress=tick)
    for failure in pictures.failures:
        talk.failed(failure)
    made = few_shot(text, pictures)
    talk.notice(f"{counted(len(pictures.paths), 'example')} blended in, alpha {made.how['alpha']:.3g}")
    return made, len(pictures.failures)
