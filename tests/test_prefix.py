"""The fast text tower against the plain one, and what it computes, counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.model import prefix
from clipcli.model.clip import build_text_tower
from clipcli.model.config import Activation
from clipcli.model.prefix import ON_CPU, Sizes, plan
from clipcli.model.text import TextTransformer
from clipcli.tokenizer import Tokenizer, cut
from clipcli.weights.model import load_model
from clipcli.zeroshot import templates as template_sets

LABELS = ["cat", "tabby cat", "bird", "heron", "black-and-white bird (of prey)", "blue car", "ball", "a", "cat"]
TEMPLATES = [
    "a photo of a <>.",
    "a photo of a small <>.",
    "a photo of the <>, seen from below.",
    "<> in a photo.",  # nothing before the label
    "<>",
    "a photo of many <>.",
    "itap of my <>: a <>!",
]
SMALL = Sizes(90, 3)  # groups and batches even of few prompts


def tower_of(folder: Path, activation: Activation = "gelu") -> tuple[TextTransformer, Tokenizer]:
    model = load_model(tiny.save(folder, config=tiny.vit(activation=activation)), device="cpu")
    tower = build_text_tower(model.config, model.checkpoint.tower("text"))
    assert isinstance(tower, TextTransformer)
    return tower, model.tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTransformer, Tokenizer]:
    return tower_of(tmp_path_factory.mktemp("tower"))


def plain(tower: TextTransformer, ids: Sequence[Sequence[int]], context: int = 77) -> torch.Tensor:
    """What the reference makes of prompts that are padded to the context length."""
    padded = torch.zeros(len(ids), context, dtype=torch.long)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    with torch.inference_mode():
        return tower(padded)


def fast(tower: TextTransformer, ids: Sequence[Sequence[int]], pack: bool = False) -> torch.Tensor:
    out = torch.full((len(ids), tower.text_projection.shape[1]), torch.nan, dtype=tower.text_projection.dtype)
    seen: list[int] = []
    for indices, vectors in prefix.encode(prefix.FastText(tower, pack=pack), ids):
        out[indices] = vectors
        seen += indices
    assert sorted(seen) == list(range(len(ids)))  # each once
    return out


def check(tower: TextTransformer, ids: Sequence[Sequence[int]]) -> None:
    expected = plain(tower, ids)
    assert expected.std() > 0.1
    for pack in (False, True):
        torch.testing.assert_close(fast(tower, ids, pack), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [ON_CPU, SMALL, Sizes(1, 0)], ids=["cpu", "small", "alone"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equal_to_the_padded_result(
    tmp_path: Path, activation: Activation, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels in templates, some of which begin alike or with the label; equal prompts; one token; cut."""
    tower, tokenizer = tower_of(tmp_path, activation)
    monkeypatch.setattr(prefix, "ON_CPU", sizes)
    ids = tokenizer(template.replace("<>", label) for label in LABELS for template in TEMPLATES)
    ids += tokenizer(["", "", "cat", "a photo of a", "a photo of a cat."])
    ids += [cut(row, 77) for row in tokenizer(["a photo of a " + "cat " * n for n in (71, 72, 73, 200)])]
    assert max(map(len, ids)) == 77
    groups = plan({tuple(row) for row in ids}, sizes)
    assert (len(groups) > 4) == (sizes != ON_CPU)
    check(tower, ids)


def test_the_end_token_is_the_first_of_the_largest_id(small: tuple[TextTransformer, Tokenizer]) -> None:
    """As in the plain tower, whatever stands behind it, and where there is none."""
    tower, tokenizer = small
    end = tokenizer.end_token
    check(tower, [[5, 9, end, end, 0], [5, 9, end], [end], [end, 3], [7], [3, 7, 7], [3, 7], [3, 9, 7], [3, 9, 8, 10]])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=40), st.integers(0, 4))
def test_equal_whatever_the_prompts_share(
    small: tuple[TextTransformer, Tokenizer], rows: list[list[int]], cost: int
) -> None:
    tower, tokenizer = small
    ids = [[*row, tokenizer.end_token] for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "ON_CPU", Sizes(20, cost))
        check(tower, ids)


