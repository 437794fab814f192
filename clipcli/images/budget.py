"""How much memory big pictures may take at once: they wait for each other, small ones for nobody.

In: what a picture is going to take, in bytes. Out: nothing but time. Pictures differ by a factor of a thousand, and
sixteen of the largest at once would be the end of most machines; one after the other they are harmless. It
measures nothing and refuses nothing: limits are `decode`'s.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

Take = Callable[[int], None]

MAX_PIXELS = 250_000_000  # 1 GB once decoded, whatever the mode; the largest telephones' cameras have 200 million
MAX_MEMORY = 8 * MAX_PIXELS  # a picture takes 4 bytes a pixel at most, and as much again when it is converted
BIG = 100_000_000  # bytes: what takes less is not counted


def unlimited(size: int) -> None:
    """For who has one picture in hand, and nobody beside him."""


class Budget:
    """So many bytes for all big pictures together; one that wants more gets them all, and is alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._returned = 0  # bytes, since memory was last handed back to the system
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
            if held:
                self._give_back(held)

    def _give_back(self, size: int) -> None:
        with self._changed:
            self._returned += size
            if self._returned >= self._size:
                _trim()(0)
                self._returned = 0
            self._free += size
            self._changed.notify_all()


@cache
def _trim() -> Callable[[int], object]:
    """What makes glibc hand freed memory back: else each thread keeps as much as its largest picture took."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, without this habit
        return lambda _: None
    return trim
