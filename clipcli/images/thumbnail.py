"""A picture made small, for a glance at it.

In: a `Source`. Out: uint8 [height, width, 3], RGB, as a person would see it; None where it can't be decoded, which is
told elsewhere. Nothing is drawn here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcli.images.decode import open_picture
from clipcli.records import Failure, Source


def thumbnail(source: Source, width: int, height: int) -> npt.NDArray[np.uint8] | None:
    """The whole picture in `width` x `height` pixels at most, its proportions kept."""
    picture = open_picture(source)
    if isinstance(picture, Failure):
        return None
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
