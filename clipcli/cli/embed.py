"""`clipcli embed`: embeddings of pictures, or of sentences, into a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk, Ticker
from clipcli.cli.request import ModelChoice
from clipcli.cli.signals import orderly_stop
from clipcli.cli.stages import report
from clipcli.cli.streams import Pictures, check_new_file
from clipcli.errors import ExitCode, UsageError
from clipcli.images.crops import check_folder
from clipcli.output.text import counted
from clipcli.records import Embedded, Failure

if TYPE_CHECKING:
    from clipcli.tasks.embed import EmbedOptions
    from clipcli.weights.model import Model

EXAMPLES = opt.epilog(
    "clipcli embed photos/ -o photos.safetensors",
    "clipcli classify photos.safetensors -l labels.txt",
    'find . -name "*.jpg" -print0 | clipcli embed -0 -o photos.npz',
    "clipcli embed --text sentences.txt -o sentences.npz",
)

Sentences = Annotated[
    str | None,
    opt.INPUT.option(
        "--text", metavar="FILE", help="Embed the sentences in FILE (- for stdin), one a line, in place of pictures."
    ),
]
OutputFile = Annotated[
    Path | None,
    opt.OUTPUT.option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where embeddings go: .safetensors, .npz or .parquet. It is there when all is done, and not before.",
    ),
]


def embed(
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
    text: Sentences = None,
    model: opt.Model = None,
    offline: opt.Offline = False,
    truncate: opt.Truncate = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    output: OutputFile = None,
    save_crop: opt.SaveCrop = None,
    strict: opt.Strict = False,
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
    """Keep what the model sees in pictures: a vector for each, in a file.

    classify takes such a file in place of the pictures, with any labels.
    An interrupted run leaves no file; the same command goes on from where
    it was, since the store keeps every embedding.
    """
    began = time.monotonic()
    pictures = Pictures(inputs or [], files_from, null, include or [], exclude or [], follow)
    if text is None:
        pictures.demand(context)
    elif pictures.inputs or files_from:
        raise UsageError("pictures and sentences don't go into one file", hint="give INPUT or --text")
    if output is None or output.name == "-":
        what = "no --output" if output is None else "embeddings can't be written to stdout"
        raise UsageError(what, hint="name a file: -o photos.safetensors")
    check_new_file(output, force=force, read=["/dev/stdin", *pictures.inputs, files_from, text])
    if text is None:
        pictures.check()
    for name in pictures.embeddings:
        raise UsageError(f"{name}: holds embeddings already", hint="give the pictures")
    if save_crop is not None:
        check_folder(save_crop, force=force, walked=pictures.inputs)
    choice = ModelChoice(
        model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size, runtime
    )
    choice.check()

    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk, orderly_stop():
        with talk.working("loading the model"):
            from clipcli.output.spool import check_ending
            from clipcli.tasks.embed import EmbedOptions

            check_ending(output)
            sentences = _sentences(text) if text else {}
            opened = choice.open(talk)
        check_new_file(output, force=force, read=opened.files)
        if sentences:
            _save_texts(sentences, opened, output, truncate, talk)
            done, failed = counted(len(sentences), "sentence"), 0
        else:
            options = EmbedOptions(
                pixels=pixels,
                crop=crop,
                decode=decode,
                batch_size=batch_size,
                workers=workers,
                flush_after=0.2 if pictures.live else None,
                save_crop=save_crop,
            )
            talk.detail("batch size {}, {} decoding threads".format(*options.speed(opened)))
            talk.detail(f"decoder: {options.decoder}")
            total, failed = _save_pictures(pictures, opened, options, output, strict, talk)
            done = f"{counted(total, 'picture')}, {failed:,} failed" if total else "no pictures found"
        talk.notice(f"{done}, written to {output}, {time.monotonic() - began:.1f} s")
    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED if failed else ExitCode.OK)


def _save_pictures(
    pictures: Pictures, model: Model, options: EmbedOptions, target: Path, strict: bool, talk: Talk
) -> tuple[int, int]:
    """Embed them into the file; failures are told. Returns how many came, and how many failed."""
    from clipcli.output.spool import save_embeddings
    from clipcli.tasks.embed import embed as task

    total = failed = 0

    def told(rows: Iterable[Embedded | Failure], tick: Ticker) -> Iterator[Embedded | Failure]:
        nonlocal total, failed
        for row in rows:
            total += 1
            tick(total)
            if isinstance(row, Failure):
                failed += 1
                talk.failed(row)
                if strict:
                    talk.notice(f"stopped at the first failure: {target} is not written")
                    raise typer.Exit(ExitCode.SOME_PICTURES_FAILED)
            yield row

    try:
        with talk.working("embedding") as tick:
            rows = told(task(pictures.walk(), model, options), tick)
            save_embeddings(rows, target, model, pixels=options.pixels, crop=options.crop, decode=options.decode)
    except KeyboardInterrupt:
        kept = "the same command goes on from there" if model.store.path else "nothing is kept"
        talk.notice(f"interrupted after {counted(total, 'picture')}, {target} is not written; {kept}")
        raise
    for line in report(options, model):
        talk.detail(line)
    if pictures.passed_over:
        talk.detail(f"{counted(pictures.passed_over, 'other file')} passed over")
    return total, failed


def _sentences(name: str) -> dict[str, str]:
    """Sentences by their places; empty lines are skipped. Raises LabelError, UsageError."""
    from clipcli.zeroshot.files import checked, decode, read_text

    text = decode(sys.stdin.buffer.read(), Path("-")) if name == "-" else read_text(Path(name))
    lines = {f"{name}:{number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise UsageError(f"{name}: no sentences", hint="write one a line")
    return {place: checked(line, "sentence", place) for place, line in lines.items()}


def _save_texts(sentences: dict[str, str], model: Model, target: Path, truncate: bool, talk: Talk) -> None:
    from clipcli.output.spool import save_embeddings
    from clipcli.tasks.embed_texts import embed_texts

    with talk.working("encoding sentences") as tick:
        rows = embed_texts(list(sentences.values()), model, truncate=truncate, where=list(sentences), progress=tick)
        save_embeddings(rows, target, model, texts=True)
