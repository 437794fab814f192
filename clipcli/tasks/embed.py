"""Pictures in, embeddings out, each from the store where it is known.

    inputs --find.walk--> sources --stream.batches--> pixels --encode_image--> embeddings
                                        |                                        |
                                        +--- store: by file, or by bytes --------+

A picture is known by its bytes, whatever its name; a file that hasn't changed isn't even read. A run that knows all
its pictures imports neither torch nor Pillow. `embed` yields a row for every input, in order; it neither prints nor
exits.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from clipcli.images.ahead import ahead
from clipcli.images.find import Walk
from clipcli.images.stages import Stages
from clipcli.images.stream import Batch, Decode, Prepared, batches, cpus, decoder, default_workers, make_prepare
from clipcli.output.embeddings import Embeddings
from clipcli.records import Embedded, Failure, FailureKind, Item, Source
from clipcli.store import keys
from clipcli.weights.model import Model, Vectors

if TYPE_CHECKING:
    from clipcli.images.transform import Crop, Pixels

POLICY = 2  # raise it when the same bytes become other pixels: embeddings of before are then never found again

_BURST = 2048  # embeddings that are passed on together

Input = str | os.PathLike[str] | Item


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How pictures are prepared, and how many at once."""

    pixels: Pixels = "auto"
    crop: Crop = "model"
    decode: Decode = "auto"
    batch_size: int | None = None  # None: chosen by device
    workers: int | None = None  # decoding threads; None: one a CPU
    flush_after: float | None = None  # seconds of silent input after which a partial batch goes through
    save_crop: Path | None = None  # a folder for what the model saw; nothing is recalled then
    stages: Stages = field(default_factory=Stages, compare=False)  # where the time goes

    @property
    def decoder(self) -> str:
        """What turns bytes into pixels, with versions."""
        return decoder(self.pixels, self.decode)

    def speed(self, model: Model) -> tuple[int, int]:
        """Batch size and decoding threads of a run: what was asked for, else what suits the device."""
        return self.batch_size or (128 if model.on_cuda else 16), self.workers or default_workers()


def embed(
    inputs: Input | Iterable[Input], model: Model, options: EmbedOptions | None = None
) -> Iterator[Embedded | Failure]:
    """The unit embedding of every picture: paths of pictures and folders, or `Source`s, or one of these.

    Rows of an embeddings file come out as they are. Raises EmbeddingsError where another model made the file.
    """
    return chain.from_iterable(embed_in_bursts(inputs, model, options or EmbedOptions()))


def embed_in_bursts(
    inputs: Input | Iterable[Input], model: Model, options: EmbedOptions
) -> Iterator[list[Embedded | Failure]]:
    """The same, those together that are ready together."""
    if isinstance(inputs, Embeddings):
        inputs.check_model(model)
    stages = options.stages
    stages.begin()
    memory = _Remembered(model, options) if model.store.path is not None else None
    live = options.flush_after is not None  # then no item may wait for the next
    chunks: Iterator[list[Item]] = _chunks(sources(inputs), 1 if live else _BURST)
    if memory and not live:
        memory.asked = True
        chunks = chain.from_iterable(memory.recall_all(some) if new else some for new, some in groupby(chunks, _is_new))
    is_ready = False

    def needs_nothing(chunk: list[Item]) -> bool:
        nonlocal is_ready
        kinds = set(map(type, chunk)) - {Failure}
        is_ready = is_ready if not kinds else kinds == {Embedded}
        return is_ready

    for ready, alike in groupby(chunks, needs_nothing):
        known = stages.awaited("known", alike)
        for burst in known if ready else _embed_sources(chain.from_iterable(alike), model, options, memory):
            with stages.timed("rows"):
                yield cast("list[Embedded | Failure]", burst)


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Some of the items at a time. One that brought its bytes waits for no other."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size or (isinstance(item, Source) and item.data is not None):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _is_new(chunk: list[Item]) -> bool:
    """Whether there are pictures in it, not rows of an embeddings file alone."""
    return Source in set(map(type, chunk))


