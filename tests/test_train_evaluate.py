"""Accuracy while a model trains: what `classify` answers, counted; and the curves and the card of a run."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clipcli import build_classifier, classify, load_model
from clipcli.errors import ModelError, OutputError, UsageError
from clipcli.model.clip import CLIP
from clipcli.records import Prediction, Source, Template
from clipcli.tasks.pairs import Pair
from clipcli.tokenizer import Tokenizer
from clipcli.train import evaluate, run
from clipcli.train.card import card
from clipcli.train.checkpoint import State
from clipcli.train.config import TrainConfig
from clipcli.train.evaluate import EvalSet, Evaluator, read_set
from clipcli.train.feed import Feed
from clipcli.train.loop import Trainer
from clipcli.train.plot import _NO_SETS, plot
from clipcli.weights.model import Model
from clipcli.zeroshot import templates as template_files

LABELS = ("cat", "dog", "heron", "rocket", "large blue house")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(model: Path) -> Model:
    return load_model(model, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def clip(opened: Model) -> CLIP:
    """The same model as training has it."""
    clip = CLIP(opened.config)
    clip.load_state_dict({name: torch.from_numpy(array) for name, array in opened.checkpoint.arrays.items()})
    return clip.eval()


def pictures(folder: Path, count: int, size: tuple[int, int] | None = None) -> list[Path]:
    """Coarse noise of many proportions."""
    random = np.random.default_rng(0)
    paths = []
    folder.mkdir(parents=True)
    for i in range(count):
        shape = size or tuple(random.integers(20, 80, 2))
        noise = Image.fromarray(random.integers(0, 256, (2 + i % 4, 3, 3), np.uint8)).resize(shape)
        paths.append(folder / f"{i:03}.png")
        noise.save(paths[-1])
    return paths


def into_classes(paths: list[Path], names: list[str], folder: Path) -> Path:
    for path, name in zip(paths, names, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / path.name).write_bytes(path.read_bytes())
    return folder


def answers(opened: Model, paths: list[Path], templates: str | list[str]) -> list[str]:
    classifier = build_classifier(opened, LABELS, templates=templates)
    rows = list(classify([str(path) for path in paths], classifier, opened))
    assert all(isinstance(row, Prediction) for row in rows)
    return [str(row.label) for row in rows]


def evaluator(opened: Model, templates: str | list[str]) -> Evaluator:
    specs = [templates] if isinstance(templates, str) else templates
    return Evaluator(opened.config, opened.tokenizer, template_files.read(specs), CPU)


def mixed(answers: list[str]) -> list[str]:
    """Class names of which some are the answers, and every class is among them."""
    names = [name if i % 3 else LABELS[i % 5] for i, name in enumerate(answers)]
    assert set(names) == set(LABELS) and 0.4 < sum(map(str.__eq__, names, answers)) / len(names) < 0.95
    return names


# Accuracy


@pytest.mark.parametrize("templates", ["imagenet7", "weighted", ["a <>.", "<>"]], ids=str)
def test_is_what_classify_answers(
    opened: Model, clip: CLIP, templates: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if templates == "weighted":
        (tmp_path / "weighted.txt").write_text("30\ta red <>.\na photo of a <>.\n0.1\t<> on the moon\n")
        templates = str(tmp_path / "weighted.txt")
    monkeypatch.setattr(evaluate, "BATCH", 16)  # several of them
    paths = pictures(tmp_path / "all", 60)
    given = answers(opened, paths, templates)
    for number, names in enumerate((mixed(given), [*given[:-5], *LABELS])):
        folder = into_classes(paths, names, tmp_path / f"set{number}")
        of = read_set("mine", str(folder), opened.config, {})
        assert of.name == "mine" and len(of.pairs) == 60 and not of.failed
        right = sum(map(str.__eq__, names, given))
        assert evaluator(opened, templates).on_set(clip, of, nullcontext()) == right / 60


def test_templates_weigh_what_they_should(opened: Model, clip: CLIP) -> None:
    pairs = [Pair(Source(f"{i}"), (name,), (), name) for i, name in enumerate(LABELS)]
    templates = [Template("a red <>.", 30.0), Template("a <>.", 0.5)]
    weight = Evaluator(opened.config, opened.tokenizer, templates, CPU)._weight(clip, pairs)
    ids = opened.tokenizer(t.text.replace("<>", name) for name in LABELS for t in templates)
    vectors = np.zeros((10, 16), np.float32)
    for indices, some in opened.encode_text(list(ids)):
        vectors[indices] = some
    mean = 30 * vectors[::2] + 0.5 * vectors[1::2]
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-6)


def test_prompts_that_are_too_long_are_cut_as_elsewhere(opened: Model, clip: CLIP, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "all", 12)
    template = "<> photo" + " a" * 80
    classifier = build_classifier(opened, LABELS, templates=template, truncate=True)
    given = [str(row.label) for row in classify([str(path) for path in paths], classifier, opened)]
    of = read_set("x", str(into_classes(paths, [*LABELS, *given[5:]], tmp_path / "set")), opened.config, {})
    right = sum(map(str.__eq__, [*LABELS, *given[5:]], given))
    assert evaluator(opened, template).on_set(clip, of, nullcontext()) == pytest.approx(right / 12)


def held_out(paths: list[str], **changes: Any) -> Feed:
    config = TrainConfig(**{"batch_size": 2, "canvas": 32, "hold_out": 0.5, **changes})
    feed = Feed(paths, config, image_size=32)
    feed.find()
    return feed


@pytest.mark.parametrize("keep_gb", [1.0, 0.0], ids=["kept", "streamed"])
def test_held_out_pictures(opened: Model, clip: CLIP, tmp_path: Path, keep_gb: float) -> None:
    """Pictures of the model's own size come to it as they are: its answers are those of `classify`."""
    paths = pictures(tmp_path / "all", 60, (32, 32))
    names = mixed(answers(opened, paths, "imagenet7"))
    given = dict(zip((path.name for path in paths), answers(opened, paths, "imagenet7"), strict=True))
    feed = held_out([str(into_classes(paths, names, tmp_path / "set"))], keep_gb=keep_gb)
    assert len(feed.held) == 30
    pairs = [feed.pairs[i] for i in feed.held]
    assert {pair.label for pair in pairs} == set(LABELS)
    right = sum(given[os.path.basename(pair.source.path)] == pair.label for pair in pairs)
    assert 0 < right < 30
    assert evaluator(opened, "imagenet7").on_held_out(clip, feed, nullcontext()) == right / 30


