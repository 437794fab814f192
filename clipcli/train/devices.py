"""Which of several devices this process is: what `torchrun` tells, or the only one.

In: torchrun's environment variables. Out: a `Share`, and the name of the device to use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from clipcli.errors import UsageError
from clipcli.train.feed import ALONE, Share


@contextmanager
def joined(device: str = "auto") -> Iterator[tuple[Share, str]]:
    """Join the other processes of a `torchrun`, if there are any, for as long as this lasts. Raises UsageError."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, device
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not cuda and device not in ("auto", "cpu"):
        raise UsageError(f"several processes can't train on {device}", hint="use --device cuda or cpu")
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size()), own
    finally:
        dist.destroy_process_group()
