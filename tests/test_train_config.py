"""The settings of a run: each from a recipe and from the command line, and what is said of those that can't work."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from clipcli.errors import UsageError
from clipcli.model.config import ResNetConfig, ViTConfig
from clipcli.train.config import TrainConfig, parse_setting

OTHERS: dict[str, Any] = {  # another value than the default for each field, as TOML spells it
    "init": "my-model", "tower": "resnet", "image_size": 64, "patch_size": 16, "layers": [2, 2, 2, 3], "width": 32,
    "heads": 8, "embed_dim": 256, "text_width": 128, "text_layers": 2, "text_heads": 4, "context_length": 32,
    "vocabulary_size": 1500, "activation": "gelu", "freeze": "image", "max_per_label": 20_000, "hold_out": 0.1,
    "templates": "simple", "eval_templates": "own.txt", "alias": 0.25, "broader": 0.2, "canvas": 80, "keep_gb": 0.5,
    "shuffle_buffer": 500, "soft_targets": False, "smoothing": 0.1, "first_scale": 10.0, "most_scale": 50.0,
    "epochs": 2.5, "batch_size": 64, "chunk_size": 16, "learning_rate": 1e-3, "warmup": 0.1, "text_warmup": 100,
    "weight_decay": 0.05, "compile": True,
    "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-8, "clip_gradient": 0.0, "ema": 0.99, "precision": "bf16",
    "freeze_batch_norm": True, "seed": 3, "crop": "resized", "crop_area": 0.2, "flip": 0.0, "jitter": 0.3,
    "grey": 0.1, "erase": 0.25, "mix": 0.5, "sizes": [32, 64], "size_until": [0.5, 0.75], "eval_every": 0.5,
    "save_minutes": 1.5,
}  # fmt: skip


def frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def wrong(**changes: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        TrainConfig.read(None, changes)
    assert "\n" not in caught.value.message
    return caught.value


# Where values come from


def test_every_setting_comes_from_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("# ours\n" + toml(OTHERS))
    config = TrainConfig.read(tmp_path / "recipe.toml")
    assert OTHERS.keys() == {field.name for field in fields(TrainConfig)}
    assert asdict(config) == {name: frozen(value) for name, value in OTHERS.items()}
    default = asdict(TrainConfig())
    assert [name for name, value in asdict(config).items() if value == default[name]] == []


def test_every_setting_comes_from_the_command_line() -> None:
    typed = dict(parse_setting(f"{name}={json.dumps(value)}") for name, value in OTHERS.items())
    assert asdict(TrainConfig.read(None, typed)) == {name: frozen(value) for name, value in OTHERS.items()}


def test_the_command_line_overrules_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 1\nepochs = 3\n")
    config = TrainConfig.read(tmp_path / "recipe.toml", {"seed": 2})
    assert (config.seed, config.epochs) == (2, 3.0)


def test_the_default_is_sound_and_what_json_kept_comes_back() -> None:
    assert TrainConfig.read() == TrainConfig()
    config = TrainConfig.read(None, OTHERS)
    assert TrainConfig.read(None, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("name", ["cpu-1.toml", "cpu-2.toml", "gpu.toml"])
def test_our_own_recipes(name: str) -> None:
    config = TrainConfig.read(Path(__file__).resolve().parents[1] / "benchmarks" / "tiny" / name)
    assert config.clip_config(1000).vision.image_size == config.image_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs=20", ("epochs", 20)),
        ("learning-rate = 1e-3", ("learning_rate", 1e-3)),
        ("soft_targets=false", ("soft_targets", False)),
        ("sizes=[32, 64]", ("sizes", [32, 64])),
        ("crop=resized", ("crop", "resized")),
        ('crop="resized"', ("crop", "resized")),
        ("templates=a photo of a <>.", ("templates", "a photo of a <>.")),
        ("init=ViT-B-32", ("init", "ViT-B-32")),
        ("init=org/model@main=x", ("init", "org/model@main=x")),
        ("init=", ("init", "")),
    ],
)
def test_parse_setting(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


def test_a_setting_without_a_value() -> None:
    with pytest.raises(UsageError, match="setting 'epochs' has no value") as caught:
        parse_setting("epochs")
    assert caught.value.hint == "write --set NAME=VALUE, as in --set epochs=20"


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: no such file or directory"):
        TrainConfig.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs: 20\n")
    with pytest.raises(UsageError, match=r"bad\.toml: expected '=' after a key.*line 1") as caught:
        TrainConfig.read(tmp_path / "bad.toml")
    assert caught.value.hint == "a recipe is TOML: epochs = 20"
    (tmp_path / "bytes.toml").write_bytes(b"init = '\xff'\n")
    with pytest.raises(UsageError, match=r"bytes\.toml: .*0xff"):
        TrainConfig.read(tmp_path / "bytes.toml")


# Names, types, values


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "did you mean batch_size?"),
        ("learning-rate", "did you mean learning_rate?"),
        ("epoch", "did you mean epochs?"),
        ("zzz", "clipcli train --help names the most important ones"),
    ],
)
def test_a_name_that_does_not_exist(name: str, hint: str) -> None:
    error = wrong(**{name: 1})
    assert (error.message, error.hint) == (f"there is no training setting `{name}`", hint)


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("batch_size", 2.5, "setting `batch_size` is 2.5", "a whole number is wanted"),
        ("batch_size", True, "setting `batch_size` is true", "a whole number is wanted"),
        ("batch_size", "many", 'setting `batch_size` is "many"', "a whole number is wanted"),
        ("epochs", True, "setting `epochs` is true", "a number is wanted"),
        ("epochs", "20", 'setting `epochs` is "20"', "a number is wanted"),
        ("epochs", float("inf"), "setting `epochs` is Infinity", "a number is wanted"),
        ("learning_rate", float("nan"), "setting `learning_rate` is NaN", "a number is wanted"),
        ("learning_rate", [1e-3], "setting `learning_rate` is [0.001]", "a number is wanted"),
        ("soft_targets", 1, "setting `soft_targets` is 1", "true or false is wanted"),
        ("templates", 7, "setting `templates` is 7", "text is wanted"),
        ("init", {"a": 1}, 'setting `init` is {"a": 1}', "text is wanted"),
        ("layers", [2.5], "setting `layers` is [2.5]", "a list is wanted, each item a whole number"),
        ("layers", [True], "setting `layers` is [true]", "a list is wanted, each item a whole number"),
        ("sizes", "32,64", 'setting `sizes` is "32,64"', "a list is wanted, each item a whole number"),
        ("size_until", "half", 'setting `size_until` is "half"', "a list is wanted, each item a number"),
        ("crop", "middle", "setting `crop` is 'middle'", "it is resized or square or none"),
        ("tower", 1, "setting `tower` is 1", "it is vit or resnet"),
        ("activation", "relu", "setting `activation` is 'relu'", "it is quick_gelu or gelu"),
    ],
)
def test_a_value_of_another_type(name: str, value: object, message: str, hint: str) -> None:
    error = wrong(**{name: value})
    assert (error.message, error.hint) == (message, hint)


def test_too_large_a_number() -> None:
    assert "epochs" in wrong(epochs=10**400).message


def test_whole_numbers_are_numbers_and_one_number_is_a_list() -> None:
    config = TrainConfig.read(None, {"epochs": 3, "layers": 6, "sizes": 32, "size_until": 1})
    assert isinstance(config.epochs, float)
    assert (config.epochs, config.layers, config.sizes, config.size_until) == (3.0, (6,), (32,), (1.0,))
    assert isinstance(config.size_until[0], float)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1 << 70}, {"epochs": 1e300}, {"canvas": 100_000}, {"width": 1 << 30}, {"text_warmup": 1 << 40},
        {"batch_size": 1}, {"epochs": 0}, {"epochs": -1}, {"learning_rate": 0}, {"epsilon": 0}, {"eval_every": 0},
        {"chunk_size": -1}, {"max_per_label": -1}, {"canvas": -1}, {"keep_gb": -1}, {"shuffle_buffer": -1},
        {"weight_decay": -0.1}, {"clip_gradient": -1}, {"seed": -1}, {"save_minutes": -1}, {"heads": -1},
        {"hold_out": 0.6}, {"hold_out": -0.1}, {"alias": 1.5}, {"broader": -1}, {"smoothing": 2}, {"warmup": 1.1},
        {"flip": -0.5}, {"grey": 2}, {"erase": 2}, {"mix": 2}, {"jitter": -1}, {"ema": 1}, {"beta1": 1}, {"beta2": -1},
        {"crop_area": 0}, {"crop_area": 1.5}, {"first_scale": 0.5}, {"first_scale": 101}, {"image_size": 0},
        {"image_size": 4, "patch_size": 4}, {"patch_size": 0}, {"width": 0}, {"embed_dim": 0}, {"text_width": 0},
        {"text_layers": 0}, {"context_length": 0}, {"layers": 0}, {"layers": []}, {"layers": [3, 3]},
        {"image_size": 100}, {"heads": 5}, {"text_heads": 5}, {"alias": 0.6, "broader": 0.5},
        {"sizes": [32, 64], "size_until": [0.5]}, {"size_until": [0.5, 0.3], "sizes": [32, 64]},
        {"size_until": [1.5], "sizes": [32]}, {"sizes": [33], "size_until": [0.5]},
        {"layers": [2], "tower": "resnet"}, {"layers": [2, 2, 0, 2], "tower": "resnet", "width": 64},
        {"image_size": 48, "layers": [2, 2, 2, 2], "tower": "resnet"},
        {"sizes": [48], "size_until": [0.5], "layers": [2, 2, 2, 2], "tower": "resnet"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_work(changes: dict[str, object]) -> None:
    assert wrong(**changes).message.startswith(f"setting `{next(iter(changes))}` ")


def test_heads_that_follow_from_the_width_must_divide_it() -> None:
    error = wrong(width=25, layers=[2, 2, 2, 2], tower="resnet")
    assert error.message == "setting `heads` (12) must divide the tower's 800 channels"
    assert TrainConfig.read(None, {"width": 25, "layers": [2, 2, 2, 2], "tower": "resnet", "heads": 8}).heads == 8
    assert wrong(text_width=200).message == "setting `text_heads` (3) must divide text_width"


def test_a_models_own_size_is_not_judged_by_the_settings_of_new_ones() -> None:
    with pytest.raises(UsageError, match="`sizes` must each be a multiple of patch_size"):
        TrainConfig.read(None, {"sizes": [112], "size_until": [0.5]})
    assert TrainConfig.read(None, {"sizes": [112], "size_until": [0.5], "init": "ViT-B-16"}).sizes == (112,)


# What follows from them


def test_towers() -> None:
    vit = TrainConfig(image_size=64, patch_size=8, layers=(6,), width=192, embed_dim=128, activation="gelu")
    config = vit.clip_config(1000)
    assert config.vision == ViTConfig(64, 8, 192, 6, 3, 768, "gelu")
    assert (config.embed_dim, config.text.vocab_size, config.text.heads, config.text.mlp_width) == (128, 1000, 8, 2048)
    resnet = TrainConfig(tower="resnet", image_size=64, layers=(1, 2, 3, 4), width=24, text_heads=4)
    config = resnet.clip_config(600)
    assert config.vision == ResNetConfig(64, (1, 2, 3, 4), 24, 12)
    assert config.text.heads == 4
    assert replace(vit, heads=6).clip_config(9).vision.heads == 6
    assert replace(vit, width=16, text_width=8).clip_config(9).vision.heads == 1


def test_sizes_over_the_run() -> None:
    config = TrainConfig(sizes=(32, 64), size_until=(0.25, 0.75))
    sizes = [config.image_size_at(done, 96) for done in (0.0, 0.249, 0.25, 0.749, 0.75, 1.0)]
    assert sizes == [32, 32, 64, 64, 96, 96]
    assert TrainConfig().image_size_at(0.0, 224) == 224


def test_canvases() -> None:
    assert TrainConfig().canvas_size(224) == 256
    assert TrainConfig().canvas_size(64) == 74
    assert TrainConfig(canvas=64).canvas_size(96) == 64


def test_differences() -> None:
    config = TrainConfig()
    assert config.differences(TrainConfig()) == []
    assert config.differences(replace(config, eval_every=2.0, save_minutes=1.0, keep_gb=1.0, compile=True)) == []
    others = TrainConfig.read(None, OTHERS)
    assert set(config.differences(others)) == OTHERS.keys() - {"eval_every", "save_minutes", "keep_gb", "compile"}
    assert config.differences(replace(config, seed=1, batch_size=2)) == ["batch_size", "seed"]
