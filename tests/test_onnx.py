"""The image tower in ONNX Runtime: the plain tower's numbers in fp32, near ones in int8, a cache that may be lost."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_fast
import tiny
import torch
from conftest import Run
from numpy.typing import NDArray
from test_house import modules_after

from clipcli import build_classifier, embed, load_model
from clipcli.errors import ModelError, UsageError
from clipcli.model import graph
from clipcli.model.clip import build_image_tower
from clipcli.model.config import ClipConfig, ViTConfig
from clipcli.records import Embedded
from clipcli.store.database import Store
from clipcli.tasks import verify
from clipcli.weights import onnx_images
from clipcli.weights.load import Checkpoint, load_checkpoint
from clipcli.weights.onnx_images import OnnxImages
from clipcli.weights.tensors import Arrays, Tensor

Pixels = NDArray[np.uint8]
Weights = dict[str, NDArray[np.float32]]


def pixels(size: int, count: int = 5) -> Pixels:
    return np.random.default_rng(count).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def plain(config: ClipConfig, weights: Weights, pictures: Pixels) -> NDArray[np.float32]:
    """Unit rows of the readable tower."""
    own = {key[7:]: array for key, array in weights.items() if key.startswith("visual.")}
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.preprocess.mean, config.preprocess.std))
    with torch.inference_mode():
        found = build_image_tower(config, own)((torch.from_numpy(pictures).float() / 255 - mean) / std)
        return torch.nn.functional.normalize(found).numpy()


def checkpoint_of(config: ClipConfig, weights: Weights, folder: Path) -> Checkpoint:
    """A checkpoint of any configuration, whatever its heads."""
    tensors = {key: Tensor(array.shape, "F32", lambda array=array: array) for key, array in weights.items()}  # type: ignore[misc]
    return replace(load_checkpoint(tiny.save(folder)), config=config, arrays=Arrays(tensors))


def by_onnx(checkpoint: Checkpoint, pictures: Pixels, **options: object) -> NDArray[np.float32]:
    settings = {"precision": "fp32", "fingerprint": "f", "folder": None} | options
    return OnnxImages(checkpoint, **settings).submit(pictures)()  # type: ignore[arg-type]


# ---- fp32


@pytest.mark.parametrize("name", test_fast.TOWERS)
def test_the_same_numbers(name: str, tmp_path: Path) -> None:
    config = test_fast.config_of(name)
    weights = tiny.weights(config)
    for count in (1, 2, 70):  # the last in parts
        pictures = pixels(config.vision.image_size, count)
        before = pictures.copy()
        found = by_onnx(checkpoint_of(config, weights, tmp_path), pictures)
        assert found.dtype == np.float32 and found.shape == (count, config.embed_dim)
        np.testing.assert_allclose(found, plain(config, weights, pictures), atol=1e-5)
        np.testing.assert_array_equal(pictures, before)


@pytest.mark.parametrize("name", ["quick", "odd", "rn"])
def test_every_tensor_matters(name: str, tmp_path: Path) -> None:
    """A weight that the graph left out would show: each is changed, and the graph follows."""
    config = test_fast.config_of(name)
    weights, pictures = tiny.weights(config), pixels(config.vision.image_size, 2)
    first = plain(config, weights, pictures)
    for key in (key for key in weights if key.startswith("visual.")):
        noise = np.random.default_rng(3).standard_normal(weights[key].shape).astype(np.float32)
        changed = weights | {key: weights[key] + 0.3 * np.abs(noise)}
        expected = plain(config, changed, pictures)
        np.testing.assert_allclose(by_onnx(checkpoint_of(config, changed, tmp_path), pictures), expected, atol=1e-5)
        # attention doesn't see the bias of its keys, alone among all tensors
        assert np.abs(expected - first).max() > 1e-5 or key.endswith("k_proj.bias"), key


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_from_every_layout(layout: str, dtype: type, tmp_path: Path) -> None:
    path = tiny.save(tmp_path, layout, tiny.vit(activation="quick_gelu"), dtype=dtype)
    options = {"activation": "quick_gelu", "head_width": 16} if path.is_file() else {}
    ours, torchs = (load_model(path, device="cpu", runtime=name, **options) for name in ("onnx", "torch"))  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.encode_image(pixels(32)), torchs.encode_image(pixels(32)), atol=1e-5)


def test_the_work_of_vit_b_32() -> None:
    """Counted, not timed: one token goes through the last block, and weights stay where they are."""
    vision = ViTConfig(64, 32, 64, 3, 2, 128, "quick_gelu")
    config = replace(tiny.vit(), vision=vision)
    weights = tiny.weights(config)
    content, apart = graph.build(config, weights)
    assert len(content) < 20_000
    shared = [name for name, array in apart.items() if any(np.shares_memory(array, own) for own in weights.values())]
    assert sum(apart[name].nbytes for name in shared) > 0.8 * sum(array.nbytes for array in apart.values())
    import onnx

    kinds = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert kinds.count("Gemm") == 1 + 2 * 4 + 4 + 1 and kinds.count("MultiHeadAttention") == 2  # query, out, mlp, mlp
    rounded = [node.op_type for node in onnx.load_from_string(graph.build(config, weights, 127)[0]).graph.node]
    assert rounded.count("DynamicQuantizeMatMul") == 2 * 4


# ---- int8


@pytest.fixture(params=[127, 63])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As on CPUs with and without VNNI."""
    if request.param > onnx_images._most():
        pytest.skip("int8 overflows on this CPU")
    monkeypatch.setattr(onnx_images, "_most", lambda: request.param)
    return int(request.param)


