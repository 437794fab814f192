"""The residual attention block that both transformers are made of (paper, section 2.4).

Attribute names are those of the original state dict, so that loading needs no map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcli.model.config import Activation, TextConfig, ViTConfig


def noise(*shape: int, std: float) -> nn.Parameter:
    """A parameter to begin training with; empty on the meta device, where random numbers import half of torch."""
    values = torch.empty(shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=std))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that computes in fp32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` and return it in `x`'s dtype."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class QuickGELU(nn.Module):
    """`x · σ(1.702 x)`: OpenAI's cheap GELU. Not interchangeable with `nn.GELU`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it element by element."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def positions(embedding: Tensor, places: int) -> Tensor:
    """Positional embeddings [1 + places, width] for a square grid of `places`, whatever grid they were made for.

    The first belongs to the class token (or the mean). Another grid than the model's own comes up only in training
    at several sizes; the embeddings are then interpolated.
    """
    if len(embedding) == places + 1:
        return embedding
    old, new = math.isqrt(len(embedding) - 1), math.isqrt(places)
    grid = embedding[1:].T.view(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([embedding[:1], grid.flatten(2)[0].T])


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = noise(3 * width, width, std=width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, width] to [B, N, width]; with `causal`, no token sees a later one."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, N, 3 * width]
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, width / heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        return self.c_proj(self.act(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Attention, then the MLP; each normalised before and added after."""

    def __init__(self, config: ViTConfig | TextConfig, *, causal: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads, causal=causal)
        self.ln_2 = LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, width] to [B, N, width]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(self, config: ViTConfig | TextConfig, *, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(config, causal=causal) for _ in range(config.layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, width] to [B, N, width]."""
        return self.resblocks(x)
