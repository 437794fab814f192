"""How much memory big pictures may take at once: they wait for each other, small ones for nobody.

In: what a picture is going to take, in bytes. Out: nothing but time. Pictures differ by a factor of a thousand, and
sixteen of the largest at once would be the end of most machines; one after the other they are harmless. It
measures nothing and refuses nothing: limits are `decode`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Take = Callable[[int], None]

BIG = 100_000_000  # bytes: what takes less is not counted


def unlimited(size: int) -> None:
    """For who has one picture in hand, and nobody beside him."""


class Budget:
    """So many bytes for all big pictures together; one that wants more gets them all, and is alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Take]:
        """One picture's part: the function waits until there is room; the block's end gives it back.

        Only the first big claim counts: two who hold something and want more would wait for each other for ever.
        """
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if held or size < BIG:
                return
            size = min(size, self._size)
            with self._changed:
                self._changed.wait_for(lambda: self._free >= size)
                self._free -= size
            held = size

        try:
            yield take
        finally:
            with self._changed:
                self._free += held
                self._changed.notify_all()
