"""How fast this machine is: each part of a run, with the programs beside it that can be imported, and what to choose.

    models --stages--> cases (ways of doing the same work) --interleaved--> Timings --bench_report--> advice

In: names of models, and pictures or none. Out: a `Timing` for each way, an `Absent` for each other program that isn't
there. The ways take turns within each round, so that what else the machine does hits all of them: only ratios are to be
trusted, and within 10 % they are ties. A model that isn't on this disk is not fetched, where the catalogue knows its
architecture: random weights are as fast. Nothing is kept, and no number says how good an answer is.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from clipcli.errors import ClipcliError, ModelError, UsageError
from clipcli.images.stream import Square, cpus, make_prepare
from clipcli.images.transform import normalise
from clipcli.model.config import ClipConfig, expected_shapes
from clipcli.output.sink import SinkOptions, open_sink
from clipcli.paths import tiny_dir
from clipcli.records import Embedded, Failure, Label, Source
from clipcli.tasks.build import build_classifier
from clipcli.tasks.classify import classify
from clipcli.tasks.embed import Input, sources
from clipcli.tasks.linear import one_thread, unit
from clipcli.tasks.peers import Absent, Peer, find
from clipcli.tokenizer import Tokenizer, find_vocabulary
from clipcli.weights import catalog
from clipcli.weights.fetch import Located, exists, here, parse, resolve
from clipcli.weights.model import Model, load_model
from clipcli.weights.save import save_model
from clipcli.zeroshot import prompts, templates
from clipcli.zeroshot.classifier import Classifier

if TYPE_CHECKING:
    from clipcli.model.device import Precision, Runtime

Stage = Literal["decode", "model", "end-to-end", "text", "start", "relabel"]
Run = Callable[[], object]

OURS = "clipcli"
LIMIT = "the bare product"
STAGES: tuple[Stage, ...] = get_args(Stage)
SIZES = {"500 x 375": (500, 375, 8), "4000 x 3000": (4000, 3000, 1)}  # width, height, how many
LABELS = ("cat", "dog", "bird", "car", "ship", "tree", "house", "person", "mountain", "book")
TEMPLATE = "a photo of a <>."
MOST_PICTURES = 64  # of the user's
BATCHES = (1, 8, 32)

log = logging.getLogger("clipcli")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how long."""

    device: str = "auto"
    precisions: tuple[Precision, ...] = ("auto",)  # with each of the runtimes; others are compared with the first
    runtimes: tuple[Runtime, ...] = ("auto",)
    batches: tuple[int, ...] = BATCHES
    stages: tuple[Stage, ...] = STAGES
    peers: bool = True  # whether other programs take part
    quick: bool = False  # a round each, and less in it
    vocabulary: Path | None = None
    offline: bool = False


class Way(NamedTuple):
    """One way of doing the work of a case."""

    run: Run
    things: int  # that a run does


Case = tuple[str, Mapping[str, Way]]  # work, and the ways to do it by their names; the first is clipcli's own


@dataclass(frozen=True)
class Timing:
    """What one way took, and how it stands to clipcli's."""

    model: str
    stage: Stage
    case: str
    way: str
    unit: str
    seconds: tuple[float, ...]  # for one thing, round by round
    ratio: float | None  # clipcli is so many times as fast: the median of the rounds; None: it is clipcli's own

    @property
    def per_second(self) -> float:
        """The median."""
        return 1 / statistics.median(self.seconds)


@dataclass(frozen=True)
class _Subject:
    """A model that is measured, with everything around it."""

    models: Mapping[str, Model]  # by the name of the way; the first is what the others are compared with
    others: Mapping[str, Model]  # what else there is here: only the image tower alone is run
    peers: Sequence[Peer]
    pictures: Mapping[str, Sequence[Source]]  # by their size
    folder: Path  # to write to
    options: BenchOptions

    @property
    def model(self) -> Model:
        return next(iter(self.models.values()))


def bench(
    names: Sequence[str],
    options: BenchOptions,
    inputs: Iterable[Input] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Timing | Absent]:
    """Measure each model on the pictures of `inputs`, or on made ones; `say` is told what is being measured.

    Raises UsageError where none of `inputs` is a picture, ModelError, VocabularyError.
    """
    import torch  # noqa: F401  # where it isn't imported yet, numpy would do the first pictures

    with TemporaryDirectory(prefix="clipcli-bench-") as place:
        pictures = _named(inputs) if inputs else _made(Path(place))
        for name in names:
            say(f"loading {name}")
            folder = Path(place, "model")
            located = _locate(name, folder, options)
            models, others = _models(located, options)
            usual = next(iter(models.values()))
            have_peers = options.peers and set(options.stages) != {"relabel"}
            found = [*find(usual, folder / "peers")] if have_peers else []
            yield from (one for one in found if isinstance(one, Absent))
            peers = [one for one in found if isinstance(one, Peer)]
            subject = _Subject(models, others, peers, pictures, folder, options)
            for stage in filter(options.stages.__contains__, STAGES):
                for what, ways in _CASES[stage][1](subject):
                    say(f"{usual.name}: {stage}, {what}")
                    yield from _measure(subject, stage, what, ways)
            shutil.rmtree(folder, ignore_errors=True)  # copies of weights are large


