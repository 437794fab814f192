"""`clipcli train`: pairs of pictures and words into a model directory."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk, Ticker, duration
from clipcli.cli.signals import heeded
from clipcli.errors import ExitCode, OutputError, UsageError, cannot_write
from clipcli.output.text import counted, printable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from clipcli.train.config import TrainConfig
    from clipcli.train.run import Evaluated, Event, Ready, Request, Step

SHOWN = 5  # failures that are listed without --verbose

DATA, MODEL, RECIPE = map(opt.Panel, ("Data", "Model", "Recipe"))

EXAMPLES = opt.epilog(
    "clipcli train photos/ -o my-model --init ViT-B-32-256-datacomp --epochs 5 --learning-rate 1e-5",
    "clipcli train captions.csv -o my-model --recipe recipe.toml --eval val=photos-val/",
    "clipcli train 'shard-000.tar' 'shard-001.tar' -o my-model --recipe recipe.toml --set seed=1",
    "clipcli train captions.csv -o my-model --recipe recipe.toml --resume",
    "torchrun --nproc-per-node 4 -m clipcli train shards/ -o my-model --recipe recipe.toml",
)

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Folders of class folders, CSV or JSONL files of path and caption (or label), webdataset .tar files.",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    opt.OUTPUT.option(
        "--output",
        "-o",
        metavar="DIR",
        help="The model directory; checkpoint and log.csv go there too.",
        show_default=False,
    ),
]
WordsOf = Annotated[
    str | None,
    DATA.option(
        "--labels",
        "-l",
        metavar="FILE",
        help="Words of the classes: aliases become captions too, groups (a|b) are broader words.",
    ),
]
Templates = Annotated[
    str | None,
    DATA.option("--templates", "-t", metavar="SET", help="Templates of the captions."),
]
MaxPerLabel = Annotated[int | None, DATA.option(metavar="N", min=1, help="At most N pairs of each class or caption.")]
Strict = Annotated[bool, DATA.flag("--strict", help="Stop at the first picture that can't be read.")]
Eval = Annotated[
    list[str] | None,
    DATA.option(
        "--eval",
        metavar="[NAME=]SET",
        help="Labelled pictures to try the model on while it trains (repeatable).",
    ),
]
Init = Annotated[
    str | None,
    MODEL.option(metavar="MODEL", help="Go on from this model instead of from random weights."),
]
Freeze = Annotated[
    Literal["none", "image", "text"] | None,
    MODEL.option(help="Keep one tower as it is (image: LiT)."),
]
Vocabulary = Annotated[
    Path | None,
    MODEL.option(
        metavar="FILE",
        help="A BPE vocabulary for the new model, or MODEL's, where it doesn't lie beside the weights.",
    ),
]
Offline = Annotated[
    bool, MODEL.flag("--offline", envvar="CLIPCLI_OFFLINE", help="Never download MODEL; use what is here.")
]
VocabularySize = Annotated[
    int | None,
    MODEL.option(metavar="N", help="Size of the vocabulary learned from the captions."),
]
Recipe = Annotated[
    Path | None,
    RECIPE.option(metavar="FILE", help="Settings, in TOML; options given here overrule it."),
]
Epochs = Annotated[float | None, RECIPE.option(metavar="N", help="Passes over the data.")]
BatchSize = Annotated[
    int | None,
    RECIPE.option("--batch-size", "-b", metavar="N", help="Pairs in a batch, over all devices."),
]
LearningRate = Annotated[float | None, RECIPE.option(metavar="R", help="Its peak.")]
Seed = Annotated[int | None, RECIPE.option(metavar="N", help="Decides everything random.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"] | None,
    RECIPE.option("--precision", "-p", help="auto: bf16 or fp16 on CUDA, else fp32."),
]
Settings = Annotated[
    list[str] | None,
    RECIPE.option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting of a recipe (repeatable); docs/training.md lists them.",
    ),
]
Resume = Annotated[bool, opt.OUTPUT.flag("--resume", help="Go on with the run in DIR.")]
Force = Annotated[bool, opt.OUTPUT.flag("--force", help="Begin anew where DIR holds a run.")]
TensorBoard = Annotated[bool, opt.OUTPUT.flag("--tensorboard", help="Write TensorBoard events into DIR too.")]


def train(
    data: Data,
    output: Output,
    labels: WordsOf = None,
    templates: Templates = None,
    max_per_label: MaxPerLabel = None,
    strict: Strict = False,
    evaluate: Eval = None,
    init: Init = None,
    freeze: Freeze = None,
    offline: Offline = False,
    vocabulary: Vocabulary = None,
    vocabulary_size: VocabularySize = None,
    recipe: Recipe = None,
    settings: Settings = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    precision: Precision = None,
    seed: Seed = None,
    device: opt.Device = "auto",
    workers: opt.Workers = None,
    resume: Resume = False,
    force: Force = False,
    tensorboard: TensorBoard = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Train a CLIP on pairs of pictures and words, or fine-tune one."""
    from clipcli.images.stream import default_workers
    from clipcli.train import devices
    from clipcli.train.config import TrainConfig, parse_setting
    from clipcli.train.run import Request
    from clipcli.zeroshot.labels import read

    typed: dict[str, object] = dict(map(parse_setting, settings or []))
    named = {
        "init": init,
        "freeze": freeze,
        "templates": templates,
        "max_per_label": max_per_label,
        "epochs": epochs,
        "vocabulary_size": vocabulary_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
    }
    sets = _sets(evaluate or [])
    config = TrainConfig.read(recipe, typed | {name: value for name, value in named.items() if value is not None})
    with (
        devices.joined(device) as (share, own),
        Talk(quiet=quiet or share.rank > 0, verbose=verbose, color=color).listening() as talk,
    ):
        if not share.rank:
            _check_output(output, [*data, *sets.values()], resume=resume, force=force)
        request = Request(
            data,
            output,
            words=read(labels) if labels else (),
            sets=sets,
            vocabulary=vocabulary,
            offline=offline,
            resume=resume,
            strict=strict,
            workers=workers or default_workers(),
            device=own,
            share=share,
        )
        _run(request, config, talk, _summary_writer() if tensorboard and not share.rank else None)


