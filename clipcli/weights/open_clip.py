"""The open_clip layout: a folder with `open_clip_config.json` and weights, safetensors before `.bin`.

Goes out: the configuration, and the tensors by their names, which are the original ones. What open_clip can
build and plain CLIP is not (timm towers, Hugging Face text towers, CoCa, SigLIP, other pooling) is refused by
the name of the setting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcli.model.config import (
    Activation,
    ClipConfig,
    Preprocess,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from clipcli.weights.fields import Fields, read_fields

if TYPE_CHECKING:
    from clipcli.weights.tensors import Tensor

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_model.bin",
    "open_clip_pytorch_model.bin",
)

# Settings that may stand there: the values that change nothing, or None where none does at inference.
Allowed = Mapping[str, Collection[Any] | None]
_MODEL: Allowed = {
    "timm_model_name": (),
    "multimodal_cfg": (),
    "init_logit_bias": (),
    "logit_bias": (),
    "custom_text": (False,),
    "nonscalar_logit_scale": (False,),
    "init_logit_scale": None,
    "cast_dtype": None,
    "output_dict": None,
}
_TOWER: Allowed = {
    "ls_init_value": (),
    "act_kwargs": ({},),
    "norm_kwargs": ({}, {"eps": 1e-5}),
    "final_ln_after_pool": (False,),
    "output_tokens": None,
    "block_type": ("default",),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}
_VISION: Allowed = {
    **_TOWER,
    "timm_model_name": (),
    "timm_model_pretrained": None,
    "timm_pool": None,
    "timm_proj": None,
    "timm_proj_bias": None,
    "timm_drop": None,
    "timm_drop_path": None,
    "patch_dropout": None,
    "attentional_pool": (False,),
    "attn_pooler_queries": None,
    "attn_pooler_heads": None,
    "global_average_pool": (False,),
    "input_patchnorm": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
}
_TEXT: Allowed = {
    **_TOWER,
    "hf_model_name": (),
    "hf_model_pretrained": None,
    "hf_pooler_type": None,
    "hf_proj_type": None,
    "hf_tokenizer_name": None,  # says where a tokenizer lies; ours lies beside the weights
    "tokenizer_kwargs": ({},),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    "no_causal_mask": (False,),
    "embed_cls": (False,),
    "correct_cls_mask": None,
    "pad_id": None,
    "eos_id": None,
}
_PREPROCESS: Allowed = {"mode": ("RGB",), "fill_color": (0,)}


def read(folder: Path, weights: Path) -> tuple[ClipConfig, dict[str, Tensor], tuple[Path, ...]]:
    """Configuration, tensors and weight files of `folder`. Raises ModelError, NotPlainClip, UnsafeFile."""
    from clipcli.weights.tensors import read_tensors  # numpy: a configuration is read without

    return read_config(folder), read_tensors(weights), (weights,)


def read_config(folder: Path) -> ClipConfig:
    """The configuration alone: no weights are needed. Raises ModelError, NotPlainClip."""
    fields = read_fields(folder / CONFIG)
    if not isinstance(fields.values.get("model_cfg"), dict):
        raise fields.wrong("model_cfg", "an object")
    model = fields.section("model_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    # The towers first: their settings name an architecture better than a flag of the whole does.
    vision.only(_VISION, ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"))
    text.only(_TEXT, ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"))
    model.only(_MODEL, ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg"))
    activation: Activation = "quick_gelu" if model.flag("quick_gelu", False) else "gelu"
    config = _vision(vision, activation)
    return ClipConfig(
        embed_dim=model.integer("embed_dim", 0),
        vision=config,
        text=_text(text, activation),
        preprocess=_preprocess(fields.section("preprocess_cfg"), config.image_size),
    )


def _vision(fields: Fields, activation: Activation) -> ViTConfig | ResNetConfig:
    image_size, head_width = fields.integer("image_size", 224), fields.integer("head_width", 64)
    layers = fields.values.get("layers", 12)
    if isinstance(layers, list):
        stages = [Fields(fields.path, fields.where, {"layers": n}).integer("layers", 0, most=1000) for n in layers]
        if len(stages) != 4:
            raise fields.wrong("layers", "a number, or four for a ResNet")
        width = fields.integer("width", 64)
        heads = fields.divide(width * 32, head_width)
        return ResNetConfig(image_size, (stages[0], stages[1], stages[2], stages[3]), width, heads)
    width = fields.integer("width", 768)
    return ViTConfig(
        image_size=image_size,
        patch_size=fields.integer("patch_size", 16),
        width=width,
        layers=fields.integer("layers", 12, most=1000),
        heads=fields.divide(width, head_width),
        mlp_width=int(width * fields.number("mlp_ratio", 4.0, most=100)),
        activation=activation,
    )


def _text(fields: Fields, activation: Activation) -> TextConfig:
    width, heads = fields.integer("width", 512), fields.integer("heads", 8)
    fields.divide(width, heads)
    return TextConfig(
        context_length=fields.integer("context_length", 77),
        vocab_size=fields.integer("vocab_size", 49408),
        width=width,
        layers=fields.integer("layers", 12, most=1000),
        heads=heads,
        mlp_width=int(width * fields.number("mlp_ratio", 4.0, most=100)),
        activation=activation,
    )


def _preprocess(fields: Fields, image_size: int) -> Preprocess:
    fields.only(_PREPROCESS, ("mean", "std", "interpolation", "resize_mode", "size"))
    if fields.values.get("size") not in (None, image_size, [image_size, image_size]):
        raise fields.wrong("size", f"the model's {image_size}")
    mode: Any = fields.choice("resize_mode", "shortest", "longest", "squash")
    interpolation: Any = fields.choice("interpolation", "bicubic", "bilinear")
    return Preprocess(
        mean=fields.mean("mean"),
        std=fields.std("std"),
        resize_mode=mode,
        interpolation=interpolation,
    )
