"""Files that torch wrote, read without torch and without executing anything in them.

Three forms hold a pickle that tells where each tensor lies: the zip of `torch.save` (`.pt`, `.bin`), the zip
of TorchScript (OpenAI's `.pt`), and the older `torch.save` without a zip. The unpickler here knows tensors,
plain containers and, for TorchScript, empty stand-ins for modules; any other name in the pickle is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipcli.errors import ModelError, UnsafeFile
from clipcli.model.config import Shape
from clipcli.weights.tensors import Array, Tensor, broken, mapped

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickled number: older torch.save
_INDEX_LIMIT = 64 << 20  # bytes of a pickle; the largest CLIP needs less than one MB
_STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_NOT_A_PICKLE = (  # what unpickling nonsense raises
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_NOT_A_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)


class _Module:
    """What stands in for a TorchScript module: it only carries attributes."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    itemsize: int
    key: str
    length: int  # elements


@dataclass(frozen=True)
class _View:
    """A tensor in the pickle: a part of a storage. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]


Locate = Callable[[_View], Tensor]


def is_torch(head: bytes) -> bool:
    """Whether a file that begins with `head` is torch's, or any pickle: a safetensors file is neither.

    A safetensors file begins with the length of its header and a brace, so its ninth byte tells it from a
    pickle whatever the first are.
    """
    return head.startswith(_ZIP) or (head.startswith(b"\x80") and head[8:9] != b"{")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file for which `is_torch` holds, by the names of its state dict.

    Wrappers (`state_dict`, `model`) are taken off. Raises ModelError for broken files, UnsafeFile for others'
    objects.
    """
    try:
        tree, locate = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
        return {name: locate(view) for name, view in _flatten(_unwrap(tree)).items()}
    except (*_NOT_A_PICKLE, *_NOT_A_ZIP) as error:
        raise broken(path, error) from error


