"""Which templates, aliases and labels help on somebody's own pictures: prompt advice.

    Bank + embeddings + truth --advise--> Advice    templates chosen on one half of the pictures, measured on the other
    Bank + embeddings alone   --weigh---> Weighing  weights for templates, without a picture that has a label

Nothing is encoded here (`bank`, `labelled`) and nothing written: `zeroshot.templates.write` keeps what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from clipcli.errors import UsageError
from clipcli.records import Label, Template
from clipcli.tasks.bank import Answers, Array, Bank, answers, cosines_of, two_nearest
from clipcli.tasks.metrics import Estimate, Flags, Indices, confusions, paired_gap, share, softmax
from clipcli.zeroshot.classifier import Progress
from clipcli.zeroshot.lint import closest
from clipcli.zeroshot.templates import MOST_WEIGHT

MOST = 10  # templates that are chosen


class Pair(NamedTuple):
    """Two labels that are hard to tell apart."""

    a: str
    b: str
    cosine: float  # of the class vectors of all templates
    a_as_b: int = 0  # pictures of `a` that were taken for `b`
    b_as_a: int = 0


# With labels


@dataclass(frozen=True)
class Measured:
    """One way to make class vectors, and its accuracy where it was chosen and where it wasn't."""

    name: str
    templates: int
    on_a: float
    on_b: Estimate
    gain: Estimate  # on B, over all templates together, picture by picture


@dataclass(frozen=True)
class Ranked:
    """A template by itself, on all pictures."""

    template: Template
    accuracy: float
    loss: float  # mean of -log of the true label's score
    without: int  # more right answers if it were left out of all templates; negative where it helps


@dataclass(frozen=True)
class AliasEffect:
    """How many more right answers there are without an alias, in each half; negative where it helps."""

    label: str
    alias: str
    without_on_a: int
    without_on_b: int


@dataclass(frozen=True)
class Advice:
    """All that labelled pictures say about prompts. A is the half on which templates are chosen, B the other."""

    pictures: tuple[int, int]  # in A and B
    measured: tuple[Measured, ...]
    chosen: tuple[Template, ...]  # by forward selection on A
    ranked: tuple[Ranked, ...]  # the best first
    aliases: tuple[AliasEffect, ...]  # of labels with several; those first that hurt most
    pairs: tuple[Pair, ...]  # the most confused first, then the most similar


def advise(
    bank: Bank, vectors: Array, truth: Indices, *, most: int = MOST, seed: int = 0, progress: Progress | None = None
) -> Advice:
    """Rank templates, choose `most` of them at most on half of the pictures, and measure that on the other half.

    `vectors` are the pictures' unit embeddings [n, dim], `truth` their labels [n]; `seed` decides which pictures are
    in which half. Raises UsageError where all pictures are of one label.
    """
    if len(np.unique(truth)) < 2:
        raise UsageError(f'all pictures are of one label: "{bank.labels[truth[0]].name}"', hint="add others")
    number = len(bank.templates)
    trials = 2 * number + sum(number - i for i in range(min(most, number)))
    done = count(1)

    def tried(chosen: Sequence[int], rows: Indices | slice = slice(None)) -> Answers:
        if progress:
            progress(next(done), trials)
        return answers(vectors[rows], bank.some(chosen), truth[rows], bank.scale)

    a, b = halves(truth, seed)
    alone = [tried([i]) for i in range(number)]
    others = [tried([j for j in range(number) if j != i])[0] for i in range(number)]
    best = max(range(number), key=lambda i: _merit(alone[i][0][a], alone[i][1][a]))
    chosen = select(lambda some: tried(some, a), number, most)
    together = bank.classes(bank.weights)
    ways = {
        "bare name": (0, bank.without_template()),
        f'best on A: "{bank.templates[best].text}"': (1, bank.some([best])),
        "all templates": (number, together),
        "all, weighted without labels": (number, bank.classes(softmax(zero_shot_scores(bank, vectors[a])))),
        "chosen on A": (len(chosen), bank.some(chosen)),
    }
    nearest = two_nearest(vectors, together)
    right = nearest[0][0] == truth
    measured = []
    for name, (size, classes) in ways.items():
        own = answers(vectors, classes, truth, bank.scale)[0]
        gain = paired_gap(right[b], own[b], seed)
        measured.append(Measured(name, size, float(own[a].mean()), share(own[b], seed), gain))
    ranked = [
        Ranked(template, float(hits.mean()), float(loss.mean()), int(without.sum()) - int(right.sum()))
        for template, (hits, loss), without in zip(bank.templates, alone, others, strict=True)
    ]
    return Advice(
        pictures=(len(a), len(b)),
        measured=tuple(measured),
        chosen=tuple(bank.templates[i] for i in chosen),
        ranked=tuple(sorted(ranked, key=lambda one: (-one.accuracy, one.loss))),
        aliases=tuple(_alias_effects(bank, vectors, truth, a, nearest)),
        pairs=tuple(_pairs(together, bank.labels, confusions(truth, nearest[0][0], len(bank.labels)))),
    )


