"""From a picture's bytes to its pixels, under one of two policies.

In: a `Source`. Out: a loaded PIL picture, or a `Failure` that says why there is none: whatever a file holds,
it never ends the run. `auto` is what a person would see, in RGB: EXIF orientation applied, transparent parts on
white, 16 bits scaled to 8, colours of an embedded ICC profile in sRGB, the first of several frames.
`reference` is the picture as Pillow opens it, for `transform` to treat as the original code did.
Only formats that Pillow decodes by itself are tried: no Ghostscript, no other program is ever started.
It resizes nothing (`transform`) and knows no threads (`stream`), but may be called from many: what a big picture
takes is announced through `take` before it is taken.

One thing gets past us: of a damaged TIFF, libtiff writes a line to file descriptor 2 by itself, even under `-q`.
Pillow lets nobody turn that off, and turning the descriptor away would silence other threads, too.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from clipcli.images.budget import BIG, MAX_PIXELS, Take, unlimited
from clipcli.images.find import HEAD, sniff
from clipcli.images.quirks import COVERED, UNSIGNED, WHITE_IS_ZERO, heed, why_not
from clipcli.images.read import read_bytes
from clipcli.records import Failure, FailureKind, Source

Pixels = Literal["auto", "reference"]

STRIP = 1 << 18  # pixels of a big or wide-valued picture that are converted at a time
_PILLOW_LIMIT = 1024**3 // 4 // 3  # what MAX_IMAGE_PIXELS is unless somebody set it

# The common ones first: Pillow imports the others' plugins only when none of these fits.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
_RARER = ("WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "CUR", "ICNS", "PSD", "QOI", "DDS", "PCX", "SGI", "XBM", "XPM")
_UNMARKED = ("TIFF", "AVIF", "ICO", "CUR", "PCX", "SGI", "XBM", "XPM")  # Pillow knows more of them than `sniff`
_PLUGINS = {"heic": ("HEIF", "pillow_heif"), "jxl": ("JXL", "pillow_jxl")}  # extras: (Pillow's name, module)
_HUNGRY = ("WEBP", "AVIF", "JPEG2000", "HEIF", "JXL")  # their decoders hold the picture several times
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings.filterwarnings` writes it
_ORIENTATION = 0x0112
_T = Image.Transpose
_UPRIGHT = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}
_UPRIGHT |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}


def open_picture(source: Source, policy: Pixels = "auto", take: Take = unlimited) -> Image.Image | Failure:
    """The picture, loaded: RGB under `auto`, of its own mode under `reference`. Bad data raise nothing."""
    data = read_bytes(source, take)
    return data if isinstance(data, Failure) else decode(source.path, data, policy, take)


def decode(path: str, data: bytes, policy: Pixels = "auto", take: Take = unlimited) -> Image.Image | Failure:
    """The picture that `data` holds; `path` names it in a failure, and tells a TGA: it has no signature."""
    if not data:
        return Failure(path, FailureKind.NOT_A_PICTURE, "the file is empty")
    settle_pillow()
    name = sniff(data[:HEAD])
    formats: tuple[str, ...] = _COMMON + _RARER
    if name in _PLUGINS:
        plugin, module = _PLUGINS[name]
        if not _has_plugin(plugin, module):
            return Failure(path, FailureKind.UNSUPPORTED, f'reading {name} needs more: pip install "clipcli[{name}]"')
        formats = (plugin,)
    elif name is None:
        formats = ("TGA",) if path.lower().endswith(".tga") else _UNMARKED
    try:
        with Image.open(BytesIO(data), formats=formats) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return Failure(path, FailureKind.TOO_LARGE, f"{picture.width} x {picture.height} pixels are too many")
            if policy == "auto" and (kind := heed(picture)):
                return _undecodable(path, name, kind)
            take(memory_of(picture, data))
            picture.load()
            turn = orientation(picture)
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


def memory_of(picture: Image.Image, data: bytes) -> int:
    """About the bytes that decoding and converting will take, by the header."""
    if picture.format in ("ICO", "ICNS"):  # it holds other pictures, whose sizes nobody has looked at yet
        return 1000 * len(data)
    return picture.width * picture.height * (20 if picture.format in _HUNGRY else 8)


def _failure(path: str, data: bytes, name: str | None, error: Exception) -> Failure:
    """Which kind of failure it is that Pillow reports as `error`."""
    text = str(error).lower()
    if isinstance(error, (MemoryError, Image.DecompressionBombError)):
        return Failure(path, FailureKind.TOO_LARGE, "it would decode to too many pixels")
    if isinstance(error, UnidentifiedImageError) and name is None:
        return Failure(path, FailureKind.NOT_A_PICTURE, "no known picture format")
    if isinstance(error, NotImplementedError) or re.search(r"unsupported|not (supported|available)|unknown", text):
        return _undecodable(path, name, _brief(text))
    if _ends_early(data, name, text):
        return Failure(path, FailureKind.TRUNCATED, "the file ends before the picture does")
    if isinstance(error, UnidentifiedImageError) and name == "tiff" and "pixel mode" in (why_not(data) or ""):
        return _undecodable(path, name, "unknown pixel mode")
    reason = f": {_brief(text)}" if type(error) is OSError else ""  # what others say is for programmers
    return Failure(path, FailureKind.CORRUPT, f"damaged {name or 'picture'} data{reason}")


def _undecodable(path: str, name: str | None, why: str) -> Failure:
    return Failure(path, FailureKind.UNSUPPORTED, f"a kind of {name or 'picture'} that can't be decoded: {why}")


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
        case "tiff" if data[2:3] + data[3:4] in (b"*\0", b"\0*"):
            order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
            start = int.from_bytes(data[4:8], order)  # of its directory, often behind the pixels
            return start + 2 + 12 * int.from_bytes(data[start : start + 2], order) > len(data) or "truncated" in text
        case "avif" | "heic":
            position, size = 0, 1
            while position + 8 <= len(data) and size:  # a box of size 0 reaches to the end of the file
                size = int.from_bytes(data[position : position + 4])
                position += size
            return position > len(data) or 0 < len(data) - position < 8
    return "truncated" in text or "not large enough" in text or len(data) < HEAD


def settle_pillow() -> None:
    """Set what Pillow keeps for the whole process. Cheap and idempotent, so that every call may make sure."""
    # catch_warnings swaps global state, which threads must not do; so one filter for Pillow's modules stays.
    # What they warn of (odd metadata, many pixels) is decided here by the outcome.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its remarks reach stderr by themselves
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


def orientation(picture: Image.Image) -> Image.Transpose | None:
    """How to turn the picture upright, by its EXIF or XMP block."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above, hostile bytes; a broken block is no reason to lose the picture
        return None


