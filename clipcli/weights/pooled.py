"""The image tower without its projection: pooled features, which linear probes learn from (paper, section 3.2).

A model comes in, and one goes out whose projection is the identity, so that every form of the image tower, the
fingerprints and the store work as they do with any other. Its text tower is of no use: no words are in that space.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b

import numpy as np

from clipcli.model.config import ResNetConfig
from clipcli.store.database import Store
from clipcli.weights.load import Checkpoint, Part
from clipcli.weights.model import Model
from clipcli.weights.tensors import Arrays, Tensor


@dataclass(frozen=True)
class _Pooled(Checkpoint):
    """A checkpoint without its projection. What is remembered of its file stays that of the original."""

    original: Checkpoint

    def fingerprint(self, part: Part, store: Store) -> str:
        """The identity of a tower, which follows from the original's."""
        return blake2b(f"pooled {self.original.fingerprint(part, store)}".encode(), digest_size=16).hexdigest()


def is_pooled(model: Model) -> bool:
    """Whether `model` gives pooled features."""
    return isinstance(model.checkpoint, _Pooled)


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
    config, arrays = checkpoint.config, checkpoint.arrays
    is_resnet = isinstance(config.vision, ResNetConfig)
    width = config.vision.width * (32 if is_resnet else 1)
    identity = Tensor((width, width), "F32", lambda: np.eye(width, dtype=np.float32))
    changed = {"visual.proj": identity}
    if is_resnet:
        nothing = Tensor((width,), "F32", lambda: np.zeros(width, np.float32))
        changed = {"visual.attnpool.c_proj.weight": identity, "visual.attnpool.c_proj.bias": nothing}
    given = {field: getattr(checkpoint, field) for field in Checkpoint.__dataclass_fields__}
    kept = {name: Tensor(arrays.shape(name), arrays.dtype(name), partial(arrays.__getitem__, name)) for name in arrays}
    given |= {"config": replace(config, embed_dim=width), "arrays": Arrays(kept | changed)}
    return _Pooled(**given, original=checkpoint)
