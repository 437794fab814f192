"""Where a tower runs and in which arithmetic: choose, name, explain.

| device | `auto` precision | why |
|-|-|-|
| cuda, compute capability ≥ 7.0 | fp16 | tensor cores; nearer to fp32 than bf16 |
| cuda, older | fp32 | half precision is slow there |
| mps | fp32 | half precision gave NaN (openai/CLIP#337) |
| cpu | fp32 | bf16 is 10 x slower on most |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from clipcli.errors import UsageError

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Runtime = Literal["auto", "torch", "onnx"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """A device and an arithmetic, both decided."""

    device: torch.device  # the first, where there are several
    precision: str
    others: tuple[torch.device, ...] = ()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that the image tower runs on."""
        return (self.device, *self.others)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.precision]

    def __str__(self) -> str:
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        more = f" and {len(self.others)} more" if self.others else ""
        return f"{self.device}{name}{more}, {self.precision}"


def place(device: str = "auto", precision: Precision = "auto") -> Placement:
    """Decide where and how to compute. `device`: auto, cpu, mps, cuda (all there are), or cuda:N. Raises UsageError."""
    chosen = _device(device)
    others = tuple(torch.device("cuda", i) for i in range(1, torch.cuda.device_count())) if chosen.index is None else ()
    if precision == "auto":
        fast_half = chosen.type == "cuda" and torch.cuda.get_device_capability(chosen) >= (7, 0)
        precision = "fp16" if fast_half else "fp32"
    return Placement(chosen, precision, others if chosen.type == "cuda" else ())


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UsageError(f'unknown device "{name}"', hint="one of auto, cpu, cuda, cuda:N, mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        hint = f"cuda:0 to cuda:{count - 1} are there" if count else "the torch that is installed sees no CUDA device"
        raise UsageError(f'device "{name}" is not there', hint=hint)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError('device "mps" is not there', hint="use --device cpu")
    return device
