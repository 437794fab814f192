"""Sample photos and a label file for them, to try clipcli on.

In: a folder. Out: the photos and `labels.txt` in it. The photos are scikit-image's, copied from where it is installed:
no network is needed, and none of them is part of clipcli. Nothing that is there is overwritten, and nothing classified.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from clipcli.errors import OutputError, UsageError, reason

# All of its photographs of a thing with an everyday name, whether `tiny` knows the thing or not. Left out are textures,
# tissue, text, test pictures, a clock blurred past knowing, and the other eye's view of the motorcycle.
PHOTOS = {  # our names: scikit-image's
    "astronaut.png": "astronaut.png",
    "cat.png": "chelsea.png",
    "coffee.png": "coffee.png",
    "coins.png": "coins.png",
    "moon.png": "moon.png",
    "motorcycle.png": "motorcycle_left.png",
    "photographer.png": "camera.png",
    "rocket.jpg": "rocket.jpg",
    "stars.jpg": "hubble_deep_field.jpg",
}
LABEL_FILE = "labels.txt"
LABELS = """\
# Labels for the photos of `clipcli demo`, a label a line. Change them, and run it again.
# Words between | mean the same thing; the first of them is what rows say.
cat | tabby cat | kitten
dog | puppy
bird
fish | goldfish
insect | beetle | butterfly
person | man | woman
car | sports car
bus
motorcycle | motorbike
bicycle
boat | ship
rocket
house | building
bridge
chair | armchair
pizza
coffee | cup of coffee | espresso
coins | money
moon | surface of the moon
# Before = stands what rows say in place of the words.
stars = night sky full of stars | galaxy
"""
_ELSEWHERE = "choose another folder: clipcli demo DIR"


def lay_out(folder: Path, *, force: bool = False) -> list[Path]:
    """Put the samples into `folder`, as far as they aren't there from an earlier time; returns the photos.

    `force`: even if it holds other things. Raises UsageError, OutputError.
    """
    samples = _samples()
    try:
        there = [name for name in samples if os.path.lexists(folder / name)]
        if os.path.lexists(folder) and not there:
            _check_unused(folder, force)
        for name in there:
            if not (folder / name).is_file() or (folder / name).read_bytes() != samples[name]:
                raise UsageError(f"{folder / name}: another file of this name is there", hint=_ELSEWHERE)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {LABEL_FILE: LABELS.encode(), **samples}.items():
            if not os.path.lexists(folder / name):
                part = folder / f".{name}.part"  # a name appears when its file is whole
                part.write_bytes(data)
                part.rename(folder / name)
    except OSError as error:
        raise OutputError(f"{folder}: the samples can't be put there: {reason(error)}", hint=_ELSEWHERE) from error
    return [folder / name for name in samples]


def _check_unused(folder: Path, force: bool) -> None:
    """Raise UsageError where something of the user's would be in the way of the samples, or they in its way."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder", hint=_ELSEWHERE)
    if os.path.lexists(folder / LABEL_FILE):
        raise UsageError(f"{folder / LABEL_FILE}: another file of this name is there", hint=_ELSEWHERE)
    if any(folder.iterdir()) and not force:
        raise UsageError(f"{folder}: holds other things", hint=f"{_ELSEWHERE}; --force puts the samples beside them")


def _samples() -> dict[str, bytes]:
    """The photos by our names. Raises UsageError where scikit-image isn't installed."""
    package = find_spec("skimage")
    data = Path(package.origin).parent / "data" if package and package.origin else None
    found = {name: data / theirs for name, theirs in PHOTOS.items() if data and (data / theirs).is_file()}
    if not found:
        raise UsageError(
            "the sample photos are scikit-image's, which is not installed", hint='pip install "clipcli[demo]"'
        )
    return {name: file.read_bytes() for name, file in found.items()}
