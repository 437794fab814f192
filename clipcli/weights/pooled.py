"""The image tower without its projection: pooled features, which linear probes learn from (paper, section 3.2).

A model comes in, and one goes out whose projection is the identity, so that every form of the image tower, the
fingerprints and the store work as they do with any other. Its text tower is of no use: no words are in that space.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property

import numpy as np

from clipcli.model.config import ResNetConfig
from clipcli.weights.load import Checkpoint
from clipcli.weights.model import Model
from clipcli.weights.tensors import Arrays, Tensor


def is_pooled(model: Model) -> bool:
    """Whether `model` gives pooled features."""
    return model.checkpoint.projected is not None


def pooled(model: Model) -> Model:
    """`model` before the projection: `encode_image` gives unit rows [B, width], of a ResNet [B, 32 * width]."""
    if is_pooled(model):
        return model
    twin = copy(model)
    for name, value in vars(Model).items():
        if isinstance(value, cached_property):
            vars(twin).pop(name, None)
    twin.checkpoint = _without_projection(model.checkpoint)
    return twin


def _without_projection(checkpoint: Checkpoint) -> Checkpoint:
    config = checkpoint.config
    is_resnet = isinstance(config.vision, ResNetConfig)
    width = config.vision.width * (32 if is_resnet else 1)
    identity = Tensor((width, width), "F32", lambda: np.eye(width, dtype=np.float32))
    changed = {"visual.proj": identity}
    if is_resnet:
        nothing = Tensor((width,), "F32", lambda: np.zeros(width, np.float32))
        changed = {"visual.attnpool.c_proj.weight": identity, "visual.attnpool.c_proj.bias": nothing}
    arrays = Arrays({**checkpoint.arrays.tensors, **changed})
    return replace(checkpoint, config=replace(config, embed_dim=width), arrays=arrays, projected=checkpoint)
