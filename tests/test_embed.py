"""Embeddings of pictures and what the store remembers of them: nothing is computed twice, and nothing is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray

import clipcli
from clipcli.output.rows import read_rows
from clipcli.paths import store_file
from clipcli.records import Embedded, Failure, FailureKind, Source
from clipcli.store.database import Store
from clipcli.tasks.embed import EmbedOptions, embed
from clipcli.weights.model import Model, load_model
from clipcli.weights.torch_images import Pending, Tower

LABELS = ("-L", "cat", "-L", "rocket", "-L", "coffee")


@pytest.fixture
def opened(model: Path, tmp_path: Path) -> Iterator[Model]:
    """The small model with a store of its own."""
    with Store(tmp_path / "store.sqlite") as store:
        yield load_model(model, device="cpu", store=store)


def vectors(rows: Iterator[Embedded | Failure]) -> dict[str, NDArray[np.float32]]:
    return {row.path: row.vector for row in rows if isinstance(row, Embedded)}


def test_a_row_for_each_input_in_order(opened: Model, photos: Path) -> None:
    inputs = [str(photos / name) for name in ("rocket.jpg", "broken.jpg", "none.jpg", "coffee.png")]
    rows = list(embed(inputs, opened))
    assert [row.path for row in rows] == inputs
    assert [type(row) for row in rows] == [Embedded, Failure, Failure, Embedded]
    for row in rows:
        if isinstance(row, Embedded):
            assert row.vector.shape == (16,) and row.vector.dtype == np.float32
            assert np.linalg.norm(row.vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("change", ["nothing", "names", "folder", "labels", "templates", "order"])
def test_a_second_run_runs_no_image_tower(
    cli: Run, model: Path, photos: Path, tmp_path: Path, seen: list[int], change: str
) -> None:
    shutil.copytree(photos, tmp_path / "a")
    first = cli("classify", tmp_path / "a", *LABELS, "-m", model, "-f", "jsonl")
    assert (first.code, sum(seen)) == (3, 5)
    folder, labels, more = tmp_path / "a", LABELS, []
    match change:
        case "names":
            for file in folder.glob("[!.]*.png"):
                file.rename(folder / f"x{file.name}")
        case "folder":
            folder = folder.rename(tmp_path / "b")
        case "labels":
            labels = ("-L", "dog", "-L", "moon")
        case "templates":
            more = ["-t", "simple"]
        case "order":
            (folder / "rocket.jpg").rename(folder / "a.jpg")
    second = cli("classify", folder, *labels, *more, "-m", model, "-f", "jsonl")
    assert (second.code, sum(seen)) == (3, 5)
    if change == "nothing":
        assert second.out == first.out
    if change in ("names", "folder"):
        scores = [sorted(row["score"] or 0 for row in run.rows) for run in (first, second)]
        assert scores[0] == scores[1]


def test_another_model_policy_crop_or_content_is_another_embedding(
    cli: Run, model: Path, photos: Path, tmp_path: Path, seen: list[int]
) -> None:
    import tiny

    picture = tmp_path / "a.png"
    shutil.copy(photos / "coffee.png", picture)
    other = tiny.save(tmp_path / "other", config=tiny.vit(activation="quick_gelu"))
    runs = [
        ("-m", model),
        ("-m", other),
        ("-m", model, "--pixels", "reference"),
        ("-m", model, "--crop", "squash"),
        ("-m", model, "-p", "bf16"),
        ("-m", model, "--decode", "exact"),
    ]
    for number, run in enumerate(runs, 1):
        assert cli("classify", picture, *LABELS, *run).code == 0
        assert len(seen) == number
    for run in runs:
        cli("classify", picture, *LABELS, *run)
    assert len(seen) == 6
    shutil.copy(photos / "chelsea.png", picture)
    cli("classify", picture, *LABELS, "-m", model)
    assert len(seen) == 7


def test_no_cache_neither_reads_nor_fills(cli: Run, model: Path, photos: Path, seen: list[int]) -> None:
    for _ in range(2):
        assert cli("classify", photos / "coffee.png", *LABELS, "-m", model, "--no-cache").code == 0
    assert seen == [1, 1]
    assert not store_file().exists()


def test_known_pictures_are_not_even_read(opened: Model, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vectors(embed([photos], opened))
    monkeypatch.setattr("clipcli.images.stream.read_bytes", lambda source, take: pytest.fail(source.path))
    again = vectors(embed([photos / name for name in ("coffee.png", "rocket.jpg")], opened))
    for path, vector in again.items():
        np.testing.assert_array_equal(vector, first[path])
    with pytest.raises(pytest.fail.Exception, match="broken"):  # what failed is looked at anew
        list(embed([photos / "broken.jpg"], opened))


def test_bytes_without_a_file_are_known_too(opened: Model, photos: Path, seen: list[int]) -> None:
    data = (photos / "rocket.jpg").read_bytes()
    one = vectors(embed(Source("-", data), opened))
    two = vectors(embed([photos / "rocket.jpg"], opened))
    assert seen == [1]
    np.testing.assert_array_equal(one["-"], two[str(photos / "rocket.jpg")])


def test_known_and_new_pictures_mixed_keep_their_places(opened: Model, photos: Path, seen: list[int]) -> None:
    names = ["coffee.png", "broken.jpg", "rocket.jpg", "astronaut.png", "none.jpg", "chelsea.png"]
    expected = {name: vectors(embed(Source(name, (photos / name).read_bytes()), opened)) for name in names[::2][:2]}
    rows = list(embed([photos / name for name in names], opened, EmbedOptions(batch_size=2)))
    assert [Path(row.path).name for row in rows] == names
    assert [isinstance(row, Failure) for row in rows] == [False, True, False, False, True, False]
    for row in rows:
        if (name := Path(row.path).name) in expected:
            np.testing.assert_array_equal(row.vector, expected[name][name])  # type: ignore[union-attr]
    assert seen == [1, 1, 2]


def test_batches_with_and_without_the_store_say_the_same(model: Path, photos: Path, tmp_path: Path) -> None:
    plain = vectors(embed([photos], load_model(model, device="cpu")))
    with Store(tmp_path / "s.sqlite") as store:
        for _ in range(2):
            kept = vectors(embed([photos], load_model(model, device="cpu", store=store)))
            assert kept.keys() == plain.keys()
            for path, vector in kept.items():
                np.testing.assert_array_equal(vector, plain[path])


def test_a_damaged_embedding_is_computed_again(opened: Model, photos: Path, seen: list[int], tmp_path: Path) -> None:
    import sqlite3

    first = vectors(embed([photos / "coffee.png"], opened))
    opened.store.close()
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        assert connection.execute("UPDATE entry SET value = zeroblob(64) WHERE kind = 'embedding'").rowcount == 1
    connection.close()
    second = vectors(embed([photos / "coffee.png"], opened))
    assert seen == [1, 1]
    np.testing.assert_array_equal(*first.values(), *second.values())


PROGRAM = """
import json, sys
from clipcli.cli.main import run
code = run(sys.argv[1:])
heavy = {"torch", "PIL.Image", "ftfy", "regex", "transformers", "scipy"} & set(sys.modules)
print(json.dumps([code, sorted(heavy)]), file=sys.stderr)
"""


def test_a_run_that_knows_everything_imports_numpy_alone(model: Path, photos: Path) -> None:
    def run() -> tuple[bytes, Any]:
        command = [sys.executable, "-c", PROGRAM, "classify", *pictures, *LABELS, "-m", model, "-d", "cpu"]
        done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONWARNINGS": ""})
        return done.stdout, json.loads(done.stderr.splitlines()[-1])

    pictures = [photos / name for name in ("coffee.png", "rocket.jpg")]
    rows, (code, heavy) = run()
    assert (code, "torch" in heavy, "PIL.Image" in heavy) == (0, True, True)
    assert run() == (rows, [0, []])


def test_several_processes_at_once(model: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "clipcli", "classify", photos, *LABELS, "-m", model, "-f", "jsonl", "-q"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    told = [run.communicate(timeout=150) for run in runs]
    rows = [list(read_rows(io.BytesIO(out))) for out, _ in told]
    for own in rows:  # one may have what another encoded, in other company
        assert [(row.path, row.label) for row in own] == [(row.path, row.label) for row in rows[0]] and len(own) == 6
        scores = [[row.score for row in some if row.score is not None] for some in (own, rows[0])]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert [err for _, err in told] == [b""] * 3
    assert [run.returncode for run in runs] == [3] * 3


# ---- when the device can't do it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:123] . DefaultCPUAllocator: can't allocate memory: 1 GB"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_a_batch_too_large_for_the_memory_is_halved(
    opened: Model, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    expected = vectors(embed([photos], load_model(opened.checkpoint.path, device="cpu")))
    begin, sizes = Tower.begin, []

    def short(self: Tower, pixels: NDArray[np.uint8]) -> Pending:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise error
        return begin(self, pixels)

    monkeypatch.setattr(Tower, "begin", short)
    found = vectors(embed([photos], opened, EmbedOptions(batch_size=5)))
    assert sizes == [5, 2, 2, 1]
    assert [r.getMessage() for r in caplog.records] == ["not enough memory for 5 pictures at once: going on with 2"]
    for path, vector in expected.items():
        np.testing.assert_allclose(found[path], vector, atol=1e-6)


def test_no_memory_for_one_picture_ends_the_run_in_a_line(
    cli: Run, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Tower, "begin", full)
    done = cli("classify", photos, *LABELS, "-m", model)
    assert done.code == 1
    assert "not enough memory for one picture" in done.err and "Traceback" not in done.err


def test_another_runtime_error_is_not_hidden(opened: Model, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Tower, "begin", bug)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(embed([photos / "coffee.png"], opened))


@pytest.mark.parametrize("mended", [True, False])
def test_what_half_precision_can_not_hold_is_tried_in_fp32(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    import torch

    begin, dtypes = Tower.begin, []

    def overflowing(self: Tower, pixels: NDArray[np.uint8]) -> Pending:
        dtypes.append((self.dtype, len(pixels)))
        found = begin(self, pixels)()
        if self.dtype is torch.bfloat16 or not mended:
            found[0] = np.nan
        return lambda: found

    monkeypatch.setattr(Tower, "begin", overflowing)
    with Store(tmp_path / "s.sqlite") as store:
        opened = load_model(model, device="cpu", precision="bf16", store=store)
        rows = list(embed([photos / name for name in ("coffee.png", "rocket.jpg", "chelsea.png")], opened))
        assert dtypes == [(torch.bfloat16, 3), (torch.float32, 1)]
        assert [isinstance(row, Embedded) for row in rows] == [mended, True, True]
        if not mended:
            assert isinstance(rows[0], Failure) and rows[0].kind is FailureKind.MODEL
            again = list(embed([photos / "coffee.png"], opened))  # what failed isn't kept
            assert len(dtypes) == 4 and isinstance(again[0], Failure)


def test_it_is_public(opened: Model, photos: Path) -> None:
    (row,) = clipcli.embed(photos / "coffee.png", opened)
    assert isinstance(row, clipcli.Embedded)
