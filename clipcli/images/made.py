"""Photographs that nobody took: JPEGs to measure with, where there are no pictures at hand.

In: a size and a seed. Out: the bytes of a JPEG, always the same ones. Structure of all scales is equally strong, as in
photographs, and nothing is sharp or noisy to the pixel, as in a good camera's: they are about as large as a camera's
files, and take as long to decode. They show nothing.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

_COARSEST, _FINEST = 4, 256  # how many structures of a scale lie side by side; more in what is wide
_COLOUR = 0.25  # its share beside brightness


def made_photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG of that size, of quality 90."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), "grey")
    across, scales = _COARSEST, 0
    while across <= max(_FINEST, width // 4):
        down, scales = max(2, across * height // width), scales + 1
        brightness, colour = random.integers(0, 256, (down, across, 1)), random.integers(0, 256, (down, across, 3))
        grid = ((1 - _COLOUR) * brightness + _COLOUR * colour).astype(np.uint8)
        scale = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        picture = Image.blend(picture, scale, 1 / scales)  # the mean of all so far
        across *= 2
    file = BytesIO()
    ImageOps.autocontrast(picture).save(file, "JPEG", quality=90)
    return file.getvalue()
