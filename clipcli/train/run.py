"""A whole training run: data, vocabulary and model are made ready, trained, evaluated and kept.

In: what the user gave. Out: events, as the run goes on, and in the output folder: `log.csv`, `checkpoint.safetensors`
from which `resume` goes on, and the model directory with the best weights so far. Of several devices, the first alone
evaluates and writes.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
from clipcli.train.feed import ALONE, Feed, Progress, Share
from clipcli.train.loop import Step as Step
from clipcli.train.loop import Trainer, precision_of
from clipcli.train.optim import freeze, initialise
from clipcli.train.vocabulary import HEADER, train_vocabulary
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
    is_first = request.share.rank == 0
    with _enough_memory():
        trainer, run = _prepare(request, config, earlier, progress)
        feed = trainer.feed
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
            if is_first:
                run.begin()
            for step in trainer.run():
                # Before it is told: what a step leads to is never skipped.
                events = run.after(step) if is_first else []
                yield step
                yield from events
        except GeneratorExit:
            if is_first and trainer.state.step:
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


@dataclass(eq=False)
class _Run:
    """What the first device does between steps: evaluate, keep the best, log, save."""

    request: Request
    trainer: Trainer
    evaluator: Evaluator
    sets: Sequence[EvalSet]
    vocabulary: str | Path
    log: _Log
    saved: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Make the folder ready: of an older run that is begun anew, nothing is left to go on from."""
        if not self.request.resume:
            checkpoint.remove(self.request.output)
        self.log.begin(self.trainer.state.step)

    def after(self, step: Step) -> list[Event]:
        """What a step leads to."""
        config, state, epoch = self.trainer.config, self.trainer.state, self.trainer.feed.steps
        events: list[Event] = []
        state.losses.append(step.loss)
        last = step.number == step.steps
        if last or step.number % max(1, round(config.eval_every * epoch)) == 0:
            accuracy = self._measure()
            reached = accuracy.get(HELD_OUT, float(step.number))  # without held-out pictures the latest are best
            best = reached >= state.best
            if best:
                state.best = reached
                self._keep()
            self.log.write(step, state, accuracy)
            events.append(Evaluated(step.number, step.epoch, accuracy, best))
        elif step.number % max(1, epoch // _LINES_AN_EPOCH) == 0:
            self.log.write(step, state, {})
        if last or time.monotonic() - self.saved > 60 * config.save_minutes:
            self.trainer.save(self.request.output)
            self.saved = time.monotonic()
            events.append(Saved(step.number))
        return events

    def _measure(self) -> dict[str, float]:
        trainer, accuracy = self.trainer, {}
        with trainer.averaged() as clip:
            if len(trainer.feed.held):
                accuracy[HELD_OUT] = self.evaluator.on_held_out(clip, trainer.feed, trainer.autocast())
            for some in self.sets:
                accuracy[some.name] = self.evaluator.on_set(clip, some, trainer.autocast())
        return accuracy

    def _keep(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        save_model(
            self.request.output,
            trainer.clip_config,
            {name: tensor.detach().float().cpu().numpy() for name, tensor in trainer.weights().items()},
            merges=self.vocabulary,
            card=card(trainer, self.request),
            training={"settings": asdict(state.config), "steps": state.step, "seconds": round(state.seconds, 1)},
            force=True,
        )


def _prepare(
    request: Request,
    config: TrainConfig,
    earlier: tuple[checkpoint.State, Mapping[str, Tensor]] | None,
    progress: Progress | None,
) -> tuple[Trainer, _Run]:
    device = place(request.device, "fp32").device
    base: Model | None = None
    if config.init:
        base = load_model(
            config.init, device="cpu", precision="fp32", vocabulary=request.vocabulary, offline=request.offline
        )
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
    failed = [failure for some in sets for failure in some.failed]
    if request.strict and failed:
        raise PictureError(f"{failed[0].path}: {failed[0].message}", hint="without --strict it would be left out")
    feed.failures += failed
    clip = _first_weights(clip_config, config, base).to(device)
    if not base and not earlier:
        warm_text(clip, tokenizer, Words(config, templates), feed, config)
    trainer = Trainer(clip, clip_config, tokenizer, feed, state, templates, device)
    if earlier:
        trainer.restore(earlier[1])
    evaluator = Evaluator(clip_config, tokenizer, eval_templates, device)
    log = _Log(request.output / LOG, [*COLUMNS, *request.sets])
    return trainer, _Run(request, trainer, evaluator, sets, base.vocabulary if base else state.merges, log)


def _merges(request: Request, config: TrainConfig, feed: Feed, templates: Sequence[Template]) -> str:
    """The text of a new model's `merges.txt`: the user's own vocabulary, or one learned from the captions."""
    if request.vocabulary is None:
        return train_vocabulary(examples(feed.pairs, templates), config.vocabulary_size)[0]
    return "".join(f"{line}\n" for line in [HEADER, *Tokenizer.from_file(request.vocabulary).merges])


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


@dataclass(frozen=True)
class _Log:
    """`log.csv`: a line now and then, flushed; after a resume, what came after the checkpoint is dropped."""

    path: Path
    columns: Sequence[str]

    def begin(self, step: int) -> None:
        """Keep the lines up to `step`, which the run goes on from."""
        rows: list[dict[str, str]] = []
        try:
            if step and self.path.is_file():
                with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                    rows = [row for row in csv.DictReader(file) if _STEP.fullmatch(row.get("step") or "")]
                rows = [row for row in rows if int(row["step"]) <= step]
        except (OSError, csv.Error) as error:
            hint = "move it away, and --resume begins a new one"
            raise UsageError(f"{self.path}: not the log of a run", hint=hint) from error
        self._write("w", rows)

    def write(self, step: Step, state: checkpoint.State, accuracy: Mapping[str, float]) -> None:
        """A line; the losses since the last one are used up."""
        row = {
            "step": step.number,
            "epoch": f"{step.epoch:.4f}",
            "seconds": f"{state.seconds:.1f}",
            "loss": f"{sum(state.losses) / len(state.losses):.5f}",
            "scale": f"{step.scale:.4f}",
            "learning_rate": f"{step.learning_rate:.4e}",
            "image_size": step.image_size,
            "pictures_per_second": f"{step.pictures_per_second:.1f}",
            **{name: f"{value:.5f}" for name, value in accuracy.items()},
        }
        state.losses.clear()
        self._write("a", [row])

    def _write(self, mode: str, rows: Sequence[Mapping[str, object]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise cannot_write(self.path, error, "go on with --resume") from error