def test_int8_is_near_on_photographs(model: Path, pictures: Path, most: int) -> None:
    exact, rounded = (load_model(model, device="cpu", precision=name) for name in ("fp32", "int8"))  # type: ignore[arg-type]
    archive = str(pictures / "caltech20-dev.tar")
    right, found = (
        np.stack([row.vector for row in embed(archive, one) if isinstance(row, Embedded)]) for one in (exact, rounded)
    )
    assert len(found) == 200
    least = {127: verify.LEAST_COSINE, 63: 0.998}[most]  # a bit less is four times the square of the error
    assert least <= (right * found).sum(axis=1).min() < 1 - 1e-6
    weight = build_classifier(exact, ["cat", "dog", "rocket", "a grey bird", "sky"], templates=["<>"]).weight.T
    cosines = 100 * right @ weight, 100 * found @ weight
    score = np.exp(cosines[0] - cosines[0].max(axis=1, keepdims=True))
    score = np.sort(score / score.sum(axis=1, keepdims=True), axis=1)
    assert (score[:, -1] - score[:, -2] > verify.MARGIN).sum() >= 20  # else nothing would be shown
    changed = verify.changed_answers(found @ weight, right @ weight, 100.0)
    assert changed <= {127: 0, 63: 5}[most]  # random weights: cosines of 16 dimensions, close together


def test_changed_answers() -> None:
    exact = np.array([[0.30, 0.20], [0.3000, 0.2999], [0.2, 0.3], [0.1, 0.3]], np.float32)
    found = np.array([[0.20, 0.30], [0.2999, 0.3000], [0.2, 0.3], [0.3, 0.1]], np.float32)
    assert verify.changed_answers(found, exact, 100.0) == 2
    assert verify.changed_answers(found, exact, 100.0, margin=-1) == 3
    assert verify.changed_answers(exact, exact, 100.0, margin=-1) == 0


def test_a_row_of_zeros_is_no_division_by_zero(tmp_path: Path) -> None:
    config = test_fast.config_of("quick")
    weights = tiny.weights(config)
    weights["visual.transformer.resblocks.0.mlp.c_fc.weight"][3] = 0
    found = by_onnx(checkpoint_of(config, weights, tmp_path), pixels(32), precision="int8")
    assert (found * plain(config, weights, pixels(32))).sum(axis=1).min() > 0.999


