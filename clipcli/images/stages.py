"""Where the time of a run goes: what the thread that hands out rows was doing, and how busy the decoding threads were.

Stages add up to the whole run: waiting for the input to name a picture, waiting for decoding, the model, fetching
embeddings that are known, the rows (scoring and writing). Nothing is printed here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Stage = Literal["input", "decoding", "model", "known", "rows"]
T = TypeVar("T")


@dataclass
class Stages:
    """Seconds, by stage; `decoders` those of all decoding threads together."""

    workers: int = 0
    decoders: float = 0.0
    seconds: Counter[Stage] = field(default_factory=Counter)
    pictures: int = 0  # that the model encoded
    began: float = field(default_factory=time.perf_counter)
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """A run begins; what was measured before is forgotten."""
        self.workers, self.decoders, self.pictures, self.began = 0, 0.0, 0, time.perf_counter()
        self.seconds.clear()

    def awaited(self, stage: Stage, things: Iterable[T]) -> Iterator[T]:
        """The same; waiting for the next one belongs to `stage`."""
        iterator = iter(things)
        while True:
            try:
                with self.timed(stage):
                    thing = next(iterator)
            except StopIteration:
                return
            yield thing

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """What happens inside belongs to `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began  # type: ignore[assignment]

    def decoded(self, seconds: float) -> None:
        """A decoding thread was busy for so long."""
        with self._adding:
            self.decoders += seconds

    @property
    def wall(self) -> float:
        """Seconds since the run began."""
        return max(time.perf_counter() - self.began, 1e-9)

    def shares(self) -> dict[Stage, float]:
        """The part of the run that each stage took so far, the largest first."""
        return {stage: seconds / self.wall for stage, seconds in self.seconds.most_common()}

    def busy(self) -> float:
        """The part of their time for which the decoding threads worked."""
        return self.decoders / max(self.workers * self.wall, 1e-9)
