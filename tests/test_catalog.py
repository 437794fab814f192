"""The catalogue: names, ids and sizes as published, and what comes near a name."""

from __future__ import annotations

import re

import pytest

from clipcli.weights import catalog
from clipcli.weights.catalog import MODELS, find, find_repo, near, size_text


def test_every_name_means_one_model() -> None:
    names = [name.lower() for entry in MODELS for name in (entry.name, *entry.aliases)]
    repos = [repo.lower() for entry in MODELS if not entry.shipped for repo in (entry.repo, *entry.twins)]
    assert len(set(names)) == len(names) and len(set(repos)) == len(repos)
    assert all(find(name) for name in names) and all(find_repo(repo) for repo in repos)
    assert not any(find(repo) for repo in repos) and not any("/" not in repo for repo in repos)


@pytest.mark.parametrize(
    "original",
    ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"],
)
def test_the_original_names(original: str) -> None:
    found = find(original)
    assert found and found.name.endswith("-openai") and found.repo.startswith("timm/")
    assert {find(original.replace("/", "-")), find(original.lower()), find(original.upper())} == {found}


def test_the_default_is_there_and_free() -> None:
    default = find(catalog.DEFAULT)
    assert default and (default.licence, default.image_size, default.top1) == ("MIT", 256, 72.81)


@pytest.mark.parametrize(
    ("name", "millions", "size"),
    [  # as the original paper's repository and open_clip's tables have them
        ("RN50", 102.01, 224),
        ("RN101", 119.69, 224),
        ("RN50x4", 178.3, 288),
        ("RN50x16", 290.98, 384),
        ("RN50x64", 623.26, 448),
        ("ViT-B/32", 151.28, 224),
        ("ViT-B/16", 149.62, 224),
        ("ViT-L/14", 427.62, 224),
        ("ViT-L/14@336px", 427.94, 336),
        (catalog.DEFAULT, 151.29, 256),
    ],
)
def test_sizes_follow_from_the_architecture(name: str, millions: float, size: int) -> None:
    entry = find(name)
    assert entry and entry.config and entry.download
    count = sum(catalog.parameters(entry.config).values())
    assert round(count / 1e6, 2) == millions and entry.image_size == size
    assert entry.download == pytest.approx(4 * count, rel=0.003)


def test_what_is_not_known_is_left_out() -> None:
    entry = find("ViT-H-14-378-dfn5b")
    assert entry and (entry.config, entry.download, entry.image_size) == (None, None, 378)
    tiny = find("TinyCLIP-ViT-39M-16")
    assert tiny and tiny.image_size is None


def test_overrides_and_licences() -> None:
    squashed = {entry.name for entry in MODELS if entry.resize_mode == "squash"}
    assert squashed == {"ViT-H-14-dfn5b", "ViT-H-14-378-dfn5b"}
    on_the_hub = [entry for entry in MODELS if not entry.shipped]
    assert {entry.repo.partition("/")[0] for entry in on_the_hub if entry.licence != "MIT"} == {"apple", "timm"}
    assert all(re.fullmatch(r"\d\d\.\d{1,2}", f"{entry.top1}") for entry in on_the_hub)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("vit-b-32-256-datacmp", catalog.DEFAULT),
        ("ViT-B/23", "ViT-B-32-openai"),
        ("laion/CLIP-ViT-B-32-256x256-DataComp-s34B", catalog.DEFAULT),
        ("RN50x46", "RN50x4-openai"),
    ],
)
def test_near_names(typed: str, nearest: str) -> None:
    assert near(typed)[0] == nearest


def test_nothing_comes_near_nonsense() -> None:
    assert near("qqqq") == []


def test_sizes_in_words() -> None:
    sizes = (0, 999, 1000, 605_000_000, 999_499_999, 999_500_000, 12_340_000_000)
    assert [size_text(size) for size in sizes] == ["0 B", "999 B", "1 kB", "605 MB", "999 MB", "1.0 GB", "12.3 GB"]