# ---- the cache


def test_int8_is_kept_and_found_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    def encode() -> NDArray[np.float32]:
        return load_model(model, precision="int8", store=Store(tmp_path / "store.sqlite")).encode_image(pixels(32))

    first = encode()
    (file,) = (tmp_path / "onnx").iterdir()
    monkeypatch.setattr(graph, "build", None)
    np.testing.assert_array_equal(encode(), first)
    assert load_model(model).image_fingerprint in file.name and f"-{most}-" in file.name
    monkeypatch.undo()
    load_model(model, precision="int8").encode_image(pixels(32))  # a store in memory keeps nothing
    load_model(model, runtime="onnx", store=Store(tmp_path / "store.sqlite")).encode_image(pixels(32))
    assert list((tmp_path / "onnx").iterdir()) == [file]


def test_a_damaged_file_is_made_anew(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = load_checkpoint(model)

    def encode() -> NDArray[np.float32]:
        return by_onnx(checkpoint, pixels(32), precision="int8", folder=tmp_path)

    first = encode()
    (file,) = tmp_path.iterdir()
    whole, random = file.read_bytes(), np.random.default_rng(0)
    broken = [whole[:100], b"", b"PK", whole[:-1], b"\x93NUMPY" + whole, whole[: len(whole) // 2]]
    for place in random.integers(0, len(whole), 30).tolist():
        broken.append(whole[:place] + bytes([whole[place] ^ int(random.integers(1, 256))]) + whole[place + 1 :])
    told = 0
    for content in broken:
        caplog.clear()
        file.write_bytes(content)
        with caplog.at_level(logging.WARNING, "clipcli"):
            np.testing.assert_array_equal(encode(), first)
        told += "damaged, and made anew" in caplog.text
        assert not caplog.text or file.stat().st_size == len(whole)
    assert told >= 6 + 20  # of the flips, some hit what nobody reads


def test_what_was_not_used_for_longest_goes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, age in (("old", 3), ("new", 1)):
        (tmp_path / f"{name}.npz").write_bytes(bytes(1000))
        os.utime(tmp_path / f"{name}.npz", (10**9 - age, 10**9 - age))
    onnx_images._keep(tmp_path / "mine.npz", {"a": np.zeros(10)})
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(onnx_images, "SIZE_LIMIT", 1900)
    onnx_images._keep(tmp_path / "mine.npz", {"a": np.zeros(10)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.npz", "new.npz"]


def test_a_folder_that_cannot_be_written_is_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "onnx").write_text("a file in its place")
    with caplog.at_level(logging.WARNING, "clipcli"):
        found = by_onnx(load_checkpoint(model), pixels(32), precision="int8", folder=tmp_path / "onnx")
    assert np.isfinite(found).all() and "not kept for later runs" in caplog.text


# ---- who runs it


def test_what_it_is_called(model: Path) -> None:
    asked = [
        ("torch", "auto"),
        ("auto", "fp32"),
        ("onnx", "auto"),
        ("onnx", "fp32"),
        ("auto", "int8"),
        ("onnx", "int8"),
    ]
    opened = [load_model(model, device="cpu", runtime=runtime, precision=kind) for runtime, kind in asked]  # type: ignore[arg-type]
    assert [one.arithmetic for one in opened] == ["torch-fp32"] * 2 + ["onnx-fp32"] * 2 + ["onnx-int8"] * 2
    assert {one.text_arithmetic for one in opened} == {"torch-fp32"}
    assert [one.where for one in opened[1:5:3]] == ["cpu, fp32", "cpu, int8, ONNX Runtime"]


def test_auto_takes_it_for_resnets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(model, device="cpu").arithmetic == "torch-fp32"
    resnet = tiny.save(tmp_path, config=tiny.resnet())
    assert load_model(resnet, device="cpu").arithmetic == "onnx-fp32"
    assert load_model(resnet, device="cpu", runtime="torch").arithmetic == "torch-fp32"
    assert load_model(resnet, device="cpu", precision="bf16").arithmetic == "torch-bf16"
    monkeypatch.setattr(onnx_images, "find_spec", lambda name: None)
    assert load_model(resnet, device="cpu").arithmetic == "torch-fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnx", "device": "cuda"}, "ONNX Runtime is for the CPU, not for cuda"),
        ({"precision": "int8", "device": "mps"}, "ONNX Runtime is for the CPU, not for mps"),
        ({"runtime": "onnx", "precision": "bf16"}, "no bf16 in ONNX Runtime on a CPU"),
        ({"runtime": "torch", "precision": "int8"}, "torch has no int8 here"),
    ],
)
def test_what_it_cannot_do(model: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(model, **options)  # type: ignore[arg-type]


def test_int8_is_for_vits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 is for vision transformers"):
        load_model(tiny.save(tmp_path, config=tiny.resnet()), precision="int8")


def test_the_extra_is_named(cli: Run, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_images, "find_spec", lambda name: None)
    for option in (("--runtime", "onnx"), ("--precision", "int8")):
        found = cli("classify", photos, "-L", "cat", "-L", "dog", "-m", model, *option)
        assert found.code == 2 and not found.out
        assert found.err == f'clipcli: {" ".join(option)} needs ONNX Runtime\nhint: pip install "clipcli[onnx]"\n'


def test_no_memory_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(OnnxImages, "_run", fail)
    with pytest.raises(ModelError, match="ONNX Runtime failed: no room at all"):
        load_model(model, runtime="onnx").encode_image(pixels(32))


def test_classify(cli: Run, model: Path, photos: Path) -> None:
    """Words are encoded once for all runtimes, pictures once for each; the rows are the same."""
    words = ("classify", photos, "-L", "cat", "-L", "dog", "-m", model, "-d", "cpu", "-f", "jsonl", "-v")
    first, second = (cli(*words, "--runtime", runtime) for runtime in ("torch", "onnx"))
    assert "2 labels × 7 templates, 14 prompts encoded" in first.err and "from the store" in second.err
    assert "on cpu, fp32, ONNX Runtime" in second.err
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one["path"] == other["path"] and one["label"] == other["label"]
        assert one["error"] or one["cosine"] == pytest.approx(other["cosine"], abs=1.1e-5)


def test_no_torch(model: Path, photos: Path) -> None:
    """A run whose words are known, with more pictures than numpy would take."""
    words = ["classify", str(photos), "-L", "cat", "-L", "dog", "-m", str(model)]
    run = "from clipcli.cli.main import run; run({})"
    modules_after(run.format([*words, "--runtime", "torch"]))
    for more in (["--runtime", "onnx"], ["--precision", "int8"]):
        assert not modules_after(run.format([*words, *more])) & {"torch", "transformers", "sympy"}


def test_verify(cli: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cli("models", "verify", model, "--precision", "int8")
    assert found.code == 0 and "cpu, int8, ONNX Runtime: right" in found.err
    lines = dict(line.split("  ", 1) for line in found.lines if line.endswith("ok"))
    assert list(lines) == ["image embeddings", "text embeddings", "cosines", "1 - cosine to fp32", "changed answers"]
    assert "1e-05" in lines["text embeddings"] and "3e-02" in lines["image embeddings"]
    assert cli("models", "verify", model, "--runtime", "onnx").code == 0
    right = graph._Graph.one_query
    monkeypatch.setattr(graph._Graph, "one_query", lambda self, *args: self("Neg", right(self, *args)))
    for options in (("--precision", "int8"), ("--runtime", "onnx")):
        wrong = cli("models", "verify", model, *options)
        assert wrong.code == 1 and "TOO LARGE" in wrong.out.decode()
