"""The image tower in numpy: equal to torch's, and all that a few pictures need."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Result, Run
from numpy.typing import NDArray

from clipcli import load_model
from clipcli.model import plain
from clipcli.model.config import Activation, ClipConfig, ViTConfig
from clipcli.weights import model as models
from clipcli.weights.load import load_checkpoint
from clipcli.weights.model import Model

TOLERANCE = 1e-5
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# what a start may cost: these, what they bring along, and the standard library
HEAVY = {"torch", "torchvision", "transformers", "huggingface_hub", "onnxruntime", "openvino", "scipy", "pandas"}
HEAVY |= {"matplotlib", "pyarrow", "ftfy", "regex", "requests", "httpx", "rich", "asyncio", "multiprocessing"}


def vit(activation: Activation = "gelu", **changed: int) -> ClipConfig:
    config = tiny.vit(activation=activation)
    assert isinstance(config.vision, ViTConfig)
    return replace(config, vision=replace(config.vision, **changed))


def pixels(size: int, count: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 3, size, size), dtype=np.float32)


def by_numpy(config: ClipConfig, arrays: Any, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    assert isinstance(config.vision, ViTConfig)
    return plain.forward(config.vision, arrays, pictures)


def by_torch(config: ClipConfig, arrays: Any, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    from clipcli.model.clip import build_image_tower

    own = {name.removeprefix("visual."): np.array(arrays[name]) for name in arrays if name.startswith("visual.")}
    with torch.inference_mode():
        found: NDArray[np.float32] = build_image_tower(config, own)(torch.from_numpy(pictures)).numpy()
    return found


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ---- the oracle


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"layers": 1},
        {"image_size": 30},  # what a patch doesn't fill is left out
        {"patch_size": 32},  # one patch
        {"width": 96, "heads": 6, "mlp_width": 200, "layers": 5, "image_size": 48, "patch_size": 4},
    ],
    ids=str,
)
def test_equal_to_torch(activation: Activation, changed: dict[str, int]) -> None:
    config = vit(activation, **changed)
    arrays = tiny.weights(config)
    pictures = pixels(config.vision.image_size)
    found, expected = by_numpy(config, arrays, pictures), by_torch(config, arrays, pictures)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(unit(found), unit(expected), atol=TOLERANCE / 10)
    np.testing.assert_allclose(by_numpy(config, arrays, pictures[1:2]), found[1:2], atol=TOLERANCE)


def test_the_two_activations_differ() -> None:
    arrays, pictures = tiny.weights(vit()), pixels(32)
    found = [unit(by_numpy(vit(name), arrays, pictures)) for name in ("gelu", "quick_gelu")]
    assert np.abs(found[0] - found[1]).max() > 100 * TOLERANCE


def test_gelu_without_erf() -> None:
    points = np.linspace(-14, 14, 140_001).astype(np.float32)
    found = points.copy()
    plain._activate(found, "gelu")
    exact = np.array([0.5 * x * math.erfc(-x / math.sqrt(2)) for x in map(float, points)])
    assert np.abs(found - exact).max() < 1e-6  # rounding to fp32 alone is up to 5e-7 there
    near = np.abs(points) < 4
    assert np.abs(found - exact)[near].max() < 3e-7


def test_an_activation_longer_than_a_chunk() -> None:
    values = np.random.default_rng(2).standard_normal(3 * plain._CHUNK + 5).astype(np.float32)
    for activation in ("gelu", "quick_gelu"):
        whole, ends = values.copy(), values[-7:].copy()
        plain._activate(whole, activation)
        plain._activate(ends, activation)
        np.testing.assert_array_equal(whole[-7:], ends)


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "openai_pt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_as_they_lie_on_the_disk(tmp_path: Path, layout: str, dtype: Any) -> None:
    config = vit()
    path = tiny.save(tmp_path, layout, config, dtype=dtype)
    checkpoint = load_checkpoint(path, activation="gelu", head_width=tiny.HEAD_WIDTH)
    pictures = pixels(32)
    found = by_numpy(config, checkpoint.arrays, pictures)  # tiny's weights are exact in float16
    np.testing.assert_allclose(unit(found), unit(by_torch(config, tiny.weights(config), pictures)), atol=TOLERANCE / 10)
    assert checkpoint.arrays.touched == {name for name in checkpoint.arrays if name.startswith("visual.")}


def test_bfloat16_and_bytes_out_of_step(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    config = vit()
    folder = tiny.save(tmp_path / "m", config=config)
    arrays = {name: torch.from_numpy(array).bfloat16() for name, array in tiny.weights(config).items()}
    written = save(arrays)
    length = int.from_bytes(written[:8], "little") + 3  # no float begins at a multiple of its size
    odd = length.to_bytes(8, "little") + written[8 : length + 5] + b"   " + written[length + 5 :]
    (folder / "open_clip_model.safetensors").write_bytes(odd)
    exact = {name: array.float().numpy() for name, array in arrays.items()}
    found = by_numpy(config, load_checkpoint(folder).arrays, pixels(32))
    np.testing.assert_allclose(unit(found), unit(by_torch(config, exact, pixels(32))), atol=TOLERANCE / 10)
    aligned = save({name: torch.from_numpy(array) for name, array in tiny.weights(config).items()})
    length = int.from_bytes(aligned[:8], "little") + 1
    odd = length.to_bytes(8, "little") + aligned[8 : length + 7] + b" " + aligned[length + 7 :]
    (folder / "open_clip_model.safetensors").write_bytes(odd)
    arrays = load_checkpoint(folder).arrays
    assert not arrays["visual.proj"].flags.aligned
    expected = by_numpy(config, tiny.weights(config), pixels(32))
    np.testing.assert_allclose(by_numpy(config, arrays, pixels(32)), expected, atol=TOLERANCE / 10)


def test_numbers_that_are_not_finite_come_out_so() -> None:
    arrays = tiny.weights(vit())
    arrays["visual.transformer.resblocks.0.mlp.c_fc.weight"][0, 0] = np.inf
    assert not np.isfinite(by_numpy(vit(), arrays, pixels(32))).any()


def test_as_much_work_whatever_the_model() -> None:
    base = ViTConfig(224, 32, 768, 12, 12, 3072, "gelu")
    large = ViTConfig(336, 14, 1024, 24, 16, 4096, "gelu")
    assert plain.few(base) in (plain.FEW - 1, plain.FEW)
    assert 1 <= plain.few(large) < plain.few(replace(base, patch_size=16)) < plain.FEW / 3
    assert plain.few(replace(base, layers=100_000)) == 1  # one is always done here: torch would need as long


# ---- when it is used


class _TorchWantedError(Exception):
    pass


class _NoTorch:
    """Stands in the way of whoever imports torch."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch":
            raise _TorchWantedError


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: torch isn't imported; trying to raises. No GPU's driver is there."""
    for name in ("torch", "clipcli.weights.torch_images"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_NoTorch(), *sys.meta_path])
    monkeypatch.setattr(models, "_cuda_is_ruled_out", lambda: True)


@pytest.fixture
def squares() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


def test_the_same_embeddings_as_torch(model: Path, squares: NDArray[np.uint8], request: pytest.FixtureRequest) -> None:
    import torch

    assert torch
    expected = load_model(model, device="cpu").encode_image(squares)
    request.getfixturevalue("no_torch")
    for device, precision in (("cpu", "auto"), ("auto", "auto"), ("cpu", "fp32")):
        opened = load_model(model, device=device, precision=precision)  # type: ignore[arg-type]
        np.testing.assert_allclose(opened.encode_image(squares), expected, atol=TOLERANCE / 10)
        assert opened.where == "cpu, fp32"


@pytest.mark.usefixtures("no_torch")
def test_until_they_are_no_longer_few(model: Path, squares: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "few", lambda config: 3)
    opened = load_model(model)
    assert len(opened.encode_image(squares[:2])) == 2
    with pytest.raises(_TorchWantedError):
        opened.encode_image(squares[:2])
    with pytest.raises(_TorchWantedError):  # and it stays so
        opened.encode_image(squares[:1])
    with pytest.raises(_TorchWantedError):
        load_model(model).encode_image(squares)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    "asked", [{"precision": "bf16"}, {"precision": "fp16"}, {"device": "mps"}, {"device": "cuda"}], ids=str
)
def test_what_only_torch_can_do_is_left_to_it(model: Path, squares: NDArray[np.uint8], asked: dict[str, Any]) -> None:
    with pytest.raises(_TorchWantedError):
        load_model(model, **asked).encode_image(squares[:1])


@pytest.mark.usefixtures("no_torch")
def test_where_there_may_be_a_gpu_torch_is_asked(
    model: Path, squares: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_cuda_is_ruled_out", lambda: False)
    with pytest.raises(_TorchWantedError):
        load_model(model).encode_image(squares[:1])
    assert len(load_model(model, device="cpu").encode_image(squares[:1])) == 1


@pytest.mark.usefixtures("no_torch")
def test_a_resnet_is_left_to_torch(tmp_path: Path, squares: NDArray[np.uint8]) -> None:
    with pytest.raises(_TorchWantedError):
        load_model(tiny.save(tmp_path, config=tiny.resnet()), runtime="torch").encode_image(squares[:1])


@pytest.mark.usefixtures("no_torch")
def test_short_of_memory_torch_is_asked(
    model: Path, squares: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(plain, "forward", full)
    with pytest.raises(_TorchWantedError):
        load_model(model).encode_image(squares)


@pytest.mark.usefixtures("no_torch")
def test_what_is_not_finite_warns_of_nothing(tmp_path: Path, squares: NDArray[np.uint8]) -> None:
    arrays = tiny.weights(tiny.vit())
    arrays["visual.proj"][:] = 0
    assert np.isnan(load_model(tiny.save(tmp_path, arrays=arrays)).encode_image(squares)).all()


# ---- the command, in a process of its own

PROGRAM = """
import json, sys
from clipcli.cli.main import run
from clipcli.model import plain
if sys.argv[1] != "all":
    plain.few = lambda config: int(sys.argv[1])
