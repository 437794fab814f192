"""The transformers layout: a folder with `config.json` of a CLIPModel and `model.safetensors` or `.bin`.

Goes out: the configuration, and the tensors under the original names: `q_proj`, `k_proj`, `v_proj` become one
`in_proj`, the two projections are transposed. `preprocessor_config.json` tells how pictures are prepared.
transformers is not imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcli.errors import ModelError
from clipcli.model.config import Activation, ClipConfig, Preprocess, TextConfig, ViTConfig
from clipcli.weights.fields import Fields, read_fields, short

if TYPE_CHECKING:
    from clipcli.weights.tensors import Array, Tensor

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
# theirs -> ours, for names in whole, towers, and parts of the name within a tower; `export` reads them backwards
WHOLE = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
TOWERS = {"vision_model.": "visual.", "text_model.": ""}
PARTS = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.": "attn.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
}


def read(folder: Path, weights: Path) -> tuple[ClipConfig, dict[str, Tensor], tuple[Path, ...]]:
    """Configuration, tensors and weight files of `folder`. Raises ModelError, NotPlainClip, UnsafeFile."""
    from clipcli.weights.tensors import read_tensors  # numpy: a configuration is read without

    config = read_config(folder)
    files = shards(weights) if weights.suffix == ".json" else (weights,)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return config, rename(tensors), files


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by their original names; what has none keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed[_ours(name)] = transposed(tensor) if name in WHOLE else tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        names = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        parts = [renamed[part] for part in names if part in renamed]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1:
            renamed[name.replace(".q_proj.", ".in_proj_")] = _joined(parts)
            for part in names:
                del renamed[part]
    return renamed


def _ours(name: str) -> str:
    for theirs, ours in TOWERS.items():
        if name.startswith(theirs):
            name = name.removeprefix(theirs)
            for part, replacement in PARTS.items():
                name = name.replace(part, replacement)
            return ours + name
    return WHOLE.get(name, name)


def transposed(tensor: Tensor) -> Tensor:
    """The projections: their rows are our columns, and the other way round."""
    from clipcli.weights.tensors import Tensor

    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


def _joined(parts: list[Tensor]) -> Tensor:
    import numpy as np

    from clipcli.weights.tensors import FLOATING, Tensor

    def read() -> Array:
        return np.concatenate([part.read() for part in parts])

    rows, *rest = parts[0].shape
    kinds = {part.dtype for part in parts}
    foreign = kinds - FLOATING  # by whose name it is refused
    dtype = "F32" if len(kinds) > 1 and not foreign else min(foreign or kinds)
    return Tensor((rows * len(parts), *rest), dtype, read)


def shards(index: Path) -> tuple[Path, ...]:
    """The weight files that an index beside them names. Raises ModelError."""
    names = read_fields(index).section("weight_map").values.values()
    for name in names:
        usable = isinstance(name, str) and name.isprintable() and len(name) <= 255
        if not usable or Path(name).name != name or name in ("", "..") or "\\" in name:
            raise ModelError(f"{index}: {short(name)} is not the name of a file beside it")
    if not names:
        raise ModelError(f"{index}: `weight_map` names no files")
    return tuple(index.parent / name for name in sorted(set(names)))


def read_config(folder: Path) -> ClipConfig:
    """The configuration alone: no weights are needed. Raises ModelError, NotPlainClip."""
    fields = read_fields(folder / CONFIG)
    if fields.values.get("model_type") != "clip":
        raise fields.foreign("model_type")
    vision, text = tower(fields, "vision_config"), tower(fields, "text_config")
    size = vision.integer("image_size", 224)
    if vision.integer("num_channels", 3) != 3:
        raise vision.foreign("num_channels")
    vocab_size = text.integer("vocab_size", 49408)
    if text.values.get("eos_token_id") not in (None, 2, vocab_size - 1):  # 2 in old files means the largest id
        raise text.foreign("eos_token_id")
    return ClipConfig(
        embed_dim=fields.integer("projection_dim", 512),
        vision=ViTConfig(
            image_size=size,
            patch_size=vision.integer("patch_size", 32),
            **_transformer(vision, width=768, heads=12),
        ),
        text=TextConfig(
            context_length=text.integer("max_position_embeddings", 77),
            vocab_size=vocab_size,
            **_transformer(text, width=512, heads=8),
        ),
        preprocess=_preprocess(folder, size),
    )


def tower(fields: Fields, key: str) -> Fields:
    """A tower's section; older files say the same, or more, again under `…_dict`."""
    section, older = fields.section(key), fields.section(f"{key}_dict")
    return Fields(fields.path, key, {**section.values, **older.values})


def _transformer(fields: Fields, *, width: int, heads: int) -> dict[str, Any]:
    """What both towers have; the arguments are transformers' defaults for what a file leaves out."""
    if fields.number("layer_norm_eps", 1e-5, most=1) != 1e-5:
        raise fields.foreign("layer_norm_eps")
    activation: Activation = fields.values.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise fields.foreign("hidden_act")
    mlp_width = fields.integer("intermediate_size", 4 * width)
    width, heads = fields.integer("hidden_size", width), fields.integer("num_attention_heads", heads)
    fields.divide(width, heads)
    return {
        "width": width,
        "layers": fields.integer("num_hidden_layers", 12, most=1000),
        "heads": heads,
        "mlp_width": mlp_width,
        "activation": activation,
    }


def read_preprocessing(folder: Path) -> Fields:
    """What is told of how pictures are prepared; empty where no file tells it. Raises ModelError."""
    for name in PREPROCESSING:
        if (folder / name).is_file():
            fields = read_fields(folder / name)
            return fields if name == PREPROCESSING[0] else fields.section("image_processor")
    return Fields(folder, "", {})


def _preprocess(folder: Path, image_size: int) -> Preprocess:
    fields = read_preprocessing(folder)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not fields.flag(key, True):
            raise fields.foreign(key)
    resample = fields.values.get("resample")
    if resample not in (None, 2, 3):
        raise fields.wrong("resample", "2 (bilinear) or 3 (bicubic)")
    size = fields.values.get("size", image_size)
    sides = size.values() if isinstance(size, dict) else [size]
    if any(side not in (None, image_size) for side in sides):
        raise fields.wrong("size", f"the model's {image_size}")
    squash = isinstance(size, dict) and size.get("shortest_edge") is None
    if not squash and not fields.flag("do_center_crop", True):
        raise fields.foreign("do_center_crop")
    return Preprocess(
        mean=fields.colours("image_mean", Preprocess.mean),
        std=fields.colours("image_std", Preprocess.std, least=1e-3),
        resize_mode="squash" if squash else "shortest",
        interpolation="bilinear" if resample == 2 else "bicubic",
    )
