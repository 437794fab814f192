"""`clipcli advise`: which templates, aliases and labels help on pictures like these."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import labelled as shared
from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.cli.labels import put
from clipcli.cli.request import ModelChoice, Words
from clipcli.cli.signals import orderly_stop
from clipcli.cli.streams import Pictures
from clipcli.errors import ExitCode, UsageError
from clipcli.images.find import check_inputs
from clipcli.zeroshot.templates import write

if TYPE_CHECKING:
    from clipcli.tasks.bank import Array
    from clipcli.tasks.metrics import Indices

EXAMPLES = opt.epilog(
    "clipcli advise by-class/ -l labels.txt  # a folder for each class",
    "clipcli advise by-class/ -l labels.txt -t imagenet80 -t caltech101 --write-templates my.txt",
    "clipcli advise photos/ --unlabelled -l labels.txt --write-templates my.txt",
    "clipcli classify photos/ -l labels.txt -t my.txt",
)
CANDIDATES = "imagenet80"

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="SET...",
        help=f"{shared.SETS} With --unlabelled what classify takes.",
        show_default=False,
    ),
]
Unlabelled = Annotated[
    bool,
    opt.INPUT.flag(
        "--unlabelled",
        help="Nobody has labelled the pictures: weigh templates by how surely they answer.",
    ),
]
Reference = Annotated[
    list[str] | None,
    opt.INPUT.option(
        metavar="INPUT",
        help="With --unlabelled: pictures of all kinds, to see what a template says of any picture (repeatable).",
    ),
]
Most = Annotated[int, opt.OUTPUT.option(metavar="N", min=1, help="Templates to choose at most.")]
Seed = Annotated[int, opt.OUTPUT.option(metavar="N", min=0, help="Another one makes other halves.")]
WriteTemplates = Annotated[
    Path | None,
    opt.OUTPUT.option(
        metavar="FILE",
        help="Write the chosen templates, or all with their new weights: a file for -t.",
    ),
]


def advise(
    data: Data,
    unlabelled: Unlabelled = False,
    reference: Reference = None,
    ignore_missing: shared.IgnoreMissing = False,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    pixels: opt.PixelPolicy = "auto",
    crop: opt.CropPolicy = "model",
    decode: opt.DecodePolicy = "auto",
    model: opt.Model = None,
    offline: opt.Offline = False,
    labels: opt.LabelFiles = None,
    label: opt.InlineLabels = None,
    templates: opt.Templates = None,
    truncate: opt.Truncate = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    most: Most = 10,
    seed: Seed = 0,
    top: shared.Top = 10,
    write_templates: WriteTemplates = None,
    as_json: shared.Json = False,
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
    """Find the templates that suit your pictures, and the words that don't.

    Templates are chosen on one half of the pictures and measured on the
    other, so that the gain is honest. Without -t, imagenet80 is what is
    chosen from. With --unlabelled all templates get weights (ZPE).
    """
    began = time.monotonic()
    _check(reference, unlabelled, write_templates)
    words = Words(labels or [], label, None, templates or [CANDIDATES], truncate)
    sets = [Pictures(names, None, False, include or [], exclude or [], False) for names in (data, reference) if names]
    for pictures in sets if unlabelled else ():
        pictures.check()
    check_inputs(data)
    shared.check_written([write_templates], force, [*data, *(reference or []), *words.read])
    choice = ModelChoice(model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size)
    choice.check()
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        known = shared.wanted_labels(words, () if unlabelled else data, talk)
        candidates = words.read_templates()
        with talk.working("loading the model"):
            from clipcli.cli import advice as show
            from clipcli.tasks import advise as task
            from clipcli.tasks.bank import encode_bank
            from clipcli.tasks.embed import EmbedOptions

            opened = choice.open(talk)
        shared.check_written([write_templates], force, opened.files)
        options = EmbedOptions(pixels=pixels, crop=crop, decode=decode, batch_size=batch_size, workers=workers)
        reader = shared.Reader(opened, known, options, {"": include or []}, exclude or [], talk)
        with talk.working("encoding prompts") as tick:
            bank = encode_bank(opened, known, candidates, truncate=truncate, progress=tick)
        found: task.Advice | task.Weighing
        if unlabelled:
            for file in (file for pictures in sets for file in pictures.embeddings.values()):
                file.check_model(opened)
            found = task.weigh(bank, *(reader.unlabelled(each.walk(), each.inputs)[1] for each in sets))
        else:
            vectors, truth = _labelled(reader, data, ignore_missing)
            with talk.working("trying templates") as tick:
                found = task.advise(bank, vectors, truth, most=most, seed=seed, progress=tick)
        put([show.as_json(found)] if as_json else show.report(found, top, wants_color(sys.stdout, color)))
        said = show.summary(found)
        if write_templates is not None:
            write(show.templates(found), write_templates, f"clipcli advise: {said}")
            said += f", written to {write_templates}, for -t"
        talk.notice(f"{said}, {time.monotonic() - began:.1f} s")
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if reader.failed else ExitCode.OK)


def _check(reference: Sequence[str] | None, unlabelled: bool, written: Path | None) -> None:
    """Raise UsageError for options that don't go together, and for a template file that wouldn't be read again."""
    if reference and not unlabelled:
        raise UsageError("--reference is for pictures without labels", hint="add --unlabelled, or leave it out")
    if written is not None and written.suffix.lower() == ".json":
        raise UsageError(f"{written}: -t would not read it as text", hint="name a .txt file")


def _labelled(reader: shared.Reader, data: Sequence[str], ignore_missing: bool) -> tuple[Array, Indices]:
    """Unit embeddings [n, dim] and their labels' indices [n]. Raises UsageError where classes are no labels."""
    from clipcli.tasks.evaluate import matched

    found = reader.whole(data)
    names = tuple(label.name for label in reader.labels)
    vectors, truth, _ = matched(found, names, ", ".join(data), ignore_missing)
    reader.tell_idle(found)
    return vectors, truth
