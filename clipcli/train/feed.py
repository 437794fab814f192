"""Pictures and words for each step, in an order that the seed alone decides.

In: the user's DATA and the settings. Out: for each step the canvases of this device's share of the batch, and what
is true of each. One pass over the data finds every pair; if all decoded pictures fit into memory they are kept
there and each epoch is a permutation of them, else every epoch reads the shards again in a new order, through a
shuffle buffer, and a picture that turns out to be broken gives its place to another. Device r of n takes every n-th
sample of the one global order, so that n devices see the very batches that one would.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import ClipcliError, PictureError, UsageError
from clipcli.images.budget import MAX_MEMORY, Budget
from clipcli.images.decode import open_picture
from clipcli.images.transform import transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Label, Source
from clipcli.tasks.pairs import Pair, at_most, read_pairs, shards
from clipcli.train.config import TrainConfig

Canvas = tuple[NDArray[np.uint8], float]  # [3, C, C], width / height
Decoded = tuple[Pair, Canvas | Failure | None]  # None: nobody wanted it any more
Progress = Callable[[int], None]  # pairs found so far

log = logging.getLogger("clipcli")

_HELD = 1 << 30  # bytes of undecoded pictures that are shuffled at once
_BLOCK = 4096  # kept canvases that are allocated together


@dataclass(frozen=True, eq=False)
class Samples:
    """One device's share of a batch: place i of the share is place rank + i * world of the global batch."""

    pairs: tuple[Pair, ...]
    canvas: NDArray[np.uint8]  # [b, 3, C, C]
    aspect: NDArray[np.float32]  # [b], width / height


@dataclass(frozen=True)
class Share:
    """Which of several devices this is."""

    rank: int = 0
    world: int = 1


ALONE = Share()


