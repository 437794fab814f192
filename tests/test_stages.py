"""Where a run's time went, as --verbose tells it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar, cast

import pytest
from conftest import Run

from clipcli.cli.stages import report
from clipcli.images.stages import Stages
from clipcli.store.database import Store
from clipcli.tasks.embed import EmbedOptions, embed
from clipcli.weights.model import Model, load_model


def test_stages_add_up_to_the_run(model: Path, photos: Path) -> None:
    opened, options = load_model(model, device="cpu"), EmbedOptions(batch_size=2, workers=2)
    began = time.perf_counter()
    for _ in embed([photos] * 3, opened, options):
        time.sleep(0.02)  # what is done with rows counts as theirs
    wall, stages = time.perf_counter() - began, options.stages
    assert set(stages.seconds) == {"input", "decoding", "model", "rows"}
    assert stages.seconds["rows"] >= 0.02 * 15
    assert 0.8 * wall <= sum(stages.seconds.values()) <= wall
    assert stages.pictures == 15 and stages.workers == 2
    assert 0 < stages.busy() <= 1


def test_a_second_run_with_the_same_options_is_measured_by_itself(model: Path, photos: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        opened, options = load_model(model, device="cpu", store=store), EmbedOptions()
        pictures = [photos / "coffee.png", photos / "rocket.jpg"]
        assert len(list(embed(pictures, opened, options))) == 2 == options.stages.pictures
        began = time.perf_counter()
        assert len(list(embed(pictures, opened, options))) == 2
        wall, stages = time.perf_counter() - began, options.stages
    assert set(stages.seconds) == {"known", "rows"} and stages.pictures == 0
    assert sum(stages.seconds.values()) <= wall


class _OnCuda:
    on_cuda = True
    busy: ClassVar = {"transfer": 1.0, "forward": 8.0}


class _OnCpu:
    on_cuda = False
    arithmetic = "torch-fp32"
    busy: ClassVar[dict[str, float]] = {}


@pytest.mark.parametrize(
    ("model", "largest", "decode", "advice"),
    [
        (_OnCuda(), "model", "auto", "--batch-size"),
        (_OnCpu(), "model", "auto", "--precision int8"),
        (_OnCpu(), "decoding", "exact", "--decode exact"),
        (_OnCpu(), "input", "auto", "lists the pictures"),
        (_OnCpu(), "known", "auto", "clipcli embed"),
        (_OnCpu(), "rows", "auto", "writing"),
    ],
)
def test_the_largest_stage_is_advised_on(model: object, largest: str, decode: str, advice: str) -> None:
    options = EmbedOptions(decode=decode)  # type: ignore[arg-type]
    stages = Stages(workers=2, decoders=10.0, pictures=100, began=time.perf_counter() - 10)
    stages.seconds.update({"input": 0.5, "decoding": 0.5, "model": 0.5, "rows": 0.5})  # type: ignore[arg-type]
    stages.seconds[largest] = 8  # type: ignore[index]
    object.__setattr__(options, "stages", stages)
    first, threads, *device, last = report(options, cast("Model", model))
    assert first.startswith("stages: ") and "80%" in first.split(",")[0]
    assert threads.startswith("2 decoding threads 50% busy")
    assert device == (["device: transfer 10% busy, forward 80% busy"] if model.on_cuda else [])  # type: ignore[attr-defined]
    assert advice in last


def test_verbose_ends_with_it(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    for command in (
        ("classify", photos, "-L", "cat", "-L", "dog", "-m", model, "--no-cache"),
        ("embed", photos, "-m", model, "-o", tmp_path / "a.npz", "--no-cache"),
    ):
        assert "stages:" not in cli(*command).err
        lines = cli(*command, "-v", *(["--force"] if command[0] == "embed" else [])).err.splitlines()
        place = next(i for i, line in enumerate(lines) if line.startswith("stages: "))
        assert "model" in lines[place] and "decoding thread" in lines[place + 1]


def test_nothing_to_tell_where_nothing_happened(cli: Run, model: Path, tmp_path: Path) -> None:
    assert "stages" not in cli("classify", tmp_path, "-L", "cat", "-L", "dog", "-m", model, "-v").err
