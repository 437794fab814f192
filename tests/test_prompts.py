"""Filling templates, counting tokens, and the message for a prompt that is too long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from clipcli.errors import LabelError
from clipcli.records import Label, Prompt, Template
from clipcli.tokenizer import Tokenizer
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_sets
from clipcli.zeroshot.prompts import fill, tokenize

TEMPLATES = [Template("a photo of a <>."), Template("<>, <>!", 2.0)]


class Counting(Tokenizer):
    """A tokenizer that remembers what it was asked."""

    asked: list[str]

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        kept = list(texts)
        self.asked.extend(kept)
        return super().__call__(kept)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Counting:
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\nc a\nca t</w>\n")
    made = Tokenizer.from_file(path)
    counting = Counting(made._ranks, made._ids)
    counting.asked = []
    return counting


def test_fill_goes_label_by_label() -> None:
    labels = [Label("n1", ("cat", "tiger  cat"), ("it purrs",)), Label("dog", ("dog",))]
    assert fill(labels, TEMPLATES) == [
        Prompt("a photo of a cat.", 0, 1.0, "a photo of a <>.", "cat"),
        Prompt("cat, cat!", 0, 2.0, "<>, <>!", "cat"),
        Prompt("a photo of a tiger  cat.", 0, 1.0, "a photo of a <>.", "tiger  cat"),
        Prompt("tiger  cat, tiger  cat!", 0, 2.0, "<>, <>!", "tiger  cat"),
        Prompt("it purrs", 0),
        Prompt("a photo of a dog.", 1, 1.0, "a photo of a <>.", "dog"),
        Prompt("dog, dog!", 1, 2.0, "<>, <>!", "dog"),
    ]


def test_a_placeholder_in_a_label_stays() -> None:
    assert fill([Label("x", ("<>",))], TEMPLATES)[1].text == "<>, <>!"


def test_descriptions_alone() -> None:
    assert fill([Label("cat", (), ("it purrs", "it mews"))], TEMPLATES) == [
        Prompt("it purrs", 0),
        Prompt("it mews", 0),
    ]


@pytest.mark.parametrize(
    ("label", "templates"),
    [(Label("cat", (), where="a:1"), TEMPLATES), (Label("cat", ("cat",), where="a:1"), [])],
)
def test_a_label_without_prompts(label: Label, templates: list[Template]) -> None:
    with pytest.raises(LabelError, match=r'^a:1: label "cat" has no prompt$') as error:
        fill([label], templates)
    assert error.value.hint


def test_tokenize_encodes_each_text_once(tokenizer: Counting) -> None:
    labels = [Label("a", ("cat",)), Label("b", ("cat", "dog"))]
    ids = tokenize(fill(labels, TEMPLATES[:1]), labels, tokenizer, 77)
    assert tokenizer.asked == ["a photo of a cat.", "a photo of a dog."]
    assert len(ids) == 3
    assert ids[0] == ids[1] == tokenizer(["a photo of a cat."])[0]
    assert (ids[2][0], ids[2][-1]) == (tokenizer.start_token, tokenizer.end_token)


def test_too_long_names_label_template_and_count(tokenizer: Counting) -> None:
    words = "cat " * 6
    labels = [Label("dog", ("cat",)), Label("x" * 70, (words.strip(),), where="labels.txt:7")]
    prompts = fill(labels, [Template("<>"), Template("<> cat <>")])
    assert [len(ids) for ids in tokenize(prompts, labels, tokenizer, 15)] == [3, 5, 8, 15]
    with pytest.raises(LabelError) as error:
        tokenize(prompts, labels, tokenizer, 14)
    short = "x" * 59 + "…"
    assert error.value.message == f'labels.txt:7: label "{short}" with template "<> cat <>" makes 15 tokens, 14 fit'
    assert error.value.hint == "shorten it, or cut it with --truncate"


def test_too_long_a_description(tokenizer: Counting) -> None:
    labels = [Label("cat", ("cat",), ("cat cat cat",))]
    with pytest.raises(LabelError, match=r'^label "cat" with description "cat cat cat" makes 5 tokens, 4 fit$'):
        tokenize(fill(labels, [Template("<>")]), labels, tokenizer, 4)


def test_truncate_keeps_the_end_token(tokenizer: Counting) -> None:
    labels = [Label("cat", ("cat cat cat cat",))]
    (ids,) = tokenize(fill(labels, [Template("<>")]), labels, tokenizer, 4, truncate=True)
    assert ids == [*tokenizer(["cat cat"])[0]]


def test_a_thousand_labels_in_eighty_templates(reference: Path) -> None:
    names = (reference / "templates" / "imagenet_classes.txt").read_text("utf-8").splitlines()
    labels = label_files.from_names(dict.fromkeys(names))
    tokenizer = Tokenizer.from_file(reference / "merges.txt", 49_408)
    start = time.process_time()
    prompts = fill(labels, template_sets.read(["imagenet80"]))
    ids = tokenize(prompts, labels, tokenizer, 77)
    assert time.process_time() - start < 5
    assert len(ids) == len(prompts) == 998 * 80
    assert prompts[0].text == f"a photo of a {names[0]}."
    assert prompts[-1].label == 997
