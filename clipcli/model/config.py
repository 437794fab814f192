"""What a CLIP model is made of, as values: two towers, and how pictures are prepared for it.

Comes from a checkpoint's configuration or from its tensors' shapes (`weights/`); read by the model, the
transform and the fingerprints. No torch here: pictures can be prepared, and a checkpoint checked, without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
Shape = tuple[int, ...]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer: patches, a class token, `layers` residual attention blocks, a projection."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation


@dataclass(frozen=True)
class ResNetConfig:
    """A ModifiedResNet: a stem of three convolutions, four stages of bottlenecks, attention pooling."""

    image_size: int
    layers: tuple[int, int, int, int]  # bottlenecks in each stage
    width: int  # channels after the stem; the last stage has 32 x as many
    heads: int  # of the attention pooling


@dataclass(frozen=True)
class TextConfig:
    """A causal text transformer, read at the end token."""

    context_length: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the image tower's input."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"  # longest: fit inside, pad
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class ClipConfig:
    """A whole model: both towers map into `embed_dim` dimensions."""

    embed_dim: int
    vision: ViTConfig | ResNetConfig
    text: TextConfig
    preprocess: Preprocess


def is_image_key(name: str) -> bool:
    """Whether the tensor `name` belongs to the image tower (else the text tower, `logit_scale` aside)."""
    return name.startswith("visual.")


def expected_shapes(config: ClipConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of `config` must hold, by its original name, and its shape.

    BatchNorm's `num_batches_tracked` is left out: only training looks at it, and not every file has it.
    """
    if isinstance(config.vision, ViTConfig):
        image = _vit_shapes(config.vision, config.embed_dim)
    else:
        image = _resnet_shapes(config.vision, config.embed_dim)
    text = config.text
    return {
        **{f"visual.{name}": shape for name, shape in image.items()},
        "token_embedding.weight": (text.vocab_size, text.width),
        "positional_embedding": (text.context_length, text.width),
        **_transformer_shapes(text),
        **_norm_shapes("ln_final", text.width),
        "text_projection": (text.width, config.embed_dim),
        "logit_scale": (),
    }


def _norm_shapes(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear_shapes(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _transformer_shapes(config: ViTConfig | TextConfig) -> dict[str, Shape]:
    width, mlp_width = config.width, config.mlp_width
    shapes: dict[str, Shape] = {}
    for block in (f"transformer.resblocks.{i}" for i in range(config.layers)):
        shapes |= _norm_shapes(f"{block}.ln_1", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear_shapes(f"{block}.attn.out_proj", width, width)
        shapes |= _norm_shapes(f"{block}.ln_2", width)
        shapes |= _linear_shapes(f"{block}.mlp.c_fc", width, mlp_width)
        shapes |= _linear_shapes(f"{block}.mlp.c_proj", mlp_width, width)
    return shapes


def _vit_shapes(vit: ViTConfig, embed_dim: int) -> dict[str, Shape]:
    tokens = (vit.image_size // vit.patch_size) ** 2 + 1
    return {
        "class_embedding": (vit.width,),
        "positional_embedding": (tokens, vit.width),
        "proj": (vit.width, embed_dim),
        "conv1.weight": (vit.width, 3, vit.patch_size, vit.patch_size),
        **_norm_shapes("ln_pre", vit.width),
        **_transformer_shapes(vit),
        **_norm_shapes("ln_post", vit.width),
    }


def _convolution_shapes(conv: str, bn: str, inputs: int, outputs: int, size: int) -> dict[str, Shape]:
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {
        f"{conv}.weight": (outputs, inputs, size, size),
        **{f"{bn}.{name}": (outputs,) for name in statistics},
    }


def _resnet_shapes(resnet: ResNetConfig, embed_dim: int) -> dict[str, Shape]:
    width = resnet.width
    shapes: dict[str, Shape] = {}
    for i, (inputs, outputs) in enumerate([(3, width // 2), (width // 2, width // 2), (width // 2, width)], 1):
        shapes |= _convolution_shapes(f"conv{i}", f"bn{i}", inputs, outputs, 3)
    inputs = width
    for stage, blocks in enumerate(resnet.layers):
        planes = width * 2**stage
        for index in range(blocks):
            block = f"layer{stage + 1}.{index}"
            shapes |= _convolution_shapes(f"{block}.conv1", f"{block}.bn1", inputs, planes, 1)
            shapes |= _convolution_shapes(f"{block}.conv2", f"{block}.bn2", planes, planes, 3)
            shapes |= _convolution_shapes(f"{block}.conv3", f"{block}.bn3", planes, 4 * planes, 1)
            if index == 0:  # the only block of a stage that changes the number of channels or the size
                shapes |= _convolution_shapes(f"{block}.downsample.0", f"{block}.downsample.1", inputs, 4 * planes, 1)
            inputs = 4 * planes
    shapes["attnpool.positional_embedding"] = ((resnet.image_size // 32) ** 2 + 1, inputs)
    for name in ("k_proj", "q_proj", "v_proj"):
        shapes |= _linear_shapes(f"attnpool.{name}", inputs, inputs)
    return shapes | _linear_shapes("attnpool.c_proj", inputs, embed_dim)
