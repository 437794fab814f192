"""A run's state on disk: one safetensors file, replaced as a whole, from which the run goes on bit for bit.

Tensors: the weights, the optimiser's two moments, the running mean. Everything else is one JSON string in its
metadata: step, best result, settings, vocabulary, a digest of the data. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipcli.errors import ModelError, OutputError, UsageError, cannot_write
from clipcli.model.clip import CLIP
from clipcli.tasks.pairs import Pair
from clipcli.train.config import TrainConfig
from clipcli.train.optim import Ema

NAME = "checkpoint.safetensors"
_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where a run stands, besides its tensors."""

    config: TrainConfig
    data: str  # digest of the pairs
    merges: str  # the vocabulary
    step: int = 0
    best: float = -1.0
    seconds: float = 0.0  # that the run has taken so far, over all its sessions
    updates: int = 0  # of the weights; fp16 leaves steps out whose gradient overflows
    losses: list[float] = field(default_factory=list)  # of the steps since the log's last line
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16 gradients


def digest(pairs: Iterable[Pair]) -> str:
    """The identity of the data: names of the pictures and the words that go with them, in order."""
    known = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        known.update(repr((pair.source.path, pair.phrases, pair.broader, pair.label)).encode("utf-8", "surrogatepass"))
    return known.hexdigest()


def save(folder: Path, state: State, clip: CLIP, optimiser: torch.optim.Optimizer, ema: Ema | None) -> None:
    """Write the checkpoint; a failure leaves the older one. Raises OutputError."""
    tensors = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    names = {id(p): name for name, p in clip.named_parameters()}
    for parameter, moments in optimiser.state.items():
        state.updates = int(moments["step"])
        tensors |= {f"{key}.{names[id(parameter)]}": moments[key] for key in _MOMENTS}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state.items()}
    told = {**asdict(state), "version": _VERSION}
    part = folder / f".{NAME}.part"  # a folder, since safetensors has a temporary file of its own
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        part.mkdir(parents=True)
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, part / NAME, {"clipcli": json.dumps(told)})
        with (part / NAME).open("rb") as file:
            os.fsync(file.fileno())
        (part / NAME).replace(folder / NAME)
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        hint = "the last checkpoint is still there" if (folder / NAME).is_file() else None
        raise OutputError(f"{folder / NAME}: {reason}", hint=hint) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove the checkpoint of an older run. Raises OutputError."""
    try:
        (folder / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder / NAME, error) from error


def read(folder: Path) -> tuple[State, dict[str, Tensor]]:
    """The state and the tensors of a run. Raises UsageError where there is none, ModelError."""
    path = folder / NAME
    if not path.is_file():
        raise UsageError(f"{folder}: no {NAME} to go on from", hint="without --resume a run begins anew")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["clipcli"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told.pop("version") != _VERSION:
            raise ModelError(f"{path}: of another version of clipcli", hint="finish the run with that one")
        config = TrainConfig.read(None, told.pop("config"))
        state = State(config=config, **told)
        _check_kinds(state)
        return state, tensors
    except UsageError as error:  # an older version had other settings
        raise ModelError(f"{path}: {error.message}", hint="finish the run with the clipcli that began it") from error
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a checkpoint of a training run", hint="begin anew with --force") from error


def _check_kinds(state: State) -> None:
    """Raise ValueError where a field is of another kind than `save` writes it."""
    for name, value in vars(State(state.config, "", "")).items():
        kind = (int, float) if isinstance(value, float) else type(value)
        if not isinstance(getattr(state, name), kind):
            raise ValueError(name)
    if min(state.step, state.updates) < 0 or not all(isinstance(loss, (int, float)) for loss in state.losses):
        raise ValueError("step")


def check_settings(state: State, config: TrainConfig, folder: Path) -> None:
    """Raise UsageError unless the run in `folder` has these settings, naming those that differ."""
    differing = state.config.differences(config)
    if differing:
        told = ", ".join(f"{n} ({getattr(state.config, n)!r}, now {getattr(config, n)!r})" for n in differing)
        raise UsageError(f"{folder}: the run was begun with other settings: {told}", hint="give those, or a new -o")


def check_data(state: State, data: str, folder: Path) -> None:
    """Raise UsageError unless the run in `folder` learns from data of this digest."""
    if state.data != data:
        hint = "give the same DATA and --labels, spelled alike, or a new -o"
        raise UsageError(f"{folder}: the run was begun with other data", hint=hint)


def restore(
    tensors: Mapping[str, Tensor], state: State, clip: CLIP, optimiser: torch.optim.Optimizer, ema: Ema | None
) -> None:
    """Put the tensors of `read` where they were. Raises ModelError."""
    try:
        clip.load_state_dict(_part(tensors, "model"))
        if ema is not None:
            for name, tensor in _part(tensors, "ema").items():
                ema.state[name].copy_(tensor)
        moments = {key: _part(tensors, key) for key in _MOMENTS}
        for name, parameter in clip.named_parameters():
            if parameter.requires_grad and name in moments["exp_avg"]:
                optimiser.state[parameter] = {
                    "step": torch.tensor(float(state.updates), device=parameter.device),
                    **{key: torch.empty_like(parameter).copy_(moments[key][name]) for key in _MOMENTS},  # its strides
                }
    except (RuntimeError, KeyError) as error:
        raise ModelError("the checkpoint doesn't fit the model of its settings", hint="begin anew") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