def _embed_sources(
    items: Iterable[Item], model: Model, options: EmbedOptions, memory: _Remembered | None
) -> Iterator[list[Embedded | Failure]]:
    batch_size, workers = options.speed(model)
    options.stages.workers = workers
    size = model.config.vision.image_size
    stream = batches(
        items,
        make_prepare(model.config.preprocess, size, options.pixels, options.crop, memory, options.decode),
        batch_size=batch_size,
        workers=workers,
        flush_after=options.flush_after,
        turns=workers >= cpus() and not model.on_cuda and sys.platform != "darwin",  # a Mac's GPU may be the model's
        stages=options.stages,
    )
    begun: deque[tuple[Batch, Callable[[], Vectors]]] = deque()
    for batch in chain(stream, (None,)):
        if batch is not None and batch.items:
            if options.save_crop is not None:
                _save_crops(options.save_crop, batch)
            with options.stages.timed("model"):
                begun.append((batch, model.submit(batch.pixels) if len(batch.pixels) else _nothing))
        while len(begun) > (model.ahead if batch is not None and batch.items else 0):
            done, wait = begun.popleft()
            with options.stages.timed("model"):
                fresh = wait()
            options.stages.pictures += len(fresh)
            yield list(_embedded(done, fresh, model))


def sources(inputs: Input | Iterable[Input]) -> Iterator[Item]:
    """What the inputs mean: folders walked, everything else as it is."""
    several: Iterable[Input] = [inputs] if isinstance(inputs, str | os.PathLike | Item) else inputs
    for kind, some in groupby(several, type):
        if issubclass(kind, str | os.PathLike):
            yield from Walk(os.fspath(cast("str", one)) for one in some)  # one walk opens an archive once
        else:
            yield from cast("Iterable[Item]", some)


class _Remembered:
    """What the store knows of pictures (`stream.Memory`)."""

    def __init__(self, model: Model, options: EmbedOptions) -> None:
        self._store = model.store
        self._recalls = options.save_crop is None
        self.asked = False  # whether all files were asked for before they came here
        self._policy = f"{POLICY} {options.pixels} {options.crop} {options.decoder}"
        self._maker = (model.image_fingerprint, model.arithmetic)

    def recall_all(self, chunks: Iterable[list[Item]]) -> Iterator[list[Item]]:
        """The same items, those with their embeddings that are known by their files."""
        return ahead(map(self._recalled, chunks), 2)

    def _recalled(self, chunk: list[Item]) -> list[Item]:
        """One chunk of them: two queries for all."""
        files = [self.file(item) if isinstance(item, Source) else None for item in chunk]
        known = self._embeddings(list(filter(None, files)))
        return [
            Embedded(item.path, known[file][1]) if file in known else item
            for file, item in zip(files, chunk, strict=True)
        ]

    def _embeddings(self, files: Sequence[bytes]) -> dict[bytes, tuple[bytes, Vectors]]:
        """Keys and embeddings of files that haven't changed since they were last read."""
        digests = self._store.picture_digests(files) if self._recalls else {}
        wanted = {file: keys.embedding_key(digest, self._policy, *self._maker) for file, digest in digests.items()}
        found = self._store.embeddings(list(wanted.values()))
        return {file: (key, found[key]) for file, key in wanted.items() if key in found}

    def recall(self, file: bytes) -> Prepared | None:
        known = None if self.asked else self._embeddings([file]).get(file)
        return None if known is None else Prepared(embedding=known[1], key=known[0])

    def recognise(self, file: bytes | None, data: bytes) -> Prepared:
        digest = keys.picture_digest(data)
        key = keys.embedding_key(digest, self._policy, *self._maker)
        known = self._store.embeddings([key]).get(key) if self._recalls else None
        return Prepared(embedding=known, key=key, file=(file, digest) if file else None)

    def file(self, source: Source) -> bytes | None:
        if source.data is not None:
            return None
        try:
            return keys.file_key(source.path, "picture")
        except (OSError, ValueError):  # reading it will tell
            return None


def _save_crops(folder: Path, batch: Batch) -> None:
    from clipcli.images.crops import save_crop

    seen = (item.path for item in batch.items if isinstance(item, Source))
    for path, square in zip(seen, batch.pixels, strict=True):
        save_crop(folder, path, square)


def _nothing() -> Vectors:
    return np.empty((0, 0), np.float32)


def _embedded(batch: Batch, fresh: Vectors, model: Model) -> Iterator[Embedded | Failure]:
    """The rows of a batch whose pixels became `fresh`, which the store learns."""
    finite = [bool(np.isfinite(vector).all()) for vector in fresh]
    if model.store.path is not None:
        known = {key: row for key, row, good in zip(batch.keys, fresh, finite, strict=True) if good}
        model.store.keep_pictures(dict(batch.files), known, model.image_fingerprint)
    rows = iter(zip(fresh, finite, strict=True))
    for place, item in enumerate(batch.items):
        if not isinstance(item, Source):
            yield item
            continue
        vector, good = (batch.known[place], True) if place in batch.known else next(rows)
        if good:
            yield Embedded(item.path, vector)
        else:
            yield Failure(item.path, FailureKind.MODEL, "the image tower gave numbers that are not finite")
