"""What the model saw, as files to look at: `--save-crop`.

In: a folder, a picture's name, and the square of pixels that goes into the image tower. Out: a PNG in that folder.
Names of pictures are only labels: no file is ever written elsewhere, whatever they hold. The same name is the same
file: a picture that is met twice has one crop, and a run again with --force renews it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clipcli.errors import UsageError, cannot_write, reason

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LONGEST = 50  # characters of a picture's name that are kept: of four bytes each, a file may have that name


def check_folder(folder: Path, *, force: bool, walked: Iterable[str] = ()) -> None:
    """Raise UsageError unless `folder` is empty, can be made, or may be written into with `force`.

    It must not lie where a walk of `walked` would meet the crops.
    """
    try:
        for top in filter(os.path.isdir, walked):
            inner = os.path.relpath(os.path.realpath(folder), os.path.realpath(top)).split(os.sep)
            if not any(part.startswith(".") and part != "." for part in inner):
                raise UsageError(f"{folder}: lies in {top}, which this run walks", hint="choose another folder")
        if not folder.exists() and not folder.is_symlink():
            if not folder.parent.is_dir():
                raise UsageError(f"{folder}: the folder {folder.parent} does not exist", hint="mkdir it first")
        elif not folder.is_dir():
            raise UsageError(f"{folder}: is no folder", hint="name a new folder")
        elif not force and any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty", hint="name a new folder, or use --force to write into this one")
    except OSError as error:
        raise UsageError(f"{folder}: {reason(error)}", hint="name another folder") from error


def crop_name(path: str) -> str:
    """The file's name: what can be read of the picture's, and a digest of all of it, so that no two meet."""
    raw = os.fsencode(path)
    shown = re.sub(r"[^\w.-]+", "_", raw.decode(errors="replace"))[-LONGEST:].strip("._-")
    return f"{shown or 'picture'}-{hashlib.blake2b(raw, digest_size=6).hexdigest()}.png"


def save_crop(folder: Path, path: str, square: npt.NDArray[np.uint8]) -> None:
    """Write uint8 [3, H, W] under the name of its picture. Raises OutputError where that fails."""
    from PIL import Image

    file = folder / crop_name(path)
    try:
        folder.mkdir(exist_ok=True)
        Image.fromarray(square.transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
    except OSError as error:
        raise cannot_write(file, error, elsewhere="choose another --save-crop") from error
