"""`clipcli eval`: how good a classifier is on labelled pictures, on one set or several, with one model or several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import complete
from clipcli.cli import labelled as shared
from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.cli.labelled import Reader, check_written, prepared, write_table
from clipcli.cli.labels import put
from clipcli.cli.request import ModelChoice, Words
from clipcli.cli.signals import orderly_stop
from clipcli.errors import ExitCode, UsageError
from clipcli.images.find import check_inputs
from clipcli.output.text import counted

if TYPE_CHECKING:
    from clipcli.tasks.evaluate import Evaluation, Paired

EXAMPLES = opt.epilog(
    "clipcli eval by-class/ -l labels.txt  # a folder for each class",
    "clipcli eval truth.csv -l labels.txt --html report.html --csv pictures.csv",
    "clipcli eval photo=photos/ sketch=sketches/ -l labels.txt  # what another kind of pictures costs",
    "clipcli eval pacs.tar -l labels.txt --include 'photo=photo-*' --include 'sketch=sketch-*'",
    "clipcli eval by-class/ -l labels.txt -m ViT-B-32-256-datacomp -m ViT-B-16-openai",
    "clipcli eval by-class/ -c my.safetensors --unknown others/ --want-precision 0.98",
    "clipcli eval tagged.csv -l tags.txt --multi-label --write-labels tags.csv  # a column labels: cat|dog",
)

Sets = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]SET...",
        help=shared.SETS,
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    opt.INPUT.option(
        metavar="[NAME=]GLOB",
        help="Only pictures that match (repeatable). With names, each SET is split into sets of these names.",
    ),
]
Models = Annotated[
    list[str] | None,
    opt.CLASSIFIER.option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="CLIPCLI_MODEL",
        callback=opt.whole_variable,
        autocompletion=complete.models,
        help="As in classify; with several, each is compared with the first on the same pictures.",
        show_default=False,
    ),
]
Csv = Annotated[
    Path | None,
    opt.OUTPUT.option("--csv", metavar="FILE", help="Write a row for every picture to FILE."),
]
Html = Annotated[
    Path | None,
    opt.OUTPUT.option(
        "--html",
        metavar="FILE",
        help="Write a report to FILE: one page with plots and the surest mistakes.",
    ),
]
MultiLabel = Annotated[
    bool,
    opt.CLASSIFIER.flag(
        "--multi-label",
        help="Each label by itself, as in classify; in the truth, | stands between a picture's labels.",
    ),
]
WriteLabels = Annotated[
    Path | None,
    opt.OUTPUT.option(
        metavar="FILE.csv",
        help="With --multi-label: write the labels with the thresholds that give the best F1.",
    ),
]


def eval(
    sets: Sets,
    include: Include = None,
    exclude: opt.Exclude = None,
    ignore_missing: shared.IgnoreMissing = False,
    unknown: shared.UnknownSet = None,
    pixels: opt.PixelPolicy = "auto",
    crop: opt.CropPolicy = "model",
    decode: opt.DecodePolicy = "auto",
    model: Models = None,
    offline: opt.Offline = False,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    classifier: opt.ClassifierFile = None,
    multi_label: MultiLabel = False,
    truncate: opt.Truncate = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    want_precision: shared.WantPrecision = 0.95,
    top: shared.Top = 10,
    as_json: shared.Json = False,
    csv_file: Csv = None,
    html_file: Html = None,
    write_labels: WriteLabels = None,
    force: opt.Force = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    no_cache: opt.NoCache = False,
    cache_size: opt.CacheSize = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Measure a classifier on pictures whose label is known.

    Classes are matched with labels by name or alias; without labels, the
    classes are the labels. Tables go to stdout: of
    one set and model all that is known, of several a row each. Exit code 3:
    some pictures could not be read, and don't count.
    """
    words = Words(labels or [], label, prompts, templates, truncate, classifier)
    data, parts = named_sets(sets), named_parts(include or [])
    inputs = [*data.values(), *(unknown or [])]
    check_inputs(inputs)
    results = len(data) * len(parts or [None]) * len(model or [None])
    competing = {"--csv": csv_file, "--html": html_file, "--unknown": unknown}
    _check_multi_label(multi_label, write_labels, results, competing)
    check_written([csv_file, html_file, write_labels], force, [*inputs, *words.read])
    choices = [
        ModelChoice(name, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size)
        for name in (model or (None,))
    ]
    for choice in choices:
        choice.check()

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        with talk.working("starting"):
            from clipcli.cli import evaluation as show
            from clipcli.cli import tags
            from clipcli.tasks.embed import EmbedOptions
            from clipcli.tasks.evaluate import evaluate

        options = EmbedOptions(pixels=pixels, crop=crop, decode=decode, batch_size=batch_size, workers=workers)
        models = prepared(choices, words, talk, [] if multi_label else list(data.values()), alone=multi_label)
        readers = ((Reader(opened, one.labels, options, parts, exclude or [], talk), one) for opened, one in models)
        if multi_label:
            raise typer.Exit(tags.measure(readers, data, ignore_missing, top, as_json, write_labels))
        found: list[Evaluation] = []
        failed = 0
        for reader, classified in readers:
            check_written([csv_file, html_file], force, reader.model.files)
            others = reader.unknown(unknown)
            found += [
                evaluate(
                    pictures,
                    classified,
                    name=name,
                    unknown=others,
                    ignore_missing=ignore_missing,
                    want_precision=want_precision,
                )
                for name, pictures in reader.sets(data)
            ]
            failed += reader.failed
        pairs = _pairs(found)
        if csv_file:
            write_table(csv_file, show.csv_rows(found))
        if html_file:
            _write(html_file, show.as_page(found, pairs))
        if as_json:
            put([json.dumps(show.as_json(found, pairs), indent=2)])
        else:
            put(show.report(found, pairs, top, wants_color(sys.stdout, color)))
            talk.notice("in percent; in parentheses bootstrap intervals of 95 %")
        tell(found, [str(file) for file in (csv_file, html_file) if file], talk)
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if failed else ExitCode.OK)


