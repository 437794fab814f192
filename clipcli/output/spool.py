"""Embeddings files, written: rows as `embed` makes them, one at a time, into a file that is whole or not there.

The formats are `embeddings.py`'s. Until all is done, vectors and names wait in two files without a name beside the
output, which end with the process, however that ends. Of a million rows only the failures are held in memory, and in
the end the header of a `.safetensors`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from clipcli import __version__
from clipcli.errors import OutputError, UsageError, writing
from clipcli.images.stream import decoder
from clipcli.output.embeddings import FORMAT, KEY, VERSION, name_in
from clipcli.output.jsonl import path_members
from clipcli.records import Embedded, Failure
from clipcli.weights.folder import whole_file
from clipcli.weights.model import Model
from clipcli.zeroshot.files import as_json

if TYPE_CHECKING:
    from clipcli.images.stream import Decode
    from clipcli.images.transform import Crop, Pixels

ENDINGS = (".safetensors", ".npz", ".parquet")
LONGEST_HEADER = 100_000_000  # bytes that safetensors allows


def check_ending(path: Path) -> str:
    """The ending that says which format `path` gets. Raises UsageError."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise UsageError(f"{path}: the ending says no format of embeddings", hint=f"end it in {', '.join(ENDINGS)}")
    if ending == ".parquet":
        from clipcli.output.parquet import check_installed

        check_installed(path)
    return ending


def save_embeddings(
    rows: Iterable[Embedded | Failure],
    path: str | Path,
    model: Model,
    *,
    pixels: Pixels = "auto",
    crop: Crop = "model",
    decode: Decode = "auto",
    texts: bool = False,
) -> None:
    """Write what `embed` yields to `path`, as it comes; the file is there when all is done, and not before.

    `pixels`, `crop` and `decode` are those of the options that `embed` had; `texts`: the rows are those of
    `embed_texts`. Raises UsageError, OutputError, and what `rows` raises.
    """
    dim = model.config.embed_dim
    made: dict[str, object] = {"format": FORMAT, "version": VERSION, "dim": dim, "model": model.name}
    if texts:
        made["text_fingerprint"] = model.text_fingerprint
    else:
        made |= {"image_fingerprint": model.image_fingerprint, "pixels": pixels, "crop": crop}
        made |= {"decode": "exact" if pixels == "reference" else decode, "decoder": decoder(pixels, decode)}
    made |= {"arithmetic": model.arithmetic, "clipcli": __version__}
    with closing(_Spool(Path(path), as_json(made), texts)) as spool:
        for row in rows:
            spool.add(row)
        spool.finish(dim)


class _Spool:
    """Rows on their way into a file, in two files without a name: vectors, and the JSON with a name a line."""

    def __init__(self, path: Path, made: str, texts: bool) -> None:
        self._path, self._ending = path, check_ending(path)
        self._made, self._texts = made, texts
        folder = Path(os.path.realpath(path)).parent
        with writing(path):
            self._vectors, self._words = TemporaryFile(dir=folder), TemporaryFile(dir=folder)  # noqa: SIM115 -- `close`
        self._failures: list[tuple[int, Failure]] = []
        self._count = self._header = 0
        self._say(f'{made[:-1]}, "{"texts" if texts else "paths"}": [')

    def add(self, row: Embedded | Failure) -> None:
        """Take one row."""
        if isinstance(row, Failure):
            self._failures.append((self._count, row))
            return
        with writing(self._path):
            self._vectors.write(np.ascontiguousarray(row.vector, "<f4").data)
        name = path_members(row.path)
        self._say(f"{',' if self._count else ''}\n{as_json(name if len(name) > 1 else name['path'])}")
        self._count += 1

    def finish(self, dim: int) -> None:
        """Make the file."""
        shape = (self._count, dim)
        failures = [
            {"after": after, **path_members(row.path), "kind": row.kind, "message": row.message}
            for after, row in self._failures
        ]
        self._say(f'\n], "failures": {as_json(failures)}}}')
        size = self._words.tell()
        with whole_file(self._path) as file:
            for spooled in (self._vectors, self._words):
                spooled.seek(0)
            if self._ending == ".safetensors":
                _write_safetensors(file, shape, self._vectors, self._words.read().decode())
            elif self._ending == ".npz":
                with zipfile.ZipFile(file, "w") as archive:  # not compressed: vectors hardly can be
                    _write_npy(archive, "embedding", "<f4", shape, self._vectors)
                    _write_npy(archive, KEY, "|u1", (size,), self._words)
            else:
                from clipcli.output import parquet

                next(self._words)
                names = (name_in(json.loads(line.rstrip(b",\n"))) for line in self._words if line[:1] in b'"{')
                parquet.write(file, self._made, names, (self._vectors, dim), self._failures, self._texts)

    def close(self) -> None:
        """Let go of the two files."""
        for file in (self._vectors, self._words):
            with suppress(OSError):  # of a full disk, on which nothing of them is wanted any more
                file.close()

    def _say(self, text: str) -> None:
        with writing(self._path):
            self._words.write(text.encode())
        if self._ending == ".safetensors":
            self._header += len(json.dumps(text, ensure_ascii=False).encode())
            if self._header > LONGEST_HEADER - 1000:
                raise OutputError(
                    f"{self._path}: {self._count:,} names are more than the header of safetensors holds",
                    hint="write .npz or .parquet; what is done lies in the store",
                )


def _write_safetensors(file: BinaryIO, shape: tuple[int, int], vectors: IO[bytes], text: str) -> None:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": (0, 4 * math.prod(shape))}
    header = json.dumps({"__metadata__": {KEY: text}, "embedding": tensor}, separators=(",", ":"), ensure_ascii=False)
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    shutil.copyfileobj(vectors, file)


def _write_npy(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], content: IO[bytes]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        shutil.copyfileobj(content, member)
