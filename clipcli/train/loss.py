"""The objective: symmetric cross-entropy over scaled cosines (paper, figure 3), and what counts as a match.

Pure functions of tensors. `contrastive_loss` is the paper's where every picture has a caption of its own; in a
batch made of class names several pictures share a word, and `truth` then says which captions hold for which
pictures ("soft targets"): a caption's target is spread evenly over the pictures that it is true of, and a picture's
over its captions in proportion to what they say: one that holds for ten pictures weighs a tenth of one that holds for
this picture alone. Spread evenly, the broad words ("animal") would drown the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, targets: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """The mean of both directions' cross-entropies, a scalar.

    `image`, `text`: unit embeddings [N, D], row i of one belongs to row i of the other; `scale`: what cosines are
    multiplied by. `targets` [N, N] ≥ 0, pictures × captions: how far each caption is true of each picture; every
    row and column needs a positive entry. None: the identity. `smoothing` spreads that share of each target evenly.
    """
    logits = scale * image @ text.T  # [N, N]
    if targets is None:
        own = torch.arange(len(logits), device=logits.device)
        return (
            F.cross_entropy(logits, own, label_smoothing=smoothing)
            + F.cross_entropy(logits.T, own, label_smoothing=smoothing)
        ) / 2
    pictures = targets / targets.sum(dim=0, keepdim=True)  # each column: a caption's share in its pictures
    captions = pictures / pictures.sum(dim=1, keepdim=True)  # each row: a picture's share in its captions
    to_text = F.cross_entropy(logits, captions, label_smoothing=smoothing)
    to_image = F.cross_entropy(logits.T, pictures.T, label_smoothing=smoothing)
    return (to_text + to_image) / 2


def truth(true_of: Sequence[NDArray[np.int64]], chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    """[pictures, captions], 1 where the caption's phrase is true of the picture.

    `true_of[i]`: ids of the phrases that hold for picture i; `chosen[j]`: id of caption j's phrase.
    """
    rows: dict[int, NDArray[np.bool_]] = {}  # pictures of one class share the array: compared once
    for ids in true_of:
        if id(ids) not in rows:
            rows[id(ids)] = np.isin(chosen, ids)
    return np.stack([rows[id(ids)] for ids in true_of]).astype(np.float32)
