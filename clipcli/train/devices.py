"""Which of several devices this process is: what `torchrun` tells, or the only one.

In: torchrun's environment variables. Out: a `Share`, and the name of the device to use; and what is true on any of
the devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from clipcli.errors import UsageError
from clipcli.model.device import place
from clipcli.train.feed import ALONE, Share

_PATIENCE = timedelta(hours=6)  # the others wait while the first reads what it evaluates on, and evaluates


@contextmanager
def joined(device: str = "auto") -> Iterator[tuple[Share, str]]:
    """Join the other processes of a `torchrun`, if there are any, for as long as this lasts. Raises UsageError."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield ALONE, device
        return
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        hint = "start it with torchrun, or unset WORLD_SIZE"
        raise UsageError(f"WORLD_SIZE is {world}, but {lacking[0]} is not set", hint=hint)
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not cuda and device not in ("auto", "cpu"):
        raise UsageError(f"several processes can't train on {device}", hint="use --device cuda or cpu")
    own = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(place(own, "fp32").device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:  # numbers that are none; nobody at the address
        raise UsageError(
            f"the processes don't find each other: {str(error).splitlines()[0]}", hint="start it with torchrun"
        ) from error
    try:
        yield Share(dist.get_rank(), dist.get_world_size()), own
    finally:
        dist.destroy_process_group()


def anywhere(holds: bool, share: Share) -> bool:
    """Whether it holds on any device. All of them must ask at the same point of the run."""
    if share.world == 1:
        return holds
    told = torch.tensor(int(holds), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)