def _run(request: Request, config: TrainConfig, talk: Talk, writer: type[SummaryWriter] | None) -> None:
    """Train to the end, or to the first interruption, whose number is the exit code less 128."""
    from clipcli.train.devices import anywhere
    from clipcli.train.run import Ready
    from clipcli.train.run import train as run

    began = time.monotonic()
    with talk.working("reading the data") as tick:
        events = run(request, config, tick)
        ready = next(events)  # Ctrl-C until here leaves nothing behind
        assert isinstance(ready, Ready)
        _tell(ready, talk)
        with (
            _signals(talk) as signals,
            closing(events),
            writer(str(request.output)) if writer else nullcontext() as board,
        ):
            best, stopped = _follow(events, talk, tick, board, lambda: anywhere(bool(signals), request.share))
    if stopped:
        talk.notice(f"stopped; the same command with --resume goes on in {request.output}")
        raise typer.Exit(128 + (signals[0][0] if signals else signal.SIGINT))
    if request.share.rank == 0:
        _tell_end(request.output, best, time.monotonic() - began, talk)
    if ready.failures and request.share.world == 1:  # torchrun takes any code but 0 for a crash
        raise typer.Exit(ExitCode.SOME_PICTURES_FAILED)


def _follow(
    events: Iterator[Event], talk: Talk, tick: Ticker, board: SummaryWriter | None, stopping: Callable[[], bool]
) -> tuple[Evaluated | None, bool]:
    """Tell what happens. The evaluation of the weights that are kept, and whether the run was stopped."""
    from clipcli.train.run import Evaluated, Saved, Step

    best: Evaluated | None = None
    line = ""
    for event in events:
        if isinstance(event, Step):
            line = _line(event)
            tick.say(line)
            values = {"loss": event.loss, "scale": event.scale, "learning_rate": event.learning_rate}
            _draw(board, event.number, values)
            if event.number < event.steps and stopping():
                return best, True
        elif isinstance(event, Evaluated):
            best = event if event.best else best
            talk.notice(f"{line} · accuracy: {_accuracies(event)}{' (kept)' if event.best else ''}", name=False)
            _draw(board, event.step, event.accuracy)
        elif isinstance(event, Saved):
            talk.detail(f"checkpoint after step {event.step:,}")
    return best, False


