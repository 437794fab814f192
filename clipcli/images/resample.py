"""The resizing of `--decode auto`: antialiased, in whole numbers, as many pictures a second as the machine has to give.

In: a picture as uint8 [H, W, 3]. Out: the same as uint8 [h, w, 3]. First the width is resized, then the height, by
weights of 16 bits, and each time the result is rounded to 8: within 1, rarely 2, of what Pillow makes with 22 bits.
(Where Pillow 13 begins with the height, for some that become much less high, black and white noise may differ by more.)
torch has the same arithmetic in vector instructions, and does it where something else has imported it already; numpy
gives the same numbers to the bit, so that nobody has to know which of them it was. No PIL, no files, no crops.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from math import ceil
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]
Filter = Literal["bicubic", "bilinear"]

STRIP = 1 << 18  # pixels whose width is resized at a time
_BLOCK = 16  # pixels of the result that are computed by one matrix product
_REACH = {"bicubic": 2, "bilinear": 1}  # of a filter, in pixels of the smaller picture
_SLIP = 1e-6  # of a pixel of the result, in the whole: so that torch rounds the size down to what is meant


class _Axis(NamedTuple):
    """How one side is resized: for each block of the result, where its part of the picture begins, and its weights."""

    blocks: tuple[tuple[int, Numbers], ...]  # weights [part, block]: whole numbers
    precision: int  # bits behind the point


def resample(
    picture: Pixels, width: int, height: int, kind: Filter, extent: tuple[float, float] | None = None
) -> Pixels:
    """Resize to `width` x `height`.

    `extent`: how much of the picture's width and height is meant, where the last column or row is only partly so.
    """
    rows, columns = picture.shape[:2]
    factors = None
    if extent not in (None, (columns, rows)):
        factors = (width + _SLIP) / extent[0], (height + _SLIP) / extent[1]
    if sys.modules.get("torch"):
        return _by_torch(picture, width, height, kind, factors)
    return by_numpy(picture, width, height, kind, factors)


def _by_torch(picture: Pixels, width: int, height: int, kind: Filter, factors: tuple[float, float] | None) -> Pixels:
    from torch import from_numpy
    from torch.nn.functional import interpolate

    given = from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    if factors is None:
        made = interpolate(given, (height, width), mode=kind, antialias=True)
    else:
        made = interpolate(given, scale_factor=(factors[1], factors[0]), mode=kind, antialias=True)
    resized: Pixels = made[0].permute(1, 2, 0).numpy()
    return resized


def by_numpy(
    picture: Pixels, width: int, height: int, kind: Filter, factors: tuple[float, float] | None = None
) -> Pixels:
    """The same without torch. Sums of whole numbers are exact in 64 bits, in whatever order BLAS adds them up."""
    rows, columns = picture.shape[:2]
    wide = np.empty((3, rows, width))
    across = _axis(columns, width, kind, factors and factors[0])
    step = max(1, STRIP // columns)
    for top in range(0, rows, step):
        strip = picture[top : top + step].transpose(2, 0, 1).astype(np.float64, order="C")
        if columns == width:
            wide[:, top : top + step] = strip
            continue
        for number, (first, weights) in enumerate(across.blocks):
            left = number * _BLOCK
            part = strip[..., first : first + len(weights)]
            wide[:, top : top + step, left : left + _BLOCK] = _rounded(part @ weights, across.precision)
    if rows == height:
        made = wide
    else:
        made = np.empty((3, height, width))
        down = _axis(rows, height, kind, factors and factors[1])
        for number, (first, weights) in enumerate(down.blocks):
            part = wide[:, first : first + len(weights)]
            made[:, number * _BLOCK : (number + 1) * _BLOCK] = _rounded(weights.T @ part, down.precision)
    return np.ascontiguousarray(made.transpose(1, 2, 0).astype(np.uint8))


def _rounded(sums: Numbers, precision: int) -> Numbers:
    sums *= 2.0**-precision
    sums += 0.5
    return np.clip(np.floor(sums, out=sums), 0, 255, out=sums)


@lru_cache(maxsize=64)  # photographs come in few sizes
def _axis(size: int, result: int, kind: Filter, factor: float | None) -> _Axis:
    scale = size / result if factor is None else 1.0 / factor
    wider = max(scale, 1.0)
    reach = _REACH[kind] * wider
    centre = scale * (np.arange(result) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), size) - first
    place = np.arange(2 * ceil(reach) + 1)
    weights = _filter((place + first[:, None] - centre[:, None] + 0.5) * (1.0 / wider), kind)
    weights[place >= count[:, None]] = 0
    weights /= weights.cumsum(axis=1)[:, -1:]  # added up one by one, for the last bit
    precision = 0
    while precision < 22 and int(0.5 + weights.max() * 2.0 ** (precision + 1)) < 1 << 15:
        precision += 1
    whole = np.trunc(weights * 2.0**precision + np.copysign(0.5, weights))
    blocks = []
    for start in range(0, result, _BLOCK):
        some = range(start, min(start + _BLOCK, result))
        begin = int(first[start])
        block = np.zeros((int((first + count)[some].max()) - begin, len(some)))
        for column, target in enumerate(some):
            of = int(first[target]) - begin
            block[of : of + int(count[target]), column] = whole[target, : int(count[target])]
        blocks.append((begin, block))
    return _Axis(tuple(blocks), precision)


def _filter(x: Numbers, kind: Filter) -> Numbers:
    x = np.abs(x)
    if kind == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
