"""The torch model against the golden files, against transformers, and against itself in another shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from clipcli.model.clip import CLIP, build_image_tower, build_text_tower
from clipcli.model.config import ClipConfig, expected_shapes
from clipcli.model.device import place
from clipcli.weights.load import Checkpoint, load_checkpoint
from clipcli.weights.model import Model, load_model

GOLDEN = [  # folder, checkpoint in it, outputs, how the activation is known, largest difference allowed
    ("vit-openai", "state_dict.safetensors", "outputs", "quick_gelu", 1e-5),
    ("vit-openai", "model.pt", "outputs", "quick_gelu", 1e-5),
    ("vit-openai", "model_jit.pt", "outputs", None, 1e-5),
    ("vit-openai", "model_jit_fp16.pt", "outputs", None, 1e-5),
    ("vit-openclip", "", "outputs_quickgelu", None, 1e-5),
    ("vit-hf", "", "outputs", None, 1e-5),
    ("vit-fullvocab", "state_dict.safetensors", "outputs", "quick_gelu", 1e-5),
    ("rn-openai", "state_dict.safetensors", "outputs", "quick_gelu", 5e-5),
    ("rn-openai", "model_jit.pt", "outputs", None, 5e-5),
    ("rn-openai", "model_jit_fp16.pt", "outputs", None, 5e-5),
]


def towers(checkpoint: Checkpoint) -> tuple[torch.nn.Module, torch.nn.Module]:
    return (
        build_image_tower(checkpoint.config, checkpoint.tower("image")),
        build_text_tower(checkpoint.config, checkpoint.tower("text")),
    )


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - theirs).max())


def check_parity(checkpoint: Checkpoint, folder: Path, outputs: str, tolerance: float) -> None:
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / f"{outputs}.safetensors")
    image_tower, text_tower = towers(checkpoint)
    image = image_tower(torch.from_numpy(inputs["pixel_values"]))
    text = text_tower(torch.from_numpy(inputs["input_ids"]).long())
    assert difference(image, expected["encode_image"]) <= tolerance
    assert difference(text, expected["encode_text"]) <= tolerance
    unit = torch.nn.functional.normalize
    logits = checkpoint.logit_scale * unit(image) @ unit(text).T
    assert difference(logits, expected["logits_per_image"]) <= 5 * tolerance  # logits are about ten times as large


@pytest.mark.parametrize(("name", "file", "outputs", "activation", "tolerance"), GOLDEN)
def test_golden(reference: Path, name: str, file: str, outputs: str, activation: str | None, tolerance: float) -> None:
    folder = reference / name
    checkpoint = load_checkpoint(folder / file, activation=activation)  # type: ignore[arg-type]
    check_parity(checkpoint, folder, outputs, tolerance)


def test_golden_with_gelu(reference: Path, tmp_path: Path) -> None:
    source = reference / "vit-openclip"
    (tmp_path / "open_clip_config.json").write_bytes((source / "open_clip_config_gelu.json").read_bytes())
    (tmp_path / "open_clip_model.safetensors").symlink_to(source / "open_clip_model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    check_parity(checkpoint, source, "outputs_gelu", 1e-5)
    with pytest.raises(AssertionError):  # the wrong activation shows
        check_parity(load_checkpoint(source), source, "outputs_gelu", 1e-3)


def test_end_to_end_with_real_text(reference: Path) -> None:
    """Labels as text and pictures as golden pixels give the golden probabilities."""
    folder = reference / "vit-fullvocab"
    model = load_model(folder / "state_dict.safetensors", activation="quick_gelu", vocabulary=reference / "merges.txt")
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    labels = ["an astronaut", "a cat", "a cup of coffee", "a rocket", "a dog", "a motorcycle"]
    labels += ["a page of text", "the moon"]
    ids = model.tokenizer([f"a photo of {label}." for label in labels])
    assert [row[: len(ours)].tolist() for row, ours in zip(inputs["input_ids"], ids, strict=True)] == ids
    text = np.empty((len(ids), model.config.embed_dim), np.float32)
    for indices, vectors in model.encode_text(ids):
        text[indices] = vectors
    golden = expected["encode_text"] / np.linalg.norm(expected["encode_text"], axis=1, keepdims=True)
    assert np.abs(text - golden).max() <= 1e-5


@pytest.mark.parametrize("config", [tiny.vit(), tiny.resnet(), tiny.resnet(image_size=64)], ids=["vit", "rn", "rn64"])
def test_expected_shapes_are_the_models_own(config: ClipConfig) -> None:
    with torch.device("meta"):
        state = CLIP(config).state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}
    assert own == expected_shapes(config)


@pytest.mark.parametrize("config", [tiny.vit(), tiny.resnet()], ids=["vit", "rn"])
def test_whole_model_equals_its_towers(tmp_path: Path, config: ClipConfig) -> None:
    checkpoint = load_checkpoint(tiny.save(tmp_path, config=config))
    whole = CLIP(config).eval()
    state = {name: torch.from_numpy(np.array(array)) for name, array in checkpoint.arrays.items()}
    missing = whole.load_state_dict(state, strict=False).missing_keys
    assert all("num_batches_tracked" in name for name in missing)
    image, text = towers(checkpoint)
    size = config.vision.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 9, config.text.vocab_size - 1, 0], [config.text.vocab_size - 1, 3, 3, 3]])
    with torch.inference_mode():
        unit = torch.nn.functional.normalize
        expected = checkpoint.logit_scale * unit(image(pixels)) @ unit(text(ids)).T
        torch.testing.assert_close(whole(pixels, ids), expected, atol=1e-4, rtol=0)


def test_a_causal_tower_needs_no_padding(tmp_path: Path) -> None:
    """The same prompts padded to the full context, ragged in batches, and alone."""
    checkpoint = load_checkpoint(tiny.save(tmp_path))
    model = Model(checkpoint, device="cpu", precision="fp32", store=load_model(tmp_path).store)
    random = np.random.default_rng(0)
    end = checkpoint.config.text.vocab_size - 1
    ids = [[end - 1, *random.integers(0, end - 1, n), end] for n in (3, 0, 75, 12, 3, 30)]
    padded = torch.zeros(len(ids), 77, dtype=torch.long)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    expected = torch.nn.functional.normalize(towers(checkpoint)[1](padded)).numpy()
    seen = []
    for indices, vectors in model.encode_text(ids):
        assert np.abs(vectors - expected[indices]).max() <= 1e-6
        seen += indices
    assert sorted(seen) == list(range(len(ids)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_exchange_with_transformers(tmp_path: Path, activation: str) -> None:
    """The same random weights in transformers and here: equal directions for real photographs and text."""
    import skimage
    from transformers import CLIPModel

    from clipcli.images.decode import open_picture
    from clipcli.images.transform import normalise, transform
    from clipcli.records import Source

    config = tiny.vit(activation=activation)  # type: ignore[arg-type]
    theirs = CLIPModel.from_pretrained(tiny.save(tmp_path / "ours", "transformers", config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs")
    data = Path(skimage.__file__).parent / "data"
    pictures = [open_picture(Source(str(data / name))) for name in ("astronaut.png", "chelsea.png", "rocket.jpg")]
    pixels = torch.from_numpy(
        normalise(np.stack([transform(x, config.preprocess, 32) for x in pictures]), config.preprocess)  # type: ignore[arg-type]
    )
    end = config.text.vocab_size - 1
    ids = torch.tensor([[end - 1, 7, 8, 9, end], [end - 1, 100, end, end, end]])
    image, text = towers(ours)
    with torch.inference_mode():
        their_output = theirs(pixel_values=pixels, input_ids=ids)
        for mine, other in ((image(pixels), their_output.image_embeds), (text(ids), their_output.text_embeds)):
            assert torch.nn.functional.cosine_similarity(mine, other).min() >= 0.99999
    assert ours.logit_scale == pytest.approx(100.0, rel=1e-5)


def test_place() -> None:
    assert place("cpu").precision == "fp32"
    assert str(place("cpu", "bf16")) == "cpu, bf16"
    assert place("cpu", "fp16").precision == "fp16"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "cpu:1", ""])
def test_place_refuses(name: str) -> None:
    from clipcli.errors import UsageError

    with pytest.raises(UsageError, match="device"):
        place(name)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_stays_near(tmp_path: Path, precision: str) -> None:
    path = tiny.save(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    exact = load_model(path, device="cpu").encode_image(pixels)
    near = load_model(path, device="cpu", precision=precision).encode_image(pixels)  # type: ignore[arg-type]
    assert near.dtype == np.float32
    assert (exact * near).sum(axis=1).min() >= 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_equals_cpu(tmp_path: Path, precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tiny.save(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    exact = load_model(path, device="cpu").encode_image(pixels)
    other = load_model(path, device="cuda", precision=precision).encode_image(pixels)  # type: ignore[arg-type]
    assert np.abs(exact - other).max() <= {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}[precision]


def test_the_tower_gets_what_normalise_defines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and standard deviation of the checkpoint, and cuDNN left on."""
    from clipcli.images.transform import normalise
    from clipcli.model.config import Preprocess

    config = tiny.vit(preprocess=Preprocess(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4)))
    model = load_model(tiny.save(tmp_path, config=config), device="cpu")
    seen = []

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        seen.append((pixels.numpy(), torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return torch.ones(len(pixels), 16)

    monkeypatch.setattr(model._images._towers[0], "tower", tower)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    model.encode_image(pixels)
    ((got, enabled, tf32),) = seen
    np.testing.assert_array_equal(got, normalise(pixels, config.preprocess))
    assert (enabled, tf32) == (True, False)


def test_arithmetic_is_known_without_a_device_where_it_can_be(tmp_path: Path) -> None:
    path = tiny.save(tmp_path)
    assert load_model(path, device="cpu").arithmetic == "torch-fp32"
    assert load_model(path, device="cuda:99", precision="fp16").arithmetic == "torch-fp16"
    auto = load_model(path)
    assert auto.arithmetic == f"torch-{auto.placement.precision}"


def test_a_vocabulary_that_changes_while_it_is_read_poisons_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise classifiers made with one vocabulary would be kept under the digest of another."""
    from clipcli.errors import VocabularyError
    from clipcli.tokenizer import Tokenizer

    model = load_model(tiny.save(tmp_path))
    read = Tokenizer.from_file

    def read_and_change(path: Path, size: int | None = None) -> Tokenizer:
        tokenizer = read(path, size)
        path.write_text(path.read_text() + "\n")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "from_file", read_and_change)
    with pytest.raises(VocabularyError, match="changed while it was read"):
        _ = model.tokenizer
