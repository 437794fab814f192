"""Pieces of work made by a thread while the caller is busy with those before.

In: any iterable, in which much time goes by outside Python (the system's calls, SQLite's). Out: the same pieces, in
order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def ahead(pieces: Iterable[T], count: int) -> Iterator[T]:
    """The same, up to `count` of them made before they are asked for; none before the first is.

    What `pieces` raises is raised here, in its place. Closing the iterator ends the thread after the piece it has in
    hand, and doesn't wait for it: it may sit in a read that nobody can interrupt.
    """
    iterator = iter(pieces)
    made: queue.SimpleQueue[Future[T] | None] = queue.SimpleQueue()  # bounded by the tickets
    tickets, is_over = threading.Semaphore(count), threading.Event()

    def make() -> None:
        while tickets.acquire() and not is_over.is_set():
            piece: Future[T] = Future()
            try:
                piece.set_result(next(iterator))
            except StopIteration:
                return made.put(None)
            except BaseException as error:  # not swallowed: the caller raises it, in its place
                piece.set_exception(error)
            made.put(piece)

    threading.Thread(target=make, name="clipcli-ahead", daemon=True).start()
    try:
        while piece := made.get():
            tickets.release()
            yield piece.result()
    finally:
        is_over.set()
        tickets.release()
