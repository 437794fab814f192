"""Linear classifiers of a few labelled vectors: logistic regression, Gaussian discriminant analysis, class means.

In: vectors [n, dim], the class of each as an index [n], weights of other classifiers. Out: `Linear`s, in float64. It
knows no pictures, labels, models or files. torch is imported for L-BFGS alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipcli.tasks.metrics import Floats, Indices, log_softmax

F = TypeVar("F", bound=np.floating[Any])
Array = NDArray[np.float64]

ITERATIONS = 1000  # of L-BFGS at most (paper, section A.3)
EXACT, ROUGH = 1e-9, 1e-4  # gradients at which it stops: for numbers that are kept, and to rank values of C
SMALL = 1 << 22  # multiplications of a product that threads would only slow down
LEAST, MOST, FINEST = -6, 6, 1 / 8  # decades of C, and the sweep's last step


class Examples(NamedTuple):
    """Vectors and what they show; every class from 0 to the last is among them."""

    vectors: Array  # [n, dim]
    truth: Indices  # [n]

    @property
    def means(self) -> Array:
        """The mean vector of every class, [classes, dim]."""
        sums = np.zeros((int(self.truth.max()) + 1, self.vectors.shape[1]))
        np.add.at(sums, self.truth, self.vectors)
        return sums / np.bincount(self.truth)[:, None]


class Linear(NamedTuple):
    """Logits = vectors · weightᵀ + bias."""

    weight: Array  # [classes, dim]
    bias: Array | float = 0.0  # [classes]

    def logits(self, vectors: NDArray[Any]) -> Array:
        """Logits [n, classes] of vectors [n, dim]."""
        found: Array = vectors @ self.weight.T + self.bias
        return found

    def quality(self, examples: Examples) -> tuple[float, float]:
        """The share that is answered right and, for ties, the mean logarithm of what the truth scores."""
        return _quality(self.logits(examples.vectors), examples.truth)

    def mixed(self, other: Linear, own: float, others: float) -> Linear:
        """The classifier whose logits are `own` times ours and `others` times the other's."""
        return Linear(own * self.weight + others * other.weight, own * self.bias + others * other.bias)


def _quality(logits: Floats, truth: Indices) -> tuple[float, float]:
    likelihood = log_softmax(logits)[np.arange(len(truth)), truth].mean()
    return float((logits.argmax(axis=1) == truth).mean()), float(likelihood)


def unit(vectors: NDArray[F]) -> NDArray[F]:
    """The same directions, with norm 1 along the last axis."""
    found: NDArray[F] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def best(candidates: Iterable[tuple[float, Linear]], held: Examples) -> tuple[float, Linear]:
    """The strength and the classifier that do best on examples held out; of equals the first."""
    return max(candidates, key=lambda candidate: candidate[1].quality(held))


@contextmanager
def one_thread(*, wanted: bool = True) -> Iterator[None]:
    """One thread of torch for as long as this lasts, if it is `wanted`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def logistic(examples: Examples, c: float, tolerance: float = EXACT, start: Linear | None = None) -> Linear:
    """Multinomial logistic regression by L-BFGS (paper, section A.3): minimises c · Σ loss + ½ ‖weight‖².

    That is scikit-learn's objective, for two classes too, where it has a single row of weights: two opposite ones of
    half its size weigh half as much. In float64, or in float32 where the `tolerance` is one that this can tell.
    `start`: where to begin, in place of zeros.
    """
    import torch

    vectors, truth = examples
    middle = vectors.mean(axis=0)  # the bias takes it up; what all pictures have in common slows L-BFGS down
    classes, dtype = int(truth.max()) + 1, torch.float32 if tolerance >= ROUGH else torch.float64
    first = start or Linear(np.zeros((classes, len(middle))), np.zeros(classes))
    x, y = torch.from_numpy(vectors - middle).to(dtype), torch.from_numpy(truth)
    weight = torch.from_numpy(first.weight).to(dtype, copy=True).requires_grad_()
    bias = torch.from_numpy(first.bias + first.weight @ middle).to(dtype, copy=True).requires_grad_()
    decay = (2 if classes == 2 else 1) / (2 * c * len(y))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=tolerance**2,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + decay * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with one_thread(wanted=x.numel() * classes < SMALL):
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = weight.detach().double().numpy()
    return Linear(found, bias.detach().double().numpy() - found @ middle)


def sweep(examples: Examples, held: Examples) -> tuple[float, Linear]:
    """Logistic regression with the C that does best on examples held out, and that C.

    The paper's search (section A.3): every other decade from 1e-6 to 1e6, then about the best at half the distance,
    down to 8 steps a decade. Of equals the weakest wins. Each begins where the next weaker one ended: from zeros, the
    weights of a large C, which no choice falls on, would take nearly all of the time.
    """
    tried: dict[float, Linear] = {}
    step, wanted = 2.0, [float(exponent) for exponent in range(LEAST, MOST + 1, 2)]
    while True:
        for one in wanted:
            weaker = tried.get(max((other for other in tried if other < one), default=one))
            tried[one] = logistic(examples, 10**one, ROUGH, weaker)
        peak, found = best(sorted(tried.items()), held)
        step /= 2
        if step < FINEST:
            return 10**peak, found
        wanted = [one for one in (peak - step, peak + step) if LEAST <= one <= MOST]


def gaussian(examples: Examples) -> Linear | None:
    """Gaussian discriminant analysis in closed form (arXiv 2402.04087): classes of one covariance, by Bayes' rule.

    The inverse covariance is d · ((n - 1) Σ + tr(Σ) I)⁻¹, after Kubokawa and Srivastava, which exists for any n.
    None where vectors of a class don't differ: one of each says nothing of their spread.
    """
    vectors, truth = examples
    means, (n, dim) = examples.means, vectors.shape
    within = vectors - means[truth]
    scatter = within.T @ within  # (n - 1) Σ
    trace = np.trace(scatter) / (n - 1)
    if trace < 1e-9:
        return None
    weight: Array = np.linalg.solve(scatter + trace * np.eye(dim), dim * means.T).T
    prior = np.log(np.bincount(truth) / n)
    return Linear(weight, prior - (weight * means).sum(axis=1) / 2)


def blend(text: Array, means: Array, alpha: float, scale: float) -> Linear:
    """Words and pictures in one vector a class: normalise(text + alpha · normalise(mean)), at the model's scale."""
    return Linear(scale * unit(text + alpha * unit(means)))


def leave_one_out(text: Array, examples: Examples, alpha: float) -> tuple[float, float]:
    """The quality (`Linear.quality`, at scale 1) of `blend` for each example by all others; each class has two or more.

    Only its own class changes when an example is left out.
    """
    vectors, truth = examples
    rows, counts = np.arange(len(truth)), np.bincount(truth)[truth, None]
    logits = blend(text, examples.means, alpha, 1).logits(vectors)
    own = unit(text[truth] + alpha * unit(examples.means[truth] * counts - vectors))
    logits[rows, truth] = (own * vectors).sum(axis=1)
    return _quality(logits, truth)
