"""The image tower in torch: batches in flight, devices that take turns, memory that is short."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray

from clipcli.model.device import Placement
from clipcli.records import Embedded, Source
from clipcli.tasks.embed import EmbedOptions, embed_in_bursts
from clipcli.weights.load import load_checkpoint
from clipcli.weights.model import Model, load_model
from clipcli.weights.torch_images import Pending, TorchImages, Tower

CPU = torch.device("cpu")


def some(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def test_devices_take_turns_and_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(tiny.save(tmp_path))
    several = TorchImages(checkpoint, Placement(CPU, "fp32", others=(CPU, CPU)))
    begin, used = Tower.begin, []

    def watched(self: Tower, pixels: NDArray[np.uint8]) -> Pending:
        used.append(id(self))
        return begin(self, pixels)

    monkeypatch.setattr(Tower, "begin", watched)
    batches = [some(2, seed) for seed in range(6)]
    begun = [several.submit(batch) for batch in batches]
    assert used[:3] == used[3:] and len(set(used)) == 3
    alone = TorchImages(checkpoint, Placement(CPU, "fp32"))
    for batch, wait in zip(batches, begun, strict=True):
        np.testing.assert_array_equal(wait(), alone.submit(batch)())


def test_memory_that_runs_out_while_a_batch_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = TorchImages(load_checkpoint(tiny.save(tmp_path)), Placement(CPU, "fp32"))
    expected = images.submit(some(5))()
    begin, sizes = Tower.begin, []

    def late(self: Tower, pixels: NDArray[np.uint8]) -> Pending:
        sizes.append(len(pixels))
        wait = begin(self, pixels)

        def fails() -> NDArray[np.float32]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

        return fails if len(pixels) > 2 else wait

    monkeypatch.setattr(Tower, "begin", late)
    first, second = images.submit(some(5)), images.submit(some(5))
    np.testing.assert_allclose(first(), expected, atol=1e-6)
    np.testing.assert_allclose(second(), expected, atol=1e-6)  # begun before anybody knew
    assert sizes == [5, 5, 2, 2, 1, 2, 2, 1]


class InFlight:
    """A model's encoder that finishes nothing by itself, as a GPU's does."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
        self.begun = self.waited = self.most = 0
        encode = model.submit

        def submit(pixels: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
            wait = encode(pixels)
            self.begun += 1
            self.most = max(self.most, self.begun - self.waited)

            def awaited() -> NDArray[np.float32]:
                self.waited += 1
                return wait()

            return awaited

        monkeypatch.setattr(model, "submit", submit)
        monkeypatch.setattr(Model, "ahead", property(lambda _: ahead))


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_rows_keep_their_order_with_batches_in_flight(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    opened = load_model(model, device="cpu")
    options = EmbedOptions(batch_size=1)
    expected = [row for burst in embed_in_bursts(photos, opened, options) for row in burst]
    flight = InFlight(opened, monkeypatch, ahead)
    found = [row for burst in embed_in_bursts(photos, opened, options) for row in burst]
    assert [row.path for row in found] == [row.path for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Embedded) and isinstance(other, Embedded):
            np.testing.assert_array_equal(one.vector, other.vector)
    assert flight.begun == flight.waited == 5 and flight.most == min(ahead, 4) + 1


def test_no_row_waits_for_an_input_that_pauses(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_model(model, device="cpu")
    InFlight(opened, monkeypatch, 4)
    seen = threading.Event()

    def pausing() -> Iterator[Source]:
        yield Source(str(photos / "coffee.png"))
        assert seen.wait(60), "the first row didn't come before the second input"
        yield Source(str(photos / "rocket.jpg"))

    rows = (
        row
        for burst in embed_in_bursts(pausing(), opened, EmbedOptions(batch_size=1, flush_after=0.05))
        for row in burst
    )
    next(rows)
    seen.set()
    assert len(list(rows)) == 1


def test_one_cuda_device_alone_where_it_is_named() -> None:
    place = Placement(torch.device("cuda", 1), "fp16")
    assert place.devices == (torch.device("cuda", 1),)
    assert replace(place, others=(CPU,)).devices == (torch.device("cuda", 1), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_batches_in_flight_on_cuda(tmp_path: Path, vision: str) -> None:
    config = getattr(tiny, vision)()
    size = config.vision.image_size
    path = tiny.save(tmp_path, config=config)
    batches = [np.random.default_rng(i).integers(0, 256, (7, 3, size, size), dtype=np.uint8) for i in range(8)]
    cpu, cuda = load_model(path, device="cpu"), load_model(path, device="cuda", precision="fp32")
    assert cuda.ahead == 2 * torch.cuda.device_count()
    begun = [cuda.submit(batch) for batch in batches]
    for batch, wait in zip(batches, begun, strict=True):
        assert np.abs(wait() - cpu.encode_image(batch)).max() <= 1e-5
    assert cuda.busy["transfer"] > 0 and cuda.busy["forward"] > 0