@settings(deadline=None, max_examples=200)
@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple), max_size=60), st.integers(0, 9))
def test_each_row_is_in_one_batch_behind_its_prefix(rows: set[tuple[int, ...]], cost: int) -> None:
    groups = plan(rows, Sizes(12, cost))
    found = [row for group in groups for batch in group.batches for row in batch]
    assert sorted(found) == sorted(rows)
    for group in groups:
        start = len(group.prefix)
        for batch in group.batches:
            assert all(row[:start] == group.prefix and len(row) > start for row in batch)
            assert batch == sorted(batch, key=len)
            assert len(batch) == 1 or sum(len(row) - start for row in batch) <= 12
    assert sum(group.positions for group in groups) <= sum(map(len, rows))


def test_plan_by_hand() -> None:
    """Two prefixes, of which one begins like the other; what is left over shares the empty one."""
    labels = [(n,) for n in range(10, 30)]
    short, long = (1, 2, 3), (1, 2, 3, 4, 5, 6)
    rows = [(*begin, *label, 99) for begin in (short, long) for label in labels] + [(7, 99), (99,)]
    groups = plan(rows, Sizes(1000, 5))
    assert [group.prefix for group in groups] == [long, short, ()]
    assert [group.positions for group in groups] == [6 + 20 * 2, 3 + 20 * 2, 2 + 1]
    assert groups[2].batches == [[(99,), (7, 99)]]
    assert [group.prefix for group in plan(rows, Sizes(1000, 10_000))] == [()]
    assert plan([]) == []


def test_half_precision_is_near(small: tuple[TextTransformer, Tokenizer], tmp_path: Path) -> None:
    tower, tokenizer = small
    ids = tokenizer(template.replace("<>", label) for label in LABELS for template in TEMPLATES)
    expected = plain(tower, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "ON_CPU", SMALL)
        half = fast(tower_of(tmp_path)[0].to(torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), expected).min() > 0.999


# ---- what is computed


class Counted:
    """Token positions that were looked up: what goes through the tower."""

    def __init__(self, tower: TextTransformer) -> None:
        self.positions = self.calls = 0
        tower.token_embedding.register_forward_hook(self.count)

    def count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.positions += inputs[0].numel()
        self.calls += 1


def test_the_tower_computes_what_was_planned(tmp_path: Path) -> None:
    tower, tokenizer = tower_of(tmp_path)
    counted = Counted(tower)
    names = [f"{a} {b}" for a in ("red", "blue", "green", "tall", "toy") for b in tiny.WORDS.split()[:60]]
    ids = tokenizer(template.replace("<>", name) for name in names for template in TEMPLATES)
    fast(tower, [*ids, *ids[:50]])
    groups = plan({tuple(row) for row in ids})
    assert len(groups) >= 5
    assert counted.calls == sum(len(group.batches) + bool(group.prefix) for group in groups)
    assert counted.positions == sum(group.positions for group in groups)
    assert counted.positions < 0.8 * sum(map(len, ids))
    assert all(sum(map(len, b)) - len(b) * len(g.prefix) <= 1500 for g in groups for b in g.batches)


def test_a_store_that_knows_all_prompts_builds_no_tower(tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path), device="cpu")
    assert list(model.encode_text([])) == []
    assert "_text_tower" not in vars(model)


def test_a_thousand_labels_in_eighty_templates(reference: Path) -> None:
    """No more positions than with one prefix a template and no padding, where padding makes 6.16 M of them."""
    names = (reference / "templates" / "imagenet_classes.txt").read_text("utf-8").splitlines()
    tokenizer = Tokenizer.from_file(reference / "merges.txt", 49_408)
    templates = [template.text for template in template_sets.read(["imagenet80"])]
    ids = tokenizer(template.replace("<>", name) for template in templates for name in names)
    groups = plan({tuple(row) for row in ids})
    assert len(ids) == 80_000
    assert sum(len(batch) for group in groups for batch in group.batches) == 998 * 80
    assert len(groups) == 80
    assert sum(group.positions for group in groups) <= 342_000


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [prefix.ON_GPU, SMALL], ids=["gpu", "small"])
def test_cuda_equals_cpu(
    small: tuple[TextTransformer, Tokenizer], tmp_path: Path, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tower, tokenizer = small
    monkeypatch.setattr(prefix, "ON_GPU", sizes)
    ids = tokenizer(template.replace("<>", label) for label in LABELS for template in TEMPLATES)
    expected = plain(tower, ids)
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 0.02)):
        there = tower_of(tmp_path)[0].to("cuda", dtype)
        assert (fast(there, ids).float() - expected).abs().max() <= most * max(1, float(expected.abs().max()))
