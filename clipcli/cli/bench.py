"""`clipcli bench`: how fast this machine is at each part of a run, and what to choose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from clipcli.cli import complete
from clipcli.cli import options as opt
from clipcli.cli.columns import aligned
from clipcli.cli.console import Talk
from clipcli.cli.labels import put
from clipcli.cli.signals import orderly_stop
from clipcli.cli.usage import propose
from clipcli.errors import UsageError
from clipcli.images.find import check_inputs
from clipcli.output.text import counted, printable

if TYPE_CHECKING:
    from clipcli.tasks.bench import Timing
    from clipcli.tasks.peers import Absent

EXAMPLES = opt.epilog(
    "clipcli bench",
    "clipcli bench -m ViT-B-32-datacomp -m ViT-B-16-datacomp --only model",
    "clipcli bench photos/ --only decode --only end-to-end",
    "clipcli bench -d cuda -p fp32 -p fp16 -p bf16 -b 32 -b 128 -b 512",
    'clipcli bench --json --quick | jq -r ".advice[]"',
)
PRECISIONS: tuple[str, ...] = get_args(get_args(opt.PrecisionOf)[0])
RUNTIMES: tuple[str, ...] = get_args(get_args(opt.RuntimeOf)[0])
STAGES = ("decode", "model", "end-to-end", "text", "start", "relabel")

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Pictures to measure with: files, folders, archives. Without any, pictures are made.",
        show_default=False,
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
        help="As elsewhere (repeatable). One that isn't on this disk is given random weights, which are as fast. "
        "Default: ViT-B-32-256-datacomp if it is there, else tiny.",
        show_default=False,
    ),
]
Precisions = Annotated[
    list[str],
    opt.SPEED.option(
        "--precision",
        "-p",
        metavar=f"[{'|'.join(PRECISIONS)}]",
        envvar="CLIPCLI_PRECISION",
        help="As elsewhere (repeatable): the others are compared with the first.",
    ),
]
Runtimes = Annotated[
    list[str],
    opt.SPEED.option(
        metavar=f"[{'|'.join(RUNTIMES)}]",
        envvar="CLIPCLI_RUNTIME",
        help="As elsewhere (repeatable): with each precision. Without both options, all that pays here is tried.",
    ),
]
Batches = Annotated[
    list[int] | None,
    opt.SPEED.option(
        "--batch-size",
        "-b",
        metavar="N",
        min=1,
        max=65_536,
        envvar="CLIPCLI_BATCH_SIZE",
        help="Pictures a batch (repeatable). Default: 1, 8 and 32.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART", help=f"Measure this part alone (repeatable): {', '.join(STAGES)}.", show_default=False
    ),
]
Quick = Annotated[bool, opt.flag("--quick", help="Once each, and less of it.")]
Peers = Annotated[bool, opt.flag("--peers/--no-peers", help="With open_clip and transformers, if they are installed.")]


def bench(
    inputs: Inputs = None,
    only: Only = None,
    quick: Quick = False,
    peers: Peers = True,
    model: Models = None,
    offline: opt.Offline = False,
    vocabulary: opt.Vocabulary = None,
    as_json: opt.Json = False,
    batch_size: Batches = None,
    device: opt.Device = "auto",
    precision: Precisions = ["auto"],  # noqa: B006  # never changed; a list is what Typer takes
    runtime: Runtimes = ["auto"],  # noqa: B006
    quiet: opt.Quiet = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Measure this machine: decoding, the model, both, prompts, starting, relabelling; and say what to choose.

    clipcli and the others take turns, and a figure is the median of the
    rounds: trust the ratios, and take what is within 10 % for a tie. Nothing
    is kept. It takes from half a minute (tiny) to some minutes.
    """
    _check("--precision", precision, PRECISIONS)
    _check("--runtime", runtime, RUNTIMES)
    _check("--only", only or [], STAGES)
    check_inputs(inputs or [])
    talk = Talk(quiet=quiet, color=color)
    found: list[Timing] = []
    absent: list[Absent] = []
    with talk.listening(), orderly_stop():
        with talk.working("starting") as tick:
            from clipcli.tasks import bench as task

            options = task.BenchOptions(
                device=device,
                precisions=tuple(dict.fromkeys(precision)),  # type: ignore[arg-type]
                runtimes=tuple(dict.fromkeys(runtime)),  # type: ignore[arg-type]
                batches=tuple(dict.fromkeys(batch_size or task.BATCHES)),
                stages=tuple(only or task.STAGES),  # type: ignore[arg-type]
                peers=peers,
                quick=quick,
                vocabulary=vocabulary,
                offline=offline,
            )
            try:
                for one in task.bench(list(dict.fromkeys(model or [_default()])), options, inputs or [], tick.say):
                    found.append(one) if isinstance(one, task.Timing) else absent.append(one)
            except KeyboardInterrupt:
                talk.notice(f"interrupted after {counted(len(found), 'figure')}")
                _show(found, absent, as_json, talk)
                raise
        _show(found, absent, as_json, talk)


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError for what isn't known. Typer has no choices for an option that may be repeated."""
    if wrong := [one for one in given if one not in known]:
        hint = propose(wrong[0], known) or f"one of {', '.join(known)}"
        raise UsageError(f'{option} "{wrong[0]}": there is no such thing', hint=hint)


def _default() -> str:
    """The model that `classify` would take, if that needs no download."""
    from clipcli.weights.catalog import DEFAULT, TINY
    from clipcli.weights.fetch import here, parse

    return DEFAULT if here(parse(DEFAULT)) else TINY.name


def _show(found: Sequence[Timing], absent: Sequence[Absent], as_json: bool, talk: Talk) -> None:
    """Everything, as far as it was measured."""
    from clipcli.tasks.bench_report import advice, machine

    about, said = machine(), advice(found)
    if as_json:
        rows = [asdict(one) | {"per_second": one.per_second} for one in found]
        report = {"machine": about, "rows": rows, "absent": [asdict(one) for one in absent], "advice": said}
        put([json.dumps(report, indent=2)])
        return
    whole = ", ".join(f"{name} {value}" for name, value in about.items())
    put([fill(whole, 79, break_long_words=False, break_on_hyphens=False)])
    if found:
        put(["", *_table(found)])
    for one in absent:
        talk.notice(f"{one.model}: not compared with {one.name}: {one.why}")
    if said:
        put(["", *map(printable, said)])


def _table(found: Sequence[Timing]) -> Iterator[str]:
    """What was measured, and below it a line for each way to do it."""
    rows = aligned([("", "clipcli is x as fast as", ""), *map(_cells, found)], right=frozenset({0, 1}), indent="  ")
    yield next(rows)
    for what, ways in groupby(found, lambda one: f"{one.model}: {one.stage}, {one.case}"):
        yield printable(what)
        yield from islice(rows, len(list(ways)))


def _cells(one: Timing) -> tuple[str, ...]:
    if one.unit == "process":
        rate = f"{1 / one.per_second:.2f} s"
    else:
        rate = f"{one.per_second:,.{0 if one.per_second >= 1000 else 1}f} {one.unit}s/s"
    return rate, "" if one.ratio is None else f"{one.ratio:.2f}", one.way
