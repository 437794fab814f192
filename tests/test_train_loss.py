"""The objective: worked out by hand, by a plain double loop, by finite differences; and what counts as a match."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from clipcli.model.config import Preprocess
from clipcli.records import Source, Template
from clipcli.tasks.pairs import Pair
from clipcli.train.augment import NUMBERS, augment
from clipcli.train.config import TrainConfig
from clipcli.train.feed import ALONE
from clipcli.train.loss import contrastive_loss, truth
from clipcli.train.words import Words

IMAGE = [[1.0, 0.0], [0.0, 1.0]]
TEXT = [[0.6, 0.8], [0.0, 1.0]]
TWO = torch.tensor(2.0)  # logits 1.2 0.0
#                                 1.6 2.0
DOG = Pair(Source("1.jpg"), ("golden retriever", "retriever"), ("dog", "animal"), "golden retriever")
PUG = Pair(Source("2.jpg"), ("pug",), ("dog", "animal"), "pug")
HERON = Pair(Source("3.jpg"), ("heron",), ("bird", "animal"), "heron")


def test_two_pairs_by_hand() -> None:
    # pictures: log(1 + e^-1.2) = 0.263282, log(1 + e^-0.4) = 0.513015
    # captions: log(1 + e^0.4) = 0.913015, log(1 + e^-2) = 0.126928
    loss = contrastive_loss(torch.tensor(IMAGE), torch.tensor(TEXT), TWO)
    assert loss.item() == pytest.approx((0.263282 + 0.513015 + 0.913015 + 0.126928) / 4, abs=1e-6)


def test_smoothing_by_hand() -> None:
    # a fifth of each target is spread over both: the wrong logits, 1.2, 0.4, -0.4 and 2 less, get a tenth
    plain = (0.263282 + 0.513015 + 0.913015 + 0.126928) / 4
    loss = contrastive_loss(torch.tensor(IMAGE), torch.tensor(TEXT), TWO, smoothing=0.2)
    assert loss.item() == pytest.approx(plain + 0.1 * (1.2 + 0.4 - 0.4 + 2.0) / 4, abs=1e-6)


def test_soft_targets_by_hand() -> None:
    # logits 2 1 0 / 0 1 0 / 0 0 1; the first two pictures and captions are of one class, so that each of these four
    # targets is half and half. Logarithms of the sums of exponentials, less the mean of the right logits:
    # pictures: 2.407606 - 1.5, 1.551445 - 0.5, 1.551445 - 1; captions: 2.239545 - 1, 1.861995 - 1, 1.551445 - 1
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    targets = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss = contrastive_loss(torch.eye(3), logits.T, torch.tensor(1.0), targets)
    assert loss.item() == pytest.approx((0.907606 + 1.051445 + 0.551445 + 1.239545 + 0.861995 + 0.551445) / 6, abs=1e-6)


def test_a_broader_caption_weighs_less_by_hand() -> None:
    # the second caption holds for two pictures, half and half; of the first picture's target it is a third, since the
    # picture's own caption holds for it alone: 1 to 1/2
    # pictures: 2.407606 - (2 × 2/3 + 1/3), 1.551445 - 1 twice; captions: 2.239545 - 2, 1.861995 - 1, 1.551445 - 1
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss = contrastive_loss(torch.eye(3), logits.T, torch.tensor(1.0), targets)
    assert loss.item() == pytest.approx((0.740939 + 0.551445 + 0.551445 + 0.239545 + 0.861995 + 0.551445) / 6, abs=1e-6)


def by_loops(
    image: NDArray[np.float64], text: NDArray[np.float64], scale: float, targets: NDArray[np.float64], smoothing: float
) -> float:
    """The definition, number by number."""
    n = len(image)
    columns = [sum(targets[i][j] for i in range(n)) for j in range(n)]  # of how many pictures a caption is true
    total = 0.0
    for own, other, picture_first in ((image, text, True), (text, image, False)):
        for i in range(n):
            logits = [scale * float(own[i] @ other[j]) for j in range(n)]
            norm = math.log(sum(math.exp(x) for x in logits))
            weights = [targets[i][j] / columns[j] if picture_first else targets[j][i] for j in range(n)]
            for j in range(n):
                share = (1 - smoothing) * weights[j] / sum(weights) + smoothing / n
                total -= share * (logits[j] - norm)
    return total / (2 * n)


def units(generator: np.random.Generator, n: int, dim: int = 8) -> NDArray[np.float64]:
    vectors = generator.standard_normal((n, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("soft", [False, True])
def test_equals_a_double_loop(seed: int, soft: bool) -> None:
    random = np.random.default_rng(seed)
    n, smoothing, scale = 3 + 2 * seed, [0.0, 0.1, 0.5][seed % 3], [1.0, 14.3, 100.0][seed // 2]
    image, text = units(random, n), units(random, n)
    targets = np.eye(n) + (random.random((n, n)) < 0.3) * random.random((n, n)) * soft
    loss = contrastive_loss(
        torch.from_numpy(image),
        torch.from_numpy(text),
        torch.tensor(scale, dtype=torch.float64),
        torch.from_numpy(targets) if soft else None,
        smoothing,
    )
    assert loss.item() == pytest.approx(by_loops(image, text, scale, targets, smoothing), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_identity_is_the_plain_loss(smoothing: float) -> None:
    random = np.random.default_rng(1)
    image, text = torch.from_numpy(units(random, 9)), torch.from_numpy(units(random, 9))
    scale = torch.tensor(20.0, dtype=torch.float64)
    plain = contrastive_loss(image, text, scale, smoothing=smoothing)
    for identity in (torch.eye(9, dtype=torch.float64), 7 * torch.eye(9, dtype=torch.float64)):
        torch.testing.assert_close(
            contrastive_loss(image, text, scale, identity, smoothing), plain, rtol=1e-14, atol=0.0
        )


@pytest.mark.parametrize("soft", [False, True])
def test_gradient(soft: bool) -> None:
    random = np.random.default_rng(2)
    image, text = (torch.from_numpy(units(random, 5)).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    targets = torch.from_numpy(np.eye(5) + random.random((5, 5))) if soft else None

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, targets, 0.1)

    assert torch.autograd.gradcheck(loss, (image, text, scale))


def test_chance_at_the_start() -> None:
    same = torch.ones(16, 1)
    assert contrastive_loss(same, same, torch.tensor(100.0)).item() == pytest.approx(math.log(16))


# What is true of a picture


def targets_of(pairs: list[Pair], phrases: list[str]) -> NDArray[np.float32]:
    """The targets where picture i has a caption with phrase i."""
    words = Words(TrainConfig(), [Template("a photo of a <>.")])
    hashes = {
        phrase: int(h) for p in pairs for phrase, h in zip((*p.phrases, *p.broader), words.true_of(p), strict=True)
    }
    return truth([words.true_of(pair) for pair in pairs], np.asarray([hashes[phrase] for phrase in phrases]))


def test_pictures_of_a_class_share_their_captions() -> None:
    targets = targets_of([DOG, DOG, HERON], ["golden retriever", "retriever", "heron"])
    np.testing.assert_array_equal(targets, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert targets.dtype == np.float32


def test_a_broader_caption_is_shared_by_all_of_its_kind() -> None:
    targets = targets_of([DOG, PUG, HERON, PUG], ["dog", "pug", "animal", "dog"])
    np.testing.assert_array_equal(targets, [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])


@given(
    st.lists(st.sampled_from([DOG, PUG, HERON]), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
    st.sampled_from([8, 11, 32]),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_every_picture_and_every_caption_keeps_a_match(pairs: list[Pair], seed: int, size: int, mix: float) -> None:
    """Whatever is drawn: mixing takes no caption's own picture away, and each row and column has something."""
    random = np.random.default_rng(seed)
    config = TrainConfig(mix=mix, crop="none", alias=0.4, broader=0.4, batch_size=len(pairs), seed=seed % 1000)
    words = Words(config, [Template("a photo of a <>.")])
    numbers = (
        random.choice([0.0, 0.5, 1 - 2**-24], (len(pairs), NUMBERS))
        if seed % 2
        else random.random((len(pairs), NUMBERS))
    )
    canvas = torch.zeros(len(pairs), 3, size, size, dtype=torch.uint8)
    _, mixing = augment(canvas, torch.ones(len(pairs)), torch.from_numpy(numbers).float(), size, config, Preprocess())
    captions = words.captions(pairs, 0, ALONE)
    hard = torch.from_numpy(truth([words.true_of(p) for p in pairs], np.asarray([h for _, h in captions])))
    assert (hard.diagonal() == 1).all()
    targets = hard if mixing is None else mixing.targets(hard)
    assert (targets.diagonal() > 0.3).all()
    assert (targets.sum(dim=1) > 0.3).all() and (targets.sum(dim=0) > 0.3).all()
    assert contrastive_loss(torch.ones(len(pairs), 1), torch.ones(len(pairs), 1), TWO, targets).isfinite()
