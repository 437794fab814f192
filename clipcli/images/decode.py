"""From a picture's bytes to its pixels, under one of two policies.

In: a `Source`. Out: a loaded PIL picture, or a `Failure` that says why there is none: whatever a file holds,
it never ends the run. `auto` is what a person would see, in RGB: EXIF orientation applied, transparent parts on
white, 16 bits scaled to 8, colours of an embedded ICC profile in sRGB, the first of several frames.
`reference` is the picture as Pillow opens it, for `transform` to treat as the original code did.
Only formats that Pillow decodes by itself are tried: no Ghostscript, no other program is ever started.
It resizes nothing (`transform`) and knows no threads (`stream`), but may be called from many.
"""

from __future__ import annotations

import re
import stat
import warnings
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from clipcli.images.find import HEAD, no_source, not_a_file, sniff
from clipcli.records import Failure, FailureKind, Source

Pixels = Literal["auto", "reference"]

MAX_PIXELS = 250_000_000  # 1 GB once decoded; the largest cameras of telephones have 200 million
MAX_BYTES = 1 << 30
_PILLOW_LIMIT = 1024**3 // 4 // 3  # what MAX_IMAGE_PIXELS is unless somebody set it

# The common ones first: Pillow imports the others' plugins only when none of these fits.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
_RARER = ("WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "CUR", "ICNS", "PSD", "QOI", "DDS", "PCX", "SGI", "XBM", "XPM")
_PLUGINS = {  # formats that need a package of their own: (Pillow's name, module, package)
    "heic": ("HEIF", "pillow_heif", "pillow-heif"),
    "jxl": ("JXL", "pillow_jxl", "pillow-jxl-plugin"),
}
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings.filterwarnings` writes it
_ORIENTATION = 0x0112
_T = Image.Transpose
_UPRIGHT = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}
_UPRIGHT |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}


def open_picture(source: Source, policy: Pixels = "auto") -> Image.Image | Failure:
    """The picture, loaded: RGB under `auto`, of its own mode under `reference`. Bad data raise nothing."""
    data = read_bytes(source)
    return data if isinstance(data, Failure) else decode(source.path, data, policy)


def read_bytes(source: Source) -> bytes | Failure:
    """All bytes of the picture's file. Read at once: a file that changes or vanishes later does no harm."""
    if source.data is not None:
        return source.data
    try:
        status = Path(source.path).stat()
        if not stat.S_ISREG(status.st_mode):  # asked before opening: a FIFO would wait for a writer
            return not_a_file(source.path, status.st_mode)
        if status.st_size > MAX_BYTES:
            return Failure(source.path, FailureKind.TOO_LARGE, f"the file has more than {MAX_BYTES >> 30} GiB")
        with Path(source.path).open("rb") as file:
            return file.read(max(status.st_size, 1 << 16))  # a bound, in case it grows without end
    except (OSError, ValueError) as error:
        return no_source(source.path, error)


def decode(path: str, data: bytes, policy: Pixels = "auto") -> Image.Image | Failure:
    """The picture that `data` holds; `path` names it in a failure, and tells a TGA: it has no signature."""
    if not data:
        return Failure(path, FailureKind.NOT_A_PICTURE, "the file is empty")
    _settle_pillow()
    name = sniff(data[:HEAD])
    formats: tuple[str, ...] = _COMMON + _RARER
    if name in _PLUGINS:
        plugin, module, package = _PLUGINS[name]
        if not _has_plugin(plugin, module):
            return Failure(path, FailureKind.UNSUPPORTED, f"reading {name} needs the package {package}")
        formats = (plugin,)
    elif name is None and path.lower().endswith(".tga"):
        formats = ("TGA",)
    try:
        with Image.open(BytesIO(data), formats=formats) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return Failure(path, FailureKind.TOO_LARGE, f"{picture.width} x {picture.height} pixels are too many")
            picture.load()
            turn = _orientation(picture)
    except Exception as error:  # hostile bytes make Pillow's plugins raise almost anything, and are data to us
        return _failure(path, data, name, error)
    try:
        if policy == "auto":
            return _to_rgb(picture, turn)
        Image.new(picture.mode, (1, 1)).resize((2, 2), Image.Resampling.BICUBIC).convert("RGB")  # what will be done
        return picture
    except MemoryError:
        return Failure(path, FailureKind.TOO_LARGE, "not enough memory for its pixels")
    except ValueError:  # so Pillow says that there is no conversion
        return Failure(path, FailureKind.UNSUPPORTED, f"pixels of mode {picture.mode} can't be made RGB")


def _failure(path: str, data: bytes, name: str | None, error: Exception) -> Failure:
    """Which kind of failure it is that Pillow reports as `error`."""
    text = str(error).lower()
    if isinstance(error, (MemoryError, Image.DecompressionBombError)):
        return Failure(path, FailureKind.TOO_LARGE, "it would decode to too many pixels")
    if isinstance(error, UnidentifiedImageError) and name is None:
        return Failure(path, FailureKind.NOT_A_PICTURE, "no known picture format")
    if isinstance(error, NotImplementedError) or re.search(r"unsupported|not (supported|available)|unknown", text):
        return Failure(
            path, FailureKind.UNSUPPORTED, f"a kind of {name or 'picture'} that can't be decoded: {_brief(text)}"
        )
    if _ends_early(data, name, text):
        return Failure(path, FailureKind.TRUNCATED, "the file ends before the picture does")
    reason = f": {_brief(text)}" if type(error) is OSError else ""  # what others say is for programmers
    return Failure(path, FailureKind.CORRUPT, f"damaged {name or 'picture'} data{reason}")


def _brief(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text.partition(" (")[0])[:80].rstrip(" .")


def _ends_early(data: bytes, name: str | None, text: str) -> bool:
    """Whether an undecodable picture was cut off: by its own end mark or size, else by Pillow's word."""
    end = data[-1024:].rstrip(b"\0\r\n ")
    match name:
        case "jpeg" | "jpeg 2000":
            return not end.endswith(b"\xff\xd9")
        case "png":
            return b"IEND" not in end[-16:]
        case "gif":
            return not end.endswith(b";")
        case "webp":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "tiff" if int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") >= len(data):
            return True  # its directory lies behind the pixels
        case "avif":
            position, size = 0, 1
            while position + 8 <= len(data) and size:  # a box of size 0 reaches to the end of the file
                size = int.from_bytes(data[position : position + 4])
                position += size
            return position > len(data) or 0 < len(data) - position < 8
    return "truncated" in text or "not large enough" in text or len(data) < HEAD


def _settle_pillow() -> None:
    """Set what Pillow keeps for the whole process. Cheap and idempotent, so that every call may make sure."""
    # catch_warnings swaps global state, which threads must not do; so one filter for Pillow's modules stays.
    # What they warn of (odd metadata, many pixels) is decided here by the outcome.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if Image.MAX_IMAGE_PIXELS == _PILLOW_LIMIT:  # a limit that the caller chose himself is his
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses from twice this number on


@lru_cache
def _has_plugin(plugin: str, module: str) -> bool:
    """Whether Pillow can open `plugin`'s format, after a try to register the package that does it."""
    Image.preinit()
    if plugin not in Image.OPEN:
        try:
            package = import_module(module)
        except ImportError:
            return False
        if hasattr(package, "register_heif_opener"):
            package.register_heif_opener()
    return plugin in Image.OPEN


def _orientation(picture: Image.Image) -> Image.Transpose | None:
    """How to turn the picture upright, by its EXIF or XMP block."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above, hostile bytes; a broken block is no reason to lose the picture
        return None


def _to_rgb(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """RGB as a person would see it: in sRGB, on white, upright."""
    profile = picture.info.get("icc_profile")
    alpha: Image.Image | None = None
    if picture.mode.startswith(("I", "F")):
        picture = _to_eight_bits(picture)
    elif picture.mode in ("LA", "La"):
        picture, alpha = picture.convert("LA").split()
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture, alpha = picture.convert("RGB"), picture.getchannel("A")
    elif picture.mode not in ("RGB", "L", "CMYK"):  # those may have a profile of their own colour space
        picture = picture.convert("RGB")
    if isinstance(profile, bytes) and (transform := _to_srgb(profile, picture.mode)):
        picture = cast(Image.Image, ImageCms.applyTransform(picture, transform))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if alpha:
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=alpha)
        picture = white
    return picture.transpose(turn) if turn is not None else picture


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as mode L.

    16 bits: v / 257, rounded; also mode I where its values fit (a PGM). Floats from 0 to 1: v * 255, rounded.
    Any other range has no agreed black and white: it is stretched from its least to its greatest value. What is
    not finite counts as 0.
    """
    values = np.asarray(picture)
    if picture.mode == "F":
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = values.min().item(), values.max().item()
    if picture.mode != "F" and low >= 0 and high <= 65535:
        values = values.astype(np.uint16)
        eight = (values // 257 + (values % 257 > 128)).astype(np.uint8)
        if isinstance(key := picture.info.get("transparency"), int):  # the grey that stands for "see-through"
            eight[values == key] = 255
        return Image.fromarray(eight)
    if picture.mode != "F" or low < 0 or high > 1:
        values = np.subtract(values, low, dtype=np.float64) / max(high - low, 1e-30)
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from an ICC profile's colours to sRGB; None if there is none to go.

    So it is for a broken profile, for one of another colour space than the pixels', and for sRGB itself: known by
    what it does to a grid of colours, since its name may be anything.
    """
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "RGB":
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(36, 6, 3)
        there = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
        if np.abs(there.astype(np.int16) - grid).max() <= 1:
            return None
    return transform