def interleaved(ways: Mapping[str, Run], seconds: float, *, least: int = 2, most: int = 9) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after a run that doesn't count.

    There are rounds for about so many seconds, `least` to `most`; a short way is repeated within each.
    """
    times: dict[str, int] = {}
    for name, run in ways.items():
        run()
        times[name] = max(1, round(seconds / 20 / _spent(run))) if seconds else 1
    spent: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - began >= seconds:
            break
        for name in list(ways)[:: -1 if number % 2 else 1]:
            spent[name].append(_spent(ways[name], times[name]))
    return spent


def _spent(run: Run, times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def _measure(subject: _Subject, stage: Stage, what: str, ways: Mapping[str, Way]) -> Iterator[Timing]:
    runs, quick = {name: way.run for name, way in ways.items()}, subject.options.quick
    found = interleaved(runs, 0 if quick or stage == "start" else 1, least=1 if quick else 2)
    each = {name: tuple(one / ways[name].things for one in spent) for name, spent in found.items()}
    first = next(iter(each.values()))
    for name, seconds in each.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds, first, strict=True))
        own = None if seconds is first else ratio
        yield Timing(subject.model.name, stage, what, name, _CASES[stage][0], seconds, own)


# ---- what is measured with


def _named(inputs: Iterable[Input]) -> dict[str, Sequence[Source]]:
    """The first pictures of the user's that there are."""
    prepare = make_prepare(catalog.ARCHITECTURES["ViT-B-32"].preprocess, 224, decode="auto")
    some = (item for item in islice(sources(inputs), 4 * MOST_PICTURES) if isinstance(item, Source))
    whole = list(islice((source for source in some if not isinstance(prepare(source), Failure)), MOST_PICTURES))
    if not whole:
        raise UsageError("there is no picture that can be decoded", hint="leave them out, and pictures are made")
    return {f"yours ({len(whole)})": whole}


def _made(folder: Path) -> dict[str, Sequence[Source]]:
    from clipcli.images.made import made_photograph

    made: dict[str, Sequence[Source]] = {}
    for what, (width, height, count) in SIZES.items():
        files = [folder / f"{width}-{seed}.jpg" for seed in range(count)]
        for seed, file in enumerate(files):
            file.write_bytes(made_photograph(width, height, seed))
        made[what] = [Source(str(file)) for file in files]
    return made


def _locate(name: str, folder: Path, options: BenchOptions) -> Located:
    """Where a model lies: on this disk, or in `folder` with random weights."""
    folder.mkdir(exist_ok=True)
    if not exists(name):
        wanted = parse(name)
        entry = catalog.find_repo(wanted.repo)
        if here(wanted) is None and entry is not None and entry.config is not None:
            log.warning("%s is not on this disk: random weights in its place, which are as fast", wanted.name)
            write_random(folder / "random", entry.config, options.vocabulary or tiny_dir())
            return Located(wanted.name, folder / "random", None, None)
    located = resolve(name, offline=options.offline, vocabulary=options.vocabulary)
    return replace(located, entry=None) if located.entry is catalog.TINY else located  # nobody need be told what it is


def _models(located: Located, options: BenchOptions) -> tuple[dict[str, Model], dict[str, Model]]:
    """The model in every arithmetic that was asked for; where none was, also in what else pays on such a device."""
    opened = partial(load_model, located, device=options.device, vocabulary=options.vocabulary)
    pairs = [*product(options.precisions, options.runtimes)]
    names = [_way(*pair) for pair in pairs] if len(pairs) > 1 else [OURS]
    models = {name: opened(precision=one, runtime=other) for name, (one, other) in zip(names, pairs, strict=True)}
    others: dict[str, Model] = {}
    if pairs == [("auto", "auto")] and "model" in options.stages:
        more: tuple[tuple[Precision, Runtime], ...] = (("fp32", "onnx"), ("int8", "onnx"))
        if models[OURS].on_cuda:
            more = (("fp32", "torch"), ("bf16", "torch"))
        for precision, runtime in more:
            with suppress(ClipcliError):  # the runtime isn't installed, or isn't for this model or device
                others[_way(precision, runtime)] = opened(precision=precision, runtime=runtime)
    return models, others


