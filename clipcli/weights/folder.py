"""The folder of a model on its way to the disk, or one file: whole or not at all.

Comes in: the content of each file, weights as lazy tensors. Goes out: the folder. Everything is written under another
name first, on the same disk, and has reached it before it gets its own. A folder that exists keeps its other files.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clipcli.errors import OutputError, UsageError, cannot_write
from clipcli.weights import open_clip, transformers
from clipcli.weights.tensors import NUMPY, Tensor

CARD, TRAINING = "README.md", "training.json"
IDS, TOKENIZER_CONFIG, SPECIAL_TOKENS = "vocab.json", "tokenizer_config.json", "special_tokens_map.json"
OPTIONAL = {TRAINING, IDS, TOKENIZER_CONFIG, SPECIAL_TOKENS}  # not every model has them
PLACE = "choose another place with --output"

Content = bytes | Mapping[str, Tensor]


def check_new_folder(folder: Path, config: str, *, force: bool) -> None:
    """Raise UsageError unless a model whose configuration is named `config` may be written to `folder`.

    That is: it isn't there, it is empty, or `force` and it holds no model in another layout.
    """
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():
            raise UsageError(f"{folder}: is a link to nothing", hint="remove it, or name another folder") from None
        return
    except NotADirectoryError as error:
        raise UsageError(f"{folder}: is no folder, or not in one", hint=PLACE) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    other = {open_clip.CONFIG, transformers.CONFIG} - {config}
    if names and not force:
        raise UsageError(f"{folder}: exists already", hint="use --force to replace the model in it")
    if found := names & other:
        raise UsageError(f"{folder}: holds another model ({found.pop()}), which would be mixed with it", hint=PLACE)
    if CARD in names and config not in names:
        raise UsageError(f"{folder}: holds no model, but a {CARD}, which would be replaced", hint=PLACE)


def write_folder(folder: Path, files: Mapping[str, Content], *, force: bool = False) -> None:
    """Write `files`, the configuration first. Raises UsageError, OutputError, ModelError.

    In a folder that exists, each file is replaced by its new form at once, and what only the older model had is
    removed: where nothing but the weights changed, as in training, there is a complete model at every moment.
    """
    config = next(iter(files))
    check_new_folder(folder, config, force=force)
    target = Path(os.path.realpath(folder))
    obsolete = OPTIONAL - files.keys() if (target / config).is_file() else set()
    temporary = (target if target.is_dir() else target.parent) / f".clipcli-{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, content in files.items():
            with (temporary / name).open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    write_tensors(file, content)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        if target.is_dir():
            for name in files:  # before any is replaced: half of the model would be new, half not
                if (target / name).is_dir():
                    raise UsageError(f"{target / name}: is a folder, where a file must be written", hint=PLACE)
            for name in files:
                (temporary / name).replace(target / name)
            for name in obsolete:
                (target / name).unlink(missing_ok=True)
            _sync(target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` once all is written; of a link, as its target. Raises OutputError."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".clipcli-{secrets.token_hex(8)}.tmp")
    try:
        if os.path.lexists(target) and not target.is_file():
            raise OutputError(f"{path}: exists and is no regular file", hint=PLACE)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor in memory at a time; the widest types first, so that all are aligned."""
    types = {name: np.dtype(NUMPY[tensor.dtype]) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-types[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + math.prod(tensor.shape) * types[name].itemsize
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(np.ascontiguousarray(tensors[name].read(), types[name]).data)


def _sync(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