code = run(sys.argv[2:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def fresh(few: str, *args: object) -> tuple[Result, set[str]]:
    """`clipcli ARGS` in a new process, and what it has imported."""
    command = [sys.executable, "-c", PROGRAM, few, *map(str, args)]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONWARNINGS": ""})
    code, imported = json.loads(done.stderr.splitlines()[-1])
    return Result(code, done.stdout, done.stderr.decode()), set(imported)


def assert_alike(some: Result, others: Result) -> None:
    assert some.code == others.code == 0 and len(some.rows) == len(others.rows)
    for row, other in zip(some.rows, others.rows, strict=True):
        assert (row["path"], row["label"]) == (other["path"], other["label"])
        for number in ("score", "cosine", "margin"):
            assert abs(row[number] - other[number]) <= TOLERANCE


def test_one_picture_needs_no_torch(
    cli: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.safetensors"
    assert cli("build-classifier", "-L", "cat", "-L", "rocket", "-m", model, "-o", file).code == 0
    command = ["classify", photos / "rocket.jpg", "-m", model, "-d", "cpu", "-f", "jsonl"]
    expected = cli(*command, "-c", file, "--no-cache")  # in this process, by torch
    done, imported = fresh("all", *command, "-c", file, "-v")
    assert_alike(done, expected)
    assert imported & HEAVY == set() and {"numpy", "PIL", "safetensors", "sqlite3"} <= imported
    assert "cpu, fp32" in done.err

    def recompute(*_: object) -> None:
        raise AssertionError("it was known")

    monkeypatch.setattr(Model, "encode_image", recompute)
    assert cli(*command, "-c", file).out == done.out  # numpy's embedding is found under torch's key
    found, imported = fresh("all", *command, "-L", "cat", "-L", "rocket")  # the classifier in the store
    assert found.out == done.out and imported & (HEAVY | {"PIL.Image"}) == set()


def test_embed_needs_no_torch_either(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    from clipcli import load_embeddings

    pictures = [photos / name for name in PHOTOS]
    files = tmp_path / "torch.safetensors", tmp_path / "numpy.safetensors"
    assert cli("embed", *pictures, "-m", model, "-d", "cpu", "-o", files[0], "--no-cache").code == 0
    done, imported = fresh("all", "embed", *pictures, "-m", model, "-d", "cpu", "-o", files[1], "--no-cache")
    assert done.code == 0 and imported & HEAVY == set()
    found, expected = ([row.vector for row in load_embeddings(file)] for file in files)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE / 10)


def test_more_than_a_few_go_on_with_torch(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    assert cli("build-classifier", "-L", "cat", "-L", "rocket", "-m", model, "-o", file).code == 0
    pictures = [photos / name for name in PHOTOS + PHOTOS[::-1]]
    command = ["classify", *pictures, "-c", file, "-m", model, "-d", "cpu", "-f", "jsonl", "--no-cache", "-b", 2]
    done, imported = fresh("5", *command)
    assert "torch" in imported
    assert_alike(done, cli(*command))
