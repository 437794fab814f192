"""The image tower in torch: on the CPU, a Mac's GPU, or every CUDA device that is wanted.

uint8 pictures go in, unit embeddings come out. `submit` begins a batch and hands back what waits for its end: on CUDA
the copy to the device, on a stream of its own, and the forward pass go on meanwhile, and batches take turns among the
devices; elsewhere the batch is done when `submit` returns. Knows no files beyond the checkpoint it was given.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipcli.errors import ModelError
from clipcli.model.clip import build_image_tower
from clipcli.model.config import Preprocess
from clipcli.model.device import Placement
from clipcli.model.fast import fast

if TYPE_CHECKING:
    from clipcli.weights.load import Checkpoint

log = logging.getLogger("clipcli")

Vectors = NDArray[np.float32]
Pending = Callable[[], Vectors]  # waits for a batch


class TorchImages:
    """A checkpoint's image tower at work. With `reference` it is the readable one, not what was derived from it."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, reference: bool = False) -> None:
        self.checkpoint = checkpoint
        self.placement = placement
        self.reference = reference
        self._most = sys.maxsize  # pictures in a batch, once memory was short
        self._turn = 0

    @property
    def busy(self) -> dict[str, float]:
        """Seconds for which CUDA devices copied and computed, all together."""
        transfer = sum(place.seconds[0] for place in self._towers)
        return {"transfer": transfer, "forward": sum(place.seconds[1] for place in self._towers)}

    def submit(self, pixels: NDArray[np.uint8]) -> Pending:
        """Begin pictures [B, 3, size, size] (uint8, RGB); what comes back waits for unit rows [B, embed_dim] (fp32).

        Where the device's memory is too small for the batch, it goes through in halves, and later ones as well.
        Pictures whose embedding isn't finite in half precision are encoded again in fp32; what still isn't finite
        comes back so. Raises ModelError where there is no memory for a single picture.
        """
        size = min(len(pixels), self._most)
        place = self._towers[self._turn % len(self._towers)]
        self._turn += 1
        try:
            begun = [place.begin(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        except (RuntimeError, MemoryError) as error:
            self._halve(size, error)
            return self.submit(pixels)

        def wait() -> Vectors:
            try:
                vectors = np.concatenate([part() for part in begun])
            except (RuntimeError, MemoryError) as error:
                self._halve(size, error)
                return self.submit(pixels)()
            wrong = ~np.isfinite(vectors).all(axis=1)
            if wrong.any() and self.placement.precision != "fp32":
                vectors[wrong] = self._exact_tower.begin(pixels[wrong])()
            return vectors

        return wait

    def _halve(self, size: int, error: Exception) -> None:
        """Let no batch be larger than half of `size` from now on. Raises ModelError where it was one picture."""
        if not is_out_of_memory(error):
            raise error
        if size > self._most:  # begun before it was known
            return
        if size == 1:
            hint = "use --device cpu, or a smaller model"
            raise ModelError(f"{self.checkpoint.name}: not enough memory for one picture", hint=hint) from error
        self._most = size // 2
        log.warning("not enough memory for %d pictures at once: going on with %d", size, self._most)
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _towers(self) -> list[Tower]:
        return [self._tower(device, self.placement.dtype) for device in self.placement.devices]

    @cached_property
    def _exact_tower(self) -> Tower:
        """In fp32, for pictures that half precision can't hold."""
        return self._tower(self.placement.device, torch.float32)

    def _tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        plain = build_image_tower(self.checkpoint.config, self.checkpoint.tower("image"))
        packed = (device.type, dtype) == ("cpu", torch.float32)
        usual = self.reference or device.type == "mps"  # where the fast form was never tried
        tower: nn.Module = plain if usual else fast(plain, pack=packed)
        if usual or not packed:
            tower.to(device, dtype)
        return Tower(tower, device, dtype, self.checkpoint.config.preprocess)


class Tower:
    """One device's copy of the tower, with what makes numbers of pixels."""

    def __init__(self, tower: nn.Module, device: torch.device, dtype: torch.dtype, preprocess: Preprocess) -> None:
        self.tower, self._device, self.dtype = tower, device, dtype
        mean, std = preprocess.mean, preprocess.std
        self._mean, self._std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
        self.seconds = (0.0, 0.0)  # of copies and of forward passes, on CUDA
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, pixels: NDArray[np.uint8]) -> Pending:
        """Begin one batch; errors of the device may come when it is waited for."""
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self._copies is None:
                found: Vectors = self._forward(torch.from_numpy(pixels).to(self._device)).cpu().numpy()
                return lambda: found
            return self._begin_on_cuda(torch.from_numpy(pixels), self._copies)

    def _begin_on_cuda(self, pixels: Tensor, copies: torch.cuda.Stream) -> Pending:
        """The pictures travel from pinned memory, on a stream of their own, while the batch before is computed."""
        computing = torch.cuda.current_stream(self._device)
        begun, moved, started, done = (torch.cuda.Event(enable_timing=True) for _ in range(4))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(copies):
            begun.record(copies)
            there = pixels.pin_memory().to(self._device, non_blocking=True)
            moved.record(copies)
        computing.wait_event(moved)
        there.record_stream(computing)  # its memory isn't given to the next batch before it is read
        with torch.cuda.device(self._device):
            started.record(computing)
            host = self._forward(there).to("cpu", non_blocking=True)
            done.record(computing)

        def wait() -> Vectors:
            done.synchronize()
            transfer, forward = self.seconds
            self.seconds = (transfer + begun.elapsed_time(moved) / 1e3, forward + started.elapsed_time(done) / 1e3)
            vectors: Vectors = host.numpy()
            return vectors

        return wait

    def _forward(self, pixels: Tensor) -> Tensor:
        normalised = pixels.float().div_(255).sub_(self._mean).div_(self._std)
        return unit(self.tower(normalised.to(self.dtype)))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in fp32."""
    x = x.float()
    rows: Tensor = x / x.norm(dim=1, keepdim=True)
    return rows


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what CUDA, MPS or the CPU's allocator mean; only CUDA has a class of its own for it."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
