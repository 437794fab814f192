"""From a stream of sources to batches of pixels, decoded by threads, in the order of the input.

    sources --feeder thread--> prepare(source) in the pool --> one queue, in order --> Batch --> the caller

A picture that is known by its file or its bytes (`Memory`) brings its embedding along and is not decoded. Where the
caller needs the same cores, decoding and he take turns: beside a model that fills a CPU it makes both slower.

In: any iterable of `Item` (it may block, as stdin does), and a function that prepares one `Source`; what isn't one is
passed on in its place. Out: batches, lazily. Everything is bounded: the feeder takes a ticket before it pulls an item,
and the ticket comes back when the item's turn has come, so that at most `batch_size + workers` items are ahead of the
batch in the making; it also waits while the sources that are not decoded yet have brought many bytes along. It knows
no model and no file formats.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from clipcli.images.budget import MAX_MEMORY, Budget, Take
from clipcli.images.read import read_bytes
from clipcli.images.stages import Stages
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Item, Source

if TYPE_CHECKING:
    from clipcli.images.transform import Crop, Pixels

Square = npt.NDArray[np.uint8]  # [3, H, W]
Vector = npt.NDArray[np.float32]
Decode = Literal["auto", "exact"]

FAST = 1  # raise it when `fast` makes other pixels of the same picture
MAX_WAITING = 1 << 28  # bytes that came with sources, of archives say, before no further one is pulled
PER_PICTURE = 3  # a batch may hold this many more items than pictures to encode before it is closed


@dataclass(frozen=True, eq=False)
class Prepared:
    """A picture made ready: its pixels, or in their place the embedding that is known of it."""

    square: Square | None = None
    embedding: Vector | None = None
    key: bytes = b""  # of its embedding, where embeddings are kept
    file: tuple[bytes, bytes] | None = None  # keys of the file and its bytes' digest, where they are news


class Memory(Protocol):
    """What is remembered of pictures. Many threads may ask."""

    def file(self, source: Source) -> bytes | None:
        """The key of its file as it is now, to be asked for before it is read; None for bytes that came otherwise."""

    def recall(self, file: bytes) -> Prepared | None:
        """The embedding of a file that hasn't changed since it was last read."""

    def recognise(self, file: bytes | None, data: bytes) -> Prepared:
        """The embedding under the digest of these bytes, if it is known; else the key that it will have."""


