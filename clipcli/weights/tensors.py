"""A weight file as lazy tensors: name, shape and type at once, the numbers only when asked for.

A path comes in, `dict[str, Tensor]` goes out, under the names the file uses; `Arrays` shows such tensors as
the mapping of numpy arrays that a checkpoint hands on: views of the memory-mapped file, copy-on-write. What
the tensors mean is the readers' matter; torch's own files are read in `torch_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import ModelError
from clipcli.model.config import Shape

FLOATING = {"F16", "BF16", "F32", "F64"}
NUMPY = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}  # all that is ever read or written
_LFS = b"version https:/"
_LONGEST_HEADER = 100_000_000  # bytes; more is no safetensors file

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor that is still on disk. `dtype` is spelled as in safetensors: F16, BF16, F32, I64, ..."""

    shape: Shape
    dtype: str
    read: Callable[[], Array]


class Arrays(Mapping[str, Array]):
    """Lazy tensors as numpy arrays: indexing reads one. bfloat16, which numpy lacks, comes out as float32."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.touched: set[str] = set()  # names whose numbers were asked for

    def __getitem__(self, name: str) -> Array:
        tensor = self.tensors[name]
        self.touched.add(name)
        return tensor.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type that a tensor's numbers are stored in: F16, BF16, F32, F64."""
        return self.tensors[name].dtype


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, a state dict saved by torch, or a TorchScript archive.

    The content decides, not the ending. Raises ModelError if the file is missing, truncated, corrupt or of another
    kind, UnsafeFile if it is a pickle of more than tensors.
    """
    from clipcli.weights import torch_files

    try:
        with path.open("rb") as file:
            head = file.read(16)
        if torch_files.is_torch(head):
            return torch_files.read(path)
        if head.startswith(_LFS):
            raise ModelError(f"{path}: a pointer of Git LFS, not the weights", hint="fetch them with: git lfs pull")
        if head[8:9] != b"{" and int.from_bytes(head[:8], "little") > _LONGEST_HEADER:
            raise ModelError(
                f"{path}: no weight file",
                hint="-m takes a folder with a checkpoint, a .safetensors, or torch's .pt, .bin",
            )
        return _read_safetensors(path)
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error


def broken(path: Path, why: object) -> ModelError:
    """The error for a weight file whose bytes make no sense."""
    reason = " ".join(str(why).split())[:200]
    return ModelError(
        f"{path}: truncated or corrupt weight file ({reason})",
        hint="download or copy it again, and compare its size with the original's",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks the header, and that the tensors fill the file without overlap
            pass
    except SafetensorError as error:
        raise broken(path, error) from error
    data = np.memmap(path, mode="c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    if "clipcli" in header.pop("__metadata__", {}) and "weight" in header:
        raise ModelError(f"{path}: this is a classifier file, no model", hint="give it as --classifier")
    return {
        name: mapped(data, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def mapped(data: Array, dtype: str, shape: Shape, start: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """The tensor at byte `start` of `data`; `strides` in bytes. numpy checks that it lies within `data`."""

    def read() -> Array:
        array: Array = np.ndarray(shape, NUMPY[dtype], data, start, strides)
        if dtype == "BF16":  # the upper half of a float32
            return (array.astype("<u4") << 16).view("<f4")
        return array

    return Tensor(shape, dtype, read)
