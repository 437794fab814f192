"""Every setting of a training run, in one flat dataclass: what a recipe file states and `training.json` keeps.

In: a TOML file's or the command line's names and values. Out: a checked `TrainConfig`, and the `ClipConfig` of the
towers that it describes. No torch here. Defaults are the paper's (section 2.5, appendix F) where a small machine
can follow it.
"""

from __future__ import annotations

import json
import sys
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from clipcli.errors import UsageError
from clipcli.model.config import Activation, ClipConfig, Preprocess, ResNetConfig, TextConfig, ViTConfig

SMALLEST = 8  # px of a side: a rectangle that is pasted in must leave something of a picture

_COUNTS = ("patch_size", "width", "embed_dim", "text_width", "text_layers", "context_length")
_NOT_NEGATIVE = (
    *("heads", "text_heads", "max_per_label", "canvas", "keep_gb", "shuffle_buffer", "chunk_size"),
    *("text_warmup", "weight_decay", "clip_gradient", "seed", "save_minutes"),
)
_TOLD = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Fractions are of the run's steps, probabilities are for each picture."""

    # The model; with `init` all of it comes from the checkpoint
    init: str = ""  # a model to go on from: anything that --model takes
    tower: Literal["vit", "resnet"] = "vit"
    image_size: int = 224
    patch_size: int = 32  # ViT only
    layers: tuple[int, ...] = (12,)  # a ViT's number of blocks, or a ResNet's bottlenecks in each of four stages
    width: int = 768
    heads: int = 0  # 0: one for 64 channels
    embed_dim: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 0
    context_length: int = 77
    vocabulary_size: int = 49408  # of the vocabulary that is trained, where none is given
    activation: Activation = "quick_gelu"
    freeze: Literal["none", "image", "text"] = "none"  # the tower that keeps its weights

    # What is learned from
    max_per_label: int = 0  # 0: all; the paper takes at most 20,000 pairs of each query
    hold_out: float = 0.02  # share of the pictures that only choose the best weights
    templates: str = "imagenet7"  # of the captions that are made of class names
    eval_templates: str = "imagenet7"  # of the zero-shot classifiers that are tried while training
    alias: float = 0.5  # probability that a caption takes one of the class's other names
    broader: float = 0.0  # probability that it takes one of the broader words instead
    canvas: int = 0  # px to which pictures are squashed before augmentation; 0: image_size * 8 / 7
    keep_gb: float = 4.0  # decoded pictures are kept in memory if all of them take no more
    shuffle_buffer: int = 10_000  # pairs among which the next is drawn, where they aren't kept

    # Objective
    soft_targets: bool = True  # pictures of which the same words are true share their target
    smoothing: float = 0.0  # share of each target that is spread over the batch
    first_scale: float = 1 / 0.07
    most_scale: float = 100.0

    # Recipe
    epochs: float = 32.0
    batch_size: int = 256  # over all devices
    chunk_size: int = 0  # pictures in memory at once on each device (gradient caching); 0: the whole batch
    learning_rate: float = 5e-4
    warmup: float = 0.05
    text_warmup: int = 0  # steps before the first, in which the text tower alone learns which captions say the same
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    clip_gradient: float = 1.0  # largest norm; 0: none
    ema: float = 0.0  # decay of the running mean of the weights, which is then what is kept; 0: none
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on CUDA, else fp32
    compile: bool = False  # have torch.compile make the image tower faster; on a CPU it needs a C++ compiler
    freeze_batch_norm: bool = False  # keep the running statistics (fine-tuning, exact gradient caching)
    seed: int = 0

    # Augmentation
    crop: Literal["resized", "square", "none"] = "square"  # the paper's: a random square of the resized picture
    crop_area: float = 0.4  # smallest share of the picture that `resized` takes
    flip: float = 0.5
    jitter: float = 0.0  # strength of random brightness, contrast and saturation
    grey: float = 0.0
    erase: float = 0.0  # probability that a random rectangle is blanked
    mix: float = 0.0  # probability that a rectangle of another picture is pasted in, or another is mixed in
    sizes: tuple[int, ...] = ()  # px of the stages of progressive resizing, before image_size
    size_until: tuple[float, ...] = ()  # the fraction of the run at which each of them ends

    # Manners
    eval_every: float = 1.0  # epochs between evaluations
    save_minutes: float = 10.0  # between checkpoints

    @classmethod
    def read(cls, recipe: Path | None = None, changes: Mapping[str, object] | None = None) -> TrainConfig:
        """The settings of a TOML file, overruled by `changes`. Raises UsageError with the name that is wrong."""
        values: dict[str, object] = {}
        if recipe is not None:
            try:
                values |= tomllib.loads(recipe.read_text(encoding="utf-8"))
            except OSError as error:
                what = f"{recipe}: {(error.strerror or 'can not be read').lower()}"
                raise UsageError(what, hint="--recipe takes a TOML file: docs/training.md has one") from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{recipe}: {str(error).lower()}", hint="a recipe is TOML: epochs = 20") from error
        config = cls(**{name: _value(name, value) for name, value in {**values, **(changes or {})}.items()})  # type: ignore[arg-type]
        config.check()
        return config

    def check(self) -> None:
        """Raise UsageError for a setting that can't work."""
        for name in _COUNTS:
            _demand(getattr(self, name) >= 1, name, "must be at least 1")
        for name in _NOT_NEGATIVE:
            _demand(getattr(self, name) >= 0, name, "can't be negative")
        for name in (*_COUNTS, "heads", "text_heads", "batch_size", "text_warmup"):
            _demand(getattr(self, name) <= 1 << 20, name, f"must be at most {1 << 20:,}")
        for name in ("epochs", "learning_rate", "epsilon", "eval_every"):
            _demand(getattr(self, name) > 0, name, "must be more than 0")
        _demand(max(self.epochs, self.eval_every) <= 1e9, "epochs", "and eval_every must be at most 1e9")
        _demand(self.seed < 1 << 63, "seed", "must be less than 2**63")
        _demand(max(self.canvas, self.image_size, *self.sizes) <= 8192, "canvas", "and the sizes must be at most 8192")
        _demand(self.batch_size >= 2, "batch_size", "must be at least 2: a picture is told apart from others")
        for name in ("hold_out", "alias", "broader", "smoothing", "warmup", "flip", "grey", "erase", "mix", "jitter"):
            _demand(0 <= getattr(self, name) <= 1, name, "must lie between 0 and 1")
        _demand(self.hold_out <= 0.5, "hold_out", "must be at most 0.5")
        for name in ("ema", "beta1", "beta2"):
            _demand(0 <= getattr(self, name) < 1, name, "must be at least 0 and less than 1")
        _demand(0 < self.crop_area <= 1, "crop_area", "must be more than 0 and at most 1")
        _demand(self.alias + self.broader <= 1, "alias", "and broader must be at most 1 together")
        _demand(1 <= self.first_scale <= self.most_scale, "first_scale", "must lie between 1 and most_scale")
        _demand(len(self.sizes) == len(self.size_until), "sizes", "and size_until must be equally long")
        _demand(list(self.size_until) == sorted(self.size_until), "size_until", "must increase")
        _demand(all(0 <= until <= 1 for until in self.size_until), "size_until", "must lie between 0 and 1")
        _demand(min(self.image_size, *self.sizes, SMALLEST) == SMALLEST, "image_size", f"must be at least {SMALLEST}")
        if not self.init:
            self._check_towers()

    def _check_towers(self) -> None:
        _demand(min(self.layers, default=0) >= 1, "layers", "must be at least 1")
        if self.tower == "resnet":
            _demand(len(self.layers) == 4, "layers", "must be four numbers for a ResNet, as in [3, 4, 6, 3]")
            unit, rule = 32, "a multiple of 32 for a ResNet"
        else:
            _demand(len(self.layers) == 1, "layers", "must be one number for a ViT")
            unit, rule = self.patch_size, "a multiple of patch_size"
        _demand(self.image_size % unit == 0, "image_size", f"must be {rule}")
        _demand(all(size % unit == 0 for size in self.sizes), "sizes", f"must each be {rule}")
        heads, text_heads = self._heads()
        _demand(
            self._channels() % heads == 0, "heads", f"({heads}) must divide the tower's {self._channels()} channels"
        )
        _demand(self.text_width % text_heads == 0, "text_heads", f"({text_heads}) must divide text_width")

    def canvas_size(self, image_size: int) -> int:
        """The side of the squares that augmentation starts from."""
        return self.canvas or -(-image_size * 8 // 7)

    def image_size_at(self, done: float, image_size: int) -> int:
        """The size to train at when the fraction `done` of the run lies behind."""
        for size, until in zip(self.sizes, self.size_until, strict=True):
            if done < until:
                return size
        return image_size

    def clip_config(self, vocab_size: int) -> ClipConfig:
        """The towers of a new model."""
        vision: ViTConfig | ResNetConfig
        heads, text_heads = self._heads()
        if self.tower == "resnet":
            layers = typing.cast("tuple[int, int, int, int]", self.layers)
            vision = ResNetConfig(self.image_size, layers, self.width, heads)
        else:
            vision = ViTConfig(
                self.image_size, self.patch_size, self.width, self.layers[0], heads, 4 * self.width, self.activation
            )
        text = TextConfig(
            context_length=self.context_length,
            vocab_size=vocab_size,
            width=self.text_width,
            layers=self.text_layers,
            heads=text_heads,
            mlp_width=4 * self.text_width,
            activation=self.activation,
        )
        return ClipConfig(self.embed_dim, vision, text, Preprocess())

    def _channels(self) -> int:
        """The width of the image tower where it attends."""
        return 32 * self.width if self.tower == "resnet" else self.width

    def _heads(self) -> tuple[int, int]:
        """Of the image tower and of the text tower."""
        return self.heads or max(1, self._channels() // 64), self.text_heads or max(1, self.text_width // 64)

    def differences(self, other: TrainConfig) -> list[str]:
        """The names of the settings in which the two differ and which change what is learned."""
        free = {"eval_every", "save_minutes", "keep_gb", "compile"}
        mine, others = asdict(self), asdict(other)
        return [name for name in mine if name not in free and mine[name] != others[name]]


def parse_setting(text: str) -> tuple[str, object]:
    """`name=value` of the command line, the value in TOML's spelling or a bare word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"setting {text!r} has no value", hint="write --set NAME=VALUE, as in --set epochs=20")
    try:
        return name.strip().replace("-", "_"), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name.strip().replace("-", "_"), value.strip()


def _demand(holds: bool, name: str, rule: str) -> None:
    if not holds:
        raise UsageError(f"setting `{name}` {rule}")


def _value(name: str, value: object) -> object:
    """`value` as the field's type wants it. Raises UsageError."""
    from difflib import get_close_matches

    hints = typing.get_type_hints(TrainConfig)
    if name not in hints:
        near = get_close_matches(name, hints, n=1)
        hint = f"did you mean {near[0]}?" if near else "clipcli train --help names the most important ones"
        raise UsageError(f"there is no training setting `{name}`", hint=hint)
    wanted = hints[name]
    choices = typing.get_args(wanted)
    if typing.get_origin(wanted) is Literal:
        if value in choices:
            return value
        raise UsageError(f"setting `{name}` is {value!r}", hint="it is " + " or ".join(choices))
    if typing.get_origin(wanted) is tuple:
        kind, hint = choices[0], f"a list is wanted, each item {_TOLD[choices[0]]}"
        values = value if isinstance(value, (list, tuple)) else [value]
        if all(_fits(item, kind) for item in values):
            return tuple(map(kind, values))
    else:
        hint = f"{_TOLD[wanted]} is wanted"
        if _fits(value, wanted):
            return wanted(value)
    raise UsageError(f"setting `{name}` is {json.dumps(value, default=str)}", hint=hint)


def _fits(value: object, kind: type) -> bool:
    """Whether it is of that kind; a whole number is a number, what isn't finite is none."""
    if kind is float and type(value) in (int, float):
        return abs(typing.cast("float", value)) <= sys.float_info.max
    return type(value) is kind
