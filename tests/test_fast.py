"""The image towers of inference against the plain ones: the same numbers from less work, and never with gradients."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipcli.model import fast as module
from clipcli.model import products
from clipcli.model.clip import CLIP, ImageTower, build_image_tower, image_tower
from clipcli.model.config import ClipConfig, ResNetConfig, ViTConfig
from clipcli.model.fast import FastResNet, FastViT, fast
from clipcli.model.products import Product, packed
from clipcli.tasks import verify
from clipcli.weights.load import load_checkpoint
from clipcli.weights.model import Model, load_model

TOWERS: dict[str, ViTConfig | ResNetConfig] = {
    "quick": ViTConfig(32, 8, 32, 2, 2, 128, "quick_gelu"),
    "gelu": ViTConfig(32, 8, 32, 2, 2, 128, "gelu"),
    "odd": ViTConfig(31, 7, 48, 3, 3, 100, "quick_gelu"),  # three columns and rows are cut off; an odd MLP
    "one-layer": ViTConfig(28, 14, 32, 1, 4, 128, "gelu"),
    "rn": ResNetConfig(32, (1, 1, 1, 1), 8, 16),
    "rn-deeper": ResNetConfig(64, (2, 1, 3, 2), 10, 5),
}
BATCHES = (1, 2, 7)


def config_of(name: str) -> ClipConfig:
    return replace(tiny.vit(), vision=TOWERS[name])


def plain(name: str, seed: int = 0) -> ImageTower:
    config = config_of(name)
    weights = tiny.weights(config, seed)  # gains, biases and BatchNorm's statistics are not trivial
    return build_image_tower(config, {key[7:]: array for key, array in weights.items() if key.startswith("visual.")})


def pictures(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def unit(tower: nn.Module, pixels: Tensor) -> Tensor:
    return nn.functional.normalize(tower(pixels).float())


def assert_equal(ours: Tensor, plain: Tensor) -> None:
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= 1e-5
    assert (ours * plain).sum(dim=1).min() >= 1 - 1e-5


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TOWERS)
def test_the_same_numbers(name: str, batch: int, pack: bool) -> None:
    tower, pixels = plain(name), pictures(batch, TOWERS[name].image_size)
    before = pixels.clone()
    assert_equal(unit(fast(plain(name), pack=pack), pixels), unit(tower, pixels))
    assert torch.equal(pixels, before)


def test_weights_are_packed_where_there_is_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.randn(6, 4), torch.randn(3, 4)
    product = Product(weight, torch.ones(6), 2.0, "gelu", pack=True)
    assert product.packed is not None and product.weight is None
    expected = nn.functional.gelu(2 * rows @ weight.T + 1)
    torch.testing.assert_close(product(rows), expected)
    assert packed(weight.half()) is None
    monkeypatch.setattr(products, "_onednn", None)
    without = Product(weight, torch.ones(6), 2.0, "gelu", pack=True)
    assert without.packed is None
    torch.testing.assert_close(without(rows), expected)


@pytest.mark.parametrize("name", ["quick", "rn"])
def test_every_tensor_matters(name: str) -> None:
    """A weight that the fast form left out would show: each is changed, and both forms follow alike."""
    tower, pixels = plain(name), pictures(2, TOWERS[name].image_size)
    first = unit(tower, pixels)
    for key, tensor in {**dict(tower.named_parameters()), **dict(tower.named_buffers())}.items():
        if "num_batches" in key:
            continue
        kept = tensor.clone()
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).abs())
        changed = unit(tower, pixels)
        for pack in (False, True):
            assert_equal(unit(fast(copy.deepcopy(tower), pack=pack), pixels), changed)
        # attention doesn't see the bias of its keys, alone among all tensors
        assert (changed - first).abs().max() > 1e-5 or key == "attnpool.k_proj.bias", key
        tensor.copy_(kept)


def test_another_size_than_the_models_own() -> None:
    for name, size in (("quick", 48), ("quick", 24), ("rn", 96)):
        pixels = pictures(2, size)
        assert_equal(unit(fast(plain(name)), pixels), unit(plain(name), pixels))


@pytest.mark.parametrize("name", ["gelu", "rn"])
def test_a_large_batch_goes_through_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Watched(FastViT if name == "gelu" else FastResNet):  # type: ignore[misc]
        def _embed(self, pixels: Tensor) -> Tensor:
            sizes.append(len(pixels))
            return super()._embed(pixels)  # type: ignore[no-any-return]

    tower = Watched(plain(name))
    pixels = pictures(7, 32)
    whole = unit(tower, pixels)
    floats = {"gelu": 17 * 128, "rn": 8 * 16 * 16}[name]  # hidden layer of the MLP; end of the stem
    monkeypatch.setattr(module, "LARGEST", 3 * floats * 4)
    assert_equal(unit(tower, pixels), whole)
    monkeypatch.setattr(module, "LARGEST", 1)
    assert_equal(unit(tower, pixels), whole)
    assert sizes == [7, 3, 3, 1, *7 * [1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["quick", "odd", "rn-deeper"])
def test_half_precision_is_no_worse(name: str, dtype: torch.dtype) -> None:
    pixels = pictures(16, TOWERS[name].image_size)
    exact = unit(plain(name), pixels)
    theirs = unit(plain(name).to(dtype), pixels.to(dtype)) - exact
    ours = unit(fast(plain(name)).to(dtype), pixels.to(dtype)) - exact
    assert ours.square().mean().sqrt() <= 1.25 * theirs.square().mean().sqrt()


def test_a_vits_weights_are_shared_and_stay() -> None:
    tower = plain("quick")
    kept = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    form = fast(tower)
    form(pictures(3, 32))
    own = {tensor.data_ptr() for tensor in tower.state_dict().values()}
    more = [tensor for tensor in form.state_dict().values() if tensor.data_ptr() not in own]
    assert {tuple(tensor.shape) for tensor in more} == {(128,)}  # the scaled bias of each block's MLP
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tower.state_dict().items())


def test_the_weights_of_a_resnet_are_there_once() -> None:
    tower = plain("rn")
    convolutions = {tensor.data_ptr() for tensor in tower.state_dict().values() if tensor.ndim == 4}
    form = fast(tower)
    assert not convolutions & {tensor.data_ptr() for tensor in form.state_dict().values()}
    assert not [part for part in form.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in form.state_dict().values() if t.ndim == 4)


def test_the_work_of_vit_b_32() -> None:
    """Counted, not timed: the last of twelve blocks costs next to nothing."""
    vision = ViTConfig(224, 32, 768, 12, 12, 3072, "quick_gelu")
    with torch.device("meta"):
        tower = image_tower(ClipConfig(512, vision, tiny.vit().text, tiny.vit().preprocess)).eval()
        pixels = torch.empty(1, 3, 224, 224)
    work = []
    for form in (tower, fast(tower)):
        with FlopCounterMode(display=False) as counter:
            form(pixels)
        work.append(counter.get_total_flops())
    blocks = 12 * (24 * 768**2 * 50 + 4 * 50**2 * 768)
    assert work[0] == blocks + 2 * 49 * 3072 * 768 + 2 * 768 * 512
    assert work[1] / work[0] <= 0.925


@pytest.mark.parametrize(
    ("name", "file", "activation", "tolerance"),
    [
        ("vit-openai", "state_dict.safetensors", "quick_gelu", 1e-5),
        ("vit-openai", "model_jit_fp16.pt", None, 1e-5),
        ("vit-openclip", "", None, 1e-5),
        ("vit-hf", "", None, 1e-5),
        ("rn-openai", "state_dict.safetensors", "quick_gelu", 5e-5),
    ],
)
def test_golden(reference: Path, name: str, file: str, activation: str | None, tolerance: float) -> None:
    folder = reference / name
    checkpoint = load_checkpoint(folder / file, activation=activation)  # type: ignore[arg-type]
    form = fast(build_image_tower(checkpoint.config, checkpoint.tower("image")))
    pixels = load_file(folder / "inputs.safetensors")["pixel_values"]
    (outputs,) = [p for p in folder.glob("outputs*.safetensors") if "gelu" not in p.name or "_quickgelu" in p.name]
    expected = load_file(outputs)["encode_image"]
    assert np.abs(form(torch.from_numpy(pixels)).numpy() - expected).max() <= tolerance


# ---- who runs which


@pytest.mark.parametrize(("config", "kind"), [(tiny.vit(), FastViT), (tiny.resnet(), FastResNet)], ids=["vit", "rn"])
def test_a_model_runs_the_fast_form(tmp_path: Path, config: ClipConfig, kind: type[nn.Module]) -> None:
    model = load_model(tiny.save(tmp_path, config=config), device="cpu", runtime="torch")
    reference = Model(model.checkpoint, device="cpu", precision="fp32", store=model.store, reference=True)
    assert isinstance(model._images._towers[0].tower, kind) and isinstance(model._images._exact_tower.tower, kind)
    assert type(reference._images._towers[0].tower) is type(image_tower(config))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    assert_equal(torch.from_numpy(model.encode_image(pixels)), torch.from_numpy(reference.encode_image(pixels)))
    assert model.image_fingerprint == reference.image_fingerprint and model.arithmetic == "torch-fp32"
    np.testing.assert_array_equal(  # files are mapped into memory: what runs changes nothing there
        model.checkpoint.arrays["visual.conv1.weight"], load_checkpoint(tmp_path).arrays["visual.conv1.weight"]
    )


def test_verifying_compares_with_the_plain_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the fast form shows there."""
    model = load_model(tiny.save(tmp_path), device="cpu")
    assert all(check.passed for check in verify.verify(model))
    right = module._one_query
    monkeypatch.setattr(module, "_one_query", lambda *args: 1.01 * right(*args))
    assert [check.passed for check in verify.verify(model)] == [False, True, False]


def test_it_has_no_gradients_and_training_does_not_know_it() -> None:
    clip = CLIP(config_of("quick")).eval()
    assert not fast(copy.deepcopy(clip.visual))(pictures(2, 32)).requires_grad
    assert clip.encode_image(pictures(2, 32)).requires_grad
    for path in (Path(module.__file__).parents[1] / "train").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "clipcli.model.fast" not in imported, path


def test_a_tower_in_training_is_refused() -> None:
    """BatchNorm's statistics are not settled then."""
    with pytest.raises(AssertionError, match="eval"):
        fast(plain("rn").train())


@pytest.mark.gpu
@pytest.mark.parametrize("name", TOWERS)
def test_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pixels = pictures(9, TOWERS[name].image_size)
    exact = unit(plain(name), pixels)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_equal(unit(fast(plain(name)).cuda(), pixels.cuda()).cpu(), exact)
        for dtype in (torch.float16, torch.bfloat16):
            theirs = unit(plain(name).to("cuda", dtype), pixels.to("cuda", dtype)).cpu() - exact
            ours = unit(fast(plain(name)).to("cuda", dtype), pixels.to("cuda", dtype)).cpu() - exact
            assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
