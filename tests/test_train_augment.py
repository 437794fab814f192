"""From canvases to a step's pixels: where crops lie, what happens to colours, what is mixed; and that no more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from clipcli.images.transform import normalise, transform
from clipcli.model.config import Preprocess
from clipcli.train.augment import NUMBERS, Mixing, augment, centre_crop, normalised, uniform
from clipcli.train.config import TrainConfig

PREPROCESS = Preprocess()
SQUARE = 52  # px of the canvases whose values are places, from the left and from the top
MANY = 2000


def settings(**changes: Any) -> TrainConfig:
    """Nothing happens but what is asked for."""
    return TrainConfig(**{"crop": "none", "flip": 0.0, "batch_size": MANY, **changes})


def colours(normalised: Tensor) -> Tensor:
    """Back to 0..1."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    return normalised * std + mean


def apply(canvas: Tensor, config: TrainConfig, *, size: int, aspect: float | Tensor = 1.0, step: int = 0) -> Tensor:
    pixels, mixing = run(canvas, config, size=size, aspect=aspect, step=step)
    assert mixing is None
    return pixels


def run(
    canvas: Tensor, config: TrainConfig, *, size: int, aspect: float | Tensor = 1.0, step: int = 0
) -> tuple[Tensor, Mixing | None]:
    numbers = torch.from_numpy(uniform(config, step)[: len(canvas)])
    aspects = aspect if isinstance(aspect, Tensor) else torch.full((len(canvas),), aspect)
    return augment(canvas, aspects, numbers, size, config, PREPROCESS)


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8))


def places() -> Tensor:
    """A canvas that tells where each of its pixels lies: red from left to right, green from top to bottom."""
    ramp = torch.arange(0, 256, 5, dtype=torch.uint8).expand(SQUARE, SQUARE)
    return torch.stack([ramp, ramp.T, torch.zeros_like(ramp)])[None]


