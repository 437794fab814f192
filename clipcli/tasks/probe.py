"""What a handful of labelled pictures adds to words: linear probes, and text and pictures blended.

    LabelledSet, perhaps a zero-shot classifier --probe--> accuracies by method and shots, and a classifier

Of each class some pictures are held out to test with, and of the rest some to choose a method's strength by, as the
paper does (section A.3); then both are learned from together. Several splits give a mean and a spread. All methods end
in a linear classifier (`tasks.linear`). Frozen embeddings come in: no tower runs here, and nothing is printed.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from clipcli.errors import UsageError
from clipcli.output.text import counted
from clipcli.records import Label
from clipcli.tasks.evaluate import check_finite, listed
from clipcli.tasks.labelled import LabelledSet
from clipcli.tasks.linear import (
    EXACT,
    ROUGH,
    Examples,
    Linear,
    best,
    blend,
    gaussian,
    leave_one_out,
    logistic,
    sweep,
    unit,
)
from clipcli.tasks.metrics import Indices
from clipcli.weights.load import MOST_SCALE
from clipcli.weights.model import Model, Vectors
from clipcli.weights.pooled import is_pooled
from clipcli.zeroshot.classifier import Classifier, Progress
from clipcli.zeroshot.classifier_file import LONGEST

Method = Literal["logistic", "gda", "blend", "gda+text", "wise"]
SHOTS = (1, 2, 4, 8, 16)  # the paper's
HELD = 1 / 4  # of a class's pictures to test with, and of the rest to choose by
ONE_SHOT = 1 / 8  # alpha of a blend where no second picture could tell a better one: more harms ViT-B/32's words
GRIDS: dict[Method, tuple[float, ...]] = {  # the strengths that are tried; logistic regression has its own search
    "gda": (1.0,),  # it has none
    "blend": (0.0, *(2.0**power for power in range(-4, 5))),  # of the pictures, where words have 1
    "gda+text": tuple(10.0**power for power in range(-4, 4)),  # as in arXiv 2402.04087
    "wise": tuple(tenths / 10 for tenths in range(11)),  # of the probe; the rest is the words' (arXiv 2109.01903)
}
STRENGTHS: dict[Method, str] = {"logistic": "C", "blend": "alpha", "gda+text": "alpha", "wise": "share"}
OF_WORDS: tuple[Method, ...] = ("blend", "gda+text", "wise")

Tuned = dict[Method, tuple[float, Linear]]  # each method's strength, and what it made


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is tried."""

    shots: tuple[int, ...] = ()  # pictures a class; none: those of SHOTS for which there are enough
    splits: int = 5  # how often pictures are held out, at random, and how often shots are drawn
    method: Method | None = None  # of the classifier; None: what is best at what is held out to choose by


@dataclass(frozen=True)
class Cell:
    """How often a method was right about pictures held out: a share for each split."""

    method: Method | Literal["zero-shot"]
    shots: int | None  # pictures a class that were learned from; None: all but those held out
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the splits."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """The standard deviation over the splits; 0 of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Probed:
    """What came of it."""

    cells: tuple[Cell, ...]  # the zero-shot one first, where there were words
    strengths: Mapping[Method, float]  # as chosen to learn from all pictures: the median of the splits
    classifier: Classifier  # learned from all pictures; `how` names the method

    @property
    def equal_shots(self) -> float | None:
        """The pictures a class with which logistic regression reaches zero-shot, log-linearly between those tried.

        0: fewer than were tried; infinity: more; None: nothing to compare.
        """
        curve = [(cell.shots, cell.mean) for cell in self.cells if cell.method == "logistic" and cell.shots]
        if self.cells[0].method != "zero-shot" or not curve:
            return None
        level = self.cells[0].mean
        for (less, low), (more, high) in pairwise(curve):
            if low <= level < high:
                return float(less * (more / less) ** ((level - low) / (high - low)))
        return 0.0 if level < curve[0][1] else math.inf


