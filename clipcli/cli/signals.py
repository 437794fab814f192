"""How a run ends early: Ctrl-C, SIGTERM and SIGHUP stop it in an orderly way, a second of them at once.

The first is raised as KeyboardInterrupt wherever the run stands, so that it can say what is finished; the exit code
then is 128 + its number. What the caller told us to ignore (`nohup`, a script's `&`) stays ignored.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def heeded() -> list[int]:
    """The signals that end a run, but for those that the caller told us to ignore."""
    return [number for number in _STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def orderly_stop() -> Iterator[None]:
    """While this lasts, the first signal unwinds the run and ends it with its code."""
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if came:  # threads may be waiting for a disk that is gone
            os._exit(128 + number)
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in heeded()}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + (came or [signal.SIGINT])[0]) from None
    finally:
        for number, handler in before.items():
            if not came:  # else the second one still has to work
                signal.signal(number, handler)
