"""Embeddings files, read back: unit vectors of pictures or of sentences, and what they are of.

    embedding  float32 [n, dim]
    clipcli    JSON: paths (or texts), one a vector; failures, each `after` so many vectors; model, fingerprint, …

In: a `.safetensors` with these two, a `.npz` (there the JSON is an array of bytes) or a `.parquet` (`parquet.py`), told
apart by their first bytes. Out: the rows that went into it, in the same order, failures among them. A path that is no
UTF-8 stands as {"path": …, "path_bytes": base64}, as in JSON Lines. The file may come from anywhere: every field of it
is checked, and nothing in it is unpickled or decompressed. `spool.py` writes them.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clipcli.errors import EmbeddingsError, UsageError, reason
from clipcli.output.rows import path_of
from clipcli.records import Embedded, Failure, FailureKind
from clipcli.weights.model import Model
from clipcli.zeroshot.files import field

FORMAT, VERSION = "embeddings", 1
KEY = "clipcli"
CHUNK = 1 << 13  # vectors that are looked at together

Array = NDArray[np.float32]

_HEADS = {  # what files of ours begin with
    "safetensors": rb".{8}\{\"__metadata__\":\{\"clipcli\":\"\{\\\"format\\\": \\\"embeddings\\\"",
    "npz": rb"PK\x03\x04.{26}embedding\.npy",
    "parquet": rb"PAR1",
}
# The header of an array, as numpy writes it: read as data, which numpy's own reader doesn't quite do.
_NPY = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d{1,18},(?: \d{1,18})?)\), \} *\n")


@dataclass(frozen=True, eq=False, kw_only=True)
class Embeddings:
    """What an embeddings file holds. Iterating gives the rows that went into it, in their order."""

    path: Path
    vectors: Array  # [n, dim], unit rows; of .safetensors and .npz they are read from the disk when they are used
    names: tuple[str, ...]  # one a vector: paths, or the sentences themselves
    failures: tuple[tuple[int, Failure], ...]  # each with the number of vectors before it
    of_texts: bool
    model: str
    fingerprint: str  # of the image tower; of sentences, the text tower's
    arithmetic: str  # precision and runtime: "torch-fp32"
    pixels: str | None  # how pictures were prepared; None: sentences
    crop: str | None
    decode: str | None

    def __iter__(self) -> Iterator[Embedded | Failure]:
        start = 0
        for end, failure in (*self.failures, (len(self.names), None)):
            yield from map(Embedded, self.names[start:end], self.vectors[start:end])
            if failure is not None:
                yield failure
            start = end

    def check_model(self, model: Model) -> None:
        """Raise EmbeddingsError unless these are of pictures and `model`'s image tower made them."""
        if self.of_texts:
            raise EmbeddingsError(f"{self.path}: holds embeddings of sentences, not of pictures")
        if self.vectors.shape[1] != model.config.embed_dim or self.fingerprint != model.image_fingerprint:
            raise EmbeddingsError(
                f'{self.path}: made with model "{self.model}" ({self.fingerprint[:8]}), '
                f'not with "{model.name}" ({model.image_fingerprint[:8]})',
                hint="make it again with this model, or give the model it was made with as --model",
            )