def boxes(config: TrainConfig, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Top left and bottom right corners [B, 2] (x, y) of the crops, in shares of the picture, read off the pixels.

    Fails where a crop leaves the picture: beyond its border, pixels are mirrored.
    """
    size = 36  # of the crops: canvases are not made coarser
    pixels = apply(places().expand(len(aspect), -1, -1, -1), config, size=size, aspect=aspect)
    lines = colours(pixels)[:, 0, 0], colours(pixels)[:, 1, :, 0]  # [B, size]: along a row, along a column
    assert all((line.diff(dim=1) > -1e-5).all() for line in lines)
    first, last = (torch.stack([(line[:, i] * 51 + 0.5) / SQUARE for line in lines], 1) for i in (3, -4))
    step = (last - first) / (size - 7)
    return first - 3.5 * step, last + 3.5 * step  # from a pixel's middle to the edge


def aspects(count: int, most: float) -> Tensor:
    generator = np.random.default_rng(5)
    return torch.from_numpy(most ** generator.uniform(-1, 1, count)).float()


# Numbers


def test_numbers_depend_on_seed_and_step_alone() -> None:
    config = TrainConfig(batch_size=6, seed=3)
    numbers = uniform(config, 7)
    assert numbers.shape == (6, NUMBERS) and numbers.dtype == np.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_array_equal(numbers, uniform(replace(config, epochs=99.0, mix=1.0), 7))
    for other in (uniform(config, 8), uniform(replace(config, seed=4), 7)):
        assert not np.isin(other, numbers).any()
    np.testing.assert_allclose(numbers[0, :3], [0.530889, 0.682230, 0.967671], atol=1e-6)  # as ever: runs go on


@pytest.mark.parametrize("world", [2, 3])
def test_a_share_is_augmented_as_in_the_whole_batch(world: int) -> None:
    config = settings(batch_size=12, crop="resized", flip=0.5, jitter=0.5, grey=0.3, erase=0.5)
    canvas, aspect = noise(12, 20), aspects(12, 3.0)
    numbers = torch.from_numpy(uniform(config, 4))
    whole, _ = augment(canvas, aspect, numbers, 16, config, PREPROCESS)
    for rank in range(world):
        some = slice(rank, None, world)
        mine, _ = augment(canvas[some], aspect[some], numbers[some], 16, config, PREPROCESS)
        torch.testing.assert_close(mine, whole[some], rtol=0, atol=1e-5)


def test_the_same_step_gives_the_same_pixels() -> None:
    config = settings(crop="resized", flip=0.5, jitter=0.5, grey=0.3, erase=0.5, mix=0.5)
    canvas = noise(8, 20)
    first, second, later = (run(canvas, config, size=16, step=step) for step in (3, 3, 4))
    assert torch.equal(first[0], second[0])
    assert first[1] and second[1] and torch.equal(first[1].share, second[1].share)
    assert not torch.isclose(first[0], later[0]).all(dim=(1, 2, 3)).any()


# Crops


def test_nothing_asked_for_is_the_models_own_normalisation() -> None:
    canvas = noise(5, 16)
    expected = normalise(canvas.numpy(), PREPROCESS)
    pixels = apply(canvas, settings(), size=16)
    assert pixels.shape == (5, 3, 16, 16) and pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(centre_crop(canvas, torch.ones(5), 16, PREPROCESS).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(normalised(canvas, PREPROCESS).numpy(), expected, atol=1e-6)


def test_no_crop_shows_all_of_the_picture() -> None:
    first, last = boxes(settings(crop="none"), aspects(20, 8.0))
    np.testing.assert_allclose(first, 0, atol=3e-3)
    np.testing.assert_allclose(last, 1, atol=3e-3)


def test_a_square_is_a_square_of_the_picture_and_takes_its_whole_short_side() -> None:
    aspect = aspects(400, 4.0)
    first, last = boxes(settings(crop="square"), aspect)
    wide, high = (last - first).unbind(1)
    np.testing.assert_allclose(wide * aspect / high, 1, rtol=0.05)
    np.testing.assert_allclose(torch.maximum(wide, high), 1, atol=6e-3)
    free = torch.where(aspect > 1, first[:, 0] / (1 - wide), first[:, 1] / (1 - high))[(aspect.log().abs() > 0.3)]
    assert free.min() < 0.05 and free.max() > 0.95 and 0.4 < free.mean() < 0.6


@pytest.mark.parametrize("most", [1.0, 6.0])
def test_a_resized_crop_keeps_its_area_and_its_proportions(most: float) -> None:
    aspect = aspects(600, most)
    config = settings(crop="resized", crop_area=0.3)
    first, last = boxes(config, aspect)
    assert first.min() > -5e-3 and last.max() < 1 + 5e-3
    wide, high = (last - first).unbind(1)
    ratio = wide * aspect / high  # of the sides in pixels
    assert ratio.min() > 0.72 and ratio.max() < 1.39
    largest = torch.minimum(aspect, 1 / aspect) * 4 / 3  # the share of a picture that such a crop can have
    area = wide * high
    assert (area > torch.minimum(largest / (16 / 9), torch.tensor(0.29))).all()
    if most == 1.0:
        assert area.min() < 0.35 and area.max() > 0.9
        assert ratio.min() < 0.8 and ratio.max() > 1.25


@pytest.mark.parametrize(("crop", "roundness"), [("square", 1.0), ("resized", 1.0), ("none", 0.5)])
@pytest.mark.parametrize("wide", [True, False])
def test_a_circle_is_round_again(crop: str, roundness: float, wide: bool) -> None:
    picture = Image.new("RGB", (600, 300) if wide else (300, 600))
    x, y = picture.width / 2, picture.height / 2
    ImageDraw.Draw(picture).ellipse((x - 60, y - 60, x + 60, y + 60), fill="white")
    canvas = torch.from_numpy(transform(picture, PREPROCESS, 128, crop="squash"))[None]
    numbers = torch.full((1, NUMBERS), 0.5)  # the middle of everything
    numbers[:, 2] = 0  # and the smallest crop
    config = settings(crop=crop, crop_area=0.25)
    pixels, _ = augment(canvas, torch.tensor([x / y]), numbers, 112, config, PREPROCESS)
    shape = colours(pixels)[0, 0]
    grid = torch.arange(112.0) - 55.5
    assert shape.sum() > 300
    centre = torch.stack([(shape.sum(0) * grid).sum(), (shape.sum(1) * grid).sum()]) / shape.sum()
    assert centre.abs().max() < 0.3
    width, height = ((shape.sum(axis) * grid**2).sum().sqrt().item() for axis in (0, 1))
    assert width / height == pytest.approx(roundness if wide else 1 / roundness, rel=0.03)


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "turned"])
def test_centre_crop_is_the_models_own(name: str) -> None:
    """On photographs that aren't square, up to what two resamplings differ."""
    folder = Path(skimage.__file__).parent / "data"
    picture = Image.open(folder / ("coffee.png" if name == "turned" else name)).convert("RGB")
    if name == "turned":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    expected = torch.from_numpy(normalise(transform(picture, PREPROCESS, 96)[None], PREPROCESS))
    for canvas_size in (110, 96, 400):
        canvas = torch.from_numpy(transform(picture, PREPROCESS, canvas_size, crop="squash"))[None]
        pixels = centre_crop(canvas, torch.tensor([picture.width / picture.height]), 96, PREPROCESS)
        assert pixels.shape == expected.shape
        off = (pixels - expected).abs().mean().item()
        moved = min((pixels.roll(1, axis) - expected).abs().mean().item() for axis in (2, 3))
        assert off < 0.09 and off < 0.55 * moved, (canvas_size, off, moved)


def test_large_canvases_are_made_coarse_first() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).expand(1, 3, 64, 64)
    for pixels in (apply(stripes, settings(), size=20), centre_crop(stripes, torch.ones(1), 20, PREPROCESS)):
        assert pixels.shape == (1, 3, 20, 20)
        np.testing.assert_allclose(colours(pixels), 0.5, atol=0.1)  # no moiré


