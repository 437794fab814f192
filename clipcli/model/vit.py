"""The vision transformer (paper, section 2.4): patches and a class token in, one embedding out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipcli.model.blocks import LayerNorm, Transformer, noise, positions
from clipcli.model.config import ViTConfig


class VisionTransformer(nn.Module):
    """The image tower of the ViT models."""

    def __init__(self, config: ViTConfig, embed_dim: int) -> None:
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        scale = config.width**-0.5
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = noise(config.width, std=scale)
        self.positional_embedding = noise(tokens, config.width, std=scale)
        self.ln_pre = LayerNorm(config.width)
        self.transformer = Transformer(config, causal=False)
        self.ln_post = LayerNorm(config.width)
        self.proj = noise(config.width, embed_dim, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised pictures [B, 3, size, size] to embeddings [B, embed_dim], not normalised."""
        x = self.conv1(x)  # [B, width, grid, grid]
        x = x.flatten(2).transpose(1, 2)  # [B, grid ** 2, width]
        places = positions(self.positional_embedding, x.shape[1])
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)  # [B, grid ** 2 + 1, width]
        x = self.ln_pre(x + places.to(x.dtype))
        x = self.transformer(x)  # [B, grid ** 2 + 1, width]
        return self.ln_post(x[:, 0]) @ self.proj  # [B, embed_dim]: the class token alone
