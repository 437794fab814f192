"""What Pillow doesn't heed in some PNGs, TIFFs and GIFs, so that the pixels would be wrong and nobody would know.

In: a picture that Pillow has opened and not loaded. Out: the same, with facts in its `info`, where `decode` looks for
them; or the reason why there is no way to see it right. It looks at no pixels.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

WHITE_IS_ZERO, UNSIGNED, COVERED = "clipcli white is zero", "clipcli unsigned", "clipcli covered"  # keys of `info`

_WIDE = (("I", ""), ("I", "S"), ("F", "F"))  # modes of 32 bits, and what their numbers are
_GREY = {"L;2": 85, "L;4": 17}  # by how much Pillow multiplies such pixels
_NATIVE = {f"{mode};32{order}{kind}": f"{mode};32N{kind}" for mode, kind in _WIDE for order in "LB"}
_BITS, _PHOTOMETRIC, _PLANAR, _FORMAT = 258, 262, 284, 339  # tags of a TIFF


def heed(picture: Any) -> str | None:
    """Note what the file says of its pixels; the name of a kind that Pillow would read wrongly."""
    if not getattr(picture, "tile", None):
        return None
    codec, extents, _, raw = picture.tile[0]
    if picture.format == "PNG":
        _transparent_key(picture.info, raw)
    elif picture.format == "TIFF":
        tags = picture.tag_v2
        bits = tags.get(_BITS, (1,))
        if len(bits) > 1 and max(bits) > 8 and tags.get(_PLANAR) == 2 and codec == "raw":
            return "16 bits in separate planes"
        if codec == "libtiff":  # which hands out numbers in the machine's order; Pillow heeds that for 16 bits alone
            native = _NATIVE.get(raw[0], raw[0])
            picture.tile = [tile._replace(args=(native, *tile[3][1:])) for tile in picture.tile]
        if picture.mode.startswith(("I", "F")):
            picture.info[WHITE_IS_ZERO] = tags.get(_PHOTOMETRIC) == 0
            picture.info[UNSIGNED] = picture.mode == "I" and tags.get(_FORMAT, (1,))[0] == 1
    elif picture.format == "GIF":
        picture.info[COVERED] = extents  # the first frame may be smaller than the picture
    return None


def why_not(data: bytes) -> str | None:
    """What Pillow has against a TIFF that it can't open, as far as it says so."""
    from PIL import TiffImagePlugin

    try:
        TiffImagePlugin.TiffImageFile(BytesIO(data)).close()
    except SyntaxError as error:  # so it says that its pixels are of a kind that it doesn't know
        return str(error)
    except Exception:  # as in `decode`: hostile bytes
        return None
    return None


def _transparent_key(info: dict[Any, Any], raw: object) -> None:
    """The value that stands for see-through, in the file's range, as one of the pixels'; `raw` says how they lie."""
    key = info.get("transparency")
    if isinstance(key, int) and raw in _GREY:
        info["transparency"] = key * _GREY[raw] & 255
    elif isinstance(key, tuple) and raw == "RGB;16B":
        info["transparency"] = tuple(value >> 8 for value in key)
