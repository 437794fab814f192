"""`clipcli probe`: what some labelled pictures add to words, and a classifier that knows both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipcli.cli import labelled
from clipcli.cli import options as opt
from clipcli.cli.columns import aligned
from clipcli.cli.console import Talk
from clipcli.cli.labels import put
from clipcli.cli.request import ModelChoice, Words
from clipcli.cli.signals import orderly_stop
from clipcli.errors import ExitCode, UsageError
from clipcli.images.find import check_inputs
from clipcli.output.text import counted

if TYPE_CHECKING:
    from clipcli.tasks.labelled import LabelledSet
    from clipcli.tasks.probe import Probed
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

EXAMPLES = opt.epilog(
    "clipcli probe by-class/  # a folder for each class",
    "clipcli probe by-class/ -l labels.txt  # beside zero-shot, and blended with it",
    "clipcli probe train.csv --test test.csv -l labels.txt --json",
    "clipcli probe by-class/ --features pooled --method logistic -o my.safetensors",
    "clipcli classify photos/ -c my.safetensors",
)

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help=labelled.SETS,
        show_default=False,
    ),
]
Test = Annotated[
    list[str] | None,
    opt.INPUT.option(
        metavar="DATA",
        help="Measure on these (repeatable). Default: on a quarter of each class, which is held out.",
    ),
]
FeaturesOf = Annotated[
    Literal["projected", "pooled"],
    opt.CLASSIFIER.option(
        help="pooled: the image tower's before its projection, as in the paper's probes; words aren't blended in then.",
    ),
]
MethodOf = Annotated[
    Literal["auto", "logistic", "gda", "blend", "gda+text", "wise"],
    opt.CLASSIFIER.option(
        help="Of the classifier that -o writes. gda: Gaussian discriminant analysis; blend: words and class means; "
        "wise: between words and logistic; auto: the best on pictures held out to choose by.",
    ),
]
Shots = Annotated[
    list[int] | None,
    opt.CLASSIFIER.option(
        metavar="N",
        min=1,
        help="Learn from N pictures a class (repeatable). Default: 1, 2, 4, 8 and 16, as far as there are so many.",
    ),
]
Splits = Annotated[
    int,
    opt.CLASSIFIER.option(metavar="N", min=1, help="Hold out pictures N times, at random."),
]
Output = Annotated[
    Path | None,
    opt.OUTPUT.option(
        "--output",
        "-o",
        metavar="FILE",
        help="Learn from all DATA, and write a classifier file (.safetensors).",
    ),
]
Json = Annotated[bool, opt.OUTPUT.flag("--json", help="One JSON object.")]


def probe(
    data: Data,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    test: Test = None,
    pixels: opt.PixelPolicy = "auto",
    crop: opt.CropPolicy = "model",
    decode: opt.DecodePolicy = "auto",
    model: opt.Model = None,
    offline: opt.Offline = False,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    classifier: opt.ClassifierFile = None,
    truncate: opt.Truncate = False,
    features: FeaturesOf = "projected",
    method: MethodOf = "auto",
    shots: Shots = None,
    splits: Splits = 5,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    output: Output = None,
    as_json: Json = False,
    force: opt.Force = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    runtime: opt.RuntimeOf = "auto",
    no_cache: opt.NoCache = False,
    cache_size: opt.CacheSize = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Learn from a few labelled pictures, and measure how much they add to words.

    On stdout a table: how often each method is right about pictures that
    were held out, in percent, by the number of pictures a class that it
    learned from. With labels, zero-shot stands beside it.
    """
    choice = ModelChoice(
        model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size, runtime
    )
    words = Words(labels or [], label, prompts, templates, truncate, classifier)
    inputs = [*data, *(test or [])]
    check_inputs(inputs)
    labelled.check_written([output], force, [*inputs, *words.read])
    choice.check()
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        with talk.working("starting"):
            from clipcli.tasks.embed import EmbedOptions
            from clipcli.tasks.labelled import embed_set, matching
            from clipcli.tasks.probe import ProbeOptions
            from clipcli.tasks.probe import probe as task
            from clipcli.weights.pooled import pooled
            from clipcli.zeroshot.classifier_file import save_classifier

        opened, text = _prepare(choice, words, talk)
        labelled.check_written([output], force, opened.files)
        how = EmbedOptions(pixels=pixels, crop=crop, decode=decode, batch_size=batch_size, workers=workers)
        known = {one.name: one for one in text.labels} if text else None

        def look(paths: list[str], tower: Model) -> LabelledSet:
            with talk.working("looking at pictures") as tick:
                return embed_set(paths, tower, how, known, matching(paths, include or [], exclude or []), tick)

        tower = pooled(opened) if features == "pooled" else opened
        pictures, tested = look(data, tower), look(test, tower) if test else None
        seen = look(test or data, text.suited(opened)) if text and text.features != features else None
        if seen and seen.paths != (tested or pictures).paths:
            raise UsageError("some pictures have features of one kind alone", hint="take out those that fail")
        failures = [*pictures.failures, *(tested.failures if tested else ())]
        for failure in failures:
            talk.failed(failure)
        options = ProbeOptions(shots=tuple(shots or ()), splits=splits, method=None if method == "auto" else method)
        with talk.working("learning") as tick:
            found = task(
                pictures, tower, text, options, test=tested, seen=seen.vectors if seen else None, progress=tick
            )
        put([json.dumps(_as_json(found), indent=2)] if as_json else table(found))
        for line in _summary(found, pictures, failures=len(failures)):
            talk.notice(line)
        if output is not None:
            save_classifier(found.classifier, output)
            best = "" if options.method else " (best on pictures held out to choose by)"
            talk.notice(f"{_made(found.classifier)}{best}, written to {output}, for classify -c")
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if failures else ExitCode.OK)