class Feed:
    """The data of a run. `find` comes first; the attributes tell what it met."""

    def __init__(
        self,
        data: Sequence[str],
        config: TrainConfig,
        *,
        image_size: int,
        words: Mapping[str, Label] | None = None,
        workers: int = 1,
        share: Share = ALONE,
        strict: bool = False,
    ) -> None:
        self.shards = shards(data)
        self.config = config
        self.size = config.canvas_size(image_size)
        self.share = share
        self.kept = True  # all pictures lie in memory
        self.pairs: list[Pair] = []  # without bytes
        self.failures: list[Failure] = []  # each once
        self.held: NDArray[np.int64] = np.empty(0, np.int64)  # pairs that only choose the best weights
        self.chosen: NDArray[np.int64] = np.empty(0, np.int64)  # pairs that are learned from
        self._met: set[Failure] = set()
        self._words = words or {}
        self._workers = workers
        self._strict = strict
        self._budget = Budget(MAX_MEMORY)
        self._starts: list[int] = []  # the first pair of each shard
        self._blocks: list[NDArray[np.uint8]] = []
        self._aspects: list[float] = []
        self._slots: list[int] = []  # where a pair's canvas is kept; -1: it can't be read

    @property
    def steps(self) -> int:
        """Steps in an epoch; what doesn't fill a batch waits for another epoch."""
        return len(self.chosen) // self.config.batch_size

    def find(self, progress: Progress | None = None) -> None:
        """Read all of the data once. Raises UsageError where there is nothing to learn from."""
        config = self.config
        for shard in self.shards:
            self._starts.append(len(self.pairs))
            for pair, canvas in self._canvases(self._read(shard), lambda: self.kept):
                self.pairs.append(replace(pair, source=Source(pair.source.path)))
                broken = self.kept and isinstance(canvas, Failure)  # what is read again is known to be broken then
                self._slots.append(-1 if broken else len(self._aspects))
                if isinstance(canvas, tuple) and self.kept:
                    self._keep(*canvas)
                if progress and not len(self.pairs) % 500:
                    progress(len(self.pairs))
        if progress:
            progress(len(self.pairs))
        if not self.pairs:
            raise UsageError(
                "no pair of a picture and words in the data", hint="see clipcli train --help for its forms"
            )
        if max(self._slots) < 0:
            raise UsageError(
                "none of the data's pictures can be read", hint=f"{self.failures[0].path}: {self.failures[0].message}"
            )
        every = at_most(self._by_label(), config.max_per_label or len(self.pairs), config.seed)
        order = np.random.default_rng((config.seed, 1)).permutation(np.asarray(every, np.int64))
        count = int(config.hold_out * len(order))
        self.held, self.chosen = np.sort(order[:count]), np.sort(order[count:])
        self._check()

    def epoch(self, number: int, skip: int = 0) -> Iterator[Samples]:
        """The steps of an epoch after the first `skip`."""
        size, world = self.config.batch_size, self.share.world
        rng = np.random.default_rng((self.config.seed, 2, number))
        mine = (skip * size + self.share.rank, self.steps * size, world)  # first, end, step
        if self.kept:
            return _batches(self._taken(rng.permutation(self.chosen)[slice(*mine)]), size // world)
        return _batches(self._canvases(islice(self._stream(rng), *mine)), size // world)

    def held_out(self, size: int) -> Iterator[Samples]:
        """The pictures that are not learned from, in batches."""
        if self.kept:
            return _batches(self._taken(self.held), size)
        wanted = set(self.held.tolist())
        pairs = (pair for shard in range(len(self.shards)) for i, pair in self._numbered(shard) if i in wanted)
        return _batches((item for item in self._canvases(pairs) if isinstance(item[1], tuple)), size)

    def _check(self) -> None:
        size, world = self.config.batch_size, self.share.world
        if size % world:
            raise UsageError(
                f"a batch of {size} can't be shared by {world} devices", hint=f"take a multiple of {world}"
            )
        if len(self.chosen) < size:
            raise UsageError(
                f"a batch of {size} is larger than the data: {len(self.chosen)} pairs to learn from",
                hint="give a smaller --batch-size, or more data",
            )
        words = {self.pairs[i].phrases for i in self.chosen}
        if len(words) < 2:
            raise UsageError(
                f"all pictures have the same words, {next(iter(words))[0]!r}",
                hint="there is nothing to tell apart: give two classes or captions at least",
            )

    def _by_label(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            if self._slots[index] >= 0:
                found.setdefault(pair.label or pair.phrases[0], []).append(index)
        return found

    def _read(self, shard: str) -> Iterator[Pair]:
        for item in read_pairs([shard], self._words):
            if isinstance(item, Failure):
                self._failed(item)
            else:
                yield item

    def _failed(self, failure: Failure) -> None:
        if self._strict:
            raise PictureError(f"{failure.path}: {failure.message}", hint="without --strict it would be left out")
        if failure in self._met:  # in an earlier epoch
            return
        self._met.add(failure)
        self.failures.append(failure)
        if len(self.chosen):  # the list was shown when all was found
            log.warning("left out: %s: %s", failure.path, failure.message)

    def _numbered(self, shard: int) -> Iterator[tuple[int, Pair]]:
        """A shard's pairs and their indices. Read again, it may not have changed."""
        start = self._starts[shard]
        end = self._starts[shard + 1] if shard + 1 < len(self._starts) else len(self.pairs)
        again = self._read(self.shards[shard])
        for index, (pair, known) in enumerate(zip_longest(again, islice(self.pairs, start, end)), start):
            if not (pair and known and (pair.source.path, pair.phrases) == (known.source.path, known.phrases)):
                hint = "--resume goes on from the last checkpoint where the data are as they were"
                raise ClipcliError(f"{self.shards[shard]}: changed while the training went on", hint=hint)
            yield index, pair

    def _stream(self, rng: np.random.Generator) -> Iterator[Pair]:
        """All chosen pairs, shard by shard in a random order, drawn from a buffer."""
        chosen = set(self.chosen.tolist())
        buffer: list[Pair] = []
        held = 0  # bytes that came with the pairs
        for shard in rng.permutation(len(self.shards)):
            for index, pair in self._numbered(int(shard)):
                if index not in chosen:
                    continue
                buffer.append(pair)
                held += len(pair.source.data or b"")
                while len(buffer) > self.config.shuffle_buffer or held > _HELD:
                    place = int(rng.integers(len(buffer)))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    held -= len(buffer[-1].source.data or b"")
                    yield buffer.pop()
        for place in rng.permutation(len(buffer)):
            yield buffer[place]

    def _taken(self, indices: NDArray[np.int64]) -> Iterator[Decoded]:
        """Kept pictures."""
        for index in indices:
            slot = self._slots[index]
            yield self.pairs[index], (self._blocks[slot // _BLOCK][slot % _BLOCK], self._aspects[slot])

    def _canvases(self, pairs: Iterator[Pair], wanted: Callable[[], bool] = lambda: True) -> Iterator[Decoded]:
        """Each pair with its canvas, in order, decoded by threads a little ahead as long as they are `wanted`."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="clipcli-train") as pool:
            ahead: deque[tuple[Pair, Future[Canvas | Failure | None]]] = deque()
            try:
                for pair in pairs:
                    ahead.append((pair, pool.submit(self._canvas, pair.source, wanted)))
                    if len(ahead) > 32 * self._workers:
                        yield self._done(*ahead.popleft())
                while ahead:
                    yield self._done(*ahead.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, pair: Pair, future: Future[Canvas | Failure | None]) -> Decoded:
        canvas = future.result()
        if isinstance(canvas, Failure):
            self._failed(canvas)
        return pair, canvas

    def _canvas(self, source: Source, wanted: Callable[[], bool]) -> Canvas | Failure | None:
        if not wanted():
            return None
        with self._budget.share() as take:
            picture = open_picture(source, take=take)
            if isinstance(picture, Failure):
                return picture
            try:
                return transform(picture, Preprocess(), self.size, crop="squash"), picture.width / picture.height
            except MemoryError:
                return Failure(source.path, FailureKind.TOO_LARGE, "not enough memory to resize it")

    def _keep(self, canvas: NDArray[np.uint8], aspect: float) -> None:
        number = len(self._aspects)
        most = int(self.config.keep_gb * 1e9 // canvas.nbytes)
        if number >= most:
            self.kept, self._blocks, self._aspects = False, [], []
            return
        if not number % _BLOCK:
            self._blocks.append(np.empty((min(_BLOCK, most - number), *canvas.shape), np.uint8))
        self._blocks[-1][number % _BLOCK] = canvas
        self._aspects.append(aspect)


def _batches(items: Iterator[Decoded], size: int) -> Iterator[Samples]:
    for first in items:
        yield _together([first, *islice(items, size - 1)])


def _together(items: Sequence[Decoded]) -> Samples:
    """A batch. A picture that can't be read gives its place to a neighbour, so that all others keep theirs."""
    good = [(pair, canvas) for pair, canvas in items if isinstance(canvas, tuple)]
    if not good:
        raise ClipcliError("none of a batch's pictures can be read", hint="look at the files of the data")
    full = [
        (pair, canvas) if isinstance(canvas, tuple) else good[i % len(good)] for i, (pair, canvas) in enumerate(items)
    ]
    return Samples(
        tuple(pair for pair, _ in full),
        np.stack([square for _, (square, _) in full]),
        np.asarray([aspect for _, (_, aspect) in full], np.float32),
    )