Prepare = Callable[[Source], "Prepared | Failure"]
Entry = Future[tuple[Item, Prepared | None]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Items in input order. Of the Sources, those in `known` have their embedding; the others are rows of `pixels`.

    A Source that brought its own bytes has let them go (`data` is empty): they are not needed again.
    """

    items: tuple[Item, ...]
    known: dict[int, Vector]  # by the item's place
    pixels: npt.NDArray[np.uint8]  # [n, 3, H, W], in the order of the items
    keys: tuple[bytes, ...]  # of the embeddings of `pixels`
    files: tuple[tuple[bytes, bytes], ...]  # what is to be remembered of files


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Threads that decode: one for each CPU, at most 16."""
    return min(16, cpus())


def decoder(pixels: Pixels, decode: Decode) -> str:
    """What turns bytes into pixels here, with versions. `reference` is always exact."""
    import PIL  # its name and version alone: importlib.metadata takes ten times as long, and a known picture no decoder

    used = [f"pillow {PIL.__version__}"]
    if decode == "auto" and pixels == "auto":
        with suppress(ImportError):
            import simplejpeg

            used.append(f"simplejpeg {simplejpeg.__version__}")
        used.append(f"fast {FAST}")
    return ", ".join(used)


def make_prepare(
    preprocess: Preprocess,
    size: int,
    pixels: Pixels = "auto",
    crop: Crop = "model",
    memory: Memory | None = None,
    decode: Decode = "exact",
) -> Prepare:
    """What `batches` does with a picture: open it, make it uint8 [3, size, size]. Many threads may call it.

    Big pictures take turns: together they have as much memory as the largest needs by itself. Pillow is imported
    with the first picture that `memory` doesn't know.
    """
    budget = Budget(MAX_MEMORY)

    def prepare(source: Source) -> Prepared | Failure:
        file = memory.file(source) if memory else None
        found = memory.recall(file) if memory and file else None
        if found is not None:
            return found
        with budget.share() as take:
            return prepared(source, file, take)  # when it returns, the picture is gone, and so its memory

    def prepared(source: Source, file: bytes | None, take: Take) -> Prepared | Failure:
        data = read_bytes(source, take)
        if isinstance(data, Failure):
            return data
        found = memory.recognise(file, data) if memory else Prepared()
        if found.embedding is not None:
            return found
        try:
            square = convert(source.path, data, take)
        except MemoryError:
            return Failure(source.path, FailureKind.TOO_LARGE, "not enough memory to resize it")
        return square if isinstance(square, Failure) else replace(found, square=square)

    def convert(path: str, data: bytes, take: Take) -> Square | Failure:
        if decode == "auto" and pixels == "auto":
            from clipcli.images.fast import fast_square

            return fast_square(path, data, preprocess, size, crop, take)
        from clipcli.images import decode as decoding
        from clipcli.images.transform import transform

        found = decoding.decode(path, data, pixels, take)
        return found if isinstance(found, Failure) else transform(found, preprocess, size, pixels=pixels, crop=crop)

    return prepare


def batches(
    sources: Iterable[Item],
    prepare: Prepare,
    *,
    batch_size: int,
    workers: int,
    flush_after: float | None = None,
    turns: bool = False,
    stages: Stages | None = None,
) -> Iterator[Batch]:
    """Every item of `sources` once, in order, in batches of up to `batch_size` pictures.

    A batch closes when it is full, when failures have made it long, or at the end; with `flush_after` also when
    the input has been silent for so many seconds and all that came is decoded. Without it, the composition
    depends on the input alone; an empty batch tells that the silence goes on. With `turns` no picture is begun while
    the caller works on pixels; `stages` learns who waits for whom. What `sources` or `prepare` raise is raised here,
    after the batch of what came before. Closing the iterator ends the threads, each after the picture it has in hand,
    and doesn't wait for them: a `sources` that blocks is left to its daemon thread.
    """
    feed = _Feed(sources, prepare, workers, batch_size + workers, stages or Stages(workers))
    try:
        for batch in _fill(feed, batch_size, flush_after):
            if turns and len(batch.pixels):
                feed.turn.clear()
            yield batch
            feed.turn.set()
    finally:
        feed.close()


def _fill(feed: _Feed, batch_size: int, flush_after: float | None) -> Iterator[Batch]:
    making = _Making(batch_size)
    told = True  # whether the caller knows of the silence
    while True:
        try:
            with feed.stages.timed("input"):
                entry = feed.next(None if told else flush_after)
        except queue.Empty:
            told = not making.items
            yield making.close()
            continue
        told = False
        with feed.stages.timed("decoding"):
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


class _Making:
    """The batch in the making: one block of memory that grows no further, filled picture by picture."""

    def __init__(self, batch_size: int) -> None:
        self._size = batch_size
        self._shape: tuple[int, ...] = (3, 0, 0)
        self._begin()

    def _begin(self) -> None:
        self.items: list[Item] = []
        self._known: dict[int, Vector] = {}
        self._keys: list[bytes] = []
        self._files: list[tuple[bytes, bytes]] = []
        self._block: npt.NDArray[np.uint8] | None = None

    def add(self, item: Item, prepared: Prepared | None) -> None:
        if prepared is not None:
            if prepared.file is not None:
                self._files.append(prepared.file)
            if prepared.embedding is not None:
                self._known[len(self.items)] = prepared.embedding
            elif prepared.square is not None:
                if self._block is None:
                    self._shape = prepared.square.shape
                    self._block = np.empty((self._size, *self._shape), np.uint8)
                self._block[len(self._keys)] = prepared.square
                self._keys.append(prepared.key)
        self.items.append(item)

    def full(self) -> bool:
        return len(self._keys) == self._size or len(self.items) >= (1 + PER_PICTURE) * self._size

    def close(self) -> Batch:
        block = np.empty((0, *self._shape), np.uint8) if self._block is None else self._block
        batch = Batch(tuple(self.items), self._known, block[: len(self._keys)], tuple(self._keys), tuple(self._files))
        self._begin()
        return batch


class _Feed:
    """The threads: one pulls the sources, a pool prepares them; `next` hands out the results in order."""

    def __init__(self, sources: Iterable[Item], prepare: Prepare, workers: int, ahead: int, stages: Stages) -> None:
        self._prepare = prepare
        self.stages = stages
        self._tickets = threading.Semaphore(ahead)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()  # bounded by the tickets
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="clipcli-decode")
        self._waiting = 0  # bytes of sources that are not decoded yet
        self._decoded = threading.Condition()
        self.turn = threading.Event()  # cleared while no picture is to be begun
        self.turn.set()
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
        self.turn.set()
        self._tickets.release()  # wakes the feeder, which then sees that it is over
        self._wait_less(0)

    def _pull(self, sources: Iterable[Item]) -> None:
        try:
            iterator = iter(sources)
            while self._tickets.acquire() and not self._closed.is_set():
                with self._decoded:
                    self._decoded.wait_for(lambda: self._waiting < MAX_WAITING or self._closed.is_set())
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
            self._wait_less(-len(item.data or b""))
            return self._pool.submit(self._prepared, item)
        entry: Entry = Future()
        entry.set_result((item, None))
        return entry

    def _prepared(self, source: Source) -> tuple[Item, Prepared | None]:
        self.turn.wait()
        began = time.perf_counter()
        try:
            outcome = self._prepare(source)
        finally:
            self.stages.decoded(time.perf_counter() - began)
            self._wait_less(len(source.data or b""))
        if isinstance(outcome, Failure):
            return outcome, None
        return (source if source.data is None else replace(source, data=b"")), outcome

    def _wait_less(self, size: int) -> None:
        """So many bytes are waiting no more, or the end has come."""
        with self._decoded:
            self._waiting -= size
            self._decoded.notify_all()
