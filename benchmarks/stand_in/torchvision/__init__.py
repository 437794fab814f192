"""A stand-in for torchvision, where it isn't installed: what open_clip takes of it, with the same calls of Pillow.

Only the benchmarks put it on a path. Pictures go through it as they go through torchvision; no model uses it.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import torch
from PIL import Image


class InterpolationMode:
    BICUBIC = Image.BICUBIC
    BILINEAR = Image.BILINEAR


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Resize:
    def __init__(self, size, interpolation=Image.BILINEAR, **_):
        self.size, self.interpolation = size, interpolation

    def __call__(self, x):
        short, long = sorted(x.size)
        length = int(self.size * long / short)
        return x.resize((length, self.size) if x.width == long else (self.size, length), self.interpolation)


class CenterCrop:
    def __init__(self, size):
        self.size = size if isinstance(size, int) else size[0]

    def __call__(self, x):
        left, top = round((x.width - self.size) / 2), round((x.height - self.size) / 2)
        return x.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    def __call__(self, x):
        return torch.from_numpy(np.array(x)).permute(2, 0, 1).contiguous() / 255


class Normalize:
    def __init__(self, mean, std, inplace=False):
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, x):
        return (x - self.mean) / self.std


class Unused:
    def __init__(self, *_, **__):
        pass


for name in ("transforms", "transforms.functional", "ops", "ops.misc"):
    sys.modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
given = sys.modules["torchvision.transforms"]
for one in (InterpolationMode, Compose, Resize, CenterCrop, ToTensor, Normalize):
    setattr(given, one.__name__, one)
for name in ("RandomResizedCrop", "ColorJitter", "Grayscale"):
    setattr(given, name, Unused)
given.functional = sys.modules["torchvision.transforms.functional"]
given.functional.to_tensor = ToTensor()
sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = Unused
transforms, ops = given, sys.modules["torchvision.ops"]