def probe(
    pictures: LabelledSet,
    model: Model,
    text: Classifier | None = None,
    options: ProbeOptions | None = None,
    *,
    test: LabelledSet | None = None,
    seen: Vectors | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Learn from 1, 2, 4, ... pictures a class and from all, and measure on others.

    `model` made the embeddings. `text`, a zero-shot classifier, is the line to compare with and what is blended.
    `test`: pictures to measure on, in place of a quarter of each class. `seen`: the projected embeddings of those that
    are measured on, where `model` has pooled features: `text` sees them, and nothing is blended. Raises UsageError for
    too few pictures, classes that are no labels, labels without pictures, embeddings that aren't finite.
    """
    options = options or ProbeOptions()
    labels = text.labels if text else tuple(Label(name, (name,)) for name in pictures.classes)
    data = _examples(pictures, labels, is_complete=True)
    tested = data if test is None else _examples(test, labels, is_complete=False)
    words = None if text is None or seen is not None else _words(text)
    if words is None and options.method in OF_WORDS:
        what = f"{options.method} takes words and projected features"
        raise UsageError(what, hint="give --labels FILE, or another --method")
    shots = _checked_shots(data, labels, options.shots, is_apart=test is not None)
    steps = options.splits * len(shots)
    tally: dict[tuple[Method | Literal["zero-shot"], int | None], list[float]] = defaultdict(list)
    chosen: dict[Method, list[tuple[float, tuple[float, float]]]] = defaultdict(list)  # strength, quality
    if text is not None:
        right = text.logits((test or pictures).vectors if seen is None else seen).argmax(axis=1) == tested.truth
    for seed in range(options.splits):
        rows, train, held, apart = _parts(data, tested, seed)
        judges, judged = _only(data, held), _only(tested, apart)
        if text is not None:
            tally["zero-shot", 0].append(float(right[apart].mean()))
        for done, count in enumerate(shots, seed * len(shots)):
            few = np.concatenate([train[data.truth[train] == index][:count] for index in range(len(labels))])
            for name, (_, linear) in _tuned(_only(data, few), judges, words).items():
                tally[name, count].append(linear.quality(judged)[0])
            if progress:
                progress(done, steps)
        found = _tuned(_only(data, train), judges, words)
        for name, (strength, linear) in found.items():
            chosen[name].append((strength, linear.quality(judges)))
        fixed = {name: strength for name, (strength, _) in found.items()}
        for name, (_, linear) in _tuned(_only(data, rows), judges, words, fixed).items():
            tally[name, None].append(linear.quality(judged)[0])
    strengths = {name: statistics.median_low(strength for strength, _ in of) for name, of in chosen.items()}
    qualities = {name: tuple(np.mean([quality for _, quality in of], axis=0)) for name, of in chosen.items()}
    finest: Method = max(qualities, key=qualities.__getitem__)
    method = options.method or finest
    if method not in chosen:
        raise UsageError(f"{method} takes two pictures a class that differ", hint="give more, or another --method")
    how = _how(method, strengths) | {"pictures": len(data.truth), "accuracy": statistics.fmean(tally[method, None])}
    linear = _tuned(data, data, words, strengths, EXACT)[method][1]
    order = ("zero-shot", *get_args(Method))
    cells = (Cell(*key, tuple(tally[key])) for key in sorted(tally, key=lambda key: order.index(key[0])))
    return Probed(
        tuple(cells), strengths, _classifier(linear, labels, model, text if method in OF_WORDS else None, how)
    )


def few_shot(text: Classifier, pictures: LabelledSet) -> Classifier:
    """`text`, a zero-shot classifier, with pictures of each label blended in.

    How much they count is what answers best for each of them by all others (leave-one-out). Raises UsageError as
    `probe` does.
    """
    words, examples = _words(text), _examples(pictures, text.labels, is_complete=True)
    alpha, weight = ONE_SHOT, unit(words.weight)
    if np.bincount(examples.truth).min() > 1:
        alpha = max(GRIDS["blend"], key=lambda alpha: leave_one_out(weight, examples, alpha))
    blended = blend(weight, examples.means, alpha, 1).weight.astype(np.float32)
    how: dict[str, str | float] = {"method": "blend", "alpha": alpha, "pictures": len(examples.truth)}
    return replace(text, weight=blended, made_by="few-shot", how=how)


def _words(text: Classifier) -> Linear:
    if text.made_by != "zero-shot":
        raise UsageError(f"a classifier made by {text.made_by} has no words of its own", hint="give a zero-shot one")
    return Linear(text.logit_scale * text.weight.astype(np.float64))


def _examples(pictures: LabelledSet, labels: Sequence[Label], *, is_complete: bool) -> Examples:
    """The vectors, and their classes as indices into `labels`; `is_complete`: each label has a picture."""
    names = [label.name for label in labels]
    if len(names) < 2:
        raise UsageError(f'one class alone ("{"".join(names)}"): nothing to tell it from', hint="give two or more")
    if foreign := [name for name in pictures.classes if name not in names]:
        hint = "add them to the labels, or make them aliases"
        raise UsageError(f"classes that are no labels: {listed(foreign)}", hint=hint)
    if is_complete and (idle := [name for name in names if name not in pictures.classes]):
        raise UsageError(f"labels without a picture: {listed(idle)}", hint="add pictures, or take the labels out")
    check_finite(pictures.vectors)
    places = np.array([names.index(name) for name in pictures.classes])
    return Examples(pictures.vectors.astype(np.float64), places[pictures.truth])


def _checked_shots(data: Examples, labels: Sequence[Label], shots: Sequence[int], *, is_apart: bool) -> Sequence[int]:
    """The shots to try, for which each class has pictures besides those held out."""
    counts = np.bincount(data.truth)
    fewest = int(counts.min())
    who = f'class "{labels[int(counts.argmin())].name}" has {counted(fewest, "picture")}'
    if fewest < (needed := 2 if is_apart else 3):
        aims = "learn from and to choose by" if is_apart else "learn from, to choose by and to test with"
        raise UsageError(f"{who}; {needed} are the fewest: to {aims}", hint="add pictures, or leave the class out")
    left = fewest - _held(fewest)
    left = left if is_apart else left - _held(left)
    if max(shots, default=1) > left:
        what = f"{who}, {left} of them to learn from: fewer than {max(shots)} shots"
        raise UsageError(what, hint="add pictures, or ask for fewer --shots; --test DATA leaves more of them")
    return sorted(set(shots)) or [count for count in SHOTS if count <= left]


def _held(count: int) -> int:
    return max(1, round(HELD * count))


def _parts(data: Examples, tested: Examples, seed: int) -> tuple[Indices, Indices, Indices, Indices]:
    """Rows of `data` to learn from, of these the ones to learn from first and those to choose by; rows of `tested`."""
    rng = np.random.default_rng(seed)
    rows, apart = np.arange(len(data.truth)), np.arange(len(tested.truth))
    if tested is data:
        rows, apart = _split(data.truth, rows, rng)
    return rows, *_split(data.truth, rows, rng), apart


def _split(truth: Indices, rows: Indices, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """`rows` in two: those kept, in random order, and a quarter of each class's held out."""
    kept, held = [], []
    for index in np.unique(truth):
        own = rng.permutation(rows[truth[rows] == index])
        held.append(own[: _held(len(own))])
        kept.append(own[_held(len(own)) :])
    return np.concatenate(kept), np.concatenate(held)


def _only(examples: Examples, rows: Indices) -> Examples:
    return Examples(examples.vectors[rows], examples.truth[rows])


def _tuned(
    examples: Examples,
    held: Examples,
    words: Linear | None,
    fixed: Mapping[Method, float] | None = None,
    tolerance: float = ROUGH,
) -> Tuned:
    """Every method that can be, at the strength that is best on `held`, or at the `fixed` one."""
    if fixed is None:
        grids, (c, regression) = GRIDS, sweep(examples, held)
    else:
        grids, c = {name: (strength,) for name, strength in fixed.items()}, fixed["logistic"]
        regression = logistic(examples, c, tolerance)
    found: Tuned = {"logistic": (c, regression)}
    discriminants = gaussian(examples)
    if discriminants is not None and "gda" in grids:
        found["gda"] = (1.0, discriminants)
    if words is not None:
        text, means, scale = unit(words.weight), examples.means, float(np.linalg.norm(words.weight[0]))
        found["blend"] = best(((alpha, blend(text, means, alpha, scale)) for alpha in grids["blend"]), held)
        found["wise"] = best(((share, words.mixed(regression, 1 - share, share)) for share in grids["wise"]), held)
        if "gda" in found:
            both = ((alpha, words.mixed(found["gda"][1], 1, alpha)) for alpha in grids["gda+text"])
            found["gda+text"] = best(both, held)
    return found


def _how(method: Method, strengths: Mapping[Method, float]) -> dict[str, str | float]:
    """What the classifier file says of the method."""
    of: tuple[Method, ...] = ("logistic", "wise") if method == "wise" else (method,)
    how: dict[str, str | float] = {"method": method}
    return how | {STRENGTHS[name]: strengths[name] for name in of if name in STRENGTHS}


def _classifier(
    linear: Linear, labels: tuple[Label, ...], model: Model, text: Classifier | None, how: dict[str, str | float]
) -> Classifier:
    """`linear` as a file keeps it: rows of about length 1, without what all of them share, which no softmax sees.

    Only a blend's rows keep that: they are unit vectors, and their cosines with pictures mean something.
    """
    weight = linear.weight if how["method"] == "blend" else linear.weight - linear.weight.mean(axis=0)
    bias = np.broadcast_to(linear.bias, len(labels))
    bias = bias - bias.mean()
    sharp = max(np.linalg.norm(weight, axis=1).max(), np.abs(bias).max()) / LONGEST  # of pictures that hardly differ
    weight, bias = weight / max(sharp, 1), bias / max(sharp, 1)  # as a file can hold them: no answer changes
    scale = float(np.clip(np.linalg.norm(weight, axis=1).mean(), 1 / MOST_SCALE, MOST_SCALE))
    if np.linalg.norm(weight, axis=1).min() < scale / LONGEST:
        raise UsageError("nothing tells the classes apart", hint="are the same pictures in several of them?")
    return Classifier(
        weight=(weight / scale).astype(np.float32),
        labels=labels,
        logit_scale=scale,
        model=model.name,
        image_fingerprint=model.image_fingerprint,
        text_fingerprint=text.text_fingerprint if text else "",
        templates=text.templates if text else (),
        template_set=text.template_set if text else "",
        made_by="probe",
        bias=bias.astype(np.float32),
        features="pooled" if is_pooled(model) else "projected",
        how=how,
    )