def _read_zip(path: Path) -> tuple[Any, Locate]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        indexes = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(indexes) != 1:
            raise ModelError(
                f"{path}: a zip archive that torch didn't write",
                hint="give the weight file itself, or a folder with a configuration and weights",
            )
        if not {info.compress_type for info in members.values()} <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise ValueError("an unusual compression")
        if members[indexes[0]].file_size > _INDEX_LIMIT:
            raise ModelError(f"{path}: its index is {members[indexes[0]].file_size:,} bytes long, which no CLIP needs")
        folder = indexes[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ModelError(f"{path}: written on a big-endian machine", hint="save it again as .safetensors")
        tree = _unpickle(io.BytesIO(archive.read(indexes[0])), path)
    data = np.memmap(path, mode="c")

    def locate(view: _View) -> Tensor:
        info = members[f"{folder}data/{view.storage.key}"]
        if info.compress_type == zipfile.ZIP_STORED:
            return _tensor(view, data, _member_start(data, info), info.file_size)
        return _compressed(view, path, info)

    return tree, locate


def _member_start(data: Array, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose length only that header tells."""
    header = data[info.header_offset : info.header_offset + 30].tobytes()
    if header[:4] != _ZIP:
        raise ValueError(f"{info.filename} has no header")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + 30 + lengths


def _compressed(view: _View, path: Path, info: zipfile.ZipInfo) -> Tensor:
    """torch never compresses, but others repack. Weights hardly shrink, so a high ratio is an attack."""
    if info.file_size > 100 * info.compress_size + (1 << 20):
        raise ModelError(f"{path}: {info.filename} unpacks to {info.file_size:,} bytes, far more than it should")

    def read() -> Array:
        try:
            with zipfile.ZipFile(path) as archive:
                data: Array = np.frombuffer(bytearray(archive.read(info)), np.uint8)
            return _tensor(view, data, 0, len(data)).read()
        except (*_NOT_A_ZIP, EOFError, ValueError) as error:
            raise broken(path, error) from error

    return Tensor(view.shape, view.storage.dtype, read)


def _read_legacy(path: Path) -> tuple[Any, Locate]:
    data = np.memmap(path, mode="c")
    head = data[: len(_LEGACY)].tobytes()
    if head[:4] == _ZIP or len(head) < len(_LEGACY):
        raise ValueError("its end is missing")
    if head != _LEGACY:
        raise _unsafe(path, "is a pickle that torch didn't write")
    storages: dict[str, _Storage] = {}
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        for _ in range(3):  # the magic number, the version, the machine
            _unpickle(file, path)
        tree = _unpickle(file, path, storages)
        keys = _unpickle(file, path)
        start = file.tell()
    places: dict[str, tuple[int, int]] = {}  # the storages follow one another, each behind its length
    for key in keys:
        length = storages[key].length * storages[key].itemsize
        places[key] = (start + 8, length)
        start += 8 + length
    return tree, lambda view: _tensor(view, data, *places[view.storage.key])


def _tensor(view: _View, data: Array, start: int, length: int) -> Tensor:
    """The tensor of `view` in the storage of `length` bytes at `start` of `data`; checks that it fits."""
    storage, shape, strides = view.storage, view.shape, view.strides
    last = view.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    available = min(length, len(data) - start) // storage.itemsize
    if min(start, view.offset, *shape, *strides, 0) < 0:
        raise ValueError("a negative size or place")
    if math.prod(shape) > available or (all(shape) and last >= available):
        raise ValueError(f"a tensor of shape {list(shape)} doesn't fit its storage")
    steps = tuple(stride * storage.itemsize for stride in strides)
    return mapped(data, storage.dtype, shape, start + view.offset * storage.itemsize, steps)


def _unwrap(tree: Any) -> Any:
    """The state dict inside a training checkpoint."""
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            return tree[key]
    return tree


def _flatten(tree: Any) -> dict[str, _View]:
    """Every tensor of nested dicts and modules, by its dotted name; an object met twice is read once."""
    found: dict[str, _View] = {}
    seen: set[int] = set()
    waiting = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, _View):
            found[prefix.removesuffix(".")] = node
        elif isinstance(node, dict | _Module) and id(node) not in seen:
            seen.add(id(node))
            children = node if isinstance(node, dict) else vars(node)
            waiting += ((f"{prefix}{name}.", child) for name, child in children.items())
    return found


def _unpickle(file: BinaryIO | mmap.mmap, path: Path, storages: dict[str, _Storage] | None = None) -> Any:
    begin = file.tell()
    for op, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # a mmap will do
        if op.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > _INDEX_LIMIT >> 3:  # it would be allocated
            raise ValueError("an absurd memo index")
    file.seek(begin)
    return _TensorUnpickler(file, path, {} if storages is None else storages).load()


class _TensorUnpickler(pickle.Unpickler):
    """Knows how torch writes a tensor, and nothing else that could be called."""

    def __init__(self, file: Any, path: Path, storages: dict[str, _Storage]) -> None:
        super().__init__(file)
        self._path = path
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (_Module,), {})  # a new one each time: a pickle may write to it
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _KNOWN:
            raise _unsafe(self._path, f"holds `{module}.{name}`, which is no tensor")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, (dtype, itemsize), key, _location, length, *view = pid
        if kind != "storage" or any(view) or not isinstance(key, str) or not isinstance(length, int):
            raise ValueError("an unknown form of storage")
        return self._storages.setdefault(key, _Storage(dtype, itemsize, key, length))


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(isinstance(number, int) for number in numbers):
        raise TypeError("not the form of a tensor")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_rest: Any) -> Any:
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("collections", "OrderedDict"): OrderedDict,
}


def _unsafe(path: Path, what: str) -> UnsafeFile:
    return UnsafeFile(
        f"{path}: {what}: loading it could execute code, so nothing of it was read",
        hint="if you trust it, save its state dict alone as .safetensors with the program that wrote it",
    )
