"""From a stream of sources to batches of pixels, decoded by threads, in the order of the input.

    sources --feeder thread--> prepare(source) in the pool --> one queue, in order --> Batch --> the caller

In: any iterable of `Source | Failure` (it may block, as stdin does), and a function that prepares one picture.
Out: batches, lazily. Everything is bounded: the feeder takes a ticket before it pulls an item, and the ticket
comes back when the item's turn has come, so that at most `batch_size + workers` items are ahead of the batch in
the making. It knows no model and no file formats.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clipcli.images.budget import Budget, Take
from clipcli.images.decode import MAX_MEMORY, Pixels, open_picture
from clipcli.images.transform import Crop, transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Source

Item = Source | Failure
Square = npt.NDArray[np.uint8]  # [3, H, W]
Prepare = Callable[[Source], Square | Failure]
Entry = Future[tuple[Item, Square | None]]

FAILURES_PER_PICTURE = 3  # a batch may hold this many more items than pictures before it is closed


@dataclass(frozen=True, eq=False)
class Batch:
    """Items in input order, and the pixels of those that are Sources: row i belongs to the i-th of them.

    A Source that brought its own bytes has let them go (`data` is empty): they are not needed again.
    """

    items: tuple[Item, ...]
    pixels: npt.NDArray[np.uint8]  # [n, 3, H, W]


def default_workers() -> int:
    """Threads that decode: one for each CPU that this process may use, at most 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cpus))


def make_prepare(preprocess: Preprocess, size: int, pixels: Pixels = "auto", crop: Crop = "model") -> Prepare:
    """What `batches` does with a picture: open it, make it uint8 [3, size, size]. Many threads may call it.

    Big pictures take turns: together they have as much memory as the largest needs by itself.
    """
    budget = Budget(MAX_MEMORY)

    def prepare(source: Source) -> Square | Failure:
        with budget.share() as take:
            return prepared(source, take)  # when it returns, the picture is gone, and so its memory

    def prepared(source: Source, take: Take) -> Square | Failure:
        picture = open_picture(source, pixels, take)
        if isinstance(picture, Failure):
            return picture
        try:
            return transform(picture, preprocess, size, pixels=pixels, crop=crop)
        except MemoryError:
            return Failure(source.path, FailureKind.TOO_LARGE, "not enough memory to resize it")

    return prepare


def batches(
    sources: Iterable[Item],
    prepare: Prepare,
    *,
    batch_size: int,
    workers: int,
    flush_after: float | None = None,
) -> Iterator[Batch]:
    """Every item of `sources` once, in order, in batches of up to `batch_size` pictures.

    A batch closes when it is full, when failures have made it long, or at the end; with `flush_after` also when
    the input has been silent for so many seconds and all that came is decoded. Without it, the composition
    depends on the input alone. What `sources` or `prepare` raise is raised here, after the batch of what came
    before. Closing the iterator ends the threads, each after the picture it has in hand, and doesn't wait for
    them: a `sources` that blocks is left to its daemon thread.
    """
    feed = _Feed(sources, prepare, workers, batch_size + workers)
    making = _Making(batch_size)
    try:
        while True:
            try:
                entry = feed.next(flush_after if making.items else None)
            except queue.Empty:
                yield making.close()
                continue
            error = entry.exception() if entry else None  # waits until the picture is done
            if entry is None or error:
                if making.items:
                    yield making.close()
                if error:
                    raise error
                return
            making.add(*entry.result())
            if making.full():
                yield making.close()
    finally:
        feed.close()


class _Making:
    """The batch in the making: one block of memory that grows no further, filled picture by picture."""

    def __init__(self, batch_size: int) -> None:
        self.items: list[Item] = []
        self._size = batch_size
        self._count = 0
        self._shape: tuple[int, ...] = (3, 0, 0)
        self._block: npt.NDArray[np.uint8] | None = None

    def add(self, item: Item, square: Square | None) -> None:
        self.items.append(item)
        if square is not None:
            if self._block is None:
                self._shape = square.shape
                self._block = np.empty((self._size, *square.shape), np.uint8)
            self._block[self._count] = square
            self._count += 1

    def full(self) -> bool:
        return self._count == self._size or len(self.items) >= (1 + FAILURES_PER_PICTURE) * self._size

    def close(self) -> Batch:
        block = np.empty((0, *self._shape), np.uint8) if self._block is None else self._block
        batch = Batch(tuple(self.items), block[: self._count])
        self.items, self._count, self._block = [], 0, None
        return batch


class _Feed:
    """The threads: one pulls the sources, a pool prepares them; `next` hands out the results in order."""

    def __init__(self, sources: Iterable[Item], prepare: Prepare, workers: int, ahead: int) -> None:
        self._prepare = prepare
        self._tickets = threading.Semaphore(ahead)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()  # bounded by the tickets
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="clipcli-decode")
        self._closing = threading.Lock()
        self._closed = threading.Event()
        # A daemon: it may sit in a read of stdin that nobody can interrupt when the process wants to end.
        threading.Thread(target=self._pull, args=(sources,), name="clipcli-feed", daemon=True).start()

    def next(self, timeout: float | None) -> Entry | None:
        """The next item's future, None at the end. Raises queue.Empty after `timeout` seconds of silence."""
        entry = self._entries.get(timeout=timeout)
        self._tickets.release()
        return entry

    def close(self) -> None:
        with self._closing:
            self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._tickets.release()  # wakes the feeder, which then sees that it is over

    def _pull(self, sources: Iterable[Item]) -> None:
        try:
            iterator = iter(sources)
            while self._tickets.acquire() and not self._closed.is_set():
                item = next(iterator, None)
                if item is None:
                    break
                with self._closing:
                    if self._closed.is_set():
                        return
                    self._entries.put(self._entry(item))
            self._entries.put(None)
        except BaseException as error:  # not swallowed: the consumer raises it, in its place
            entry: Entry = Future()
            entry.set_exception(error)
            self._entries.put(entry)

    def _entry(self, item: Item) -> Entry:
        if isinstance(item, Source):
            return self._pool.submit(self._prepared, item)
        entry: Entry = Future()
        entry.set_result((item, None))
        return entry

    def _prepared(self, source: Source) -> tuple[Item, Square | None]:
        outcome = self._prepare(source)
        if isinstance(outcome, Failure):
            return outcome, None
        return (source if source.data is None else replace(source, data=b"")), outcome