def _prepare(choice: ModelChoice, words: Words, talk: Talk) -> tuple[Model, Classifier | None]:
    """The model, and the zero-shot classifier if there are words."""
    from clipcli.zeroshot.classifier_file import load_classifier

    labels = words.labels() if words.are_given else []
    text = load_classifier(words.classifier) if words.classifier else None
    sets = words.expanded() if labels else []
    with talk.working("loading the model"):
        model = choice.open(talk)
    if text is not None:
        text.suited(model)
    return model, words.build(model, labels, sets, talk).classifier if labels else text


def table(found: Probed) -> Iterator[str]:
    """A line a method, a column for each number of shots."""
    columns = list(dict.fromkeys(cell.shots for cell in found.cells))
    cells: dict[str, dict[int | None, str]] = {}
    for cell in found.cells:
        cells.setdefault(cell.method, {})[cell.shots] = f"{100 * cell.mean:.1f} ±{100 * cell.spread:.1f}"
    header = ["shots", *("all" if count is None else str(count) for count in columns)]
    rows = [[method, *(row.get(count, "") for count in columns)] for method, row in cells.items()]
    return aligned([header, *rows], right=frozenset(range(1, len(header))))


def _summary(found: Probed, pictures: LabelledSet, *, failures: int) -> Iterator[str]:
    splits = len(found.cells[0].accuracies)
    size = f"{counted(len(pictures.paths), 'picture')} of {len(pictures.classes):,} classes"
    yield f"{size}, {failures:,} failed; percent right, mean and standard deviation of {counted(splits, 'split')}"
    equal = found.equal_shots
    if equal is None:
        return
    tried = [cell.shots for cell in found.cells if cell.shots]
    if 0 < equal < math.inf:
        yield f"zero-shot is as good as logistic regression with {equal:.1f} pictures a class"
    else:
        better, worse = ("logistic regression", "zero-shot") if equal == 0 else ("zero-shot", "logistic regression")
        at = counted(max(tried) if equal else min(tried), "picture")
        yield f"with {at} a class, {better} is better than {worse}"


def _made(classifier: Classifier) -> str:
    how = classifier.how
    said = [f"{key} {how[key]:.3g}" for key in ("C", "alpha", "share") if key in how]
    return f"classifier: {', '.join([str(how['method']), *said])}, of {counted(int(how['pictures']), 'picture')}"


def _as_json(found: Probed) -> dict[str, Any]:
    equal = found.equal_shots
    return {
        "labels": list(found.classifier.names),
        "model": found.classifier.model,
        "features": found.classifier.features,
        "cells": [
            {"method": x.method, "shots": x.shots, "mean": x.mean, "spread": x.spread, "accuracies": x.accuracies}
            for x in found.cells
        ],
        "strengths": dict(found.strengths),
        "equal_shots": equal if equal is not None and math.isfinite(equal) else None,
        "classifier": dict(found.classifier.how),
    }
