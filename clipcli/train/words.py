"""What is said of a picture in a step, and what is true of it.

A pair's phrases are whole captions, or the words of its class, which take a template. Phrases are known by a hash of
their spelling, so that devices can compare theirs without a common table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from clipcli.records import Template
from clipcli.tasks.pairs import Pair
from clipcli.train.config import TrainConfig
from clipcli.train.feed import Share

MOST_EXAMPLES = 2_000_000  # captions that a vocabulary is learned from


class Words:
    """Chooses captions by the seed and the step."""

    def __init__(self, config: TrainConfig, templates: Sequence[Template]) -> None:
        self._config = config
        self._templates = [template.text for template in templates]
        weights = np.cumsum([template.weight for template in templates])
        self._heights = weights / weights[-1]
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], NDArray[np.int64]] = {}

    def captions(self, pairs: Sequence[Pair], step: int, share: Share) -> list[tuple[str, int]]:
        """A caption for each pair of a device's share, and the hash of its phrase."""
        numbers = np.random.default_rng((self._config.seed, 3, step)).random((self._config.batch_size, 3))
        mine = numbers[share.rank :: share.world]
        return [self._caption(pair, *u) for pair, u in zip(pairs, mine.tolist(), strict=True)]

    def true_of(self, pair: Pair) -> NDArray[np.int64]:
        """Hashes of all phrases that hold for the pair; one array for each class."""
        if pair.label is None:
            return np.asarray([_hash(phrase) for phrase in pair.phrases], np.int64)
        key = (pair.phrases, pair.broader)
        if key not in self._known:
            self._known[key] = np.asarray([_hash(phrase) for phrase in pair.phrases + pair.broader], np.int64)
        return self._known[key]

    def _caption(self, pair: Pair, which: float, place: float, template: float) -> tuple[str, int]:
        phrases = pair.phrases
        if pair.label is None:
            phrase = phrases[int(place * len(phrases))]
            return phrase, _hash(phrase)
        if which < self._config.broader and pair.broader:
            phrase = pair.broader[int(place * len(pair.broader))]
        elif which < self._config.broader + self._config.alias and len(phrases) > 1:
            phrase = phrases[1 + int(place * (len(phrases) - 1))]
        else:
            phrase = phrases[0]
        text = self._templates[int(np.searchsorted(self._heights, template, side="right"))]
        return text.replace("<>", phrase), _hash(phrase)


def examples(pairs: Sequence[Pair], templates: Sequence[Template]) -> Iterator[str]:
    """Captions to learn a vocabulary from: each distinct phrase as often as it stands there, with some template."""
    for number, pair in enumerate(pairs[:MOST_EXAMPLES]):
        if pair.label is None:
            yield from pair.phrases
        else:
            words = pair.phrases + pair.broader
            text = templates[number % len(templates)].text if templates else "<>"
            yield text.replace("<>", words[number % len(words)])


@lru_cache(100_000)
def _hash(phrase: str) -> int:
    spelled = " ".join(phrase.lower().split()).encode()
    return int.from_bytes(hashlib.blake2b(spelled, digest_size=8).digest(), "little", signed=True)
