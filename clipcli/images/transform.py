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

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = {"center": "shortest", "squash": "squash", "pad": "longest"}


def transform(
    picture: Image.Image,
    preprocess: Preprocess,
    size: int,
    *,
    pixels: Pixels = "auto",
    crop: Crop = "model",
) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [3, size, size].

    `crop` is the model's own way or another: `center` (shortest side to `size`, the middle of the long one),
    `squash` (both sides to `size`) or `pad` (longest side to `size`, the rest filled: with the model's mean
    colour, which is zero to it, or with black where padding is the model's own way, and under `reference`).
    Of a picture some 300 times as long as wide, only the middle is resized, and one so high that is squashed
    shrinks before it widens: that may differ by 1 from what the original code does.
    """
    mode = preprocess.resize_mode if crop == "model" else _RESIZE_MODES[crop]
    resample = _FILTERS[preprocess.interpolation]
    if mode == "squash":
        if picture.width < size and size * picture.height > MAX_RESIZED:  # Pillow widens first
            picture = picture.resize((picture.width, size), resample)
        picture = picture.resize((size, size), resample)
    elif mode == "shortest":
        picture = _shortest(picture, size, resample)
    else:
        own = pixels == "reference" or preprocess.resize_mode == "longest"
        mean = tuple(round(min(255.0, max(0.0, 255 * value))) for value in preprocess.mean)
        picture = _longest(picture, size, resample, None if own else mean)
    rgb = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def normalise(pixels: npt.NDArray[np.uint8], preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]: (pixels / 255 - mean) / std, each step in float32."""
    mean = np.array(preprocess.mean, np.float32)[:, None, None]
    std = np.array(preprocess.std, np.float32)[:, None, None]
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def _shortest(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Shortest side to `size`, then the middle."""
    short, long = min(picture.size), max(picture.size)
    length = int(size * long / short)
    start = round((length - size) / 2)
    wide = picture.width == long
    if size * length > MAX_RESIZED:
        first, last = start * long / length, (start + size) * long / length
        box = (first, 0, last, short) if wide else (0, first, short, last)
        return picture.resize((size, size), resample, box=box)
    picture = picture.resize((length, size) if wide else (size, length), resample)
    left, top = (start, 0) if wide else (0, start)
    return picture.crop((left, top, left + size, top + size))


def _longest(picture: Image.Image, size: int, resample: Image.Resampling, fill: tuple[int, ...] | None) -> Image.Image:
    """Longest side to `size`, in the middle of a square; `fill` None: zeros of the picture's own mode."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), resample)
    left, top = (size - width) // 2, (size - height) // 2
    if fill is None:
        return picture.crop((-left, -top, size - left, size - top))  # outside of a picture lie zeros
    square = Image.new("RGB", (size, size), fill)
    square.paste(picture, (left, top))
    return square