def named_sets(given: Sequence[str]) -> dict[str, str]:
    """Paths by name: `name=path`, or a path, whose last part without ending is then the name. Raises UsageError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.lexists(text):
            name, path = Path(text).name.partition(".")[0] or text, text
        if name in found:
            raise UsageError(f'two sets are named "{name}"', hint="write NAME=SET")
        found[name] = path
    return found


def named_parts(include: Sequence[str]) -> dict[str, list[str]]:
    """Globs by the name of the part that they make, "" where they have none. Raises UsageError."""
    parts: dict[str, list[str]] = {}
    for text in include:
        part, equals, glob = text.partition("=")
        parts.setdefault(part if equals else "", []).append(glob if equals else text)
    if len(parts) > 1 and "" in parts:
        raise UsageError("--include with a name and without one", hint="give each GLOB a name, or none")
    return parts


def _check_multi_label(multi_label: bool, written: Path | None, results: int, others: Mapping[str, object]) -> None:
    """Raise UsageError for options that don't go together."""
    if written and results > 1:
        raise UsageError("thresholds of several sets or models", hint="--write-labels takes one set and one model")
    if written and not multi_label:
        raise UsageError("--write-labels is for the thresholds of --multi-label", hint="add --multi-label")
    if written and written.suffix.lower() != ".csv":
        raise UsageError(f"{written}: -l would not read it as a table", hint="name a .csv file")
    for option, value in others.items():
        if multi_label and value:
            raise UsageError(f"{option} is about labels that compete, with --multi-label none does")


def tell(found: Sequence[Evaluation], written: Sequence[str], talk: Talk) -> None:
    """What the figures leave out: labels without pictures, pictures without a label, and those that failed."""
    from clipcli.tasks.evaluate import listed

    for one in found:
        if one.model != found[0].model:
            break  # the sets are the same
        idle = [name for name, count in zip(one.labels, one.classes.pictures, strict=True) if not count]
        if idle:
            talk.notice(f"{one.name}: labels without pictures: {listed(idle)}")
        if len(idle) == len(one.labels) - 1:
            talk.notice(f"{one.name}: pictures of one class alone: what is taken for it by mistake doesn't show")
        if one.left_out:
            talk.notice(f"{one.name}: {counted(one.left_out, 'picture')} left out: their classes are no labels")
        if one.failed:
            talk.notice(f"{one.name}: {counted(one.failed, 'picture')} failed, of {one.failed + len(one.paths):,}")
    if written:
        talk.notice(f"written to {', '.join(written)}")


def _pairs(found: Sequence[Evaluation]) -> list[Paired]:
    """The first model against each other one, set by set."""
    from clipcli.tasks.evaluate import compare_models

    first: dict[str, Evaluation] = {}
    return [compare_models(base, one) for one in found if (base := first.setdefault(one.name, one)) is not one]


def _write(path: Path, text: str) -> None:
    from clipcli.weights.folder import whole_file

    with whole_file(path) as file:
        file.write(text.encode())
