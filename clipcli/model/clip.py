"""The whole model, and how a tower is made of a checkpoint's arrays without random numbers first.

`CLIP` is what training trains and what every fast form is checked against. Inference builds one tower at a
time: `build_image_tower`, `build_text_tower`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipcli.model.config import ClipConfig, ResNetConfig
from clipcli.model.resnet import ModifiedResNet
from clipcli.model.text import TextTransformer
from clipcli.model.vit import VisionTransformer

ImageTower = VisionTransformer | ModifiedResNet
Tower = TypeVar("Tower", bound=nn.Module)


def image_tower(config: ClipConfig) -> ImageTower:
    """The image tower that `config` describes, initialised at random."""
    if isinstance(config.vision, ResNetConfig):
        return ModifiedResNet(config.vision, config.embed_dim)
    return VisionTransformer(config.vision, config.embed_dim)


class CLIP(TextTransformer):
    """Both towers and the learned temperature.

    The text tower's tensors have no prefix in the original state dict, so the model *is* a text transformer
    with an image tower under `visual`.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config.text, config.embed_dim)
        self.visual = image_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map normalised pictures [B, 3, size, size] to embeddings [B, embed_dim], not normalised."""
        return self.visual(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Map token ids [B, N] to embeddings [B, embed_dim], not normalised."""
        return super().forward(ids)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [pictures, texts]: scaled cosines of every picture with every text (paper, figure 3)."""
        image = nn.functional.normalize(self.encode_image(pixels), dim=1)
        text = nn.functional.normalize(self.encode_text(ids), dim=1)
        return self.logit_scale.exp() * image @ text.T


def build_image_tower(config: ClipConfig, arrays: Mapping[str, NDArray[np.generic]]) -> ImageTower:
    """The image tower with the weights of `arrays` (names without `visual.`), fp32, ready for inference."""
    with torch.device("meta"):
        tower = image_tower(config)
    return _fill(tower, arrays)


def build_text_tower(config: ClipConfig, arrays: Mapping[str, NDArray[np.generic]]) -> TextTransformer:
    """The text tower with the weights of `arrays`, fp32, ready for inference."""
    with torch.device("meta"):
        tower = TextTransformer(config.text, config.embed_dim)
    return _fill(tower, arrays)


def _fill(tower: Tower, arrays: Mapping[str, NDArray[np.generic]]) -> Tower:
    state = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    for name, buffer in tower.named_buffers():
        if name.endswith("num_batches_tracked"):  # counts training steps; inference never looks
            state[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    tower.load_state_dict(state, assign=True)
    return tower.eval().requires_grad_(False)
