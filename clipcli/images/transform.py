"""From a decoded picture to the square of pixels that the image tower takes.

In: a picture of `decode.open_picture`, the model's `Preprocess` and size. Out: uint8 [3, size, size], RGB.
The arithmetic is that of the original code: the long side is cut to a whole number, the crop rounded half to
even, and the picture resized in its own mode before it becomes RGB (a palette by nearest neighbour, therefore;
under `auto` it is RGB already). Mean and standard deviation are the model's business, on its device; `normalise`
is their definition. It opens no files.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcli.images.decode import Pixels as Pixels
from clipcli.model.config import Preprocess

Crop = Literal["model", "center", "squash", "pad"]

MAX_RESIZED = 1 << 24  # pixels of a resized picture before its crop: beyond, only the crop is computed

_RESIZE_MODES = {"center": "shortest", "squash": "squash", "pad": "longest"}


def transform(
    picture: Image.Image, preprocess: Preprocess, size: int, *, pixels: Pixels = "auto", crop: Crop = "model"
) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [3, size, size].

    `crop` is the model's own way or another: `center` (shortest side to `size`, the middle of the long one),
    `squash` (both sides to `size`) or `pad` (longest side to `size`, the rest filled: with the model's mean
    colour, which is zero to it, or with black where padding is the model's own way, and under `reference`).
    Of a picture some 300 times as long as wide, only the middle is resized, and one so high that is squashed
    shrinks before it widens: that may differ by 1 from what the original code does.
    """
    mode = resize_mode(preprocess, crop)
    resample = Image.Resampling[preprocess.interpolation.upper()]
    if mode == "squash":
        if picture.width < size and size * picture.height > MAX_RESIZED:  # Pillow widens first
            picture = picture.resize((picture.width, size), resample)
        picture = picture.resize((size, size), resample)
    elif mode == "shortest":
        picture = _shortest(picture, size, resample)
    else:
        picture = _longest(picture, size, resample, None if pixels == "reference" else padding(preprocess))
    rgb = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def resize_mode(preprocess: Preprocess, crop: Crop) -> str:
    """How a picture becomes square: `shortest`, `squash` or `longest`."""
    return preprocess.resize_mode if crop == "model" else _RESIZE_MODES[crop]


def padding(preprocess: Preprocess) -> tuple[int, ...] | None:
    """The colour beside a padded picture; None: black, the model's own."""
    if preprocess.resize_mode == "longest":
        return None
    return tuple(round(min(255.0, max(0.0, 255 * value))) for value in preprocess.mean)


def placed(width: int, height: int, mode: str, size: int) -> tuple[int, int, int, int]:
    """Width and height to resize a picture to, and where in that the square begins: left, top; below 0 if outside."""
    if mode == "squash":
        return size, size, 0, 0
    short, long = min(width, height), max(width, height)
    if mode == "shortest":
        length = int(size * long / short)
        start = round((length - size) / 2)
        return (length, size, start, 0) if width == long else (size, length, 0, start)
    scale = size / long
    width, height = (max(1, round(side * scale)) for side in (width, height))
    return width, height, -((size - width) // 2), -((size - height) // 2)


def normalise(pixels: npt.NDArray[np.uint8], preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]: (pixels / 255 - mean) / std, each step in float32."""
    mean = np.array(preprocess.mean, np.float32)[:, None, None]
    std = np.array(preprocess.std, np.float32)[:, None, None]
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def _shortest(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Shortest side to `size`, then the middle."""
    width, height, left, top = placed(*picture.size, "shortest", size)
    if width * height > MAX_RESIZED:
        across = (left * picture.width / width, (left + size) * picture.width / width)
        down = (top * picture.height / height, (top + size) * picture.height / height)
        return picture.resize((size, size), resample, box=(across[0], down[0], across[1], down[1]))
    return picture.resize((width, height), resample).crop((left, top, left + size, top + size))


def _longest(picture: Image.Image, size: int, resample: Image.Resampling, fill: tuple[int, ...] | None) -> Image.Image:
    """Longest side to `size`, in the middle of a square; `fill` None: zeros of the picture's own mode."""
    width, height, left, top = placed(*picture.size, "longest", size)
    picture = picture.resize((width, height), resample)
    if fill is None:
        return picture.crop((left, top, left + size, top + size))  # outside of a picture lie zeros
    square = Image.new("RGB", (size, size), fill)
    square.paste(picture, (-left, -top))
    return square
