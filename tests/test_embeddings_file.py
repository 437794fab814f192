"""Embeddings files: what goes in comes out, whatever the format; and nothing else is believed."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import resource
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from clipcli.errors import EmbeddingsError, OutputError, UsageError
from clipcli.output import parquet, spool
from clipcli.output.embeddings import Embeddings, kind_of, load_embeddings
from clipcli.output.spool import save_embeddings
from clipcli.records import Embedded, Failure, FailureKind
from clipcli.weights.model import Model

FORMATS = ("safetensors", "npz", "parquet")
NAMES = ["a.jpg", "b/ü 猫.png", 'new\nline\t"quoted".png', os.fsdecode(b"caf\xe9.png"), ""]
every_format = pytest.mark.parametrize("kind", FORMATS)


def maker(dim: int = 8, name: str = "a model") -> Model:
    """As much of a model as a file is told of."""
    config = SimpleNamespace(embed_dim=dim)
    prints = {"image_fingerprint": "1234567890abcdef", "text_fingerprint": "fedcba0987654321"}
    return cast(Model, SimpleNamespace(name=name, config=config, arithmetic="torch-fp32", **prints))


def unit(count: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    found = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def some_rows() -> list[Embedded | Failure]:
    """Vectors, and failures first, last, two in a row."""
    rows: list[Embedded | Failure] = list(map(Embedded, NAMES, unit(len(NAMES))))
    torn = Failure(os.fsdecode(b"t\xf6rn.jpg"), FailureKind.TRUNCATED, "the file ends before the picture does")
    rows[3:3] = [torn, Failure("gone.jpg", FailureKind.MISSING, "no such file")]
    return [Failure("first", FailureKind.CORRUPT, "odd\x00"), *rows, Failure("last", FailureKind.MODEL, "…\udce9")]


def same(found: Embeddings, expected: list[Embedded | Failure]) -> None:
    rows = list(found)
    assert [row.path for row in rows] == [row.path for row in expected]
    for row, other in zip(rows, expected, strict=True):
        if isinstance(other, Failure):
            assert isinstance(row, Failure) and row.kind is other.kind
            assert re.sub("[\udce9?]", "\ufffd", other.message) == re.sub(r"\?", "\ufffd", row.message)
        else:
            assert isinstance(row, Embedded)
            np.testing.assert_array_equal(row.vector, other.vector)


@every_format
def test_round_trip(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    save_embeddings(iter(some_rows()), path, maker(name="m \udce9"), pixels="reference", crop="pad")
    found = load_embeddings(path)
    same(found, some_rows())
    same(found, some_rows())  # it can be gone through again
    assert (found.pixels, found.crop, found.of_texts) == ("reference", "pad", False)
    assert (found.model, found.fingerprint, found.arithmetic) == ("m \ufffd", "1234567890abcdef", "torch-fp32")
    assert found.vectors.dtype == np.float32 and kind_of(path) == kind
    assert os.listdir(tmp_path) == [path.name]


@every_format
@pytest.mark.parametrize("rows", [[], [Failure("a", FailureKind.MISSING, "no such file")]], ids=["none", "failed"])
def test_a_file_without_vectors(tmp_path: Path, kind: str, rows: list[Embedded | Failure]) -> None:
    save_embeddings(rows, tmp_path / f"a.{kind}", maker())
    found = load_embeddings(tmp_path / f"a.{kind}")
    same(found, rows)
    assert found.vectors.shape == (0, 8)


@every_format
def test_of_sentences(tmp_path: Path, kind: str) -> None:
    rows = list(map(Embedded, ["a cat", "a dog"], unit(2)))
    save_embeddings(rows, tmp_path / f"a.{kind}", maker(), texts=True)
    found = load_embeddings(tmp_path / f"a.{kind}")
    assert found.names == ("a cat", "a dog") and found.of_texts
    assert (found.fingerprint, found.pixels, found.crop) == ("fedcba0987654321", None, None)
    with pytest.raises(EmbeddingsError, match="of sentences, not of pictures"):
        found.check_model(maker())


@every_format
def test_the_same_rows_make_the_same_bytes(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        save_embeddings(some_rows(), tmp_path / f"{name}.{kind}", maker())
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_other_tools_read_them(tmp_path: Path) -> None:
    vectors = unit(len(NAMES))
    for kind in FORMATS:
        save_embeddings(some_rows(), tmp_path / f"a.{kind}", maker())
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["embedding"], vectors)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["embedding"], vectors)
        content = json.loads(bytes(arrays["clipcli"]))
    assert content["paths"][:3] == NAMES[:3]
    assert content["paths"][3] == {"path": "caf\ufffd.png", "path_bytes": "Y2Fm6S5wbmc="}
    assert [failure["after"] for failure in content["failures"]] == [0, 3, 3, 5]
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["path"] for row in table] == [
        "first", *NAMES[:3], "t\ufffdrn.jpg", "gone.jpg", "caf\ufffd.png", "", "last"
    ]  # fmt: skip
    assert table[4]["path_bytes"] == b"t\xf6rn.jpg" and table[4]["embedding"] is None
    assert table[4]["error_kind"] == "truncated" and table[1]["error_kind"] is None
    np.testing.assert_array_equal(np.float32(table[1]["embedding"]), vectors[0])


def test_more_rows_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP", 3)
    save_embeddings(some_rows(), tmp_path / "a.parquet", maker())
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    same(load_embeddings(tmp_path / "a.parquet"), some_rows())


# ---- what goes wrong while one is written


@every_format
def test_an_interrupted_run_leaves_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"

    def interrupted() -> Iterator[Embedded | Failure]:
        yield from some_rows()
        assert len(os.listdir(tmp_path)) == before  # what waits has no name, and can't be left behind
        raise KeyboardInterrupt

    for before in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            save_embeddings(interrupted(), path, maker())
        assert len(os.listdir(tmp_path)) == before
        save_embeddings(some_rows(), path, maker())  # which the next run doesn't touch
    same(load_embeddings(path), some_rows())


@every_format
@pytest.mark.parametrize("limit", [0, 40, 400])
def test_a_full_disk_is_told(tmp_path: Path, kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(spool, "TemporaryFile", lambda dir: Full())
    with pytest.raises(OutputError, match="no space left"):
        save_embeddings(map(Embedded, map(str, range(100)), unit(100)), tmp_path / f"a.{kind}", maker())
    assert os.listdir(tmp_path) == []


@every_format
def test_a_full_disk_is_told_whatever_waits_in_buffers(tmp_path: Path, kind: str) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
    try:
        for count in (300, 3000):  # what fails: the end, and a row
            with pytest.raises(OutputError, match="file too large"):
                save_embeddings(map(Embedded, map(str, range(count)), unit(count)), tmp_path / f"a.{kind}", maker())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []


def test_what_the_rows_raise_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def rows() -> Iterator[Embedded | Failure]:
        yield Embedded("a", unit(1)[0])
        raise PermissionError("the list of paths")

    with pytest.raises(PermissionError, match="the list of paths"):
        save_embeddings(rows(), tmp_path / "a.npz", maker())


def test_more_names_than_a_header_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "LONGEST_HEADER", 5_000)
    many = [Embedded(f"folder/{number}.jpg", vector) for number, vector in enumerate(unit(300))]
    with pytest.raises(OutputError, match=r"1\d\d names are more than") as caught:
        save_embeddings(many, tmp_path / "a.safetensors", maker())
    assert ".npz or .parquet" in (caught.value.hint or "")
    assert os.listdir(tmp_path) == []
    save_embeddings(many[:100], tmp_path / "a.safetensors", maker())
    size = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert 2_000 < size < 5_000
    save_embeddings(many, tmp_path / "a.npz", maker())


def test_endings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a.bin", "a.npz.gz"):
        with pytest.raises(UsageError, match="ending"):
            save_embeddings([], tmp_path / name, maker())
    save_embeddings([], tmp_path / "A.NPZ", maker())
    assert kind_of(tmp_path / "A.NPZ") == "npz"
    monkeypatch.setattr(parquet, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs more") as caught:
        save_embeddings([], tmp_path / "a.parquet", maker())
    assert caught.value.hint == 'pip install "clipcli[parquet]"'


@every_format
def test_memory_is_flat_and_time_is_short(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP", 500)
    vectors = unit(64, dim=512)

    def rows(count: int) -> Iterator[Embedded]:
        return (Embedded(f"photos/{number:07}.jpg", vectors[number % 64]) for number in range(count))

    save_embeddings(rows(1), tmp_path / f"warm.{kind}", maker(512))  # imports
    peaks = []
    for count in (1_000, 10_000):
        tracemalloc.start()
        save_embeddings(rows(count), tmp_path / f"{count}.{kind}", maker(512))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / f"10000.{kind}").stat().st_size > 20_000_000
    assert peaks[1] - peaks[0] < 2_500_000  # a header has 300 kB, and is there a few times
    began = time.process_time()
    save_embeddings(rows(10_000), tmp_path / f"again.{kind}", maker(512))
    found = load_embeddings(tmp_path / f"again.{kind}")
    assert sum(1 for _ in found) == 10_000
    assert time.process_time() - began < 5  # it takes 0.3 s


# ---- hostile files

GOOD: dict[str, Any] = {
    "format": "embeddings", "version": 1, "dim": 4, "model": "m", "image_fingerprint": "ab", "pixels": "auto",
    "crop": "model", "arithmetic": "torch-fp32", "paths": ["a", "b"], "failures": [],
}  # fmt: skip
UNIT = np.eye(2, 4, dtype=np.float32)


def write(path: Path, content: object, **arrays: NDArray[Any]) -> Path:
    """A file of ours, by other means."""
    text = content if isinstance(content, str) else json.dumps(content)
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=True, **arrays, clipcli=np.frombuffer(text.encode(), np.uint8))
    else:
        save_file(arrays, path, {"clipcli": text})
    return path


def failure(**changes: object) -> dict[str, object]:
    return {"after": 0, "path": "c", "kind": "missing", "message": "no such file", **changes}


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_what_the_next_test_breaks_is_good(tmp_path: Path, kind: str) -> None:
    found = load_embeddings(write(tmp_path / f"a.{kind}", GOOD | {"failures": [failure()]}, embedding=UNIT))
    same(found, [Failure("c", FailureKind.MISSING, "no such file"), *map(Embedded, "ab", UNIT)])


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "version 2 of the format"),
        ({"version": "9" * 200}, "of the format"),
        ({"dim": 5}, "embedding is [2, 4] for 2 names"),
        ({"paths": ["a"]}, "embedding is [2, 4] for 1 names"),
        ({"paths": ["a", 7]}, "a name is 7"),
        ({"paths": ["a", "b\0"]}, "NUL"),
        ({"paths": ["a", "b\udce9"]}, "surrogates"),
        ({"paths": ["a", {"path": "b"}, "c"]}, "for 3 names"),
        ({"paths": ["a", {"path_bytes": "_"}]}, "base64"),
        ({"paths": ["a", {"path_bytes": "YgA="}]}, "NUL"),
        ({"paths": ["a", {}]}, "path"),
        ({"paths": {"a": 1, "b": 2}}, "paths is"),
        ({"paths": None}, "paths is None"),
        ({"model": None}, "model is None"),
        ({"image_fingerprint": 7}, "image_fingerprint is 7"),
        ({"pixels": ["auto"]}, "pixels is"),
        ({"arithmetic": None}, "arithmetic is None"),
        ({"failures": None}, "failures is None"),
        ({"failures": [7]}, "after is None"),
        ({"failures": [failure(after=3)]}, "out of order"),
        ({"failures": [failure(after=-1)]}, "out of order"),
        ({"failures": [failure(after=2), failure(after=1)]}, "out of order"),
        ({"failures": [failure(after="0")]}, "after is '0'"),
        ({"failures": [failure(kind="bored")]}, "bored"),
        ({"failures": [failure(message=None)]}, "None"),
        ({"failures": [failure(path="\0")]}, "NUL"),
    ],
)
def test_broken_metadata(tmp_path: Path, kind: str, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path / f"a.{kind}", GOOD | change, embedding=UNIT)
    with pytest.raises(EmbeddingsError) as caught:
        load_embeddings(path)
    assert what in caught.value.message and "\n" not in caught.value.message
    assert caught.value.message.startswith(str(path)) and len(caught.value.message) < len(str(path)) + 200


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize(
    "text",
    [
        '{"format": "embeddings", "paths": ' + "[" * 100_000,
        '{"format": "embeddings", "version": ' + "9" * 10_000 + "}",
        '{"format": "embeddings"',
        '{"format": "embeddings"}',
    ],
    ids=["deep", "long", "open", "empty"],
)
def test_broken_json(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(EmbeddingsError):
        load_embeddings(write(tmp_path / f"a.{kind}", text, embedding=UNIT))


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize(
    "array",
    [
        UNIT.astype(np.float16),
        UNIT.astype(np.int32),
        UNIT * 2,
        UNIT * np.float32([[1], [np.nan]]),
        np.full((2, 4), np.inf, np.float32),
        np.zeros((2, 4), np.float32),
        UNIT[:1],
        UNIT[0],
        UNIT[None],
        np.zeros((0, 4), np.float32),
        np.zeros((2, 0), np.float32),
    ],
    ids=["half", "int", "long", "nan", "inf", "zero", "one", "flat", "deep", "none", "narrow"],
)
def test_broken_vectors(tmp_path: Path, kind: str, array: NDArray[Any]) -> None:
    with pytest.raises(EmbeddingsError):
        load_embeddings(write(tmp_path / f"a.{kind}", GOOD, embedding=array))


def test_broken_containers(tmp_path: Path) -> None:
    good = write(tmp_path / "good.npz", GOOD, embedding=UNIT).read_bytes()
    arrays = {"embedding": UNIT, "clipcli": np.frombuffer(json.dumps(GOOD).encode(), np.uint8)}
    np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    np.savez(tmp_path / "columns.npz", **{**arrays, "embedding": np.asfortranarray(UNIT)})
    np.savez(tmp_path / "objects.npz", **{**arrays, "embedding": np.array([None, None])}, allow_pickle=True)
    np.savez(tmp_path / "alone.npz", embedding=UNIT)
    (tmp_path / "huge.npz").write_bytes(good.replace(b"(2, 4), }        ", b"(2, 4000000000), }", 1))
    with zipfile.ZipFile(tmp_path / "code.npz", "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, __import__('os').getpid()), }"
        archive.writestr("embedding.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    save_file({"embedding": UNIT, "other": UNIT}, tmp_path / "two.safetensors", {"clipcli": json.dumps(GOOD)})
    pq.write_table(pa.table({"path": ["a"], "x": [1]}), tmp_path / "foreign.parquet")
    files = sorted(set(tmp_path.iterdir()) - {tmp_path / "good.npz"})
    assert len(files) == 8
    for path in files:
        with pytest.raises(EmbeddingsError, match="broken embeddings file"):
            load_embeddings(path)


def test_a_small_file_can_not_claim_to_be_large(tmp_path: Path) -> None:
    schema = parquet._schema(False).with_metadata({b"clipcli": json.dumps(GOOD | {"dim": 512}).encode()})
    vectors = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 5001 * 512, 512, dtype=np.int32)), pa.array(np.tile(np.eye(1, 512, dtype="f4"), 5000)[0])
    )
    nothing = [pa.nulls(5000, pa.binary()), pa.nulls(5000, pa.string())]
    table = pa.table([pa.array(["a" * 10_000] * 5000), nothing[0], vectors, nothing[1], nothing[1]], schema=schema)
    delta = {"column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    for count, way, what in (
        (5000, {"compression": "zstd", "use_dictionary": False}, "it is compressed"),
        (5000, {"compression": "NONE", "use_dictionary": ["path"]}, "it is compressed"),
        (100, {"compression": "NONE", "use_dictionary": False, **delta}, "it holds more than the file has bytes for"),
    ):
        pq.write_table(table[:count], tmp_path / "a.parquet", **way)
        assert kind_of(tmp_path / "a.parquet") == "parquet"
        with pytest.raises(EmbeddingsError, match=what):
            load_embeddings(tmp_path / "a.parquet")


@every_format
def test_any_damage_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    save_embeddings(some_rows(), path, maker())
    data, chance, told = path.read_bytes(), random.Random(11), 0
    for _ in range(150):
        place, way = chance.randrange(len(data)), chance.randrange(4)
        cut = {0: place, 1: len(data), 2: place + 1 + chance.randrange(20), 3: place + 1}[way]
        rest = data[cut:] if way else b""
        new = bytes([chance.randrange(256)]) if way == 3 else chance.randbytes(3) if way == 1 else b""
        path.write_bytes(data[:place] + new + rest)
        try:
            list(load_embeddings(path))
        except (EmbeddingsError, UsageError) as error:
            told += 1
            assert error.message.startswith(str(path))
    assert told > 60


def test_what_is_no_such_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "empty.npz").touch()
    (tmp_path / "picture.npz").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    save_file({"weight": UNIT}, tmp_path / "weights.safetensors")
    for path in (*tmp_path.iterdir(), tmp_path / "none.npz", Path("\0")):
        assert kind_of(path) is None
    for path in tmp_path.iterdir():
        with pytest.raises(UsageError, match="no embeddings file"):
            load_embeddings(path)
    with pytest.raises(UsageError, match="no such file"):
        load_embeddings(tmp_path / "none.npz")
