"""The ModifiedResNet (paper, section 2.4): three stem convolutions, average pooling wherever the size
shrinks, and attention pooling in place of the global average.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcli.model.blocks import noise, positions
from clipcli.model.config import ResNetConfig


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, all of stride 1; a larger stride is an average pool after the second."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            conv, bn = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(OrderedDict({"-1": nn.AvgPool2d(stride), "0": conv, "1": bn}))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, 4 * planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + shortcut)


class AttentionPool2d(nn.Module):
    """One query, the mean of all places, attends to every place and to itself."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = noise(grid**2 + 1, width, std=width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, grid, grid] to [B, embed_dim]."""
        x = x.flatten(2).transpose(1, 2)  # [B, grid ** 2, width]
        places = positions(self.positional_embedding, x.shape[1])
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + places.to(x.dtype)  # [B, grid ** 2 + 1, width]
        q, k, v = (self._split(y) for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, width / heads]
        return self.c_proj(x.transpose(1, 2).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], self.heads, -1).transpose(1, 2)  # [B, heads, N, width / heads]


class ModifiedResNet(nn.Module):
    """The image tower of the RN models."""

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _stage(width, width, config.layers[0], stride=1)
        self.layer2 = _stage(width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = _stage(width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = _stage(width * 16, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool2d(config.image_size // 32, width * 32, config.heads, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised pictures [B, 3, size, size] to embeddings [B, embed_dim], not normalised."""
        x = F.relu(self.bn1(self.conv1(x)))  # [B, width / 2, size / 2, size / 2]
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # [B, width, size / 2, size / 2]
        x = self.avgpool(x)  # [B, width, size / 4, size / 4]
        x = self.layer2(self.layer1(x))  # [B, 8 * width, size / 8, size / 8]
        x = self.layer4(self.layer3(x))  # [B, 32 * width, size / 32, size / 32]
        return self.attnpool(x)


def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(planes * Bottleneck.expansion, planes, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, planes, stride), *rest)