def _to_rgb(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """RGB as a person would see it: in sRGB, on white, upright. `picture` is used up."""
    covered = picture.info.get(COVERED, (0, 0, *picture.size))
    if picture.mode != "RGB" or picture.has_transparency_data or way_to_srgb(picture):
        levels = _levels(picture) if picture.mode in ("I", "F") else (0, 65535)
        if 8 * picture.width * picture.height < BIG and not picture.mode.startswith(("I", "F")):
            picture = _seen(picture, levels)
        else:  # what lies between is as large as a strip, not as the picture
            rgb = Image.new("RGB", picture.size)
            for box in _strips(picture.size):
                rgb.paste(_seen(picture.crop(box), levels), box)
            picture.close()
            picture = rgb
    if covered != (0, 0, *picture.size):  # the rest is see-through
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture.crop(covered), covered)
        picture = white
    return picture.transpose(turn) if turn is not None else picture


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of about `STRIP` pixels that make up the whole, cut across its long side."""
    width, height = size
    step = max(1, STRIP // min(size))
    for start in range(0, max(size), step):
        if width > height:
            yield start, 0, min(start + step, width), height
        else:
            yield 0, start, width, min(start + step, height)


def _seen(strip: Image.Image, levels: tuple[float, float]) -> Image.Image:
    """A part of a picture as RGB, on white."""
    alpha: Image.Image | None = None
    if strip.mode.startswith(("I", "F")):
        strip = _to_eight_bits(strip, *levels)
    elif strip.mode in ("LA", "La"):
        strip, alpha = strip.convert("LA").split()
    elif strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip, alpha = strip.convert("RGB"), strip.getchannel("A")
    elif strip.mode not in ("RGB", "L", "CMYK"):  # those may have a profile of their own colour space
        strip = strip.convert("RGB")
    if way := way_to_srgb(strip):
        strip = cast(Image.Image, ImageCms.applyTransform(strip, way))
    if strip.mode != "RGB":
        strip = strip.convert("RGB")
    if alpha:
        white = Image.new("RGB", strip.size, "white")
        white.paste(strip, mask=alpha)
        strip = white
    return strip


def _numbers(strip: Image.Image) -> npt.NDArray[Any]:
    values = np.asarray(strip)
    if strip.info.get(UNSIGNED):
        values = values.view(np.uint32)
    return np.nan_to_num(values, posinf=0.0, neginf=0.0) if strip.mode == "F" else values


def _levels(picture: Image.Image) -> tuple[float, float]:
    """The least and the greatest value. What is not finite counts as 0."""
    strips = (_numbers(picture.crop(box)) for box in _strips(picture.size))
    lows, highs = zip(*((strip.min().item(), strip.max().item()) for strip in strips), strict=True)
    return min(lows), max(highs)


def _to_eight_bits(strip: Image.Image, low: float, high: float) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as mode L; `low` and `high` are those of the whole picture.

    16 bits: v / 257, rounded; also mode I where its values fit (a PGM). Floats from 0 to 1: v * 255, rounded.
    Any other range has no agreed black and white: it is stretched from its least to its greatest value.
    """
    values = _numbers(strip)
    if strip.mode != "F" and low >= 0 and high <= 65535:
        values = values.astype(np.uint16)
        eight = (values // 257 + (values % 257 > 128)).astype(np.uint8)
        if strip.info.get(WHITE_IS_ZERO):
            eight = 255 - eight
        if isinstance(key := strip.info.get("transparency"), int):  # the grey that stands for "see-through"
            eight[values == key] = 255
        return Image.fromarray(eight)
    if strip.mode != "F" or low < 0 or high > 1:
        values = np.subtract(values, low, dtype=np.float64) / max(high - low, 1e-30)
    eight = np.rint(values * 255).astype(np.uint8)
    return Image.fromarray(255 - eight if strip.info.get(WHITE_IS_ZERO) else eight)


def way_to_srgb(picture: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What turns the colours of the picture's own profile into sRGB; None if there is nothing to turn."""
    profile = picture.info.get("icc_profile")
    return _to_srgb(profile, picture.mode) if isinstance(profile, bytes) else None


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