def _way(precision: Precision, runtime: Runtime) -> str:
    return f"{OURS}, {precision}" + ("" if runtime == "auto" else f" by {runtime}")


def write_random(folder: Path, config: ClipConfig, vocabulary: Path) -> None:
    """A model directory with random weights, and as many tokens as `vocabulary` (a file or a folder) has."""
    file = find_vocabulary(vocabulary) if vocabulary.is_dir() else vocabulary
    if file is None:
        raise ModelError(f"{vocabulary}: no vocabulary there", hint="name one with --vocabulary FILE")
    config = replace(config, text=replace(config.text, vocab_size=Tokenizer.from_file(file).vocab_size))
    random = np.random.default_rng(0)
    arrays = {
        name: np.ones(shape, np.float32)
        if len(shape) < 2  # gains, variances, the logarithm of the scale
        else random.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)
        for name, shape in expected_shapes(config).items()
    }
    save_model(folder, config, arrays, merges=file, card="Random weights, to measure with.\n")


def _squares(subject: _Subject, count: int) -> Square:
    """Pictures [count, 3, size, size] for the model, those of the first kind over and over."""
    prepare = make_prepare(subject.model.config.preprocess, subject.model.config.vision.image_size)
    found = [prepare(source) for source in next(iter(subject.pictures.values()))]
    squares = [one.square for one in found if not isinstance(one, Failure) and one.square is not None]
    return np.stack(list(islice(cycle(squares), count)))


# ---- the stages


def _decode(subject: _Subject) -> Iterator[Case]:
    """From files to squares, on one core."""
    config = subject.model.config
    prepare = partial(make_prepare, config.preprocess, config.vision.image_size)
    ways: dict[str, Callable[[Source], object]] = {
        OURS: prepare(decode="auto"),
        f"{OURS}, exact": prepare(decode="exact"),
        "Pillow": prepare("reference"),  # the calls of the original code
        **{peer.name: peer.square for peer in subject.peers},
    }

    def run(way: Callable[[Source], object], pictures: Sequence[Source]) -> None:
        for picture in pictures:
            way(picture)

    with one_thread():
        for what, some in subject.pictures.items():
            runs = {name: Way(partial(run, way, some), len(some)) for name, way in ways.items()}
            yield f"{what}, a core", runs


def _model(subject: _Subject) -> Iterator[Case]:
    """From squares to embeddings."""
    import torch

    squares = _squares(subject, max(subject.options.batches))
    ready = torch.from_numpy(normalise(squares, subject.model.config.preprocess))

    def theirs(peer: Peer, batch: int) -> None:
        with torch.inference_mode():
            peer.image(ready[:batch]).float().cpu()

    for batch in subject.options.batches:
        ways = {
            name: Way(partial(model.encode_image, squares[:batch]), batch)
            for name, model in {**subject.models, **subject.others}.items()
        }
        ways |= {peer.name: Way(partial(theirs, peer, batch), batch) for peer in subject.peers}
        yield f"batch {batch}", ways


def _end_to_end(subject: _Subject) -> Iterator[Case]:
    """From files to rows, with batches as `classify` and the others' loops choose them."""
    import torch

    built = {name: build_classifier(model, LABELS, templates=TEMPLATE) for name, model in subject.models.items()}
    weight = torch.from_numpy(next(iter(built.values())).weight)
    loaders = cpus() if subject.model.on_cuda else 0  # on a CPU they would disturb the model, and gain nothing
    squares = _squares(subject, 16)
    subject.model.encode_image(squares)
    rate = len(squares) / _spent(partial(subject.model.encode_image, squares))
    count = 16 if subject.options.quick else min(512, max(16, round(rate)))  # about a second

    for what, some in subject.pictures.items():
        many = list(islice(cycle(some), count if len(some) > 1 else 16))
        runs: dict[str, Run] = {
            name: partial(_rows, many, built[name], model) for name, model in subject.models.items()
        }
        runs |= {peer.name: partial(peer.answers, many, weight, workers=loaders) for peer in subject.peers}
        yield what, {name: Way(run, len(many)) for name, run in runs.items()}


def _rows(pictures: Sequence[Source | Embedded], classifier: Classifier, model: Model) -> None:
    with open(os.devnull, "wb") as file:
        sink = open_sink("jsonl", file, SinkOptions(labels=classifier.names))
        for row in classify(pictures, classifier, model):
            sink.write(row)
        sink.close()


