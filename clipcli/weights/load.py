"""The door of this room: a path comes in, a `Checkpoint` goes out, whatever layout lies there.

`load_checkpoint` recognises the layout, calls its reader, and holds the tensors against the configuration.
Nothing but headers is read until a tower or a fingerprint is asked for, and no torch is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np

from clipcli.errors import ModelError, UsageError
from clipcli.model.config import Activation, ClipConfig, ResNetConfig, expected_shapes, is_image_key
from clipcli.store.database import Store
from clipcli.tokenizer import find_vocabulary
from clipcli.weights import open_clip, openai, transformers
from clipcli.weights.fields import read_fields
from clipcli.weights.tensors import FLOATING, Array, Arrays, Tensor

Part = Literal["image", "text"]
Layout = Literal["open_clip", "transformers", "file"]
_FINGERPRINT = "1"  # raise it when a fingerprint's meaning changes
MOST_SCALE = 1e4  # cosines are exact to 1e-5: beyond it scores are noise, and below 1 / MOST_SCALE all are equal


@dataclass(frozen=True)
class Checkpoint:
    """Weights and configuration of a CLIP, under the original names, still on disk."""

    name: str
    path: Path
    layout: Layout
    config: ClipConfig
    arrays: Arrays
    files: tuple[Path, ...]  # that hold the weights
    vocabulary: Path | None
    projected: Checkpoint | None = None  # the original, where this one gives pooled features

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by: `exp` of the stored number. Raises ModelError if that makes no sense."""
        stored = float(self.arrays["logit_scale"])
        if not abs(stored) <= math.log(MOST_SCALE):
            raise ModelError(
                f"{self.path}: `logit_scale` is {stored:g}, but the logarithm of a scale (4.6 in most models) is meant",
                hint="the weights are damaged, or of another program; download them again",
            )
        return math.exp(stored)

    def tower(self, part: Part) -> dict[str, Array]:
        """The arrays of one tower as stored (fp16, fp32), by the names within it: `visual.` is taken off."""
        return {name.removeprefix("visual."): self.arrays[name] for name in self._names(part)}

    def fingerprint(self, part: Part, store: Store) -> str:
        """The identity of a tower: its function, whatever layout, file or exact precision it came in.

        32 hex digits. Hashing the weights is remembered in `store` by the file's size and times.
        """
        if self.projected is not None:  # what is remembered of the file stays the original's
            original = self.projected.fingerprint(part, store)
            return hashlib.blake2b(f"pooled {original}".encode(), digest_size=16).hexdigest()
        config = self.config.vision if part == "image" else self.config.text
        settings = {"kind": type(config).__name__, "tower": asdict(config)}
        if part == "image":
            settings["preprocess"] = asdict(self.config.preprocess)
        others = b"".join(_stamp(file) for file in self.files[1:])
        remembered = f"{_FINGERPRINT}-{part}{hashlib.blake2b(others, digest_size=8).hexdigest()}"
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([_FINGERPRINT, part, settings], sort_keys=True).encode())
        digest.update(store.tensor_digest(self.files[0], remembered, lambda: self._digest(part)))
        return digest.hexdigest()

    def _names(self, part: Part) -> list[str]:
        return [
            name for name in sorted(self.arrays) if name != "logit_scale" and is_image_key(name) == (part == "image")
        ]

    def _digest(self, part: Part) -> bytes:
        digest = hashlib.blake2b(digest_size=32)
        for name in self._names(part):
            array = self.arrays[name]
            digest.update(f"{name} {list(array.shape)}\n".encode())
            digest.update(np.ascontiguousarray(array, dtype="<f4").data)
        return digest.digest()


def load_checkpoint(
    path: Path,
    *,
    activation: Activation | None = None,
    head_width: int | None = None,
    vocabulary: Path | None = None,
) -> Checkpoint:
    """Open the checkpoint at `path`: a folder in open_clip's or transformers' layout, or a weight file.

    `activation` and `head_width` (of the image tower) are for weight files, which don't tell them. The
    vocabulary is looked for beside the weights unless given. Raises ModelError, NotPlainClip, UnsafeFile, and
    UsageError where an argument contradicts the checkpoint.
    """
    if activation not in (None, *get_args(Activation)):
        raise UsageError(f"unknown activation {activation!r}", hint="it is quick_gelu or gelu")
    if head_width is not None and head_width < 1:
        raise UsageError(f"a head width of {head_width} makes no sense")
    kind = _kind(path)
    if kind == stat.S_IFDIR:
        layout, reader, weights = _layout(path)
        config, tensors, files = reader.read(path, weights)
        _agree(path, config, activation, head_width)
    elif kind == stat.S_IFREG:
        layout, files = "file", (path,)
        config, tensors = openai.read(path, activation, head_width)
    else:
        wrong = "neither a file nor a folder" if kind else "no such file or folder"
        raise ModelError(f"{path}: {wrong}", hint="-m takes a folder with a checkpoint, or a weight file")
    return Checkpoint(
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        path=path,
        layout=layout,
        config=config,
        arrays=Arrays(_complete(path, config, tensors)),
        files=files,
        vocabulary=vocabulary or find_vocabulary(path if path.is_dir() else path.parent),
    )


