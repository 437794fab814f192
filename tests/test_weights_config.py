"""What a checkpoint's configuration, shapes and names say, and what is refused about them (issue 8)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_weights import CONFIGURED, identity, opened

from clipcli.errors import ModelError, NotPlainClip, UsageError
from clipcli.model.config import Preprocess, ResNetConfig, ViTConfig, expected_shapes
from clipcli.weights.load import load_checkpoint


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Configurations


def test_open_clip_leaves_out_what_is_default(tmp_path: Path) -> None:
    from clipcli.weights.open_clip import read

    tiny.save(tmp_path)
    model = {"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}})
    )
    config, _, _ = read(tmp_path, tmp_path / "open_clip_model.safetensors")
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    assert (vision.width, vision.heads, vision.mlp_width, vision.activation) == (768, 12, 3072, "gelu")
    assert (config.text.width, config.text.heads, config.text.vocab_size) == (512, 8, 49408)
    assert config.preprocess == Preprocess((0.5,) * 3, (0.5,) * 3, "shortest", "bicubic")


def test_published_open_clip_sizes(tmp_path: Path) -> None:
    """H/14 and RN50x64, as their configurations stand on the Hub."""
    from clipcli.weights.open_clip import read

    tiny.save(tmp_path)
    towers = {
        "h14": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "rn50x64": {"image_size": 448, "layers": [3, 15, 36, 10], "width": 128, "patch_size": None},
        "bigg": {
            "image_size": 224,
            "layers": 48,
            "width": 1664,
            "head_width": 104,
            "mlp_ratio": 4.9231,
            "patch_size": 14,
        },
    }
    made = {}
    for name, vision in towers.items():
        edit(
            tmp_path / "open_clip_config.json",
            lambda value, vision=vision: value["model_cfg"].update(vision_cfg=vision),
        )
        made[name] = read(tmp_path, tmp_path / "open_clip_model.safetensors")[0].vision
    assert (made["h14"].heads, made["bigg"].heads, made["rn50x64"].heads) == (16, 16, 64)
    assert isinstance(made["rn50x64"], ResNetConfig) and made["rn50x64"].layers == (3, 15, 36, 10)
    assert isinstance(made["bigg"], ViTConfig) and made["bigg"].mlp_width == 8192


@pytest.mark.parametrize("layout", CONFIGURED)
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "shortest", "bilinear"),
        Preprocess(resize_mode="squash"),
    ],
)
def test_preprocessing_is_read(tmp_path: Path, layout: str, preprocess: Preprocess) -> None:
    checkpoint = load_checkpoint(tiny.save(tmp_path, layout, tiny.vit(preprocess=preprocess)))
    assert checkpoint.config.preprocess == preprocess


def test_older_and_newer_preprocessors_of_transformers(tmp_path: Path) -> None:
    tiny.save(tmp_path, "transformers")
    older = {
        "size": 32,
        "crop_size": 32,
        "resample": 3,
        "do_center_crop": True,
        "image_mean": [0.5, 0.5, 0.5],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    expected = Preprocess(mean=(0.5, 0.5, 0.5))
    assert load_checkpoint(tmp_path).config.preprocess == expected
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": older}))
    assert load_checkpoint(tmp_path).config.preprocess == expected


def vision(**changes: Any) -> Any:
    return lambda value: value["model_cfg"]["vision_cfg"].update(changes)


def text(**changes: Any) -> Any:
    return lambda value: value["model_cfg"]["text_cfg"].update(changes)


def model(**changes: Any) -> Any:
    return lambda value: value["model_cfg"].update(changes)


def preprocess(**changes: Any) -> Any:
    return lambda value: value["preprocess_cfg"].update(changes)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (vision(timm_model_name="vit_base_patch16_siglip_224"), "vision_cfg.timm_model_name"),
        (text(hf_model_name="xlm-roberta-base"), "text_cfg.hf_model_name"),
        (model(custom_text=True), "custom_text"),
        (model(init_logit_bias=-10), "init_logit_bias"),
        (model(multimodal_cfg={"width": 512}), "multimodal_cfg"),
        (text(pool_type="last"), "text_cfg.pool_type"),
        (vision(pool_type="avg"), "vision_cfg.pool_type"),
        (vision(attentional_pool=True), "attentional_pool"),
        (text(no_causal_mask=True), "no_causal_mask"),
        (vision(no_ln_pre=True), "no_ln_pre"),
        (vision(ls_init_value=0.1), "ls_init_value"),
        (text(embed_cls=True), "embed_cls"),
        (text(proj_bias=True), "proj_bias"),
        (vision(norm_kwargs={"eps": 1e-6}), "vision_cfg.norm_kwargs"),
        (text(act_kwargs={"approximate": "tanh"}), "text_cfg.act_kwargs"),
        (text(tokenizer_kwargs={"clean": "canonicalize"}), "tokenizer_kwargs"),
        (vision(rope=True), "vision_cfg.rope"),
    ],
)
def test_open_clip_refuses_other_architectures_by_name(tmp_path: Path, change: Any, named: str) -> None:
    tiny.save(tmp_path)
    edit(tmp_path / "open_clip_config.json", change)
    with pytest.raises(NotPlainClip, match=named) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint is not None and "DataComp" in caught.value.hint
    assert "\n" not in caught.value.message


def test_open_clip_settings_without_effect_are_read(tmp_path: Path) -> None:
    plain = identity(load_checkpoint(tiny.save(tmp_path)))
    for change in (
        vision(patch_dropout=0.5, output_tokens=True, timm_model_name=None, ls_init_value=None, pool_type="tok"),
        text(hf_tokenizer_name="somebody/tokenizer", pool_type="argmax", norm_kwargs={}, pad_id=0),
        model(custom_text=False, init_logit_scale=2.6, multimodal_cfg=None),
    ):
        edit(tmp_path / "open_clip_config.json", change)
    assert identity(load_checkpoint(tmp_path)) == plain


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda value: value.update(model_type="siglip"), "siglip"),
        (lambda value: value.update(model_type="chinese_clip"), "chinese_clip"),
        (lambda value: value.update(model_type="metaclip_2"), "metaclip_2"),
        (lambda value: value["vision_config"].update(hidden_act="gelu_new"), "vision_config.hidden_act"),
        (lambda value: value["text_config"].update(layer_norm_eps=1e-6), "text_config.layer_norm_eps"),
        (lambda value: value["text_config"].update(eos_token_id=7), "text_config.eos_token_id"),
        (lambda value: value["vision_config"].update(num_channels=1), "num_channels"),
    ],
)
def test_transformers_refuses_other_architectures_by_name(tmp_path: Path, change: Any, named: str) -> None:
    tiny.save(tmp_path, "transformers")
    edit(tmp_path / "config.json", change)
    with pytest.raises(NotPlainClip, match=named) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (vision(layers=0), "vision_cfg.layers"),
        (vision(layers=10**12), "vision_cfg.layers"),
        (vision(layers=[1, 1, 1]), "vision_cfg.layers"),
        (vision(width="32"), "vision_cfg.width"),
        (vision(head_width=15), "not divisible by 15"),
        (text(heads=True), "text_cfg.heads"),
        (text(heads=5), "not divisible by 5"),
        (vision(mlp_ratio=float("nan")), "mlp_ratio"),
        (vision(mlp_ratio=1e308), "vision_cfg.mlp_ratio` should be a positive number up to 100"),
        (text(mlp_ratio=10**400), "text_cfg.mlp_ratio"),
        (text(mlp_ratio=True), "text_cfg.mlp_ratio"),
        (text(width=10**400), "text_cfg.width` should be a positive whole number, not 10{39}…$"),
        (vision(width=[[]] * 99), "vision_cfg.width"),
        (model(quick_gelu="false"), 'quick_gelu` should be true or false, not "false"'),
        (model(quick_gelu=1), "quick_gelu"),
        (vision(image_size=[32, 16]), "image_size"),
        (model(text_cfg=[]), "model_cfg.text_cfg"),
        (lambda value: value["model_cfg"].pop("embed_dim"), "embed_dim"),
        (lambda value: value.pop("model_cfg"), "model_cfg"),
        (preprocess(mean=[0, 0]), "preprocess_cfg.mean"),
        (preprocess(interpolation="random"), "preprocess_cfg.interpolation"),
        (preprocess(resize_mode="stretch"), "preprocess_cfg.resize_mode"),
        (preprocess(resize_mode={}), "preprocess_cfg.resize_mode"),
        (preprocess(interpolation=[]), "preprocess_cfg.interpolation` should be bicubic or bilinear"),
        (preprocess(interpolation=""), "preprocess_cfg.interpolation"),
        (preprocess(size=64), "preprocess_cfg.size"),
        (preprocess(mean=[0, 0, 10**400]), "preprocess_cfg.mean` should be three numbers from -10 to 10"),
        (preprocess(mean=[0, 0, 1e308]), "preprocess_cfg.mean"),
        (preprocess(std=[1, 1, 10**400]), "preprocess_cfg.std` should be three numbers from 0.001 to 10"),
        (preprocess(std=[1, 1, 0]), "preprocess_cfg.std"),
        (preprocess(std=[1, -1, 1]), "preprocess_cfg.std"),
        (preprocess(std=[1, float("nan"), 1]), "preprocess_cfg.std"),
    ],
)
def test_nonsense_in_a_configuration_is_named(tmp_path: Path, change: Any, named: str) -> None:
    tiny.save(tmp_path)
    edit(tmp_path / "open_clip_config.json", change)
    with pytest.raises(ModelError, match=named) as caught:
        load_checkpoint(tmp_path)
    assert "open_clip_config.json" in caught.value.message


def test_absurd_numbers_of_transformers(tmp_path: Path) -> None:
    tiny.save(tmp_path, "transformers")
    edit(tmp_path / "config.json", lambda value: value["text_config"].update(layer_norm_eps=10**400))
    with pytest.raises(ModelError, match=r"config\.json: `text_config\.layer_norm_eps` should be a positive number"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"model_cfg":' * 100_000])
def test_a_configuration_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    tiny.save(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"open_clip_config\.json: not "):
        load_checkpoint(tmp_path)


# Bare weights


def test_bare_weights_need_the_activation(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, "bare")
    with pytest.raises(ModelError, match="don't tell the activation") as caught:
        load_checkpoint(path, head_width=16)
    assert "--activation" in str(caught.value.hint)
    with pytest.raises(ModelError, match="don't tell the activation") as caught:
        load_checkpoint(tiny.save(tmp_path / "whole") / "open_clip_model.safetensors")
    assert caught.value.hint == f"give the folder {tmp_path / 'whole'}, whose configuration tells it"
    assert load_checkpoint(path, activation="quick_gelu", head_width=16).config == tiny.vit(activation="quick_gelu")


def test_bare_weights_may_need_the_head_width(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, "bare")
    with pytest.raises(ModelError, match="how wide the heads are, and 64 doesn't divide 32"):
        load_checkpoint(path, activation="gelu")
    with pytest.raises(UsageError, match="head width of 5 doesn't divide 32"):
        load_checkpoint(path, activation="gelu", head_width=5)


def test_heads_of_80(tmp_path: Path) -> None:
    """H/14: 64 divides the image tower's width, and yet its heads are 80 wide; the text tower's are 64."""
    config = tiny.vit()
    assert isinstance(config.vision, ViTConfig)
    wide = replace(
        config,
        vision=replace(config.vision, width=1280, layers=1, heads=16, mlp_width=64),
        text=replace(config.text, width=64, heads=1, layers=1, mlp_width=64),
    )
    arrays = {name: np.zeros(shape, np.float16) for name, shape in expected_shapes(wide).items()}
    path = tiny.save(tmp_path, "bare", wide, arrays=arrays, dtype=np.float16)
    with pytest.raises(ModelError, match="1280") as caught:
        load_checkpoint(path, activation="gelu")
    assert "--head-width 80" in str(caught.value.hint)
    checkpoint = load_checkpoint(path, activation="gelu", head_width=80)
    assert checkpoint.config == wide


def test_openais_archive_tells_everything(tmp_path: Path) -> None:
    config = tiny.vit(activation="quick_gelu")
    assert isinstance(config.vision, ViTConfig)
    config = replace(
        config,
        vision=replace(config.vision, width=64, heads=1),
        text=replace(config.text, width=64, heads=1),
    )
    path = tiny.save(tmp_path, "torchscript", config)
    assert load_checkpoint(path).config == config
    lying = replace(config, text=replace(config.text, context_length=60))
    path = tiny.save(tmp_path, "torchscript", lying, arrays=tiny.weights(config))
    with pytest.raises(ModelError, match="says context_length 60, but its tensors are of 77"):
        load_checkpoint(path)


def test_a_bare_file_with_transformers_names(tmp_path: Path) -> None:
    expected = identity(load_checkpoint(tiny.save(tmp_path, "transformers")))
    file = load_checkpoint(tmp_path / "model.safetensors", activation="gelu", head_width=16)
    assert identity(file) == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [("logit_bias", "SigLIP"), ("visual.trunk.blocks.0", "timm"), ("text.transformer.x", "custom text")],
)
def test_bare_weights_of_other_architectures(tmp_path: Path, name: str, told: str) -> None:
    arrays = {**tiny.weights(tiny.vit()), name: np.zeros(1, np.float32)}
    path = tiny.save(tmp_path, "bare", arrays=arrays)
    with pytest.raises(NotPlainClip, match=told):
        opened(path, "bare")


def test_a_safetensors_file_of_something_else(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"not the weights of a CLIP: `token_embedding\.weight` is missing"):
        load_checkpoint(tmp_path / "x.safetensors", activation="gelu")


@pytest.mark.parametrize("layout", CONFIGURED)
def test_arguments_that_contradict_the_configuration(tmp_path: Path, layout: str) -> None:
    path = tiny.save(tmp_path, layout)
    assert load_checkpoint(path, activation="gelu", head_width=16).config == tiny.vit()
    with pytest.raises(UsageError, match="says gelu, not quick_gelu"):
        load_checkpoint(path, activation="quick_gelu")
    with pytest.raises(UsageError, match="says a head width of 16, not 64"):
        load_checkpoint(path, head_width=64)
    with pytest.raises(UsageError, match="unknown activation 'relu'"):
        load_checkpoint(path, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="makes no sense"):
        load_checkpoint(path, head_width=0)


# What is missing


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    arrays = tiny.weights(tiny.vit())
    del arrays["ln_final.bias"], arrays["visual.proj"]
    arrays["visual.extra"] = np.zeros(2, np.float32)
    arrays["text_projection"] = np.zeros((16, 32), np.float32)
    arrays["positional_embedding"] = arrays["positional_embedding"].astype(np.int8)
    folder = tiny.save(tmp_path)
    save_file(arrays, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_checkpoint(folder)
    for part in (
        "2 missing: visual.proj, ln_final.bias",
        "1 unexpected: visual.extra",
        "1 misshaped: text_projection [16, 32] instead of [32, 16]",
        "1 not floating-point: positional_embedding I8",
    ):
        assert part in caught.value.message
    assert "\n" not in caught.value.message


def test_harmless_extras_are_dropped(tmp_path: Path) -> None:
    config = tiny.resnet()
    extras = {
        "attn_mask": np.zeros((77, 77), np.float32),
        "visual.bn1.num_batches_tracked": np.zeros((), np.int64),
        "context_length": np.array(77),
    }
    tiny.save(tmp_path, "open_clip", config)
    expected = identity(load_checkpoint(tmp_path))
    save_file({**tiny.weights(config), **extras}, tmp_path / "open_clip_model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    assert not set(extras) & set(checkpoint.arrays)
    assert identity(checkpoint) == expected
    tiny.save(tmp_path / "hf", "transformers")
    arrays = load_file(tmp_path / "hf" / "model.safetensors")
    arrays["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(arrays, tmp_path / "hf" / "model.safetensors")
    assert len(load_checkpoint(tmp_path / "hf").arrays) == len(expected_shapes(tiny.vit()))


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder") as caught:
        load_checkpoint(tmp_path / "nothing")
    assert caught.value.hint
    with pytest.raises(ModelError, match="it holds nothing"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # anybody's
    with pytest.raises(ModelError, match=r"neither .*it holds config\.json"):
        load_checkpoint(tmp_path)
    tiny.save(tmp_path, "bare")
    with pytest.raises(ModelError, match=r"it holds config\.json, merges\.txt, tiny\.safetensors") as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value.hint) == f"give the weight file itself: {tmp_path / 'tiny.safetensors'}"
    (tmp_path / "inputs.safetensors").write_bytes(bytes(9))
    with pytest.raises(ModelError, match="it holds") as caught:
        load_checkpoint(tmp_path)
    assert (
        str(caught.value.hint) == f"give the weight file itself, perhaps the largest: {tmp_path / 'tiny.safetensors'}"
    )


@pytest.mark.parametrize(
    ("layout", "weights"),
    [("open_clip", "open_clip_model.safetensors"), ("transformers", "model.safetensors")],
)
def test_a_configuration_without_weights(tmp_path: Path, layout: str, weights: str) -> None:
    tiny.save(tmp_path, layout)
    (tmp_path / weights).unlink()
    with pytest.raises(ModelError, match=re.escape(f"config.json is there, but no weights ({weights})")):
        load_checkpoint(tmp_path)


def test_vocabulary_and_name(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "my.model", "bare", vocabulary=False)
    assert opened(path, "bare").vocabulary is None
    assert opened(path, "bare").name == "tiny"
    given = tmp_path / "merges.txt"
    checkpoint = load_checkpoint(path, activation="gelu", head_width=16, vocabulary=given)
    assert checkpoint.vocabulary == given
    assert load_checkpoint(tiny.save(tmp_path / "B-32.v2")).name == "B-32.v2"


@pytest.mark.parametrize(
    ("change", "image", "text"),
    [
        (vision(head_width=32), True, False),
        (text(heads=4), False, True),
        (model(quick_gelu=True), True, True),
        (preprocess(mean=[0, 0, 0]), True, False),
        (preprocess(resize_mode="squash"), True, False),
    ],
)
def test_settings_are_part_of_the_fingerprint(tmp_path: Path, change: Any, image: bool, text: bool) -> None:
    folder = tiny.save(tmp_path)
    before = identity(load_checkpoint(folder))
    edit(folder / "open_clip_config.json", change)
    after = identity(load_checkpoint(folder))
    assert (before[0] != after[0], before[1] != after[1]) == (image, text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": {"shortest_edge": 48}}, "`size` should be the model's 32"),
        ({"size": {"shortest_edge": [32]}}, "`size` should be the model's 32"),
        ({"resample": 0}, "`resample` should be 2"),
        ({"do_normalize": False}, "`do_normalize` is false"),
        ({"do_center_crop": False}, "`do_center_crop` is false"),
        ({"image_std": 1}, "`image_std` should be three numbers"),
        ({"image_mean": [10**400] * 3}, "`image_mean` should be three numbers"),
        ({"do_resize": "false"}, "`do_resize` should be true or false"),
    ],
)
def test_preprocessing_that_clipcli_does_not_do(tmp_path: Path, change: Any, named: str) -> None:
    tiny.save(tmp_path, "transformers")
    edit(tmp_path / "preprocessor_config.json", lambda value: value.update(change))
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        load_checkpoint(tmp_path)
    assert "preprocessor_config.json" in caught.value.message