def halves(truth: Indices, seed: int) -> tuple[Indices, Indices]:
    """Two halves of the pictures as indices, each label's pictures spread evenly over both."""
    order = np.random.default_rng(seed).permutation(len(truth))
    order = order[np.argsort(truth[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def select(tried: Callable[[list[int]], Answers], number: int, most: int) -> list[int]:
    """Forward selection among `number` templates: that one is added each time with which most answers are right.

    Of equals the one with the least loss is taken. Returns the indices in the order in which they were taken, as far
    as the best set goes. 7 of 80 were found so for ImageNet by the paper's authors, in the notebook they published.
    """
    chosen: list[int] = []
    reached: list[tuple[float, float]] = []
    while len(chosen) < min(most, number):
        merits = {i: _merit(*tried([*chosen, i])) for i in range(number) if i not in chosen}
        chosen.append(max(merits, key=merits.__getitem__))
        reached.append(merits[chosen[-1]])
    return chosen[: reached.index(max(reached)) + 1]


def _merit(right: Flags, loss: Array) -> tuple[float, float]:
    return float(right.mean()), -float(loss.mean())


def _alias_effects(
    bank: Bank, vectors: Array, truth: Indices, a: Indices, nearest: tuple[Indices, Array]
) -> list[AliasEffect]:
    (first, second), (highest, next_to_it) = nearest
    in_a = np.isin(np.arange(len(truth)), a)
    right = first == truth
    effects = []
    for index, label in enumerate(bank.labels):
        rival = np.where(first == index, second, first)  # the nearest of the others, whose vectors stay what they are
        reached = np.where(first == index, next_to_it, highest)
        for place, alias in enumerate(label.aliases if len(label.aliases) > 1 else ()):
            wins = vectors @ bank.without_alias(index, place) > reached
            change = (np.where(wins, index, rival) == truth).astype(int) - right
            effects.append(AliasEffect(label.name, alias, int(change[in_a].sum()), int(change[~in_a].sum())))
    return sorted(effects, key=lambda effect: -effect.without_on_a - effect.without_on_b)


def _pairs(classes: Array, labels: Sequence[Label], confused: Sequence[tuple[int, int, int]] = ()) -> list[Pair]:
    """The pairs that pictures confuse, the most frequent first, then those most similar."""
    taken: dict[tuple[int, int], list[int]] = {}
    for true, said, number in confused:
        taken.setdefault((min(true, said), max(true, said)), [0, 0])[int(true > said)] = number
    cosines = {(i, j): round(float(classes[i] @ classes[j]), 6) for i, j in taken}
    cosines |= {(i, j): cosine for cosine, i, j in closest(classes, 0)[0]}
    times = {pair: sum(taken.get(pair, ())) for pair in cosines}
    order = sorted(cosines, key=lambda pair: (-times[pair], -cosines[pair], pair))
    return [Pair(labels[i].name, labels[j].name, cosines[i, j], *taken.get((i, j), ())) for i, j in order]


# Without labels


@dataclass(frozen=True)
class Weighed:
    """A template with the weight that pictures give it; the mean over all templates is 1."""

    template: Template
    score: float


@dataclass(frozen=True)
class Weighing:
    """All that pictures without labels say about prompts."""

    pictures: int
    changed: int  # pictures that get another label by the new weights
    weighed: tuple[Weighed, ...]  # the heaviest first
    pairs: tuple[Pair, ...]  # the most similar labels


def weigh(bank: Bank, vectors: Array, reference: Array | None = None) -> Weighing:
    """Weights for templates by ZPE (Allingham et al. 2023, arXiv 2302.06235): the softmax of `zero_shot_scores`.

    `vectors` are unit embeddings [n, dim] of pictures to be labelled, `reference` those of pictures of all kinds.
    """
    scores = zero_shot_scores(bank, vectors, reference)
    weights = np.maximum(softmax(scores) * len(scores), 1 / MOST_WEIGHT)
    before, after = (two_nearest(vectors, bank.classes(each))[0][0] for each in (bank.weights, weights))
    weighed = [
        Weighed(Template(template.text, float(f"{weight:.4g}")), float(score))
        for template, weight, score in zip(bank.templates, weights, scores, strict=True)
    ]
    return Weighing(
        pictures=len(vectors),
        changed=int((before != after).sum()),
        weighed=tuple(sorted(weighed, key=lambda one: -one.score)),
        pairs=tuple(_pairs(bank.classes(bank.weights), bank.labels)),
    )


def zero_shot_scores(bank: Bank, vectors: Array, reference: Array | None = None) -> Array:
    """How well each template fits pictures of unknown labels [templates]: the mean of their largest logits.

    From each logit its mean over pictures is taken first, so that no template gains by words that are near to every
    picture (ZPE, section 3): the mean over `vectors`, and over `reference`, which stands for the pictures that the
    model was trained on, half of each.
    """
    usual = vectors.mean(axis=0)
    if reference is not None:
        usual = (usual + reference.mean(axis=0)) / 2
    scores = np.empty(len(bank.templates), np.float32)
    for i in range(len(scores)):
        classes = bank.some([i])
        largest = [(cosines - usual @ classes.T).max(axis=1) for _, cosines in cosines_of(vectors, classes)]
        scores[i] = bank.scale * np.concatenate(largest).mean()
    return scores
