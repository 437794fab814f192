"""The causal text transformer (paper, section 2.4): token ids in, the embedding at the end token out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clipcli.model.blocks import LayerNorm, Transformer, noise
from clipcli.model.config import TextConfig


def pad(ids: Sequence[Sequence[int]]) -> Tensor:
    """Ragged token ids as one tensor [B, N] (int64), N the longest: what follows an end token is never seen."""
    padded = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
    for place, row in enumerate(ids):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)


class TextTransformer(nn.Module):
    """The text tower. No token sees a later one, so what follows the end token changes nothing."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = noise(config.context_length, config.width, std=0.01)
        self.transformer = Transformer(config, causal=True)
        self.ln_final = LayerNorm(config.width)
        self.text_projection = noise(config.width, embed_dim, std=config.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [B, N ≤ context_length] (int64) to embeddings [B, embed_dim], not normalised.

        The end token is the largest id; rows are read at its first place, and may be padded behind it.
        """
        x = self.token_embedding(ids)  # [B, N, width]
        x = x + self.positional_embedding[: ids.shape[1]].to(x.dtype)
        x = self.transformer(x)
        x = x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)]  # [B, width]
        return self.ln_final(x) @ self.text_projection  # [B, embed_dim]
