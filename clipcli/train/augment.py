"""From squashed canvases to the pixels of one training step: crop, flip, colours, erasing, mixing.

In: uint8 canvases [B, 3, C, C], whole pictures squashed to a square, with the aspect ratio that they had, and
uniform random numbers that were drawn for the whole global batch: a step's augmentation depends on the seed, the
step and the place in the batch, on nothing else. Out: normalised pixels, computed as one batch on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipcli.model.config import Preprocess
from clipcli.train.config import TrainConfig

NUMBERS = 20  # uniform numbers that a picture may use up
_RATIO = 4 / 3  # the most that a resized crop is stretched


@dataclass(frozen=True)
class Mixing:
    """Which other picture of the batch each picture was mixed with, and how much is left of its own."""

    partner: Tensor  # [B] int64
    share: Tensor  # [B] of the picture itself, in 0..1

    def targets(self, targets: Tensor) -> Tensor:
        """The targets [B, captions] of the mixed pictures."""
        share = self.share[:, None]
        return share * targets + (1 - share) * targets[self.partner]


def uniform(config: TrainConfig, step: int) -> NDArray[np.float32]:
    """The numbers of one step, [batch_size, NUMBERS] in 0..1."""
    return np.random.default_rng((config.seed, step)).random((config.batch_size, NUMBERS), dtype=np.float32)


def augment(
    canvas: Tensor, aspect: Tensor, numbers: Tensor, size: int, config: TrainConfig, preprocess: Preprocess
) -> tuple[Tensor, Mixing | None]:
    """Pixels [B, 3, size, size], normalised, and how pictures were mixed.

    `canvas`: uint8 [B, 3, C, C]; `aspect`: width / height of the pictures [B]; `numbers`: [B, NUMBERS]. All on the
    device where the work is done.
    """
    u = numbers.unbind(1)
    x = _coarse(canvas, size)
    centre, half = _boxes(aspect, torch.stack(u[:4], 1), config)
    half = torch.stack([torch.where(u[4] < config.flip, -half[:, 0], half[:, 0]), half[:, 1]], 1)
    x = _crop(x, centre, half, size)
    x = _colours(x, torch.stack(u[5:9], 1), config)
    x = _normalised(x, preprocess)
    if config.erase:
        inside = _rectangle(x, torch.stack(u[9:12], 1), 0.02 + 0.28 * u[12])[0]
        x = x.masked_fill(inside & (u[13] < config.erase).view(-1, 1, 1, 1), 0.0)
    if not config.mix:
        return x, None
    return _mix(x, torch.stack(u[14:20], 1), config.mix)


def centre_crop(canvas: Tensor, aspect: Tensor, size: int, preprocess: Preprocess) -> Tensor:
    """Pixels [B, 3, size, size], normalised, of the middle square, as the model's own preprocessing takes it."""
    x = _coarse(canvas, size)
    if x.shape[-1] != size or bool((aspect != 1).any()):
        half = _largest_squares(aspect)
        x = _crop(x, torch.full_like(half, 0.5), half, size)
    return _normalised(x, preprocess)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [B, 3, H, W] as the model takes it."""
    return _normalised(pixels.float() / 255, preprocess)


def _coarse(canvas: Tensor, size: int) -> Tensor:
    """The canvases in 0..1, not much larger than `size`: crops are taken without a filter, so the finest goes first."""
    x = canvas.float() / 255
    if x.shape[-1] <= 1.5 * size:
        return x
    return F.interpolate(x, size=(round(1.25 * size),) * 2, mode="bilinear", antialias=True, align_corners=False)


def _normalised(x: Tensor, preprocess: Preprocess) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (x - mean) / std


def _boxes(aspect: Tensor, u: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Centres and half sides [B, 2] (x, y) of the crops, in shares of the picture."""
    if config.crop == "none":
        half = torch.full((len(aspect), 2), 0.5, device=aspect.device)
    elif config.crop == "square":
        half = _largest_squares(aspect)
    else:
        area = config.crop_area + (1 - config.crop_area) * u[:, 2]
        ratio = torch.exp((2 * u[:, 3] - 1) * float(np.log(_RATIO)))  # width / height of the crop, in pixels
        wide = (area * ratio / aspect).sqrt().clamp(max=1)
        high = (area / ratio * aspect).sqrt().clamp(max=1)
        wide, high = torch.minimum(wide, high * _RATIO / aspect), torch.minimum(high, wide * aspect * _RATIO)
        half = torch.stack([wide, high], 1) / 2
    return half + (1 - 2 * half) * u[:, :2], half


def _largest_squares(aspect: Tensor) -> Tensor:
    """Half sides [B, 2] of the largest squares of the pictures, in shares of them."""
    return torch.stack([(1 / aspect).clamp(max=1), aspect.clamp(max=1)], 1) / 2


def _crop(x: Tensor, centre: Tensor, half: Tensor, size: int) -> Tensor:
    theta = torch.zeros(len(x), 2, 3, device=x.device)  # grid_sample's picture reaches from -1 to 1
    theta[:, 0, 0], theta[:, 1, 1] = 2 * half[:, 0], 2 * half[:, 1]
    theta[:, :, 2] = 2 * centre - 1
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colours(x: Tensor, u: Tensor, config: TrainConfig) -> Tensor:
    if config.jitter:
        brightness, contrast, saturation = (1 + config.jitter * (2 * u[:, i] - 1) for i in range(3))
        grey = _grey(x)
        x = grey + (x - grey) * saturation.view(-1, 1, 1, 1)
        middle = grey.mean(dim=(2, 3), keepdim=True)
        x = middle + (x - middle) * contrast.view(-1, 1, 1, 1)
        x = (x * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
    if config.grey:
        x = torch.where((u[:, 3] < config.grey).view(-1, 1, 1, 1), _grey(x).expand_as(x), x)
    return x


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


def _rectangle(x: Tensor, u: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """A mask [B, 1, H, W] of rectangles that take about the share `area`, and the shares they really take."""
    stretch = torch.exp(2 * u[:, 2] - 1).sqrt()
    high, wide = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    places = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    top, left = u[:, 0] * (1 - high), u[:, 1] * (1 - wide)
    rows = (places >= top[:, None]) & (places < (top + high)[:, None])  # [B, H]
    columns = (places >= left[:, None]) & (places < (left + wide)[:, None])
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return inside, inside.float().mean(dim=(1, 2, 3))


def _mix(x: Tensor, u: Tensor, probability: float) -> tuple[Tensor, Mixing]:
    """Half of the chosen pictures get a rectangle of their neighbour in the batch, half its faint image.

    About half of a picture is its own at least, so that no caption is left without a picture. The neighbour is on
    the same device: of several devices, each mixes its own share.
    """
    partner = torch.arange(len(x), device=x.device).roll(1)
    chosen = u[:, 0] < probability
    pasted = chosen & (u[:, 1] < 0.5)
    inside, share = _rectangle(x, u[:, 2:5], u[:, 5] / 2)
    share = torch.where(pasted, 1 - share, torch.where(chosen, 1 - u[:, 5] / 2, torch.ones_like(share)))
    fainter = torch.where(pasted, torch.ones_like(share), share).view(-1, 1, 1, 1)
    other = x[partner]
    x = torch.where(inside & pasted.view(-1, 1, 1, 1), other, fainter * x + (1 - fainter) * other)
    return x, Mixing(partner, share)