def test_flips() -> None:
    canvas = noise(200, 12)
    plain = apply(canvas, settings(), size=12)
    torch.testing.assert_close(apply(canvas, settings(flip=1.0), size=12), plain.flip(3), rtol=0, atol=1e-4)
    half = apply(canvas, settings(flip=0.5), size=12)
    turned = torch.isclose(half, plain.flip(3), atol=1e-3).flatten(1).all(dim=1)
    straight = torch.isclose(half, plain, atol=1e-3).flatten(1).all(dim=1)
    assert (turned ^ straight).all() and 70 < turned.sum() < 130


# Colours


def test_jitter_moves_colours_no_further_than_asked() -> None:
    level = torch.tensor([120, 100, 80], dtype=torch.uint8).view(1, 3, 1, 1).expand(MANY, 3, 8, 8)
    seen = colours(apply(level, settings(jitter=0.2), size=8))[:, :, 0, 0]
    grey = (seen * torch.tensor([0.299, 0.587, 0.114])).sum(1)
    brightness = grey / ((0.299 * 120 + 0.587 * 100 + 0.114 * 80) / 255)
    assert brightness.min() > 0.8 - 1e-4 and brightness.max() < 1.2 + 1e-4
    assert brightness.min() < 0.82 and brightness.max() > 1.18 and brightness.mean() == pytest.approx(1, abs=0.02)
    colour = (seen[:, 0] - seen[:, 2]) / brightness / (40 / 255)  # by saturation and contrast
    assert colour.min() > 0.8**2 - 1e-3 and colour.max() < 1.2**2 + 1e-3
    assert colour.min() < 0.7 and colour.max() > 1.35


def test_jitter_changes_contrast_around_the_middle() -> None:
    halves = torch.tensor([100, 140], dtype=torch.uint8).repeat_interleave(4).expand(MANY, 3, 8, 8)
    seen = colours(apply(halves, settings(jitter=0.3), size=8))[:, 0, 0]
    middle, spread = (seen[:, 1] + seen[:, 6]) / 2, seen[:, 6] - seen[:, 1]
    contrast = spread / middle / (40 / 120)
    assert contrast.min() > 0.7 - 1e-3 and contrast.max() < 1.3 + 1e-3
    assert contrast.max() - contrast.min() > 0.5


