"""Zero-shot accuracy while a model is in training: on held-out pictures and on sets of the user's.

In: the model as it stands, pictures with their class names (or captions). Out: a share of right answers. A class is
known by its own name in the templates alone, as a user would ask; a held-out picture with a caption must find its
caption among the others'. Whole evaluations, with intervals and confusions, are not made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipcli.errors import UsageError
from clipcli.images.stream import make_prepare
from clipcli.model.clip import CLIP
from clipcli.model.config import ClipConfig
from clipcli.model.text import pad
from clipcli.records import Failure, Label, Source, Template
from clipcli.tasks.pairs import Pair, read_pairs
from clipcli.tokenizer import Tokenizer, cut
from clipcli.train.augment import centre_crop, normalised
from clipcli.train.feed import Feed

BATCH = 256
MOST_CLASSES = 5_000  # or captions, that a picture is compared with; pictures of others don't count
_AS_IT_IS = (Template("<>"),)  # a whole caption takes no template


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Pictures with the names of their classes, prepared as the model will get them from users."""

    name: str
    pairs: tuple[Pair, ...]  # without bytes
    pixels: tuple[NDArray[np.uint8], ...]  # each [3, size, size]
    failed: tuple[Failure, ...]


def read_set(name: str, path: str, config: ClipConfig, words: Mapping[str, Label]) -> EvalSet:
    """All pictures of a folder of class folders, a table with labels, or a webdataset tar. Raises UsageError."""
    prepare = make_prepare(config.preprocess, config.vision.image_size)
    pairs: list[Pair] = []
    squares: list[NDArray[np.uint8]] = []
    failed: list[Failure] = []
    for pair in read_pairs([path], words):
        square = pair if isinstance(pair, Failure) else prepare(pair.source)
        if isinstance(pair, Failure):
            failed.append(pair)
        elif isinstance(square, Failure):
            failed.append(square)
        elif pair.label is None:
            raise UsageError(f"{path}: {pair.source.path} has a caption, no class", hint="--eval takes labelled data")
        else:
            pairs.append(replace(pair, source=Source(pair.source.path)))
            assert square.square is not None  # nothing is remembered here
            squares.append(square.square)
    if not pairs:
        raise UsageError(f"{path}: no labelled pictures to evaluate on")
    return EvalSet(name, tuple(pairs), tuple(squares), tuple(failed))


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures one model again and again, as its weights change."""

    config: ClipConfig
    tokenizer: Tokenizer
    templates: Sequence[Template]
    device: torch.device

    def on_set(self, clip: CLIP, of: EvalSet, autocast: AbstractContextManager[object]) -> float:
        """Top-1 accuracy on a set."""
        places = (slice(i, i + BATCH) for i in range(0, len(of.pairs), BATCH))
        batches = (
            (of.pairs[some], normalised(self._on_device(np.stack(of.pixels[some])), self.config.preprocess))
            for some in places
        )
        with torch.no_grad(), autocast:
            return self._top1(clip, of.pairs, batches)

    def on_held_out(self, clip: CLIP, feed: Feed, autocast: AbstractContextManager[object]) -> float:
        """Top-1 accuracy on the pictures that the feed held out."""
        size, preprocess = self.config.vision.image_size, self.config.preprocess
        batches = (
            (s.pairs, centre_crop(self._on_device(s.canvas), self._on_device(s.aspect), size, preprocess))
            for s in feed.held_out(BATCH)
        )
        with torch.no_grad(), autocast:
            return self._top1(clip, [feed.pairs[i] for i in feed.held], batches)

    def _top1(self, clip: CLIP, pairs: Sequence[Pair], batches: Iterator[tuple[Sequence[Pair], Tensor]]) -> float:
        classes = dict(islice({_class(pair): pair for pair in pairs}.items(), MOST_CLASSES))
        names, weight = list(classes), self._weight(clip, list(classes.values()))
        right = count = 0
        for some, pixels in batches:
            image = clip.encode_image(pixels.contiguous(memory_format=torch.channels_last)).float()
            best = (image @ weight.T).argmax(dim=1).tolist()
            true = [_class(pair) for pair in some]
            right += sum(names[i] == name for i, name in zip(best, true, strict=True))
            count += sum(name in classes for name in true)
        return right / max(1, count)

    def _weight(self, clip: CLIP, classes: Sequence[Pair]) -> Tensor:
        """Class vectors [classes, D]: the normalised mean of the normalised prompts, by their templates' weights."""
        prompts = [
            (place, template.text.replace("<>", pair.phrases[0]), template.weight)
            for place, pair in enumerate(classes)
            for template in (self.templates if pair.label else _AS_IT_IS)
        ]
        owner = torch.tensor([place for place, _, _ in prompts], device=self.device)
        heavy = torch.tensor([weight for _, _, weight in prompts], device=self.device)[:, None]
        most = self.config.text.context_length
        ids = [cut(row, most) for row in self.tokenizer(text for _, text, _ in prompts)]
        weight = torch.zeros(len(classes), self.config.embed_dim, device=self.device)
        for start in range(0, len(ids), 4 * BATCH):
            some = ids[start : start + 4 * BATCH]
            vectors = F.normalize(clip.encode_text(pad(some).to(self.device)).float(), dim=1)
            here = slice(start, start + len(some))
            weight.index_add_(0, owner[here], heavy[here] * vectors)
        return F.normalize(weight, dim=1)

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _class(pair: Pair) -> str:
    return pair.label or pair.phrases[0]
