"""`clipcli classify`: a row for every picture."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import complete
from clipcli.cli import options as opt
from clipcli.cli.console import Talk, Ticker
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.cli.streams import Destination, Pictures, Writer
from clipcli.errors import ExitCode, UsageError
from clipcli.output.text import Counts, counted
from clipcli.records import Failure, Prediction, Row

if TYPE_CHECKING:
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

EXAMPLES = opt.epilog(
    "clipcli classify photos/ -L cat -L dog",
    "clipcli classify photos/ -l labels.txt -t imagenet80 -o answers.csv",
    "clipcli classify photos/ -c my.safetensors --select cat -f paths --print0 | xargs -0 -r cp -t cats/",
    'find . -name "*.jpg" -print0 | clipcli classify -0 -l labels.txt -f jsonl | jq .label',
    "cat a.jpg | clipcli classify - -L cat -L dog",
)

Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="LABEL",
        autocompletion=complete.labels,
        help="Only rows whose label is this (repeatable). Failures are then on stderr alone.",
        rich_help_panel=opt.OUTPUT,
    ),
]
MinScore = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, max=1, help="Below this score a row abstains.", rich_help_panel=opt.OUTPUT),
]
MinCosine = Annotated[
    float | None,
    typer.Option(metavar="N", min=-1, max=1, help="Below this cosine a row abstains.", rich_help_panel=opt.OUTPUT),
]
MinMargin = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, max=1, help="Below this margin a row abstains.", rich_help_panel=opt.OUTPUT),
]
UnknownLabel = Annotated[
    str, typer.Option(metavar="NAME", help="The label of a row that abstains.", rich_help_panel=opt.OUTPUT)
]
Strict = Annotated[
    bool,
    typer.Option("--strict", metavar="", help="Stop at the first failing picture.", rich_help_panel=opt.OUTPUT),
]
Background = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="More labels in the softmax; where one of them wins, the row abstains.",
        rich_help_panel=opt.CLASSIFIER,
    ),
]
Temperature = Annotated[float, typer.Option(metavar="T", help="Divides the logits.", rich_help_panel=opt.CLASSIFIER)]


def classify(
    context: typer.Context,
    inputs: opt.Inputs = None,
    files_from: opt.FilesFrom = None,
    null: opt.Null = False,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    follow: opt.Follow = False,
    pixels: opt.PixelPolicy = "auto",
    crop: opt.CropPolicy = "model",
    model: opt.Model = None,
    offline: opt.Offline = False,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    classifier: opt.ClassifierFile = None,
    background: Background = None,
    temperature: Temperature = 1.0,
    truncate: opt.Truncate = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    output: opt.Output = None,
    format: opt.Format = "auto",
    top_k: opt.TopK = None,
    select: Select = None,
    min_score: MinScore = None,
    min_cosine: MinCosine = None,
    min_margin: MinMargin = None,
    unknown_label: UnknownLabel = "unknown",
    print0: opt.Print0 = False,
    strict: Strict = False,
    force: opt.Force = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    no_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Say for every picture which of your labels fits it best.

    Rows go to stdout (or --output), one a picture, in input order; everything else goes to stderr. Exit code 3:
    some pictures failed, each in a row of its own.
    """
    began = time.monotonic()
    pictures = Pictures(inputs or [], files_from, null, include or [], exclude or [], follow)
    if not pictures.given:
        with redirect_stdout(sys.stderr):
            typer.echo(context.get_help())
        raise UsageError("no INPUT", hint="name pictures or folders, or send a list of paths on stdin")
    destination = Destination(None if output == Path("-") else output, format, force, top_k, print0, color)
    choice = ModelChoice(model, device, precision, activation, head_width, vocabulary, no_cache, offline)
    words = Words(labels or [], label, prompts, templates, truncate, classifier)
    read = [
        "/dev/stdin",
        *pictures.inputs,
        files_from,
        *words.files,
        background,
        prompts,
        classifier,
        *(templates or []),
    ]
    destination.check(read)
    pictures.check()
    choice.check()

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        with talk.working("starting"):
            from clipcli.tasks.classify import ClassifyOptions
            from clipcli.tasks.classify import classify as task

        options = ClassifyOptions(
            top_k=top_k or 5,
            temperature=temperature,
            min_score=min_score,
            min_cosine=min_cosine,
            min_margin=min_margin,
            unknown_label=unknown_label,
            pixels=pixels,
            crop=crop,
            batch_size=batch_size,
            workers=workers,
            flush_after=0.2 if pictures.live else None,
        )
        wanted = frozenset(select or [])
        opened, found, rest = _prepare(choice, words, background, unknown_label, wanted, talk)
        destination.check(opened.files)
        talk.detail("batch size {}, {} decoding threads".format(*options.speed(opened)))
        rows = task(pictures.walk(), found, opened, options, background=rest)
        with talk.working("classifying"):
            rows = chain(list(islice(rows, 1)), rows)  # the towers work: only now is an output file made
        with destination.open(found.names + (rest.names if rest else ())) as sink:
            counts = _deliver(rows, sink, talk, wanted, strict, destination)
            sink.close()
        _sum_up(counts, pictures, destination, talk, time.monotonic() - began)
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if counts.failed else ExitCode.OK)


