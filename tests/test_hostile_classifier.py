"""Classifier files that are broken, lie, or mean harm: one clear line each; and places where none should be written."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from safetensors import safe_open
from safetensors.numpy import save_file

from clipcli.errors import ClassifierError, OutputError, UsageError
from clipcli.records import Label, Template
from clipcli.zeroshot.classifier import Classifier
from clipcli.zeroshot.classifier_file import load_classifier, save_classifier

GOOD = Classifier(
    weight=np.eye(2, dtype=np.float32),
    labels=(Label("cat", ("cat", "tom"), ("it purrs",), "pets", 0.25), Label("dog", ("dog",))),
    logit_scale=100.0,
    model="m",
    image_fingerprint="1" * 32,
    text_fingerprint="2" * 32,
    templates=(Template("a <>"),),
    template_set="simple",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_classifier(GOOD, tmp_path / "my.safetensors")
    return tmp_path / "my.safetensors"


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        return dict(json.loads(file.metadata()["clipcli"]))


def rewrite(path: Path, changes: dict[str, Any], **tensors: np.ndarray) -> Path:
    text = json.dumps(metadata(path) | changes)
    save_file({"weight": GOOD.weight, **tensors}, path, metadata={"clipcli": text})
    return path


def refused(path: Path) -> str:
    with pytest.raises(ClassifierError) as caught:
        load_classifier(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ") and caught.value.hint
    assert message.isprintable() and len(message) < 250 + len(str(path))
    return message


def label(**changes: Any) -> dict[str, Any]:
    cat = {"name": "cat", "aliases": ["cat"], "descriptions": [], "group": None}
    return {"labels": [cat | changes, cat | {"name": "dog"}]}


def template(text: Any = "a <>", weight: Any = 1.0) -> dict[str, Any]:
    return {"templates": [{"text": text, "weight": weight}]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"logit_scale": 10**400}, "logit_scale is 1000000"),
        ({"logit_scale": 1e5}, "logit_scale is 100000.0"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"logit_scale": True}, "logit_scale is True"),
        ({"logit_scale": float("nan")}, "logit_scale is nan"),
        ({"version": 10**400}, "in version 1000000"),
        ({"version": "x" * 10**6}, "in version 'xxxx"),
        ({"made_by": "x" * 10**6}, "made_by is 'xxxx"),
        ({"features": "patches"}, "features that this clipcli doesn't make: 'patches'"),
        ({"features": ["pooled"]}, "features that this clipcli doesn't make: ['pooled']"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"how": "by hand"}, "how is 'by hand'"),
        ({"how": {"C": [1]}}, "how is {'C': [1]}"),
        ({"model": ["x" * 10**6]}, "model is ['xxxx"),
        ({"labels": {"cat": 1}}, "labels is {'cat': 1}"),
        ({"labels": [1, 2]}, "name None is not text"),
        ({"templates": "a <>"}, "templates is 'a <>'"),
        (label(name="\ud800"), "label 1: half of a character U+D800 in name"),
        (label(name="c\x1b[31mat"), "label 1: control character U+001B in name"),
        (label(name="c\0at"), "U+0000 in name"),
        (label(aliases=["cat", "to\nm"]), "U+000A in alias"),
        (label(aliases=[""]), "empty alias"),
        (label(aliases="cat"), "aliases is 'cat'"),
        (label(descriptions=["it\u2028purrs"]), "U+2028 in description"),
        (label(group="\x9b"), "U+009B in group"),
        (label(group=1), "group 1 is not text"),
        (template(weight=10**400), "weight is 1000000"),
        (template(weight=0), "weight is 0"),
        (template(weight=-1), "weight is -1"),
        (template(weight=float("inf")), "weight is inf"),
        (template(weight=float("nan")), "weight is nan"),
        (template(weight=1e308), "weight is 1e+308"),
        (template(weight=5e-324), "weight is 5e-324"),
        (template(text="a cat"), "template 1 has no place for the label"),
        (template(text="a <>\n"), ""),  # white space around it is taken off
        (template(text="a\n<>"), "template 1: control character U+000A"),
    ],
)
def test_metadata(path: Path, changes: dict[str, Any], told: str) -> None:
    rewrite(path, changes)
    if told:
        assert told in refused(path)
    else:
        assert load_classifier(path).templates == GOOD.templates


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000, "{", "null", ""])
def test_metadata_that_is_no_object(path: Path, text: str) -> None:
    save_file({"weight": GOOD.weight}, path, metadata={"clipcli": text})
    refused(path)


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight": np.zeros((2, 0), np.float32)}, "weight is [2, 0] for 2 labels"),
        ({"weight": np.zeros((0, 2), np.float32)}, "weight is [0, 2] for 2 labels"),
        ({"weight": np.eye(3, dtype=np.float32)}, "weight is [3, 3] for 2 labels"),
        ({"weight": np.ones(2, np.float32)}, "weight is [2] for 2 labels"),
        ({"weight": rows([1, 0], [0, 0])}, "row 2 of weight has the length 0"),
        ({"weight": rows([1, 0], [0, 1.002])}, "row 2 of weight has the length 1.002"),
        ({"weight": rows([1e38, 1e38], [0, 1])}, "row 1 of weight has the length 1.41421e+38"),
        ({"weight": rows([1, 0], [np.nan, 1])}, "row 2 of weight has the length nan"),
        ({"weight": rows([1, 0], [-np.inf, 1])}, "row 2 of weight has the length inf"),
        ({"weight": np.eye(2)}, "a tensor 'weight' of type F64"),
        ({"offset": np.zeros(2, np.float32)}, "a tensor 'offset' of type F32"),
        ({"bias": np.zeros(2)}, "a tensor 'bias' of type F64"),
        ({"bias": np.zeros(3, np.float32)}, "bias is not a number for each of 2 labels"),
        ({"bias": np.array([0, np.nan], np.float32)}, "bias is not a number"),
        ({"bias": np.array([0, -np.inf], np.float32)}, "bias is not a number"),
        ({"threshold": np.zeros(1, np.float32)}, "threshold is not a number for each of 2 labels"),
        ({"threshold": np.zeros((2, 1), np.float32)}, "threshold is not a number"),
        ({"threshold": np.array([0.5, np.inf], np.float32)}, "threshold is not a number"),
        ({"threshold": np.array([0.5, -1.5], np.float32)}, "threshold is not a number"),
        ({"bias": np.zeros(2, np.float32)}, "made_by is 'zero-shot' with a bias"),
        ({"threshold": np.zeros(2, np.int64)}, "a tensor 'threshold' of type I64"),
    ],
)
def test_tensors(path: Path, tensors: dict[str, np.ndarray], told: str) -> None:
    assert told in refused(rewrite(path, {}, **tensors))


def test_rows_of_a_probe_need_not_be_unit_vectors(path: Path) -> None:
    weight = rows([3, 4], [0, 20])
    np.testing.assert_array_equal(load_classifier(rewrite(path, {"made_by": "few-shot"}, weight=weight)).weight, weight)
    assert "row 1" in refused(rewrite(path, {"made_by": "few-shot"}, weight=weight * np.float32(1e30)))
    assert "row 1" in refused(rewrite(path, {"made_by": "few-shot"}, weight=weight * 0))


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 16), ("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("BOOL", 8)])
def test_types_that_numpy_lacks(path: Path, dtype: str, bits: int) -> None:
    size = 4 * bits // 8
    entry = {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"clipcli": json.dumps(metadata(path))}, "weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    assert f"of type {dtype}" in refused(path)


def test_no_weight_at_all(path: Path) -> None:
    changed = {"clipcli": json.dumps(metadata(path))}
    save_file({"threshold": np.zeros(2, np.float32)}, path, metadata=changed)
    assert "weight is [0] for 2 labels" in refused(path)


# Places


def test_places_without_a_file(path: Path, cli: Run) -> None:
    for name, hint in (("mi.safetensors", f"did you mean {path}?"), ("x", "make one with: clipcli build-classifier")):
        with pytest.raises(UsageError, match=r"no such file$") as caught:
            load_classifier(path.with_name(name))
        assert caught.value.hint == hint
    result = cli("classify", ".", "-c", path.with_name("x"), "-m", path)
    assert (result.code, result.err.splitlines()[0]) == (2, f"clipcli: {path.with_name('x')}: no such file")
    os.mkfifo(path.with_name("fifo"))
    for place in (path.with_name("fifo"), path.parent):
        with pytest.raises(UsageError, match=r"must be a regular file$"):
            load_classifier(place)


def test_a_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    with pytest.raises(UsageError, match=r"my\.safetensors: permission denied$"):
        load_classifier(path)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff.safetensors")
    odd = Classifier(
        **{**vars(GOOD), "model": os.fsdecode(b"mod\xe9l"), "template_set": os.fsdecode(b"\xff\xfe.txt a")}
    )
    save_classifier(odd, file)
    read = load_classifier(file)
    assert (read.model, read.template_set) == ("mod\ufffdl", "\ufffd\ufffd.txt a")
    save_classifier(read, file)


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "fifo", tmp_path / "folder", tmp_path / "loop", Path(os.devnull)):
        with pytest.raises(OutputError, match="exists and is no regular file"):
            save_classifier(GOOD, path)
    assert (tmp_path / "fifo").is_fifo() and Path(os.devnull).is_char_device()
    assert len(list(tmp_path.iterdir())) == 3


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there" / "a", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to("there/a")
    dangling.symlink_to("there/b")
    for path in (link, dangling):
        save_classifier(GOOD, path)
        assert path.is_symlink()
        assert load_classifier(path).names == ("cat", "dog")
    assert sorted(path.name for path in target.parent.iterdir()) == ["a", "b"]


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    save_classifier(GOOD, tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]
