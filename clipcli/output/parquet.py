"""Embeddings in Parquet, a row for each picture: for millions of them, and for tools that read columns.

    path (text: of sentences)  string       embedding   list of float32, null in the row of a failure
    path_bytes                 binary       error_kind, error_message    string
        where it is no UTF-8                    of a failure

In and out: what `spool` and `embeddings` have, group by group. What made them stands as JSON under the key `clipcli` of
the schema. Needs pyarrow (extra `parquet`), which is imported on demand. Nothing is compressed: vectors hardly can be,
and so no small file can claim to be a large one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.records import Failure, FailureKind

if TYPE_CHECKING:
    import pyarrow

KEY = b"clipcli"
GROUP = 1 << 14  # rows that are written, or read, together

Failures = Sequence[tuple[int, Failure]]  # each with the number of vectors before it


def check_installed(path: Path) -> None:
    """Raise UsageError where pyarrow isn't there."""
    if find_spec("pyarrow") is None:
        raise UsageError(f"{path}: .parquet needs more", hint='pip install "clipcli[parquet]"')


def write(
    file: BinaryIO, made: str, names: Iterable[str], vectors: tuple[IO[bytes], int], failures: Failures, texts: bool
) -> None:
    """Write all rows; `vectors`: a file of float32, and how many make a vector."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = _schema(texts).with_metadata({KEY: made.encode()})
    content, dim = vectors
    rows = _rows(iter(names), failures)
    with parquet.ParquetWriter(file, schema, compression="NONE", use_dictionary=False) as writer:
        while group := list(islice(rows, GROUP)):
            paths = [os.fsencode(name) for name, _ in group]
            shown = [path.decode(errors="replace") for path in paths]
            exact = [None if path == text.encode() else path for path, text in zip(paths, shown, strict=True)]
            failed = np.array([failure is not None for _, failure in group])
            ends = np.concatenate([[0], np.cumsum(~failed) * dim]).astype(np.int32)
            numbers = pa.array(np.frombuffer(content.read(4 * int(ends[-1])), "<f4"))
            lists = pa.ListArray.from_arrays(pa.array(ends, mask=np.append(failed, False)), numbers)
            kinds = [failure and failure.kind.value for _, failure in group]
            messages = [failure and failure.message.encode(errors="replace").decode() for _, failure in group]
            columns = (pa.array(x, f.type) for x, f in zip((shown, exact), schema, strict=False))
            texts_of = (pa.array(x, pa.string()) for x in (kinds, messages))
            writer.write_table(pa.table([*columns, lists, *texts_of], schema=schema), row_group_size=GROUP)


def read(path: Path) -> tuple[bytes, NDArray[np.float32], list[str], list[tuple[int, Failure]]]:
    """The JSON, vectors, their names, and failures. Raises ValueError for a file that we didn't write, UsageError."""
    check_installed(path)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            made = (file.schema_arrow.metadata or {}).get(KEY)
            texts = file.schema_arrow.names[:1] == ["text"]
            if made is None or not file.schema_arrow.equals(_schema(texts)):
                raise ValueError("its columns are not those of embeddings")
            if any(c.compression != "UNCOMPRESSED" or c.has_dictionary_page for c in _chunks(file.metadata)):
                raise ValueError("it is compressed, and may hold more than the file has bytes for")
            return made, *_read(file, path.stat().st_size)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"truncated or damaged: {error}") from error


def _schema(texts: bool) -> pyarrow.Schema:
    import pyarrow as pa

    kinds = {
        "text" if texts else "path": pa.string(),
        "path_bytes": pa.binary(),
        "embedding": pa.list_(pa.float32()),
        "error_kind": pa.string(),
        "error_message": pa.string(),
    }
    return pa.schema(list(kinds.items()))


def _chunks(about: Any) -> Iterator[Any]:
    """What the file says of each column of each row group."""
    for group in map(about.row_group, range(about.num_row_groups)):
        yield from map(group.column, range(group.num_columns))


def _rows(names: Iterator[str], failures: Failures) -> Iterator[tuple[str, Failure | None]]:
    """All rows in their order."""
    done = 0
    for after, failure in failures:
        yield from ((name, None) for name in islice(names, after - done))
        yield failure.path, failure
        done = after
    yield from ((name, None) for name in names)


def _read(file: Any, size: int) -> tuple[NDArray[np.float32], list[str], list[tuple[int, Failure]]]:
    """`size`: bytes of the file, in which every vector has its own."""
    import pyarrow.compute as pc

    vectors = np.empty((0, 0), np.float32)
    names: list[str] = []
    failures: list[tuple[int, Failure]] = []
    left = size
    for batch in file.iter_batches(batch_size=GROUP):
        shown, exact, embedding, kinds, messages = batch.columns
        left -= 4 * len(embedding.flatten()) + sum(pc.sum(pc.binary_length(x)).as_py() or 0 for x in (shown, kinds))
        if left < 0:
            raise ValueError("it holds more than the file has bytes for")
        start = len(names)
        rows = zip(*(column.to_pylist() for column in (shown, exact, kinds, messages)), strict=True)
        for (text, raw, kind, message), is_vector in zip(rows, embedding.is_valid().to_pylist(), strict=True):
            name = _name(text, raw)
            if is_vector:
                names.append(name)
            else:
                failures.append((len(names), Failure(name, FailureKind(kind), _name(message, None))))
        if len(names) == start:
            continue
        (dim, *others) = {*pc.list_value_length(embedding).drop_null().to_pylist()}
        if not len(vectors) and dim:
            vectors = np.empty((size // (4 * dim), dim), np.float32)  # untouched memory costs nothing
        if others or dim != vectors.shape[1]:
            raise ValueError("its vectors are not of one length")
        vectors[start : len(names)] = embedding.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return vectors[: len(names)], names, failures


def _name(text: str | None, raw: bytes | None) -> str:
    if text is None:
        raise ValueError("a row without a name")
    return text if raw is None else os.fsdecode(raw)
