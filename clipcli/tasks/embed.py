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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from clipcli.images.find import Walk
from clipcli.images.stream import Batch, Decode, Prepared, batches, cpus, decoder, default_workers, make_prepare
from clipcli.output.embeddings import Embeddings
from clipcli.records import Embedded, Failure, FailureKind, Item, Source
from clipcli.store import keys
from clipcli.weights.model import Model

if TYPE_CHECKING:
    from clipcli.images.transform import Crop, Pixels

POLICY = 2  # raise it when the same bytes become other pixels: embeddings of before are then never found again

_BURST = 1024  # embeddings that are passed on together

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
    is_ready = False

    def needs_nothing(item: Item) -> bool:
        nonlocal is_ready
        is_ready = is_ready if isinstance(item, Failure) else isinstance(item, Embedded)
        return is_ready

    for ready, items in groupby(sources(inputs), needs_nothing):
        if ready:
            while burst := list(islice(items, _BURST)):
                yield cast("list[Embedded | Failure]", burst)
        else:
            yield from _embed_sources(items, model, options)


def _embed_sources(items: Iterable[Item], model: Model, options: EmbedOptions) -> Iterator[list[Embedded | Failure]]:
    batch_size, workers = options.speed(model)
    memory = _Remembered(model, options) if model.store.path is not None else None
    size = model.config.vision.image_size
    stream = batches(
        items,
        make_prepare(model.config.preprocess, size, options.pixels, options.crop, memory, options.decode),
        batch_size=batch_size,
        workers=workers,
        flush_after=options.flush_after,
        turns=workers >= cpus() and not model.on_cuda and sys.platform != "darwin",  # a Mac's GPU may be the model's
    )
    for batch in stream:
        if options.save_crop is not None:
            _save_crops(options.save_crop, batch)
        yield list(_embed_batch(batch, model))


def sources(inputs: Input | Iterable[Input]) -> Iterator[Item]:
    """What the inputs mean: folders walked, everything else as it is."""
    several: Iterable[Input] = [inputs] if isinstance(inputs, str | os.PathLike | Item) else inputs
    for named, some in groupby(several, lambda one: isinstance(one, str | os.PathLike)):
        if named:
            yield from Walk(os.fspath(cast("str", one)) for one in some)  # one walk opens an archive once
        else:
            yield from cast("Iterable[Item]", some)


class _Remembered:
    """What the store knows of pictures (`stream.Memory`)."""

    def __init__(self, model: Model, options: EmbedOptions) -> None:
        self._store = model.store
        self._recalls = options.save_crop is None
        self._policy = f"{POLICY} {options.pixels} {options.crop} {options.decoder}"
        self._maker = (model.image_fingerprint, model.arithmetic)

    def recall(self, file: bytes) -> Prepared | None:
        digest = self._store.picture_digest(file) if self._recalls else None
        if digest is None:
            return None
        key = keys.embedding_key(digest, self._policy, *self._maker)
        embedding = self._store.embedding(key)
        return None if embedding is None else Prepared(embedding=embedding, key=key)

    def recognise(self, file: bytes | None, data: bytes) -> Prepared:
        digest = keys.picture_digest(data)
        key = keys.embedding_key(digest, self._policy, *self._maker)
        known = self._store.embedding(key) if self._recalls else None
        return Prepared(embedding=known, key=key, file=(file, digest) if file else None)

    def file(self, source: Source) -> bytes | None:
        if source.data is not None:
            return None
        try:
            return keys.file_key(Path(source.path), "picture")
        except (OSError, ValueError):  # reading it will tell
            return None


def _save_crops(folder: Path, batch: Batch) -> None:
    from clipcli.images.crops import save_crop

    seen = (item.path for item in batch.items if isinstance(item, Source))
    for path, square in zip(seen, batch.pixels, strict=True):
        save_crop(folder, path, square)


def _embed_batch(batch: Batch, model: Model) -> Iterator[Embedded | Failure]:
    fresh = model.encode_image(batch.pixels) if len(batch.pixels) else np.empty((0, 0), np.float32)
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