def captioned(folder: Path, count: int) -> Path:
    paths = pictures(folder / "all", count, (32, 32))
    captions = [f"a {LABELS[i % 5]} with <> number {i % 17} {i // 17}" for i in range(count)]
    lines = [f"all/{path.name},{caption}" for path, caption in zip(paths, captions, strict=True)]
    (folder / "captions.csv").write_text("\n".join(["path,caption", *lines, ""]))
    return folder / "captions.csv"


def test_a_picture_must_find_its_caption(
    opened: Model, clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = held_out([str(captioned(tmp_path, 40))])
    pairs = [feed.pairs[i] for i in feed.held]
    ids = opened.tokenizer(pair.phrases[0] for pair in pairs)  # no template around them, `<>` as it is
    text = np.zeros((20, 16), np.float32)
    for indices, vectors in opened.encode_text(list(ids)):
        text[indices] = vectors
    image = opened.encode_image(np.stack([np.asarray(Image.open(p.source.path)).transpose(2, 0, 1) for p in pairs]))
    judge = evaluator(opened, "imagenet7")
    best = (image @ text.T).argmax(axis=1)
    assert judge.on_held_out(clip, feed, nullcontext()) == (best == np.arange(20)).mean()
    monkeypatch.setattr(evaluate, "MOST_CLASSES", 3)  # then the others don't count, as right or as wrong
    best = (image @ text[:3].T).argmax(axis=1)[:3]
    assert judge.on_held_out(clip, feed, nullcontext()) == pytest.approx((best == np.arange(3)).mean())
    assert (best == np.arange(3)).any()


def test_nothing_held_out_is_no_division_by_zero(opened: Model, clip: CLIP) -> None:
    empty = EvalSet("none", (), (), ())
    judge = evaluator(opened, "imagenet7")
    assert judge._top1(clip, empty.pairs, iter(())) == 0


# Sets


def test_a_set_and_what_fails_in_it(opened: Model, tmp_path: Path) -> None:
    folder = into_classes(pictures(tmp_path / "all", 4), ["cat", "dog", "cat", "dog"], tmp_path / "set")
    (folder / "cat" / "torn.png").write_bytes((folder / "cat" / "000.png").read_bytes()[:60])
    of = read_set("mine", str(folder), opened.config, {})
    assert [pair.label for pair in of.pairs] == ["cat", "cat", "dog", "dog"]
    assert len(of.pixels) == 4 and all(pixels.shape == (3, 32, 32) for pixels in of.pixels)
    assert [os.path.basename(failure.path) for failure in of.failed] == ["torn.png"]


def test_a_set_in_an_archive_keeps_no_bytes(opened: Model, tmp_path: Path) -> None:
    (path,) = pictures(tmp_path / "all", 1)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        for name, data in (("1.png", path.read_bytes()), ("1.cls", b"0"), ("1.txt", b"cat")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    of = read_set("x", str(tmp_path / "set.tar.gz"), opened.config, {})
    assert of.pairs[0].label == "cat" and of.pairs[0].source.data is None


def test_sets_that_cannot_be_used(opened: Model, tmp_path: Path) -> None:
    table = captioned(tmp_path, 3)
    with pytest.raises(UsageError, match=r"captions\.csv: .*000\.png has a caption, no class") as caught:
        read_set("x", str(table), opened.config, {})
    assert caught.value.hint == "--eval takes labelled data"
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    for path in (tmp_path / "set", table.with_name("empty.csv")):
        table.with_name("empty.csv").write_text("path,label\n")
        with pytest.raises(UsageError, match="no labelled pictures to evaluate on"):
            read_set("x", str(path), opened.config, {})
    with pytest.raises(UsageError, match="no such file or folder"):
        read_set("x", str(tmp_path / "none"), opened.config, {})


# Curves

HEADER = "step,epoch,seconds,loss,scale,learning_rate,image_size,pictures_per_second"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(folder: Path, log: str) -> tuple[bytes, list[str], int]:
    """The file, its texts (matplotlib draws letters as shapes, and keeps the text as a comment), its curves."""
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(log)
    path = plot(folder)
    assert path == folder / "curves.svg"
    data = path.read_bytes()
    root = ElementTree.fromstring(data, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
    texts = [str(node.text).strip() for node in root.iter(ElementTree.Comment)]  # type: ignore[arg-type]
    axes = [node for node in root.iter(f"{SVG}g") if str(node.get("id")).startswith("axes_")]
    curves = [child for node in axes for child in node if str(child.get("id")).startswith("line2d_")]
    return data, texts, len(curves)


def test_columns_of_the_log() -> None:
    assert ",".join(run.COLUMNS[:_NO_SETS]) == HEADER and run.COLUMNS[_NO_SETS:] == (run.HELD_OUT,)


def test_curves_of_loss_and_sets(tmp_path: Path) -> None:
    log = (
        f"{HEADER},held_out,val,cost $a$ _b\n"
        "10,0.5,1.0,3.5,14.0,1e-3,32,100,,,\n"
        "20,1.0,2.0,2.5,15.0,1e-3,32,100,0.25,0.2,0.1\n"
        "40,2.0,4.0,1.5,15.0,1e-3,32,100,0.5,0.3,0.2\n"
        "60,3.0,4.0\n"  # a full disk
    )
    first, texts, curves = drawn(tmp_path / "a", log)
    assert curves == 4
    assert {"epoch", "loss", "zero-shot accuracy", "held out", "val", "cost $a$  b"} <= set(texts)
    assert drawn(tmp_path / "b", log)[0] == first  # bytes
    assert str(tmp_path).encode() not in first


@pytest.mark.parametrize(
    "log", ["", f"{HEADER}\n", f"{HEADER},val\n", f"{HEADER}\n1,0.5,1,3.5,14,1e-3,32,100\n"], ids=len
)
def test_short_logs(tmp_path: Path, log: str) -> None:
    _, texts, curves = drawn(tmp_path / "a", log)
    assert curves == ("3.5" in log)
    assert {"epoch", "loss", "zero-shot accuracy"} <= set(texts) and "val" not in texts


def test_curves_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"log\.csv: no such file or directory"):
        plot(tmp_path)
    (tmp_path / "log.csv").write_text(f"{HEADER}\n")
    (tmp_path / "curves.svg").mkdir()
    with pytest.raises(OutputError, match=r"curves\.svg: exists and is no regular file"):
        plot(tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(tmp_path) is None
    assert 'no curves drawn: that needs pip install "clipcli[plot]"' in caplog.text


# The card


@pytest.fixture
def trainer(opened: Model, tmp_path: Path) -> Iterator[Trainer]:
    feed = held_out([str(into_classes(pictures(tmp_path / "all", 8, (32, 32)), [*LABELS[:4]] * 2, tmp_path / "set"))])
    state = State(replace(feed.config, seed=4, sizes=(16,), size_until=(0.5,)), "", "", step=1, best=0.625)
    yield Trainer(CLIP(opened.config), opened.config, opened.tokenizer, feed, state, [Template("<>")], CPU)


def request(tmp_path: Path, *data: str) -> run.Request:
    return run.Request(data, tmp_path / "models" / "birds")


def test_card(trainer: Trainer, tmp_path: Path) -> None:
    text = card(trainer, request(tmp_path, "shards/a-{000}.tar", "photos/"))
    assert text.startswith("# birds\n")
    for line in (
        "| image tower | ViT, 32 px |",
        "| text tower | 2 layers, width 32, context 77, vocabulary 814 |",
        f"| parameters | {sum(p.numel() for p in trainer.clip.parameters()):,} |",
        "| data | 4 pairs of `a-{000}.tar`, `photos` |",
        f"| steps | 1 of {trainer.steps}, 2 pictures each |",
        "| accuracy on pictures held out from training | 62.5% |",
        f"Use it with `clipcli classify photos/ --labels labels.txt -m {tmp_path}/models/birds`.",
        "`clipcli models export FOLDER --layout transformers -o DIR` makes a copy that transformers reads.",
        "- `batch_size = 2`", "- `seed = 4`", "- `sizes = (16,)`",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "epochs = 32" not in text


def test_card_of_a_resnet_from_odd_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.resnet()
    tokenizer = Tokenizer.from_file(tiny.save(tmp_path / "model", config=config) / "merges.txt")
    folder = into_classes(pictures(tmp_path / "all", 4, (32, 32)), ["cat", "dog"] * 2, tmp_path / "set")
    feed = held_out([str(folder)], hold_out=0.0)
    trainer = Trainer(CLIP(config), config, tokenizer, feed, State(feed.config, "", ""), [Template("<>")], CPU)
    monkeypatch.chdir(folder)
    text = card(trainer, request(tmp_path, ".", os.fsdecode(b"caf\xe9\n")))
    assert "| image tower | ModifiedResNet, 32 px |" in text and "transformers has no CLIP with a ResNet." in text
    assert "| data | 4 pairs of `set`, `caf\\xe9\\n` |" in text
    assert "were held out |" in text
    text.encode()  # can be written
