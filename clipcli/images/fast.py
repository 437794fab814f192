"""From a picture's bytes to the square that the image tower takes, as `--decode auto` does it: fast, nearly the same.

In: a picture's bytes, the model's `Preprocess` and size. Out: uint8 [3, size, size], or the `Failure` that `decode`
makes of them. A plain JPEG is decoded by simplejpeg where that is installed, else by Pillow; a large one at a half, a
quarter or an eighth of its size, well above what it is going to be, which JPEG does in passing. Then `resample` makes
it small. The difference to `decode` and `transform` is 1 in 255 a pixel for what is decoded in full, rarely 2; for
what is not, up to 3 on most photographs (0.2 to 0.4 in the mean), more on what is sharp to the pixel.
Whatever is odd about a picture (broken, CMYK, with a colour profile, huge) is left to those two, so that it becomes
what it becomes there.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from clipcli.images.budget import BIG, MAX_PIXELS, Take, unlimited
from clipcli.images.decode import decode, memory_of, orientation, settle_pillow, way_to_srgb
from clipcli.images.resample import Pixels, resample
from clipcli.images.transform import MAX_RESIZED, Crop, padding, placed, resize_mode, transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure

LARGE = 1_000_000  # pixels; smaller pictures are quickly decoded in full, and sharper
_T = Image.Transpose
_SIDEWAYS = (_T.TRANSPOSE, _T.TRANSVERSE, _T.ROTATE_90, _T.ROTATE_270)
SPARE = 2.5  # a picture that is decoded at less than its size remains so many times as large as the result


def fast_square(
    path: str, data: bytes, preprocess: Preprocess, size: int, crop: Crop = "model", take: Take = unlimited
) -> Pixels | Failure:
    """The picture that `data` holds, as uint8 [3, size, size]; `path` and `take` are as for `decode`."""
    mode = resize_mode(preprocess, crop)
    found = _plain_jpeg(data, mode, size, take) if data.startswith(b"\xff\xd8") else None
    if found is None:
        picture = decode(path, data, "auto", take)
        if isinstance(picture, Failure):
            return picture
        if _is_huge(*picture.size, mode, size) or 8 * picture.width * picture.height >= BIG:  # two copies are too many
            return transform(picture, preprocess, size, crop=crop)
        found = np.array(picture), (picture.width, picture.height), picture.size
    pixels, extent, upright = found
    width, height, left, top = placed(*upright, mode, size)
    resized = resample(pixels, width, height, preprocess.interpolation, extent)
    if left >= 0 and top >= 0:
        resized = resized[top : top + size, left : left + size]
    else:
        square = np.empty((size, size, 3), np.uint8)
        square[:] = padding(preprocess) or 0
        square[-top : height - top, -left : width - left] = resized
        resized = square
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


Found = tuple[Pixels, tuple[float, float], tuple[int, int]]  # [H, W, 3] upright, how much of it is meant, its full size


def _plain_jpeg(data: bytes, mode: str, size: int, take: Take) -> Found | None:
    """A JPEG, decoded at the size that it is needed in; None if it isn't plain, or not in order."""
    settle_pillow()
    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as picture:
            stored, turn = picture.size, orientation(picture)
            upright = stored[::-1] if turn in _SIDEWAYS else stored
            if picture.mode not in ("L", "RGB") or _is_huge(*upright, mode, size) or way_to_srgb(picture):
                return None
            take(memory_of(picture, data))
            shrink = _shrink(upright, mode, size, whole=turn is not None)
            pixels = _by_simplejpeg(data, stored, shrink)
            if pixels is None:
                picture.draft(None, (stored[0] // shrink, stored[1] // shrink))
                pixels = np.array(picture.convert("RGB"))
            if pixels.shape != (-(-stored[1] // shrink), -(-stored[0] // shrink), 3):
                return None
            if turn is not None:
                pixels = np.array(Image.fromarray(pixels).transpose(turn))
    except Exception:  # `decode` says what is wrong, if anything is
        return None
    return pixels, (upright[0] / shrink, upright[1] / shrink), upright


def _is_huge(width: int, height: int, mode: str, size: int) -> bool:
    """Whether it is one of those for which `decode` and `transform` have ways of their own."""
    if width * height > MAX_PIXELS or size * max(width, height) > MAX_RESIZED:
        return True
    new_width, new_height, _, _ = placed(width, height, mode, size)
    return new_width * new_height > MAX_RESIZED


def _shrink(upright: tuple[int, int], mode: str, size: int, *, whole: bool) -> int:
    """By how much it may be smaller when decoded; `whole`: only if that leaves no part of a pixel at its edges.

    What is turned would have that part where `resample` can't leave it out.
    """
    width, height, _, _ = placed(*upright, mode, size)
    spare = min(upright[0] / width, upright[1] / height) / SPARE
    fitting = (n for n in (8, 4, 2) if n <= spare and not (whole and any(side % n for side in upright)))
    return next(fitting, 1) if upright[0] * upright[1] >= LARGE else 1


def _by_simplejpeg(data: bytes, stored: tuple[int, int], shrink: int) -> Pixels | None:
    """RGB in a `shrink`-th of the `stored` size; None without the package. It raises at what libjpeg only warns of."""
    package = simplejpeg()
    if package is None:
        return None
    width, height = (-(-side // shrink) if shrink > 1 else 0 for side in stored)
    pixels: Pixels = package.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    return pixels


@cache
def simplejpeg() -> Any:
    """The package, which is an extra, or None."""
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None
