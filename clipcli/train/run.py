"""A whole training run: data, vocabulary and model are made ready, trained, evaluated and kept.

In: what the user gave. Out: events, as the run goes on, and in the output folder: `log.csv`, `checkpoint.safetensors`
from which `resume` goes on, and the model directory with the best weights so far. Of several devices, the first alone
evaluates and writes.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from clipcli.errors import ClipcliError, PictureError, UsageError, cannot_write
from clipcli.model.clip import CLIP
from clipcli.model.config import ClipConfig
from clipcli.model.device import place
from clipcli.records import Failure, Label, Template
from clipcli.tokenizer import Tokenizer
from clipcli.train import checkpoint
from clipcli.train.card import card
from clipcli.train.config import TrainConfig
from clipcli.train.evaluate import EvalSet, Evaluator, read_set
from clipcli.train.feed import ALONE, Feed, Share
from clipcli.train.loop import Step as Step
from clipcli.train.loop import Trainer, precision_of
from clipcli.train.optim import freeze, initialise
from clipcli.train.vocabulary import train_vocabulary
from clipcli.train.warm import warm_text
from clipcli.train.words import Words, examples
from clipcli.weights.folder import check_new_folder
from clipcli.weights.model import Model, load_model
from clipcli.weights.open_clip import CONFIG
from clipcli.weights.save import read_merges, save_model
from clipcli.weights.torch_images import is_out_of_memory
from clipcli.zeroshot import templates as template_files

LOG = "log.csv"
HELD_OUT = "held_out"  # the name of the column
COLUMNS = ("step", "epoch", "seconds", "loss", "scale", "learning_rate", "image_size", "pictures_per_second", HELD_OUT)
_LINES_AN_EPOCH = 20
_STEP = re.compile("[0-9]{1,18}")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Ready:
    """The data are found and the model is made."""

    pairs: int  # that are learned from
    held_out: int
    failures: Sequence[Failure]  # what had to be left out; of pictures that are read again, it may get longer
    kept: bool  # decoded pictures lie in memory
    device: str  # and the arithmetic
    parameters: int
    vocab_size: int
    steps: int
    done: int  # steps that an earlier session took


@dataclass(frozen=True)
class Evaluated:
    """Zero-shot accuracies after a step, by the set's name."""

    step: int
    epoch: float
    accuracy: dict[str, float]
    best: bool  # these weights are now the model in the output folder


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int


Event = Ready | Step | Evaluated | Saved


@dataclass(frozen=True)
class Request:
    """What a run is asked to do, besides its settings."""

    data: Sequence[str]
    output: Path
    words: Sequence[Label] = ()  # classes' other and broader words
    sets: Mapping[str, str] = field(default_factory=dict)  # to evaluate on: name -> folder, table or tar
    vocabulary: Path | None = None  # None: the model's own, or learned from the captions
    offline: bool = False
    resume: bool = False
    strict: bool = False
    workers: int = 1
    device: str = "auto"
    share: Share = ALONE


def train(request: Request, config: TrainConfig, progress: Progress | None = None) -> Generator[Event]:
    """Run or go on with a training. Raises ClipcliError and its kinds; what is saved then stays.

    Nothing is written before `Ready`. Closing the iterator after it, as leaving the loop over it does, leaves a
    checkpoint.
    """
    earlier = checkpoint.read(request.output) if request.resume else None
    if earlier:
        checkpoint.check_settings(earlier[0], config, request.output)
    check_new_folder(request.output, CONFIG, force=True)  # now, not after the first hour
    with _enough_memory():
        trainer, run = _prepare(request, config, earlier, progress)
        feed = trainer.feed
        feed.failures += [failure for some in run.sets for failure in some.failed]
        try:
            yield Ready(
                len(feed.chosen),
                len(feed.held),
                feed.failures,
                feed.kept,
                f"{trainer.device}, {precision_of(config, trainer.device)}",
                sum(p.numel() for p in trainer.clip.parameters()),
                trainer.clip_config.text.vocab_size,
                trainer.steps,
                trainer.state.step,
            )
            if run.first:
                run.begin()
            for step in trainer.run():
                # Before it is told: what a step leads to is never skipped.
                events = run.after(step) if run.first else []
                yield step
                yield from events
        except GeneratorExit:
            if run.first and trainer.state.step:
                trainer.save(request.output)
            raise


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Tell a person what a device that has too little says in its own way."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "take a smaller batch_size, a chunk_size (which changes no result), or a smaller model"
        raise ClipcliError("not enough memory for this training", hint=hint) from error