def test_jitter_stays_a_picture() -> None:
    seen = colours(apply(noise(300, 8), settings(jitter=1.0), size=8))
    assert seen.min() > -1e-5 and seen.max() < 1 + 1e-5
    assert (seen.flatten(1).min(1).values < 1e-5).any() and (seen.flatten(1).max(1).values > 1 - 1e-5).any()


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_grey(probability: float, share: float) -> None:
    canvas = noise(MANY, 4)
    seen = colours(apply(canvas, settings(grey=probability), size=4))
    grey = torch.isclose(seen[:, 0], seen[:, 2], atol=1e-5).flatten(1).all(1)
    assert grey.float().mean() == pytest.approx(share, abs=0.04)
    luma = (canvas / 255 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    torch.testing.assert_close(seen[grey][:, 1], luma[grey], rtol=0, atol=1e-4)


# Erasing and mixing


def rectangle(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Its height and width; fails where the mask is no rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask.sum() == len(rows) * len(columns)
    assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
    return len(rows), len(columns)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_erasing_blanks_a_rectangle(probability: float, share: float) -> None:
    white = torch.full((500, 3, 32, 32), 255, dtype=torch.uint8)
    pixels = apply(white, settings(erase=probability), size=32)
    blank = (pixels == 0).all(dim=1).numpy()
    some = blank.any(axis=(1, 2))
    assert some.mean() == pytest.approx(share, abs=0.06)
    torch.testing.assert_close(
        colours(pixels)[~torch.from_numpy(blank)[:, None].expand_as(pixels)].min(), torch.tensor(1.0)
    )
    areas = [high * wide / 32**2 for high, wide in map(rectangle, blank[some])]
    if areas:
        assert min(areas) > 0.005 and max(areas) < 0.36 and np.ptp(areas) > 0.2


def test_mixing_says_what_is_left_of_a_picture() -> None:
    """Pictures of one value each: the mean of a mixed one tells how much of it is its own."""
    count = 300
    level = (torch.arange(count) * 7 % 250).to(torch.uint8)
    level += level == level.roll(1)
    canvas = level.view(-1, 1, 1, 1).expand(count, 3, 16, 16)
    pixels, mixing = run(canvas, settings(mix=0.8), size=16)
    assert mixing is not None
    seen, own = colours(pixels)[:, 0], level / 255
    other = own[mixing.partner]
    torch.testing.assert_close(
        seen.mean(dim=(1, 2)), mixing.share * own + (1 - mixing.share) * other, rtol=0, atol=1e-4
    )
    assert torch.equal(mixing.partner, torch.arange(count).roll(1))
    mixed = mixing.share < 1
    assert mixed.float().mean() == pytest.approx(0.8, abs=0.08)
    assert mixing.share.min() > 0.4
    flat = seen.flatten(1).std(dim=1) < 1e-4  # faint all over, not in a rectangle
    assert (mixed & flat).sum() > 80 and (mixed & ~flat).sum() > 80
    for i in torch.nonzero(mixed & ~flat)[:50, 0]:
        pasted = torch.isclose(seen[i], other[i], atol=1e-4)
        assert (pasted | torch.isclose(seen[i], own[i], atol=1e-4)).all()
        rectangle(pasted.numpy())


def test_no_mixing() -> None:
    canvas = noise(9, 8)
    pixels, mixing = run(canvas, settings(mix=1e-9), size=8)
    assert mixing is not None and (mixing.share == 1).all()
    torch.testing.assert_close(pixels, apply(canvas, settings(), size=8), rtol=0, atol=1e-5)
    assert torch.equal(mixing.targets(torch.eye(9)), torch.eye(9))


def test_targets_of_mixed_pictures() -> None:
    mixing = Mixing(torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.75, 0.5]))
    targets = mixing.targets(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(targets, [[1, 1, 0], [1, 1, 0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("crop", ["resized", "square", "none"])
@pytest.mark.parametrize("size", [8, 24])
def test_always_finite(crop: str, size: int) -> None:
    """Thousands of draws, at the ends of the range too, of pictures of any proportions."""
    random = np.random.default_rng(0)
    numbers = random.random((4000, NUMBERS), dtype=np.float32)
    numbers[:2000] = random.choice(np.float32([0.0, 0.5, 1 - 2**-24]), (2000, NUMBERS))
    aspect = torch.from_numpy(np.float32(10_000) ** random.uniform(-1, 1, 4000).astype(np.float32))
    config = settings(crop=crop, crop_area=0.01, flip=0.5, jitter=1.0, grey=0.5, erase=0.5, mix=0.9)
    pixels, mixing = augment(noise(4000, 12), aspect, torch.from_numpy(numbers), size, config, PREPROCESS)
    assert pixels.shape == (4000, 3, size, size) and pixels.isfinite().all()
    seen = colours(pixels)
    assert seen.min() > -1e-4 and seen.max() < 1 + 1e-4
    assert mixing is not None and mixing.share.min() > 0.3 and mixing.share.max() <= 1
    assert math.isfinite(centre_crop(noise(4000, 12), aspect, size, PREPROCESS).sum().item())
