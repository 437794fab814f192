"""Vocabularies learned from captions: against a trainer that recounts everything, and read by the tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from clipcli.errors import UsageError
from clipcli.tokenizer import Tokenizer, spell, words_of
from clipcli.train.vocabulary import HEADER, LONGEST, SMALLEST, learn_merges, train_vocabulary

ANIMALS = ["a photo of a tabby cat.", "a photo of a heron.", "a blurry photo of the cat.", "many herons in a photo."]


def naive(captions: list[str], most: int) -> list[tuple[str, str]]:
    """The merges, all pairs counted again for each; a pair that would spell an existing token is passed over."""
    words = [spell(word) for caption in captions for word in words_of(caption)]
    merges: dict[str, tuple[str, str]] = {}
    while len(merges) < most:
        counts = Counter(pair for word in words for pair in pairwise(word))
        counts = Counter({pair: count for pair, count in counts.items() if "".join(pair) not in merges})
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges["".join(best)] = best
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return list(merges.values())


def trained(folder: Path, captions: list[str], size: int) -> Tokenizer:
    text, real = train_vocabulary(captions, size)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return Tokenizer.from_file(folder / "merges.txt", real)


@pytest.mark.parametrize("seed", range(30))
def test_equals_a_trainer_that_recounts_everything(seed: int) -> None:
    generator = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé1.' "
    captions = ["".join(generator.choices(letters, k=generator.randint(0, 24))) for _ in range(40)]
    most = generator.choice([3, 40, 1000])
    text, size = train_vocabulary(captions, SMALLEST + most)
    expected = naive(captions, most)
    assert text.splitlines() == [HEADER, *(" ".join(pair) for pair in expected)]
    assert size == SMALLEST + len(expected)


def test_equals_it_where_two_pairs_spell_the_same_token() -> None:
    captions = ["aaaaa aaaaaaa aaaaaaaaaaa aaaaaaaaaaaaa", "baaaab aabaab aaaabaaaa"] * 3
    merges = learn_merges(Counter(word for caption in captions for word in words_of(caption)), 500)
    assert merges == naive(captions, 500)
    assert len({"".join(pair) for pair in merges}) == len(merges)


def test_the_tokenizer_cuts_words_as_training_did(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, ANIMALS * 5, 1000)
    assert tokenizer.tokens("A photo of a CAT.") == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>", ".</w>"]
    (ids,) = tokenizer(["a heron"])
    assert (ids[0], ids[-1]) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert tokenizer.decode(ids) == "a heron"


def test_what_was_never_seen_is_spelled(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, ANIMALS * 5, 1000)
    for text in ("zebra", "日本の猫", "ñandú 🐈", "x" * 300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_beyond_ascii_becomes_tokens(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, ["写真 の 猫", "ein Bär &amp; ein Bär", "猫 写真"] * 9, 5000)
    assert len(tokenizer.encode("猫 写真 bär &")) == 4


def test_the_size_is_kept_or_told() -> None:
    text, size = train_vocabulary(ANIMALS * 3, 520)
    assert (size, len(text.splitlines())) == (520, 7)
    assert text.startswith("#version: 0.2\n") and text.endswith("\n")
    assert train_vocabulary(ANIMALS * 3, 10**9)[1] < 700
    assert train_vocabulary(ANIMALS * 3, SMALLEST) == ("#version: 0.2\n", SMALLEST)


def test_what_is_seen_once_is_no_pattern() -> None:
    assert train_vocabulary(["quick", "brown"], 600)[1] == SMALLEST


@pytest.mark.parametrize("captions", [[], ["", "  ", "\n"]], ids=["none", "blank"])
def test_without_words_the_letters_remain(captions: list[str], tmp_path: Path) -> None:
    assert trained(tmp_path, captions, 600).decode(trained(tmp_path, captions, 600).encode("cat")) == "cat"


def test_order_and_form_of_the_captions_do_not_matter() -> None:
    captions = [f"{animal} number {i}" for i, animal in enumerate(["heron", "cat", "Tabby", "owl"] * 30)]
    shuffled = random.Random(1).sample(captions, len(captions))
    assert train_vocabulary(captions, 600) == train_vocabulary(iter(shuffled), 600)


def test_endless_words_cost_nothing() -> None:
    assert train_vocabulary(["ab" * 500_000] * 2, 8192)[1] == SMALLEST
    assert train_vocabulary(["x" * LONGEST] * 2, 8192)[1] > SMALLEST


def test_half_characters_are_no_accident(tmp_path: Path) -> None:
    assert trained(tmp_path, ["gr\udcfcn"] * 3, 600).encode("gr\udcfcn")


@pytest.mark.parametrize("size", [513, 0, -1])
def test_too_small_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="512 letters") as caught:
        train_vocabulary(ANIMALS, size)
    assert caught.value.hint and "514" in caught.value.hint
