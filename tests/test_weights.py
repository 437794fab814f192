"""Checkpoints in every layout become the same arrays, configuration and fingerprints (issue 8)."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from clipcli.model.config import ClipConfig, Preprocess, ViTConfig, expected_shapes
from clipcli.store.database import Store
from clipcli.weights.load import Checkpoint, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGURED = ("open_clip", "transformers")  # layouts that carry a configuration


def opened(path: Path, layout: str) -> Checkpoint:
    if layout in CONFIGURED:
        return load_checkpoint(path)
    return load_checkpoint(path, activation="gelu", head_width=tiny.HEAD_WIDTH)


def identity(checkpoint: Checkpoint, store: Store | None = None) -> tuple[str, str]:
    store = store or Store(None)
    return checkpoint.fingerprint("image", store), checkpoint.fingerprint("text", store)


# Layouts


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        *((tiny.vit(), layout) for layout in tiny.LAYOUTS),
        *((tiny.resnet(image_size=64), layout) for layout in tiny.LAYOUTS if layout != "transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value.vision).__name__,
)
def test_every_layout_is_the_same_model(tmp_path: Path, config: ClipConfig, layout: str, dtype: type) -> None:
    weights = tiny.weights(config)
    checkpoint = opened(tiny.save(tmp_path, layout, config, dtype=dtype), layout)
    assert checkpoint.config == config
    assert set(checkpoint.arrays) == set(weights)
    for name, array in weights.items():
        assert checkpoint.arrays.shape(name) == array.shape
        assert checkpoint.arrays[name].dtype == dtype
        if name != "logit_scale":  # the only one that float16 rounds
            np.testing.assert_array_equal(checkpoint.arrays[name].astype(np.float32), array)
    assert checkpoint.logit_scale == pytest.approx(100, rel=2e-3 if dtype == np.float16 else 1e-6)
    assert checkpoint.vocabulary == tmp_path / "merges.txt"
    assert checkpoint.files[0].parent == tmp_path
    plain = opened(tiny.save(tmp_path / "plain", "open_clip", config), "open_clip")
    assert identity(checkpoint) == identity(plain)


@pytest.mark.parametrize("kind", ["vit-openai", "rn-openai"])
def test_golden_files_are_one_model(reference: Path, kind: str) -> None:
    folder = reference / kind
    ours = {
        name: load_checkpoint(folder / name, activation="quick_gelu" if "jit" not in name else None)
        for name in ("state_dict.safetensors", "model.pt", "model_jit.pt", "model_jit_fp16.pt")
    }
    if kind == "vit-openai":
        ours["open_clip"] = load_checkpoint(reference / "vit-openclip")
        ours["transformers"] = load_checkpoint(reference / "vit-hf")
    stored = load_file(folder / "state_dict.safetensors")
    store = Store(None)
    for name, checkpoint in ours.items():
        assert checkpoint.config == ours["model.pt"].config, name
        assert identity(checkpoint, store) == identity(ours["model.pt"], store), name
        assert checkpoint.logit_scale == pytest.approx(math.exp(float(stored["logit_scale"])))
        for key in checkpoint.arrays:
            np.testing.assert_array_equal(checkpoint.arrays[key].astype(np.float32), stored[key], err_msg=key)
    vision = ours["model.pt"].config.vision
    expected = json.loads((folder / "config.json").read_text())
    assert vision.image_size == expected["image_resolution"]
    assert vision.heads == expected["vision_heads_inferred"]
    assert ours["model.pt"].config.text.heads == expected["transformer_heads"]


def test_golden_full_vocabulary(reference: Path) -> None:
    checkpoint = load_checkpoint(reference / "vit-fullvocab" / "state_dict.safetensors", activation="quick_gelu")
    assert (checkpoint.name, checkpoint.config.text.vocab_size) == ("state_dict", 49408)


def test_towers_are_read_apart(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny.save(tmp_path))
    assert checkpoint.arrays.touched == set()
    text = checkpoint.tower("text")
    assert checkpoint.arrays.touched == set(text)
    assert "token_embedding.weight" in text and "logit_scale" not in text
    image = checkpoint.tower("image")
    assert image["conv1.weight"].shape == (32, 3, 8, 8)
    assert len(image) + len(text) + 1 == len(expected_shapes(checkpoint.config))
    assert not any(name.startswith("visual.") for name in image)


def test_arrays_are_mapped_and_private(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, "bare")
    before = path.read_bytes()
    array = opened(path, "bare").arrays["visual.proj"]
    assert not array.flags.owndata and array.flags.writeable  # torch warns about arrays it can't write to
    array[:] = 0
    assert path.read_bytes() == before
    assert opened(path, "bare").arrays["visual.proj"].any()


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "bare", "openai_pt", "torchscript"])
def test_no_torch_is_imported(tmp_path: Path, layout: str) -> None:
    path = tiny.save(tmp_path, layout)
    options = "" if layout in CONFIGURED else ", activation='gelu', head_width=16"
    code = (
        "import sys; from pathlib import Path; from clipcli.weights.load import load_checkpoint;"
        f"c = load_checkpoint(Path({str(path)!r}){options}); c.tower('image'); c.tower('text');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module", "parameters", "legacy", "legacy_parameters"])
def test_forms_of_torch_files(tmp_path: Path, wrap: str) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in tiny.weights(tiny.vit()).items()}
    if "parameters" in wrap:
        state = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    if wrap == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    saved: Any = (
        {wrap: state, "epoch": 3, "optimizer": {"step": torch.ones(2)}} if wrap in ("state_dict", "model") else state
    )
    path = tmp_path / "model.pt"
    torch.save(saved, path, _use_new_zipfile_serialization="legacy" not in wrap)
    assert identity(opened(path, "bare")) == identity(load_checkpoint(tiny.save(tmp_path / "a")))


def test_views_of_one_storage(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in tiny.weights(tiny.vit()).items()}
    joint = torch.stack([state["text_projection"], state["visual.proj"]]).transpose(1, 2).contiguous()
    state["text_projection"], state["visual.proj"] = joint[0].T, joint[1].T  # offsets and strides
    torch.save(state, tmp_path / "model.pt")
    checkpoint = opened(tmp_path / "model.pt", "bare")
    assert checkpoint.arrays["visual.proj"].strides == (4, 128)
    assert identity(checkpoint) == identity(load_checkpoint(tiny.save(tmp_path / "a")))


def test_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    state = {name: torch.from_numpy(array).bfloat16() for name, array in tiny.weights(tiny.vit()).items()}
    save_torch(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        arrays = opened(tmp_path / name, "bare").arrays
        assert all(
            np.array_equal(arrays[key], tensor.float().numpy()) and arrays[key].dtype == np.float32
            for key, tensor in state.items()
        )


def test_a_folder_of_both_layouts_is_open_clips(tmp_path: Path) -> None:
    tiny.save(tmp_path, "transformers")
    assert load_checkpoint(tmp_path).layout == "transformers"
    tiny.save(tmp_path, "open_clip")
    assert load_checkpoint(tmp_path).layout == "open_clip"
    (tmp_path / "open_clip_model.safetensors").unlink()  # only half of it is there
    assert load_checkpoint(tmp_path).layout == "transformers"


@pytest.mark.parametrize(
    ("layout", "safe", "pickled"),
    [
        ("open_clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        ("open_clip", "open_clip_model.safetensors", "open_clip_model.bin"),
        ("transformers", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_bin_is_read_where_there_is_no_safetensors(tmp_path: Path, layout: str, safe: str, pickled: str) -> None:
    torch = pytest.importorskip("torch")
    before = load_checkpoint(tiny.save(tmp_path, layout))
    torch.save({k: torch.from_numpy(v) for k, v in load_file(tmp_path / safe).items()}, tmp_path / pickled)
    assert load_checkpoint(tmp_path).files == (tmp_path / safe,)
    expected = identity(before)
    (tmp_path / safe).unlink()
    assert load_checkpoint(tmp_path).files == (tmp_path / pickled,)
    assert identity(load_checkpoint(tmp_path)) == expected


def test_shards(tmp_path: Path) -> None:
    expected = identity(load_checkpoint(tiny.save(tmp_path, "transformers")))
    arrays = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(arrays)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}  # q, k, v apart
    for file, held in parts.items():
        save_file({name: arrays[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = load_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    store = Store(None)
    assert identity(checkpoint, store) == expected
    other = dict.fromkeys(parts["model-2.safetensors"])
    save_file({name: arrays[name] + 1 for name in other}, tmp_path / "model-2.safetensors")
    assert identity(load_checkpoint(tmp_path), store) != expected  # also the second file is watched


# transformers, the program


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_model_that_transformers_wrote(tmp_path: Path, activation: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from clipcli.model.clip import build_image_tower, build_text_tower

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**tower, "intermediate_size": 96, "image_size": 32, "patch_size": 8},
            text_config={**tower, "intermediate_size": 64, "vocab_size": 600, "eos_token_id": 599},
            projection_dim=24,
            initializer_factor=5.0,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert isinstance(ours.config.vision, ViTConfig)
    assert (ours.config.vision.mlp_width, ours.config.text.mlp_width, ours.config.embed_dim) == (96, 64, 24)
    assert ours.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    pixels = torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[598, 5, 7, 599], [598, 300, 2, 599]])
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=pixels)
        image = build_image_tower(ours.config, ours.tower("image"))(pixels)
        text = build_text_tower(ours.config, ours.tower("text"))(ids)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(image, dim=1), output.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(unit(text, dim=1), output.text_embeds, atol=1e-5, rtol=0)


def test_transformers_reads_what_the_tests_write(tmp_path: Path) -> None:
    """So that the layouts of `tiny` are real ones."""
    transformers = pytest.importorskip("transformers")
    _, info = transformers.CLIPModel.from_pretrained(tiny.save(tmp_path, "transformers"), output_loading_info=True)
    assert not any(info.values())


def test_transformers_leaves_out_what_is_default(tmp_path: Path) -> None:
    from clipcli.weights.transformers import read

    tiny.save(tmp_path, "transformers")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config_dict": {"hidden_act": "gelu"}}')
    config, _, _ = read(tmp_path, tmp_path / "model.safetensors")
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    assert (vision.width, vision.layers, vision.heads, vision.patch_size) == (768, 12, 12, 32)
    assert (vision.mlp_width, vision.image_size, vision.activation) == (3072, 224, "quick_gelu")
    text = config.text
    assert (text.width, text.heads, text.mlp_width, text.vocab_size) == (512, 8, 2048, 49408)
    assert (text.context_length, text.activation, config.embed_dim) == (77, "gelu", 512)
    assert config.preprocess == Preprocess()


# Fingerprints


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(expected_shapes(tiny.resnet()))))
def test_every_weight_is_part_of_its_towers_fingerprint(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    config = tiny.resnet()
    arrays = tiny.weights(config)
    folder = tmp_path_factory.mktemp("model")
    before = identity(load_checkpoint(tiny.save(folder / "a", "open_clip", config, arrays=arrays)))
    arrays[name] = arrays[name] + np.float32(1)
    after = identity(load_checkpoint(tiny.save(folder / "b", "open_clip", config, arrays=arrays)))
    image = name.startswith("visual.")
    differs = (image, not image) if name != "logit_scale" else (False, False)
    assert (before[0] != after[0], before[1] != after[1]) == differs


def test_the_second_start_hashes_nothing(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    file = tmp_path / "store.sqlite"
    with Store(file) as store:
        first = identity(load_checkpoint(folder), store)
    with Store(file) as store:
        again = load_checkpoint(folder)
        assert identity(again, store) == first
        assert again.arrays.touched == set()
        shutil.copytree(folder, tmp_path / "copy")
        assert identity(load_checkpoint(tmp_path / "copy"), store) == first
        arrays = tiny.weights(tiny.vit(), seed=1)
        tiny.save(folder, arrays=arrays)
        os.utime(folder / "open_clip_model.safetensors", ns=(1, 1))
        assert identity(load_checkpoint(folder), store) != first