def _text(subject: _Subject) -> Iterator[Case]:
    """From prompts to embeddings, in 80 templates; the others do fewer prompts, which cost them as much each."""
    import torch
    from torch.nn import functional

    from clipcli.model.text import pad

    config, labels = subject.model.config.text, [Label(name, (name,)) for name in LABELS]
    labels = labels[:2] if subject.options.quick else labels
    filled = prompts.fill(labels, templates.read(["imagenet80"]))
    ids = prompts.tokenize(filled, labels, subject.model.tokenizer, config.context_length, truncate=True)

    def ours(model: Model) -> None:
        for _ in model.encode_text(ids):
            pass

    def theirs(peer: Peer) -> None:
        some = pad(sample)
        with torch.inference_mode():
            peer.text(functional.pad(some, (0, (peer.padded or some.shape[1]) - some.shape[1]))).float().cpu()

    sample = ids[:: len(ids) // 16][:16]
    towers: dict[str, str] = {}  # the first way of each arithmetic: a runtime for pictures changes nothing here
    for name, model in subject.models.items():
        towers.setdefault(model.text_arithmetic, name)
    ways = {name: Way(partial(ours, subject.models[name]), len(ids)) for name in towers.values()}
    ways |= {peer.name: Way(partial(theirs, peer), len(sample)) for peer in subject.peers}
    yield f"{len(labels)} labels x 80 templates", ways


def _start(subject: _Subject) -> Iterator[Case]:
    """A process that answers for one picture; clipcli knows its labels from before, as after any first run."""
    checkpoint, picture = subject.model.checkpoint, _file(subject)
    known, fresh, scratch = (subject.folder / name for name in ("known", "fresh", "scratch"))  # stores
    labels = [f"--label={name}" for name in LABELS]
    common = [*labels, "-t", TEMPLATE, "-q", "-m", str(checkpoint.path.resolve()), "-d", subject.options.device]
    common += ["--vocabulary", str(checkpoint.vocabulary.resolve())] if checkpoint.vocabulary else []
    command = [sys.executable, "-m", "clipcli", "classify", picture, *common]
    _process([sys.executable, "-m", "clipcli", "build-classifier", *common], fresh)
    shutil.copytree(fresh, known)
    _process(command, known)

    def anew() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(fresh, scratch)
        _process(command, scratch)

    ways = {OURS: Way(anew, 1), f"{OURS}, known picture": Way(partial(_process, command, known), 1)}
    for peer in subject.peers:
        if peer.script:
            script = [sys.executable, "-c", peer.script, str(peer.folder), picture, *LABELS]
            ways[peer.name] = Way(partial(_process, script, known), 1)
    yield "one picture, a new process", ways


def _file(subject: _Subject) -> str:
    """The path of a picture that every program can open."""
    source = next(iter(subject.pictures.values()))[0]
    if source.data is None:
        return os.path.abspath(source.path)
    file = subject.folder / "picture"  # known by its content
    file.write_bytes(source.data)
    return str(file)


def _process(command: Sequence[str], store: Path) -> None:
    environment = {**os.environ, "CLIPCLI_CACHE_DIR": str(store), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=store.parent)  # no settings lie there
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ModelError(f"a process that was to be measured ended with {done.returncode}: {said[-1]}")


def _relabel(subject: _Subject) -> Iterator[Case]:
    """From embeddings to rows of JSON, for 1,000 labels; the product of the same matrices is the limit."""
    model, random = subject.model, np.random.default_rng(0)
    count = 2_000 if subject.options.quick else 20_000
    vectors, weight = (
        unit(random.standard_normal((rows, model.config.embed_dim), np.float32)) for rows in (count, 1_000)
    )
    labels = tuple(Label(f"label {i}", (f"label {i}",)) for i in range(len(weight)))
    classifier = Classifier(weight, labels, 100.0, model.name, model.image_fingerprint, model.text_fingerprint)
    known = [Embedded(f"{i:06}.jpg", vector) for i, vector in enumerate(vectors)]

    def product() -> None:
        for start in range(0, count, 1024):
            vectors[start : start + 1024] @ weight.T

    ways = {OURS: Way(partial(_rows, known, classifier, model), count), LIMIT: Way(product, count)}
    yield f"{len(weight):,} labels", ways


_CASES: dict[Stage, tuple[str, Callable[[_Subject], Iterator[Case]]]] = {  # what is counted, and what is done
    "decode": ("picture", _decode),
    "model": ("picture", _model),
    "end-to-end": ("picture", _end_to_end),
    "text": ("prompt", _text),
    "start": ("process", _start),
    "relabel": ("row", _relabel),
}
