"""A weight file alone: OpenAI's `.pt`, or a bare state dict; the configuration is read off the shapes.

Shapes tell the architecture but neither the activation nor the width of the heads. OpenAI's own files carry
three numbers besides the weights, and are known: QuickGELU, heads of 64. For other files the caller says it.
"""

from __future__ import annotations

import math
from pathlib import Path

from clipcli.errors import ModelError, NotPlainClip, UsageError
from clipcli.model.config import Activation, ClipConfig, Preprocess, ResNetConfig, Shape, TextConfig, ViTConfig
from clipcli.weights import open_clip, transformers
from clipcli.weights.fields import PLAIN_CLIP
from clipcli.weights.tensors import Tensor, read_tensors

SCALARS = ("input_resolution", "context_length", "vocab_size")  # int64, in OpenAI's files
_OTHER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # image towers H, g, bigG, whose heads aren't 64 wide
_FOREIGN = {  # a name that only another architecture has
    "logit_bias": "SigLIP",
    "visual.trunk.": "a timm image tower",
    "text.transformer.": "a custom text tower",
    "text_decoder.": "CoCa",
    "visual.attn_pool.": "attentional pooling",
}


def read(path: Path, activation: Activation | None, head_width: int | None) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Configuration and tensors of a `.pt` or `.safetensors` file.

    Raises ModelError where the activation or the head width must be told, or it is no CLIP; UnsafeFile.
    """
    tensors = read_tensors(path)
    if all(name.startswith("module.") for name in tensors):  # saved from a parallel wrapper
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if "text_model.embeddings.token_embedding.weight" in tensors:  # transformers' names
        tensors = transformers.rename(tensors)
    for prefix, what in _FOREIGN.items():
        if any(name.startswith(prefix) for name in tensors):
            raise NotPlainClip(f"{path}: holds `{prefix}`: {what}, not a plain CLIP", hint=PLAIN_CLIP)
    told = {name: tensors[name].read().item() for name in SCALARS if _is_scalar(tensors.get(name))}
    if len(told) == len(SCALARS):
        activation, head_width = activation or "quick_gelu", head_width or 64
    if activation is None:
        configured = any(
            path.name in x.WEIGHTS and (path.parent / x.CONFIG).is_file() for x in (open_clip, transformers)
        )
        raise ModelError(
            f"{path}: bare weights don't tell the activation, and the wrong one costs accuracy silently",
            hint=f"give the folder {path.parent}, whose configuration tells it"
            if configured
            else "give --activation quick_gelu (OpenAI, DFN, MetaCLIP) or gelu (LAION, DataComp)",
        )
    config = _Shapes(path, tensors).config(activation, head_width)
    seen = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
    for name, number in zip(SCALARS, seen, strict=True):
        if told.get(name, number) != number:
            raise ModelError(f"{path}: says {name} {told[name]}, but its tensors are of {number}")
    return config, tensors


def _is_scalar(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == "I64" and math.prod(tensor.shape) == 1


class _Shapes:
    """The shapes of a state dict, and what they tell."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.tensors = tensors

    def config(self, activation: Activation, head_width: int | None) -> ClipConfig:
        vocab_size, text_width = self.shape("token_embedding.weight", 2)
        return ClipConfig(
            embed_dim=self.shape("text_projection", 2)[1],
            vision=self.vision(activation, head_width),
            text=TextConfig(
                context_length=self.shape("positional_embedding", 2)[0],
                vocab_size=vocab_size,
                width=text_width,
                layers=self.count("transformer.resblocks."),
                heads=self.heads(text_width, head_width if text_width % 64 else 64),
                mlp_width=self.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
                activation=activation,
            ),
            preprocess=Preprocess(),
        )

    def vision(self, activation: Activation, head_width: int | None) -> ViTConfig | ResNetConfig:
        if "visual.attnpool.positional_embedding" in self.tensors:
            width = self.shape("visual.layer1.0.conv1.weight", 4)[0]
            stages = [self.count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
            return ResNetConfig(
                image_size=32 * self.grid("visual.attnpool.positional_embedding"),
                layers=(stages[0], stages[1], stages[2], stages[3]),
                width=width,
                heads=self.heads(32 * width, head_width or 64),
            )
        width, _, _, patch_size = self.shape("visual.conv1.weight", 4)
        if width in _OTHER_HEADS and head_width is None:
            raise ModelError(
                f"{self.path}: bare weights don't tell how wide the heads of the image tower ({width}) are",
                hint=f"give --head-width {_OTHER_HEADS[width]}, as the published models of this size have",
            )
        return ViTConfig(
            image_size=patch_size * self.grid("visual.positional_embedding"),
            patch_size=patch_size,
            width=width,
            layers=self.count("visual.transformer.resblocks."),
            heads=self.heads(width, head_width if width % 64 else head_width or 64),
            mlp_width=self.shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            activation=activation,
        )

    def shape(self, name: str, dimensions: int) -> Shape:
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.shape) != dimensions or not all(tensor.shape):
            problem = "missing" if tensor is None else "misshaped"
            raise ModelError(f"{self.path}: not the weights of a CLIP: `{name}` is {problem}", hint=PLAIN_CLIP)
        return tensor.shape

    def count(self, prefix: str) -> int:
        """How many numbered parts follow `prefix`."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})

    def grid(self, name: str) -> int:
        """The side of the square of places; one more is the class token or the mean."""
        places = self.shape(name, 2)[0] - 1
        side = math.isqrt(places)
        if side < 1 or side**2 != places:
            raise ModelError(f"{self.path}: `{name}` has {places} places, which is no square")
        return side

    def heads(self, width: int, head_width: int | None) -> int:
        if head_width is None:
            raise ModelError(
                f"{self.path}: bare weights don't tell how wide the heads are, and 64 doesn't divide {width}",
                hint="give --head-width N",
            )
        if width % head_width:
            raise UsageError(f"{self.path}: a head width of {head_width} doesn't divide {width}")
        return width // head_width