def kind_of(path: str | Path) -> str | None:
    """Which kind of embeddings file lies at `path`, going by its first bytes: safetensors, npz, parquet; or None."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            head = file.read(100)
    except (OSError, ValueError):
        return None
    return next((kind for kind, mark in _HEADS.items() if re.match(mark, head, re.DOTALL)), None)


def load_embeddings(path: str | Path) -> Embeddings:
    """Read an embeddings file. Raises EmbeddingsError if it is none, broken, or of a newer version; UsageError."""
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        what = "no embeddings file, or none that can be read" if path.exists() else "no such file"
        raise UsageError(f"{path}: {what}", hint="make one with: clipcli embed photos/ -o photos.safetensors")
    try:
        if kind == "parquet":
            from clipcli.output import parquet

            text, vectors, names, failures = parquet.read(path)
            made = json.loads(text)
            return _checked(path, made, vectors if names else vectors.reshape(0, made["dim"]), names, failures)
        words, vectors = _read_safetensors(path) if kind == "safetensors" else _read_npz(path)
        content = json.loads(words)
        names = _names(field(content, "paths" if "paths" in content else "texts", list))
        return _checked(path, content, vectors, names, list(map(_failure, field(content, "failures", list))))
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise _broken(path, "truncated or damaged") from error
    except RecursionError as error:
        raise _broken(path, "its JSON is nested too deep") from error
    except (ValueError, TypeError, KeyError, NotImplementedError, OverflowError) as error:  # of hostile zips, too
        raise _broken(path, str(error)[:120]) from error
    except OSError as error:
        raise _broken(path, reason(error)) from error


def _read_safetensors(path: Path) -> tuple[str | bytes, Array]:
    with safe_open(path, framework="np") as file:  # checks the header, and that the tensors fill the file
        if list(file.keys()) != ["embedding"] or file.get_slice("embedding").get_dtype() != "F32":
            raise ValueError("it holds other tensors than embedding in F32")
        text, shape = file.metadata()[KEY], file.get_slice("embedding").get_shape()
    with path.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    return text, _mapped(path, "<f4", tuple(shape), start)


def _read_npz(path: Path) -> tuple[str | bytes, Array]:
    with zipfile.ZipFile(path) as archive:
        vectors = _read_npy(path, archive.getinfo("embedding.npy"), "<f4")
        words = _read_npy(path, archive.getinfo(f"{KEY}.npy"), "|u1")
    return words.tobytes(), vectors


def _read_npy(path: Path, member: zipfile.ZipInfo, dtype: str) -> NDArray[Any]:
    """An array of an archive, where it lies in the file: nothing that is compressed or encrypted will do."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename[:40]!r} is compressed")
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)  # of its header; then come the name and another field, with these lengths
        file.seek(sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28)), os.SEEK_CUR)
        magic = file.read(10)
        header = file.read(int.from_bytes(magic[8:], "little"))
        found = _NPY.fullmatch(header) if magic.startswith(b"\x93NUMPY\x01\x00") else None
        if not found or found[1].decode() != dtype:
            raise ValueError(f"{member.filename[:40]!r} is of another form")
        return _mapped(path, dtype, tuple(map(int, found[2].strip(b",").split(b","))), file.tell())


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...], start: int) -> NDArray[Any]:
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", start, shape))  # raises ValueError beyond the end


def _checked(
    path: Path, made: dict[str, Any], vectors: Array, names: list[str], failures: list[tuple[int, Failure]]
) -> Embeddings:
    """The embeddings, each part of them checked. Raises ValueError, EmbeddingsError."""
    if field(made, "format", str) != FORMAT:
        raise ValueError(f"it holds no embeddings but {reprlib.repr(made['format'])}")
    if made.get("version") != VERSION:
        what = f"written in version {reprlib.repr(made.get('version'))} of the format, this clipcli reads {VERSION}"
        raise EmbeddingsError(f"{path}: {what}", hint="upgrade clipcli")
    if vectors.shape != (len(names), made.get("dim")) or not vectors.shape[1]:
        raise ValueError(f"embedding is {list(vectors.shape)} for {len(names)} names")
    places = [0, *(after for after, _ in failures), len(names)]
    if places != sorted(places):
        raise ValueError("its failures are out of order")
    if any("\0" in name for name in (*names, *(failure.path for _, failure in failures))):
        raise ValueError("a name holds a NUL")
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK]
        lengths = np.sqrt(np.einsum("ij,ij->i", part, part))
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= 1e-3))  # NaN is neither
        if len(wrong):
            raise ValueError(f"vector {start + wrong[0] + 1} has the length {lengths[wrong[0]]:g}")
    of_texts = "text_fingerprint" in made
    return Embeddings(
        path=path,
        vectors=vectors,
        names=tuple(names),
        failures=tuple(failures),
        of_texts=of_texts,
        model=field(made, "model", str),
        fingerprint=field(made, "text_fingerprint" if of_texts else "image_fingerprint", str),
        arithmetic=field(made, "arithmetic", str),
        pixels=None if of_texts else field(made, "pixels", str),
        crop=None if of_texts else field(made, "crop", str),
        decode=None if of_texts else field({"decode": "exact", **made}, "decode", str),  # as it was before it said so
    )


def _names(entries: list[Any]) -> list[str]:
    """Names out of JSON, most of which are text and no more."""
    if set(map(type, entries)) == {str}:
        _text("".join(entries))
        return entries
    return [name_in(entry) for entry in entries]


def name_in(entry: object) -> str:
    """A name out of JSON, its bytes as they were. Raises ValueError."""
    return path_of(entry) if isinstance(entry, dict) else _text(entry)


def _failure(entry: object) -> tuple[int, Failure]:
    after, kind, message = field(entry, "after", int), field(entry, "kind", str), _text(field(entry, "message"))
    return after, Failure(name_in(entry), FailureKind(kind), message)


def _text(value: object) -> str:
    """Text without halves of characters, which no output could hold."""
    if not isinstance(value, str):
        raise ValueError(f"a name is {reprlib.repr(value)}")
    value.encode()
    return value


def _broken(path: Path, why: str) -> EmbeddingsError:
    return EmbeddingsError(f"{path}: broken embeddings file: {why}", hint="make it again: clipcli embed")