class _Run:
    """What the first device does between steps: evaluate, keep the best, log, save."""

    def __init__(
        self, request: Request, trainer: Trainer, evaluator: Evaluator, sets: Sequence[EvalSet], vocabulary: str | Path
    ) -> None:
        self.trainer = trainer
        self.sets = sets
        self.first = request.share.rank == 0
        self._request = request
        self._evaluator = evaluator
        self._vocabulary = vocabulary
        self._saved = time.monotonic()
        self._log = _Log(request.output / LOG, request.sets)

    def begin(self) -> None:
        """Make the folder ready: of an older run that is begun anew, nothing is left to go on from."""
        if not self._request.resume:
            checkpoint.remove(self._request.output)
        self._log.begin(self.trainer.state.step)

    def after(self, step: Step) -> list[Event]:
        """What a step leads to."""
        trainer, config, epoch = self.trainer, self.trainer.config, self.trainer.feed.steps
        losses, events = trainer.state.losses, list[Event]()
        losses.append(step.loss)
        last = step.number == trainer.steps
        if last or step.number % max(1, round(config.eval_every * epoch)) == 0:
            accuracy = self._measure()
            best = self._is_best(accuracy)
            if best:
                self._keep()
            self._log.write(step, trainer.state.seconds, losses, accuracy)
            events.append(Evaluated(step.number, step.epoch, accuracy, best))
        elif step.number % max(1, epoch // _LINES_AN_EPOCH) == 0:
            self._log.write(step, trainer.state.seconds, losses, {})
        if last or time.monotonic() - self._saved > 60 * config.save_minutes:
            trainer.save(self._request.output)
            self._saved = time.monotonic()
            events.append(Saved(step.number))
        return events

    def _measure(self) -> dict[str, float]:
        trainer, accuracy = self.trainer, {}
        with trainer.averaged() as clip:
            if len(trainer.feed.held):
                accuracy[HELD_OUT] = self._evaluator.on_held_out(clip, trainer.feed, trainer.autocast())
            for some in self.sets:
                accuracy[some.name] = self._evaluator.on_set(clip, some, trainer.autocast())
        return accuracy

    def _is_best(self, accuracy: Mapping[str, float]) -> bool:
        """Whether the weights are the best so far by the held-out pictures; without those the latest are."""
        state = self.trainer.state
        reached = accuracy.get(HELD_OUT, float(state.step))
        if reached < state.best:
            return False
        state.best = reached
        return True

    def _keep(self) -> None:
        trainer = self.trainer
        save_model(
            self._request.output,
            trainer.clip_config,
            {name: tensor.detach().float().cpu().numpy() for name, tensor in trainer.weights().items()},
            merges=self._vocabulary,
            card=card(trainer, self._request),
            training=trainer.summary(),
            force=True,
        )


def _prepare(
    request: Request,
    config: TrainConfig,
    earlier: tuple[checkpoint.State, Mapping[str, Tensor]] | None,
    progress: Progress | None,
) -> tuple[Trainer, _Run]:
    device = place(request.device, "fp32").device
    base = _base(request, config) if config.init else None
    words = {label.name: label for label in request.words}
    templates = template_files.read([config.templates])
    eval_templates = template_files.read([config.eval_templates])
    feed = Feed(
        request.data,
        config,
        image_size=base.config.vision.image_size if base else config.image_size,
        words=words,
        workers=request.workers,
        share=request.share,
        strict=request.strict,
    )
    feed.find(progress)
    digest = checkpoint.digest(feed.pairs)
    if earlier:
        state = replace(earlier[0], config=config)  # what doesn't change the outcome may have changed
        checkpoint.check_data(state, digest, request.output)
        if request.vocabulary and not base and _merges(request, config, feed, templates) != state.merges:
            raise UsageError(
                f"{request.output}: the run was begun with another vocabulary", hint="leave --vocabulary out"
            )
    else:
        state = checkpoint.State(config, digest, "" if base else _merges(request, config, feed, templates))
    tokenizer = base.tokenizer if base else read_merges(state.merges)
    clip_config = base.config if base else config.clip_config(tokenizer.vocab_size)
    wanted = {} if request.share.rank else request.sets
    sets = [read_set(name, path, clip_config, words) for name, path in wanted.items()]
    if request.strict and (failed := [failure for some in sets for failure in some.failed]):
        raise PictureError(f"{failed[0].path}: {failed[0].message}", hint="without --strict it would be left out")
    clip = _first_weights(clip_config, config, base).to(device)
    if not base and not earlier:
        warm_text(clip, tokenizer, Words(config, templates), feed, config)
    trainer = Trainer(clip, clip_config, tokenizer, feed, state, templates, device)
    if earlier:
        trainer.restore(earlier[1])
    evaluator = Evaluator(clip_config, tokenizer, eval_templates, device)
    return trainer, _Run(request, trainer, evaluator, sets, base.vocabulary if base else state.merges)


def _base(request: Request, config: TrainConfig) -> Model:
    """The model to go on from."""
    return load_model(
        config.init, device="cpu", precision="fp32", vocabulary=request.vocabulary, offline=request.offline
    )


def _merges(request: Request, config: TrainConfig, feed: Feed, templates: Sequence[Template]) -> str:
    """The text of a new model's `merges.txt`: the user's own vocabulary, or one learned from the captions."""
    if request.vocabulary is None:
        return train_vocabulary(examples(feed.pairs, templates), config.vocabulary_size)[0]
    merges = Tokenizer.from_file(request.vocabulary).merges
    return "".join(f"{line}\n" for line in ["#version: 0.2", *merges])


def _first_weights(clip_config: ClipConfig, config: TrainConfig, base: Model | None) -> CLIP:
    torch.manual_seed(config.seed)
    clip = CLIP(clip_config)
    if base is None:
        initialise(clip, config.first_scale)
    else:
        state = {name: torch.from_numpy(array).float() for name, array in base.checkpoint.arrays.items()}
        clip.load_state_dict(state, strict=False)  # files need not count BatchNorm's batches
    freeze(clip, config.freeze)
    return clip


class _Log:
    """`log.csv`: a line now and then, flushed; after a resume, what came after the checkpoint is dropped."""

    def __init__(self, path: Path, sets: Iterable[str]) -> None:
        self._path = path
        self._columns = [*COLUMNS, *sets]

    def begin(self, step: int) -> None:
        """Keep the lines up to `step`, which the run goes on from."""
        rows: list[dict[str, str]] = []
        try:
            if step and self._path.is_file():
                with self._path.open(newline="", encoding="utf-8", errors="replace") as file:
                    rows = [row for row in csv.DictReader(file) if _STEP.fullmatch(row.get("step") or "")]
                rows = [row for row in rows if int(row["step"]) <= step]
        except (OSError, csv.Error) as error:
            hint = "move it away, and --resume begins a new one"
            raise UsageError(f"{self._path}: not the log of a run", hint=hint) from error
        self._write("w", rows, header=True)

    def write(self, step: Step, seconds: float, losses: list[float], accuracy: Mapping[str, float]) -> None:
        """A line; `losses`, those since the last line, are used up."""
        row = {
            "step": step.number,
            "epoch": f"{step.epoch:.4f}",
            "seconds": f"{seconds:.1f}",
            "loss": f"{sum(losses) / max(1, len(losses)):.5f}",
            "scale": f"{step.scale:.4f}",
            "learning_rate": f"{step.learning_rate:.4e}",
            "image_size": step.image_size,
            "pictures_per_second": f"{step.pictures_per_second:.1f}",
            **{name: f"{value:.5f}" for name, value in accuracy.items()},
        }
        losses.clear()
        self._write("a", [row])

    def _write(self, mode: str, rows: Sequence[Mapping[str, object]], *, header: bool = False) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, extrasaction="ignore", lineterminator="\n")
                if header:
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise cannot_write(self._path, error, "go on with --resume") from error
