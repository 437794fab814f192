"""`clipcli classify`: a row for every picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import complete
from clipcli.cli import options as opt
from clipcli.cli.console import Talk, Ticker
from clipcli.cli.destination import Destination, Writer
from clipcli.cli.request import ModelChoice, Words, describe
from clipcli.cli.signals import orderly_stop
from clipcli.cli.stages import report
from clipcli.cli.streams import Pictures
from clipcli.cli.usage import propose
from clipcli.errors import ExitCode, UsageError
from clipcli.images.crops import check_folder
from clipcli.output.text import Counts, counted
from clipcli.records import Failure, Predictions, Row

if TYPE_CHECKING:
    from clipcli.tasks.classify import ClassifyOptions
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Classifier

EXAMPLES = opt.epilog(
    "clipcli classify photos/ -L cat -L dog",
    "clipcli classify photos/ -l labels.txt -t imagenet80 -o answers.csv",
    "clipcli classify photos.safetensors -l labels.txt  # the embeddings that clipcli embed wrote",
    "clipcli classify photos/ -c my.safetensors --select cat -f paths --print0 | xargs -0 -r cp -t cats/",
    'find . -name "*.jpg" -print0 | clipcli classify -0 -l labels.txt -f jsonl | jq .label',
    "cat a.jpg | clipcli classify - -L cat -L dog",
    "clipcli classify photos/ -l tags.txt --multi-label -f jsonl",
    "clipcli classify a.jpg -l labels.txt --explain",
)

Select = Annotated[
    list[str] | None,
    opt.OUTPUT.option(
        "--select",
        metavar="LABEL",
        autocompletion=complete.labels,
        help="Only rows whose label is this (repeatable). Failures are then on stderr alone.",
    ),
]
MinScore = Annotated[
    float | None, opt.OUTPUT.option(metavar="N", min=0, max=1, help="Below this score a row abstains.")
]
MinCosine = Annotated[
    float | None, opt.OUTPUT.option(metavar="N", min=-1, max=1, help="Below this cosine a row abstains.")
]
MinMargin = Annotated[
    float | None, opt.OUTPUT.option(metavar="N", min=0, max=1, help="Below this margin a row abstains.")
]
UnknownLabel = Annotated[str, opt.OUTPUT.option(metavar="NAME", help="The label of a row that abstains.")]
Background = Annotated[
    str | None,
    opt.CLASSIFIER.option(metavar="FILE", help="More labels in the softmax; where one of them wins, the row abstains."),
]
MultiLabel = Annotated[
    bool,
    opt.CLASSIFIER.flag(
        "--multi-label",
        help="Score each label by itself: rows list all above their threshold, else --min-score or 0.5.",
    ),
]
ByGroup = Annotated[
    bool,
    opt.CLASSIFIER.flag(
        "--by-group", help="Answer with the label file's groups: a group's score is the sum of its labels'."
    ),
]
Explain = Annotated[
    bool,
    opt.OUTPUT.flag(
        "--explain",
        help="Show what answers rest on: cosines by template and alias, and what the model saw. table or jsonl.",
    ),
]
Calibrated = Annotated[
    bool,
    opt.CLASSIFIER.flag(
        "--calibrated",
        help="Use the temperature and the least scores that clipcli calibrate has put into the classifier file.",
    ),
]
Temperature = Annotated[float, opt.CLASSIFIER.option(metavar="T", help="Divides the logits.")]


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
    decode: opt.DecodePolicy = "auto",
    model: opt.Model = None,
    offline: opt.Offline = False,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    classifier: opt.ClassifierFile = None,
    background: Background = None,
    multi_label: MultiLabel = False,
    by_group: ByGroup = False,
    calibrated: Calibrated = False,
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
    explain: Explain = False,
    print0: opt.Print0 = False,
    save_crop: opt.SaveCrop = None,
    strict: opt.Strict = False,
    force: opt.Force = False,
    resume: opt.Resume = False,
    retry_failed: opt.RetryFailed = False,
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
    """Say for every picture which of your labels fits it best.

    Rows go to stdout (or --output), one a picture, in input order;
    everything else goes to stderr. Exit code 3: some pictures failed, each
    in a row of its own.
    """
    began = time.monotonic()
    pictures = Pictures(inputs or [], files_from, null, include or [], exclude or [], follow)
    pictures.demand(context)
    wanted = frozenset(select or [])
    target = None if output == Path("-") else output
    most = sys.maxsize if multi_label else None  # of labels that don't compete, a row shows all that hold
    destination = Destination(
        target, format, top_k or most, print0, color, wanted, force, resume, retry_failed, explain
    )
    choice = ModelChoice(
        model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size, runtime
    )
    words = Words(labels or [], label, prompts, templates, truncate, classifier)
    destination.check(["/dev/stdin", *pictures.inputs, files_from, *words.read, background])
    pictures.check()
    if save_crop is not None:
        check_folder(save_crop, force=force or destination.goes_on, walked=pictures.inputs)
    choice.check()

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        with talk.working("starting"):
            from clipcli.tasks.classify import ClassifyOptions, candidates
            from clipcli.tasks.identity import row_settings

        options = ClassifyOptions(
            top_k=top_k,
            calibrated=calibrated,
            temperature=temperature,
            min_score=min_score,
            min_cosine=min_cosine,
            min_margin=min_margin,
            unknown_label=unknown_label,
            by_group=by_group,
            multi_label=multi_label,
            pixels=pixels,
            crop=crop,
            decode=decode,
            batch_size=batch_size,
            workers=workers,
            flush_after=0.2 if pictures.live else None,
            save_crop=save_crop,
        )
        opened, found, rest = _prepare(choice, words, background, options, wanted, talk)
        destination.check(opened.files)
        prepared = {"pixels": pixels, "crop": crop} | ({"decode": decode} if decode == "exact" else {})
        for line in pictures.check_embeddings(opened, prepared, context):
            talk.detail(line)
        talk.detail("batch size {}, {} decoding threads".format(*options.speed(opened)))
        talk.detail(f"decoder: {options.decoder}")
        settings = row_settings(opened, found, rest, options, truncate=truncate, is_file=classifier is not None)
        names = candidates(found.labels, options) + (rest.names if rest else ())
        with destination.open(names, settings) as out:
            bursts = _task(explain)(out.left(pictures.walk()), found, opened, options, background=rest)
            with talk.working("classifying"):
                first = list(islice(bursts, 1))  # the towers work, the inputs are the same: only now is a file touched
            if first and out.done:
                talk.notice(f"{output}: {_going_on(out, retry_failed)}")
            counts = _deliver(chain(first, bursts), out, talk, strict, destination)
            out.close(complete=not (strict and counts.failed))
        for line in report(options, opened):
            talk.detail(line)
        _sum_up(counts, pictures, destination, out, talk, time.monotonic() - began)
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if counts.failed or out.failed else ExitCode.OK)


def _prepare(
    choice: ModelChoice,
    words: Words,
    background: str | None,
    options: ClassifyOptions,
    wanted: frozenset[str],
    talk: Talk,
) -> tuple[Model, Classifier, Classifier | None]:
    """Model, classifier and background; everything that can be wrong with words is told before weights are read."""
    from clipcli.tasks.classify import candidates, check_names
    from clipcli.zeroshot import labels as label_files
    from clipcli.zeroshot.classifier_file import load_classifier

    labels = words.labels()
    classifier = load_classifier(words.classifier) if words.classifier else None
    others = label_files.read(background) if background else []
    given = classifier.labels if classifier else labels
    check_names(given, others, options)
    _check_selection(wanted, (*candidates(given, options), options.unknown_label))
    templates = classifier.templates if classifier else words.expanded()
    with talk.working("loading the model"):
        model = choice.open(talk)
    if classifier is None:
        built = words.build(model, labels, templates, talk)
        talk.detail(describe(built))
        classifier = built.classifier
    suited = classifier.suited(model)
    rest = words.build(model, others, templates or words.read_templates(), talk).classifier if others else None
    return suited, classifier, rest


def _task(explain: bool) -> Callable[..., Iterator[Iterable[Row]]]:
    """What makes rows."""
    if explain:
        from clipcli.tasks.explain import explain_in_bursts

        return explain_in_bursts
    from clipcli.tasks.classify import classify_in_bursts

    return classify_in_bursts


def _check_selection(wanted: frozenset[str], possible: tuple[str, ...]) -> None:
    """Raise UsageError unless every label of --select is one that a row can have."""
    for name in sorted(wanted.difference(possible)):
        hint = propose(name, possible, 3) or "the labels are those of --labels and --unknown-label"
        raise UsageError(f'--select "{name}": no such label', hint=hint)


def _going_on(out: Writer, retry: bool) -> str:
    if retry and out.failed:
        return f"trying {counted(out.failed, 'failed picture')} again"
    return f"going on after {counted(out.done, 'picture')}"


def _deliver(
    bursts: Iterable[Iterable[Row]], out: Writer, talk: Talk, strict: bool, destination: Destination
) -> Counts:
    """Hand rows out as they come."""
    counts = Counts()
    told = bool(destination.wanted) or destination.chosen == "paths"  # failures that have no row
    live = nullcontext(Ticker()) if destination.is_terminal else talk.working("classifying")
    try:
        with live as tick:
            for burst in bursts:
                if isinstance(burst, Predictions) and out.at_once:
                    out.write_all(burst)
                    counts.add_all(burst)
                    burst = ()
                for row in burst:
                    out.write(row)
                    counts.add(row)
                    if isinstance(row, Failure):
                        if told:
                            talk.failed(row)
                        if strict:
                            return counts
                out.flush()
                tick(counts.total)
    except KeyboardInterrupt:
        out.flush()
        talk.notice(f"interrupted {out.kept(counts.total)}")
        raise
    return counts


def _sum_up(
    counts: Counts, pictures: Pictures, destination: Destination, out: Writer, talk: Talk, seconds: float
) -> None:
    """What became of it all, on stderr."""
    others = f"{counted(pictures.passed_over, 'other file')} passed over"
    if out.done and not counts.total:
        talk.notice(f"{destination.path}: complete, nothing to do")
    elif not counts.total:
        talk.notice(f"no pictures found ({others})" if pictures.passed_over else "no pictures found")
    if destination.chosen == "table":
        for line in counts.lines():
            talk.notice(line, name=False)
    if pictures.passed_over:
        talk.detail(others)
    if counts.total or not out.done:
        talk.notice(f"{counted(counts.total, 'picture')}, {counts.failed:,} failed, {seconds:.1f} s")
    if out.failed:
        what = f"{counted(out.failed, 'picture')} in it failed"
        talk.notice(f"{destination.path}: {what}; the same command with --retry-failed tries again")
