"""The open_clip layout: a folder with `open_clip_config.json` and weights, safetensors before `.bin`.

Goes out: the configuration, and the tensors by their names, which are the original ones. What open_clip can
build and plain CLIP is not (timm towers, Hugging Face text towers, CoCa, SigLIP, other pooling) is refused by
the name of the setting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcli.model.config import Activation, ClipConfig, Preprocess, ResNetConfig, TextConfig, ViTConfig
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
_UNSET, _OFF, _ANY = (), (False,), None
_MODEL: Allowed = {
    **dict.fromkeys(("timm_model_name", "multimodal_cfg", "init_logit_bias", "logit_bias"), _UNSET),
    **dict.fromkeys(("custom_text", "nonscalar_logit_scale"), _OFF),
    **dict.fromkeys(("init_logit_scale", "cast_dtype", "output_dict"), _ANY),
}
_TOWER: Allowed = {
    "ls_init_value": _UNSET,
    "act_kwargs": ({},),
    "norm_kwargs": ({}, {"eps": 1e-5}),
    "block_type": ("default",),
    **dict.fromkeys(("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), _OFF),
    **dict.fromkeys(("final_ln_after_pool", "qk_norm", "scaled_cosine_attn"), _OFF),
    "output_tokens": _ANY,
}
_VISION: Allowed = {
    **_TOWER,
    "timm_model_name": _UNSET,
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    **dict.fromkeys(("attentional_pool", "global_average_pool", "input_patchnorm", "no_ln_pre"), _OFF),
    **dict.fromkeys(("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"), _ANY),
    **dict.fromkeys(("timm_drop_path", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"), _ANY),
}
_TEXT: Allowed = {
    **_TOWER,
    "hf_model_name": _UNSET,
    "tokenizer_kwargs": ({},),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    **dict.fromkeys(("proj_bias", "no_causal_mask", "embed_cls"), _OFF),
    "hf_tokenizer_name": _ANY,  # says where a tokenizer lies; ours lies beside the weights
    **dict.fromkeys(("hf_model_pretrained", "hf_pooler_type", "hf_proj_type"), _ANY),
    **dict.fromkeys(("correct_cls_mask", "pad_id", "eos_id"), _ANY),
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
    mean, std = fields.colours("mean", Preprocess.mean), fields.colours("std", Preprocess.std, least=1e-3)
    return Preprocess(mean, std, mode, interpolation)