def _prepare(
    choice: ModelChoice, words: Words, background: str | None, unknown_label: str, wanted: frozenset[str], talk: Talk
) -> tuple[Model, Classifier, Classifier | None]:
    """Model, classifier and background; everything that can be wrong with words is told before weights are read."""
    from clipcli.tasks.classify import check_names
    from clipcli.zeroshot import labels as label_files
    from clipcli.zeroshot.classifier_file import load_classifier

    labels = words.labels()
    classifier = load_classifier(words.classifier) if words.classifier else None
    others = label_files.read(background) if background else []
    names = classifier.names if classifier else tuple(label.name for label in labels)
    check_names(names, tuple(label.name for label in others), unknown_label)
    _check_selection(wanted, (*names, unknown_label))
    templates = classifier.templates if classifier else words.expanded()
    with talk.working("loading the model"):
        model = choice.open(talk)
    if classifier is None:
        built = words.build(model, labels, templates, talk)
        talk.detail(describe(built))
        classifier = built.classifier
    classifier.check_model(model)
    rest = words.build(model, others, templates or words.read_templates(), talk).classifier if others else None
    return model, classifier, rest


def _check_selection(wanted: frozenset[str], possible: tuple[str, ...]) -> None:
    """Raise UsageError unless every label of --select is one that a row can have."""
    for name in sorted(wanted.difference(possible)):
        near = difflib.get_close_matches(name, possible)
        hint = f"did you mean {' or '.join(near)}?" if near else "the labels are those of --labels and --unknown-label"
        raise UsageError(f'--select "{name}": no such label', hint=hint)


def _deliver(
    rows: Iterable[Row],
    sink: Writer,
    talk: Talk,
    wanted: frozenset[str],
    strict: bool,
    destination: Destination,
) -> Counts:
    """Hand rows to the sink as they come."""
    counts = Counts()
    live = nullcontext(Ticker()) if destination.is_terminal else talk.working("classifying")
    try:
        with live as tick:
            for row in rows:
                counts.add(row)
                if not wanted or (isinstance(row, Prediction) and row.label in wanted):
                    sink.write(row)
                tick(counts.total)
                if isinstance(row, Failure):
                    if wanted or destination.chosen == "paths":
                        talk.failure(f"{row.path}: {row.kind}: {row.message}")
                    if strict:
                        break
    except KeyboardInterrupt:
        talk.notice(f"interrupted after {counted(counts.total, 'picture')}, whose rows are written")
        raise
    return counts


def _sum_up(counts: Counts, pictures: Pictures, destination: Destination, talk: Talk, seconds: float) -> None:
    """What became of it all, on stderr."""
    others = f"{counted(pictures.passed_over, 'other file')} passed over"
    if not counts.total:
        talk.notice(f"no pictures found ({others})" if pictures.passed_over else "no pictures found")
    if destination.chosen == "table":
        for line in counts.lines():
            talk.notice(line, name=False)
    if pictures.passed_over:
        talk.detail(others)
    talk.notice(f"{counted(counts.total, 'picture')}, {counts.failed:,} failed, {seconds:.1f} s")