def _tell(ready: Ready, talk: Talk) -> None:
    kept = "kept in memory" if ready.kept else "read again each epoch"
    talk.notice(
        f"{counted(ready.pairs, 'pair')} to learn from, {ready.held_out:,} held out, {kept}; "
        f"{ready.parameters:,} parameters, vocabulary of {ready.vocab_size:,}"
    )
    talk.detail(f"{ready.device}; {counted(ready.steps, 'step')}")
    if ready.failures:
        talk.notice(f"{counted(len(ready.failures), 'picture')} left out:")
        shown = ready.failures if talk.verbose else ready.failures[:SHOWN]
        for failure in shown:
            talk.notice(f"  {failure.path}: {failure.message}", name=False)
        if len(shown) < len(ready.failures):
            talk.notice("  … (-v lists all)", name=False)
    if ready.done:
        talk.notice(f"going on after step {ready.done:,} of {ready.steps:,}")


def _line(step: Step) -> str:
    """`epoch 3.2 · step 1,200/9,000 · loss 2.31 · …`."""
    return " · ".join(
        (
            f"epoch {step.epoch:.1f}",
            f"step {step.number:,}/{step.steps:,}",
            f"loss {step.loss:.3f}",
            f"scale {step.scale:.1f}",
            f"{step.image_size} px",
            f"{step.pictures_per_second:,.0f} pictures/s",
            f"{duration(step.seconds_left)} left",
        )
    )


def _accuracies(event: Evaluated) -> str:
    told = (f"{name.replace('_', ' ')} {value:.1%}" for name, value in event.accuracy.items())
    return ", ".join(told) or "none, as nothing was held out"


def _tell_end(folder: Path, best: Evaluated | None, seconds: float, talk: Talk) -> None:
    """What is there now: the model, its accuracy, and the curves, where the extra that draws is installed."""
    from clipcli.train.plot import plot

    curves = plot(folder)
    accuracy = f", accuracy: {_accuracies(best)}" if best and best.accuracy else ""
    talk.notice(f"{folder}: trained in {duration(seconds)}{accuracy}{f'; curves in {curves.name}' if curves else ''}")
    talk.notice(f"use it: clipcli classify photos/ -L cat -L dog -m {shlex.quote(str(folder))}")


def _check_output(output: Path, read: Sequence[str], *, resume: bool, force: bool) -> None:
    """Raise UsageError where the folder holds anything and the run neither goes on with it nor may replace it.

    `read` is what the run reads: nothing of it may be written. Raises OutputError.
    """
    from clipcli.train.run import LOG

    try:
        if output.is_dir() and any(output.iterdir()) and not (resume or force):
            hint = "use --resume to go on with its run, or --force to begin anew in it"
            raise UsageError(f"{output}: exists already", hint=hint)
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output}: is a file", hint="name a folder for the model")
        if not output.parent.is_dir():
            raise OutputError(f"{output}: the folder {output.parent} does not exist", hint=f"mkdir -p {output.parent}")
        for path in filter(Path.exists, (output, output / LOG)):
            if any(path.samefile(other) for other in filter(os.path.exists, read)):
                raise UsageError(f"{path}: is read by this very run", hint="name another folder with --output")
    except OSError as error:
        raise cannot_write(output, error) from error


def _sets(given: Sequence[str]) -> dict[str, str]:
    """`name=path` or a path, whose last part without ending is then the name."""
    from clipcli.train.run import COLUMNS

    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            name, path = Path(text).name.partition(".")[0], text
        name = printable(name)
        if name in found:
            raise UsageError(f'two sets to evaluate on are named "{name}"', hint="write --eval NAME=PATH")
        if not name or name in COLUMNS:
            raise UsageError(f'a set to evaluate on can\'t be named "{name}"', hint="write --eval NAME=PATH")
        found[name] = path
    return found


@contextmanager
def _signals(talk: Talk) -> Iterator[list[tuple[int, float]]]:
    """Signals, and when they came: the first ends the run after its step, a later one at once.

    What the caller told us to ignore (`nohup`, a script's `&`) stays ignored.
    """
    came: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and time.monotonic() - came[0][1] > 0.5:  # with torchrun, one Ctrl-C may come twice
            raise KeyboardInterrupt
        if not came and not talk.quiet:
            with suppress(OSError):  # the terminal may have gone; and print might be under way
                os.write(2, b"\nclipcli: saving after this step (once more: stop at once)\n")
        came.append((number, time.monotonic()))

    before = {number: signal.signal(number, note) for number in heeded()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer. Raises UsageError where it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = 'pip install "clipcli[tensorboard]"'
        raise UsageError("--tensorboard needs a package that isn't installed", hint=hint) from error
    return SummaryWriter


def _draw(board: SummaryWriter | None, step: int, values: Mapping[str, float]) -> None:
    if board:
        for name, value in values.items():
            board.add_scalar(name, value, step)
