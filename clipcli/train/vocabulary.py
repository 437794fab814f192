"""A vocabulary learned from captions: the merges of a byte-level BPE, as `clipcli.tokenizer` reads them.

Comes in: captions, as they stream by. Goes out: the text of a `merges.txt`. Words are counted once; then the pair of
neighbours that stands there most often becomes a token, again and again (Sennrich et al. 2016). The same captions in
any order give the same vocabulary. Nothing is written here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from clipcli.errors import UsageError
from clipcli.tokenizer import spell, words_of

SMALLEST = 514  # 256 letters, 256 letters that end a word, the start, the end
LEAST = 2  # times that a pair must stand there: what is seen once is no pattern
LONGEST = 100  # letters of a word that counts; more is no word
HEADER = "#version: 0.2"

Pair = tuple[str, str]


def train_vocabulary(captions: Iterable[str], size: int) -> tuple[str, int]:
    """The text of a `merges.txt` learned from `captions`, and the size that the text tower then needs.

    That is `size`, or less where the captions have no more pairs to join. Raises UsageError for a size that has no
    place for the letters.
    """
    if size < SMALLEST:
        raise UsageError(
            f"a vocabulary of {size:,} has no place for the 512 letters, the start and the end",
            hint=f"give {SMALLEST:,} or more; small models do well with 1,000 to 8,000",
        )
    words = Counter(word for caption in captions for word in words_of(caption) if len(word) <= LONGEST)
    merges = learn_merges(words, size - SMALLEST)
    return "".join(f"{line}\n" for line in [HEADER, *map(" ".join, merges)]), SMALLEST + len(merges)


def learn_merges(words: Mapping[str, int], most: int) -> list[Pair]:
    """The first `most` merges, or all there are, of words and their counts; of equal pairs the first by spelling.

    A token is made of one pair only: files of merges have no way to say more.
    """
    spelled, times = [spell(word) for word in words], list(words.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have the pair, or had it
    for place, letters in enumerate(spelled):
        for pair in pairwise(letters):
            counts[pair] += times[place]
            places[pair].add(place)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapify(queue)
    merges: dict[str, Pair] = {}
    while queue and len(merges) < most:
        count, pair = heappop(queue)
        if -count != counts[pair]:  # neighbours were joined to others meanwhile; it never gets more
            heappush(queue, (-counts[pair], pair))
            continue
        if -count < LEAST:
            break
        token = "".join(pair)
        if merges.setdefault(token, pair) != pair:
            continue
        new: set[Pair] = set()
        for place in places.pop(pair):
            before, after = spelled[place], _joined(spelled[place], pair)
            spelled[place] = after
            for old in pairwise(before):
                counts[old] -= times[place]
            for fresh in pairwise(after):
                counts[fresh] += times[place]
                if token in fresh:
                    places[fresh].add(place)
                    new.add(fresh)
        for fresh in new:
            heappush(queue, (-counts[fresh], fresh))
    return list(merges.values())


def _joined(parts: list[str], pair: Pair) -> list[str]:
    """`parts` with each `pair` made one, from left to right."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
