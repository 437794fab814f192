"""`clipcli calibrate`: temperature and thresholds for a classifier file, from pictures whose label is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipcli.cli import labelled
from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice, Words
from clipcli.cli.signals import orderly_stop
from clipcli.cli.streams import check_whole_file
from clipcli.errors import ExitCode
from clipcli.images.find import check_inputs
from clipcli.output.text import counted

EXAMPLES = opt.epilog(
    "clipcli calibrate my.safetensors by-class/ -o calibrated.safetensors",
    "clipcli calibrate my.safetensors truth.csv --unknown others/ --want-precision 0.98 -o calibrated.safetensors",
    "clipcli classify photos/ -c calibrated.safetensors --calibrated",
)

File = Annotated[
    Path, typer.Argument(metavar="CLASSIFIER", help="A classifier file made by build-classifier.", show_default=False)
]
Set = Annotated[str, typer.Argument(metavar="SET", help="Labelled pictures, as for clipcli eval.", show_default=False)]
Output = Annotated[
    Path,
    opt.OUTPUT.option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where the calibrated classifier goes.",
        show_default=False,
    ),
]


def calibrate(
    classifier: File,
    pictures: Set,
    output: Output,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    ignore_missing: labelled.IgnoreMissing = False,
    unknown: labelled.UnknownSet = None,
    pixels: opt.PixelPolicy = "auto",
    crop: opt.CropPolicy = "model",
    decode: opt.DecodePolicy = "auto",
    model: opt.Model = None,
    offline: opt.Offline = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    want_precision: labelled.WantPrecision = 0.95,
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
    """Find out what a classifier's scores are worth, and write that into a copy of it.

    The temperature makes scores as high as answers are right; each label
    gets a least score from which its answers are right as often as wanted.
    classify uses them with --calibrated only.
    """
    check_inputs([pictures, *(unknown or [])])
    check_whole_file(output, force=force, read=[classifier, pictures, *(unknown or [])])
    choice = ModelChoice(model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size)
    choice.check()
    words = Words([], None, None, None, False, classifier)
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        with talk.working("starting"):
            from clipcli.tasks import calibrate as task
            from clipcli.tasks.embed import EmbedOptions
            from clipcli.zeroshot.classifier_file import save_classifier

        options = EmbedOptions(pixels=pixels, crop=crop, decode=decode, batch_size=batch_size, workers=workers)
        ((opened, loaded),) = labelled.prepared([choice], words, talk)
        check_whole_file(output, force=force, read=opened.files)
        reader = labelled.Reader(opened, loaded.labels, options, {"": include or []}, exclude or [], talk)
        others = reader.unknown(unknown)
        labelled_set = reader.whole([pictures])
        reader.tell_idle(labelled_set)
        found = task.calibrate(
            labelled_set, loaded, unknown=others, ignore_missing=ignore_missing, want_precision=want_precision
        )
        save_classifier(found.classifier, output)
        fitted = f"{found.error:.4f} -> {found.fitted_error:.4f}"
        talk.notice(f"temperature {found.classifier.temperature:.4g}: calibration error {fitted}")
        least = f"least score {found.outcome.value:.4f}, {counted(found.own, 'label')} with a threshold of their own"
        got = f"{found.outcome.coverage:.1%} of these pictures answered, {found.outcome.precision:.1%} of those right"
        talk.notice(f"{least}: {got}")
        talk.notice(f"written to {output}, for classify -c with --calibrated")
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if reader.failed else ExitCode.OK)
