"""The model that is part of the package: there by name, without a network, and honest about what it is."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny as made
from conftest import Run

from clipcli import ClassifyOptions, build_classifier, classify, load_model
from clipcli.errors import ModelError
from clipcli.paths import tiny_dir
from clipcli.records import Label
from clipcli.tasks.pairs import Pair, read_pairs
from clipcli.weights import fetch
from clipcli.weights.catalog import DEFAULT, MODELS, TINY
from clipcli.weights.describe import CARD
from clipcli.zeroshot import labels

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "LICENSE",
    "README.md",
    "merges.txt",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "training.json",
}
NOTICE = f"clipcli: tiny is a small model for trying out; default: {DEFAULT}\n"


@pytest.fixture(autouse=True)
def alone(cut_off: Path) -> Path:
    """No network, in a folder of our own."""
    return cut_off


# ---- the files


def test_the_package_holds_the_model() -> None:
    sizes = {path.name: path.stat().st_size for path in tiny_dir().iterdir()}
    assert sizes.keys() >= FILES and sum(sizes.values()) <= 12_000_000
    json.loads((tiny_dir() / "training.json").read_text(encoding="utf-8"))


def test_wheel_and_sdist_hold_the_model() -> None:
    builders = pytest.importorskip("hatchling.builders.wheel"), pytest.importorskip("hatchling.builders.sdist")
    for builder in (builders[0].WheelBuilder(str(ROOT)), builders[1].SdistBuilder(str(ROOT))):
        packed = {file.distribution_path for file in builder.recurse_included_files()}
        assert {f"clipcli/tiny/{name}" for name in FILES} <= packed


# ---- by name


def test_in_python(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clipcli"):
        model = load_model("tiny", device="cpu")
        vectors = model.encode_image(np.zeros((2, 3, *2 * [model.config.vision.image_size]), np.uint8))
    assert model.name == "tiny" and model.checkpoint.path == tiny_dir()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert [f"clipcli: {message}\n" for message in caplog.messages] == [NOTICE]


@pytest.mark.parametrize("name", ["tiny", "TINY", "clipcli/tiny", str(tiny_dir())])
def test_classify(cli: Run, photos: Path, name: str) -> None:
    result = cli("classify", photos, "-L", "cat", "-L", "coffee", "-m", name, "-f", "jsonl")
    assert result.code == 3 and len(result.rows) == 6  # one of the photos is broken
    assert all(row["label"] in ("cat", "coffee") for row in result.rows if not row["error"])
    assert result.err.startswith(NOTICE) and result.err.count("trying out") == 1


def test_quietly(cli: Run, photos: Path) -> None:
    assert cli("classify", photos / "chelsea.png", "-L", "cat", "-L", "dog", "-m", "tiny", "-q").err == ""


def test_its_classifier_is_its_own(cli: Run, photos: Path, model: Path) -> None:
    built = cli("build-classifier", "-L", "cat", "-L", "dog", "-m", "tiny", "-o", "my.safetensors")
    assert built.code == 0 and built.err.startswith(NOTICE)
    used = cli("classify", photos / "chelsea.png", "-c", "my.safetensors", "-m", "tiny")
    assert used.code == 0 and used.err.startswith(NOTICE)
    other = cli("classify", photos / "chelsea.png", "-c", "my.safetensors", "-m", model)
    assert other.code == 1 and "tiny" in other.err


def test_labels_with_its_vocabulary(cli: Run) -> None:
    Path("labels.txt").write_text("cat\ndog\n")
    result = cli("labels", "show", "labels.txt", "-m", "tiny", "-t", "simple")
    assert result.code == 0 and [line.split("\t")[0] for line in result.lines] == ["cat", "dog"]
    assert all(int(line.split("\t")[2]) > 2 for line in result.lines)


def test_from_the_environment_and_settings(cli: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("classify", photos / "chelsea.png", "-L", "cat", "-L", "dog")
    Path("clipcli.toml").write_text('model = "tiny"\n')
    assert cli(*arguments).err.startswith(NOTICE)
    found = json.loads(cli("doctor", "--json").out)
    assert not [finding for finding in found["findings"] if "tiny" in finding["text"]]
    Path("clipcli.toml").unlink()
    monkeypatch.setenv("CLIPCLI_MODEL", "tiny")
    assert cli(*arguments).err.startswith(NOTICE)


# ---- models


def test_list(cli: Run) -> None:
    result = cli("models", "list")
    row = next(line.split() for line in result.lines if line.startswith("tiny "))
    assert row[-1] == "shipped" and "B" in row[4] and f"{len(MODELS)} models, 1 here" in result.err
    rows = {row["name"]: row for row in json.loads(cli("models", "list", "--json").out)}
    shipped = rows["tiny"]
    assert shipped["shipped"] and shipped["path"] == str(tiny_dir()) and shipped["repository"] is None
    assert shipped["download"] == (tiny_dir() / "open_clip_model.safetensors").stat().st_size
    assert shipped["parameters"] > 0 and shipped["image_size"] == 96 and shipped["imagenet_top1"] is None
    assert [name for name, row in rows.items() if row["shipped"]] == ["tiny"]


def test_info_says_what_the_card_says(cli: Run) -> None:
    facts = json.loads(cli("models", "info", "tiny", "--json").out)
    card = " ".join((tiny_dir() / "README.md").read_text(encoding="utf-8").split())
    assert all(len(facts[name]) > 5 and facts[name] in card for name in CARD.values())
    assert {facts["sources"][name] for name in CARD.values()} == {"README.md"}
    assert facts["shipped"] is True and facts["licence"] == TINY.licence
    assert "repository" not in facts and "imagenet_top1" not in facts
    page = cli("models", "info", "tiny").out.decode()
    assert facts["terms"] in page and "with clipcli: nothing is downloaded" in page


def test_a_stranger_s_card_is_not_quoted(cli: Run) -> None:
    folder = made.save(Path("m"))
    (folder / "README.md").write_bytes(b"# m\xff\n\n## How to use\n\nAt your own risk.\n\n## Terms\nNone.\n\nAt all.\n")
    facts = json.loads(cli("models", "info", folder, "--json").out)
    assert facts["terms"] == "None." and not {"knows", "does_not_know", "trained_on"} & facts.keys()


def test_pull(cli: Run) -> None:
    result = cli("models", "pull", "tiny")
    assert (result.code, result.out) == (0, os.fsencode(tiny_dir()) + b"\n")
    assert result.err == "clipcli: tiny comes with clipcli: nothing to download\n"


def test_verify(cli: Run) -> None:
    result = cli("models", "verify", "tiny", "-d", "cpu")
    assert result.code == 0 and result.err.startswith(NOTICE) and "right, against fp32" in result.err


# ---- what may go wrong


def test_it_has_no_revisions(cli: Run) -> None:
    result = cli("models", "pull", "tiny@v1")
    assert result.code == 1 and result.err.startswith(
        "clipcli: tiny@v1: tiny comes with clipcli and has no revisions\n"
    )


def test_a_folder_of_its_name_comes_first_and_is_told(cli: Run, photos: Path) -> None:
    made.save(Path("tiny"))
    arguments = ("classify", photos / "chelsea.png", "-L", "cat", "-L", "dog", "-m")
    hidden = "clipcli: tiny is taken as the path that it is here; the model of that name is clipcli/tiny\n"
    assert cli(*arguments, "tiny").err.startswith(hidden + "clipcli: 1 picture")
    assert cli(*arguments, "./tiny").err.startswith("clipcli: 1 picture")
    assert cli(*arguments, "clipcli/tiny").err.startswith(NOTICE)
    facts = cli("models", "info", "tiny")
    assert facts.err == hidden and "shipped" not in facts.out.decode()


def test_an_installation_without_it(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_dir(), tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(fetch, "tiny_dir", lambda: tmp_path / "tiny")
    with pytest.raises(ModelError, match="tiny is not in this installation"):
        load_model("tiny")
    assert "missing" in cli("models", "info", "tiny").out.decode()
    assert not next(line for line in cli("models", "list").lines if line.startswith("tiny ")).endswith("shipped")


# ---- accuracy: figures measured with the weights that are committed, see benchmarks/tiny/


@pytest.mark.timeout(300)
def test_it_tells_its_200_classes_apart(pictures: Path) -> None:
    """Chance is 0.5 %; the figures of the card are of the same 4,000 pictures."""
    table = ROOT / "benchmarks" / "tiny" / "words.csv"
    words = {label.name: label for label in labels.read(str(table))}
    pairs = [
        pair for pair in read_pairs([str(pictures / "tiny-imagenet-val-dev.tar.gz")], words) if isinstance(pair, Pair)
    ]
    model = load_model("tiny", device="cpu")
    classifier = build_classifier(model, [Label(name, (name,)) for name in words])
    rows = classify([pair.source for pair in pairs], classifier, model, ClassifyOptions(top_k=5))
    answers = [
        (row.label == pair.label, pair.label in [one.label for one in row.top])
        for row, pair in zip(rows, pairs, strict=True)
    ]
    top1, top5 = np.mean(answers, axis=0)
    assert len(answers) == 4000 and top1 >= 0.33 and top5 >= 0.60