def _kind(path: Path) -> int:
    """What lies at `path`, one of `stat.S_IF…`; 0 if nothing does. Raises ModelError where that can't be seen."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind == stat.S_IFDIR and not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError
    except PermissionError as error:
        raise ModelError(f"{path}: permission denied", hint="ask its owner, or copy it to a place of yours") from error
    except (OSError, ValueError):  # nothing there, or a name that no file can have
        return 0
    return kind


def _layout(folder: Path) -> tuple[Layout, ModuleType, Path]:
    """The layout of `folder`, its reader and its weights; open_clip's where both are complete."""
    layouts: dict[Layout, ModuleType] = {"open_clip": open_clip, "transformers": transformers}
    lacking = ""
    for layout, reader in layouts.items():
        config = folder / reader.CONFIG
        if not config.is_file():
            continue
        if reader is transformers and "model_type" not in read_fields(config).values:
            continue  # anybody's config.json
        for name in reader.WEIGHTS:
            if (folder / name).is_file():
                return layout, reader, folder / name
        lacking = lacking or f"{folder}: {config.name} is there, but no weights ({reader.WEIGHTS[0]})"
    entries = sorted(entry.name for entry in folder.iterdir())
    bare = [folder / name for name in entries if name.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    bare = sorted((file for file in bare if file.is_file()), key=lambda file: -file.stat().st_size)
    perhaps = ", perhaps the largest" if len(bare) > 1 else ""
    held = ", ".join(entries[:6]) + (", …" if len(entries) > 6 else "") if entries else "nothing"
    raise ModelError(
        lacking or f"{folder}: neither {open_clip.CONFIG} nor a CLIP's {transformers.CONFIG}; it holds {held}",
        hint=f"give the weight file itself{perhaps}: {bare[0]}"
        if bare
        else "a checkpoint is a configuration and weights in one folder; download both",
    )


def _agree(path: Path, config: ClipConfig, activation: Activation | None, head_width: int | None) -> None:
    """Refuse arguments that contradict what the configuration says."""
    vision = config.vision
    width = 32 * vision.width if isinstance(vision, ResNetConfig) else vision.width
    if activation not in (None, config.text.activation):
        raise UsageError(
            f"{path}: its configuration says {config.text.activation}, not {activation}",
            hint="leave --activation out: it is for bare weight files",
        )
    if head_width not in (None, width // vision.heads):
        raise UsageError(
            f"{path}: its configuration says a head width of {width // vision.heads}, not {head_width}",
            hint="leave --head-width out: it is for bare weight files",
        )


def _complete(path: Path, config: ClipConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `config` asks for, no others. Raises one ModelError for all that is wrong."""
    expected = expected_shapes(config)
    held = {name: tensors[name] for name in expected if name in tensors}
    problems = {
        "missing": [name for name in expected if name not in held],
        "unexpected": [name[:80] for name in tensors if name not in held and not _harmless(name)],
        "misshaped": [
            f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
            for name, tensor in held.items()
            if tensor.shape != expected[name]
        ],
        "not floating-point": [f"{name} {x.dtype}" for name, x in held.items() if x.dtype not in FLOATING],
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ModelError(
            f"{path}: the weights don't fit the configuration: {told}",
            hint="quantised weights can't be read; take the original ones"
            if problems["not floating-point"]
            else "check that configuration and weights are of the same model, and complete",
        )
    return held


def _harmless(name: str) -> bool:
    """Whether a tensor outside the configuration changes nothing: constants, counters, OpenAI's numbers."""
    last = name.rpartition(".")[2]
    return name in openai.SCALARS or last in ("attn_mask", "position_ids", "num_batches_tracked")


def _stamp(file: Path) -> bytes:
    status = file.stat()
    return f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode()
