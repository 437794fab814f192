"""What is said of a picture: which phrase, in which template, how often; and what is known to be true of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clipcli.records import Source, Template
from clipcli.tasks.pairs import Pair
from clipcli.train.config import TrainConfig
from clipcli.train.feed import ALONE, Share
from clipcli.train.words import Words, examples

MANY = 8000
DOG = Pair(Source("1.jpg"), ("golden retriever", "retriever", "goldie"), ("dog", "animal"), "golden retriever")
CHAIN = Pair(Source("2.jpg"), ("chain",), (), "chain")
TALE = Pair(Source("3.jpg"), ("A dog runs.", "Something <> brown."))
BARE = [Template("<>")]
TWO = [Template("a <>."), Template("b <>.")]
AS_EVER = [
    "b golden retriever.",
    "a chain.",
    "A dog runs.",
    "b golden retriever.",
    "b goldie.",
    "a chain.",
    "A dog runs.",
    "b golden retriever.",
    "a retriever.",
    "a chain.",
    "Something <> brown.",
    "a retriever.",
]


def said(pair: Pair, templates: list[Template], count: int = MANY, **changes: Any) -> list[str]:
    words = Words(TrainConfig(batch_size=count, **changes), templates)
    return [text for text, _ in words.captions([pair] * count, 0, ALONE)]


def shares(texts: list[str]) -> dict[str, float]:
    return {text: count / len(texts) for text, count in Counter(texts).items()}


def test_names_aliases_and_broader_words_by_their_probabilities() -> None:
    expected = {"golden retriever": 0.3, "retriever": 0.25, "goldie": 0.25, "dog": 0.1, "animal": 0.1}
    assert shares(said(DOG, BARE, alias=0.5, broader=0.2)) == pytest.approx(expected, abs=0.02)


def test_the_ends_of_the_probabilities() -> None:
    assert set(said(DOG, BARE, 500, alias=0.0, broader=0.0)) == {"golden retriever"}
    assert set(said(DOG, BARE, 500, alias=1.0, broader=0.0)) == {"retriever", "goldie"}
    assert set(said(DOG, BARE, 500, alias=0.0, broader=1.0)) == {"dog", "animal"}


def test_without_other_words_there_is_the_name() -> None:
    assert set(said(CHAIN, BARE, 500, alias=0.5, broader=0.5)) == {"chain"}


def test_templates_by_their_weights() -> None:
    templates = [Template("a <>.", 1.0), Template("<>"), Template("the <> of <>", 6.0)]
    expected = {"a chain.": 0.125, "chain": 0.125, "the chain of chain": 0.75}
    assert shares(said(CHAIN, templates)) == pytest.approx(expected, abs=0.02)


def test_phrase_and_template_are_drawn_apart() -> None:
    texts = shares(said(DOG, [Template("a <>"), Template("b <>")], alias=0.5))
    expected = {f"{t} {p}": q / 2 for t in "ab" for p, q in zip(DOG.phrases, (0.5, 0.25, 0.25), strict=True)}
    assert texts == pytest.approx(expected, abs=0.02)


def test_captions_take_no_template() -> None:
    texts = said(TALE, [Template("a photo of a <>.")], alias=1.0, broader=0.0)
    assert shares(texts) == pytest.approx({"A dog runs.": 0.5, "Something <> brown.": 0.5}, abs=0.02)


def test_seed_step_and_place_decide() -> None:
    pairs = [DOG, CHAIN, TALE, DOG] * 3
    config = TrainConfig(batch_size=12, broader=0.2, seed=5)
    words = Words(config, TWO)
    whole = words.captions(pairs, 4, ALONE)
    assert words.captions(pairs, 4, ALONE) == whole == Words(config, TWO).captions(pairs, 4, ALONE)
    assert words.captions(pairs, 5, ALONE) != whole
    assert Words(replace(config, seed=6), TWO).captions(pairs, 4, ALONE) != whole
    for rank in range(3):
        assert words.captions(pairs[rank::3], 4, Share(rank, 3)) == whole[rank::3]
    assert [text for text, _ in whole] == AS_EVER  # runs go on with another version's code


def test_what_is_said_is_true() -> None:
    pairs = [DOG, CHAIN, TALE] * 200
    words = Words(TrainConfig(batch_size=600, alias=0.4, broader=0.4), BARE)
    for pair, (text, known) in zip(pairs, words.captions(pairs, 0, ALONE), strict=True):
        true = words.true_of(pair)
        assert true.dtype == np.int64 and len(true) == len(pair.phrases + pair.broader)
        assert known == true[(pair.phrases + pair.broader).index(text)]
    assert words.true_of(DOG) is words.true_of(Pair(Source("9.jpg"), DOG.phrases, DOG.broader, "golden retriever"))


def test_phrases_are_known_by_their_spelling() -> None:
    """In any case and spacing, whatever class or caption says them, on every machine."""
    words = Words(TrainConfig(), BARE)
    pairs = [
        Pair(Source("1"), ("Maine Coon", "cat"), (), "Maine Coon"),
        Pair(Source("2"), ("maine  coon",), ("Cat",), "x"),
        Pair(Source("3"), (" MAINE COON",)),
        Pair(Source("4"), ("mainecoon",)),
    ]
    first, second, third, fourth = (words.true_of(pair).tolist() for pair in pairs)
    assert first == second and third == first[:1] and fourth[0] not in first
    assert first[1] == 3429664268601861939


def test_examples_of_all_words() -> None:
    templates = [Template("a photo of a <>."), Template("<>")]
    texts = list(examples([DOG] * 10 + [CHAIN] + [TALE], templates))
    assert len(texts) == 10 + 1 + 2
    for word in DOG.phrases + DOG.broader:
        assert sum(word == text.removeprefix("a photo of a ").removesuffix(".") for text in texts[:10]) == 2
    assert texts[10] == "a photo of a chain." and texts[11:] == list(TALE.phrases)
    assert list(examples([CHAIN], [])) == ["chain"]
    assert list(examples([], templates)) == []
