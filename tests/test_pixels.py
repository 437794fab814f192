"""The pixel policy, kind by kind: files made here byte by byte, expected pixels computed here by numpy alone.

`KINDS` holds a file of each kind with what a person should see, and by how much the decoder may be off. Under
`--pixels reference`, every one of them is compared bit for bit with the original preprocessing, written out below.
"""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from pictures_made import SRGB_BLUE, SRGB_GREEN, SRGB_RED, encoded, photo, profile
from PIL import Image, ImageCms, features

from clipcli.images import decode as decode_module
from clipcli.images.decode import decode
from clipcli.images.transform import transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind

Array = npt.NDArray[Any]
Kind = tuple[str, bytes, Array, float]  # name, file, expected RGB [H, W, 3], tolerance

DICE = np.random.default_rng(11)
H, W = 9, 14
RGB = DICE.integers(0, 256, (H, W, 3), np.uint8)
RGB16 = DICE.integers(0, 65536, (H, W, 3), np.uint16)
ALPHA = DICE.choice([0, 51, 128, 255], (H, W, 1)).astype(np.uint8)
GREY, GREY16 = RGB[..., 0], RGB16[..., 0]


def rgb(grey: Array) -> Array:
    """Grey [H, W] as RGB."""
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(colours: Array, alpha: Array) -> Array:
    """Colours of 0 to 255, with this much (0 to 255) of each before white."""
    part = alpha / 255
    return colours * part + 255 * (1 - part)


# ---- PNG, by its specification


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], depth: int, colour: int, *more: tuple[bytes, bytes], width: int = W, lace: int = 0) -> bytes:
    """Unfiltered rows; `more` chunks stand before the pixels."""
    height = len(rows) if not lace else H
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, lace))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in more) + body + chunk(b"IEND", b"")


def bits(values: Array, depth: int) -> list[bytes]:
    """Rows of values of 1, 2 or 4 bits."""
    spread = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return [row.tobytes() for row in np.packbits(spread.reshape(len(values), -1), axis=1)]


def rows(values: Array) -> list[bytes]:
    return [row.astype(">u2" if row.dtype == np.uint16 else "u1").tobytes() for row in values]


def laced(values: Array) -> list[bytes]:
    """The rows of Adam7's seven passes."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    return [row.tobytes() for y, x, dy, dx in passes for row in values[y::dy, x::dx] if row.size]


def pngs() -> Iterator[Kind]:
    for depth in (1, 2, 4):
        values = DICE.integers(0, 2**depth, (H, W))
        values[0, 0] = key = 2**depth // 2 - 1
        seen = rgb(values * 255 // (2**depth - 1))
        yield f"png grey {depth}", png(bits(values, depth), depth, 0), seen, 0
        keyed = np.where(rgb(values) == key, 255, seen)
        yield f"png grey {depth} key", png(bits(values, depth), depth, 0, (b"tRNS", struct.pack(">H", key))), keyed, 0
    for depth in (1, 2, 4, 8):
        values = DICE.integers(0, 2**depth, (H, W)).astype(np.uint8)
        palette = DICE.integers(0, 256, (2**depth, 3), np.uint8)
        opaque = DICE.integers(0, 256, 2**depth).astype(np.uint8)[: max(2, 2**depth // 2)]
        body = bits(values, depth) if depth < 8 else rows(values)
        yield f"png palette {depth}", png(body, depth, 3, (b"PLTE", palette.tobytes())), palette[values], 0
        alpha = np.concatenate([opaque, np.full(2**depth - len(opaque), 255, np.uint8)])
        seen = on_white(palette[values], alpha[values][..., None])
        yield (
            f"png palette {depth} tRNS",
            png(body, depth, 3, (b"PLTE", palette.tobytes()), (b"tRNS", opaque.tobytes())),
            seen,
            1,
        )
    yield "png grey 8", png(rows(GREY), 8, 0), rgb(GREY), 0
    yield (
        "png grey 8 key",
        png(rows(GREY), 8, 0, (b"tRNS", struct.pack(">H", GREY[2, 3]))),
        rgb(np.where(GREY[2, 3] == GREY, 255, GREY)),
        0,
    )
    yield "png grey 16", png(rows(GREY16), 16, 0), rgb(np.rint(GREY16 / 257)), 0
    yield (
        "png grey 16 key",
        png(rows(GREY16), 16, 0, (b"tRNS", struct.pack(">H", GREY16[2, 3]))),
        rgb(np.where(GREY16[2, 3] == GREY16, 255, np.rint(GREY16 / 257))),
        0,
    )
    yield "png rgb 8", png(rows(RGB), 8, 2), RGB, 0
    key = struct.pack(">3H", *RGB[4, 5])
    yield (
        "png rgb 8 key",
        png(rows(RGB), 8, 2, (b"tRNS", key)),
        np.where((RGB[4, 5] == RGB).all(axis=2, keepdims=True), 255, RGB),
        0,
    )
    yield "png rgb 16", png(rows(RGB16), 16, 2), RGB16 / 257, 1
    wide = np.where((RGB16[4, 5] == RGB16).all(axis=2, keepdims=True), 65535, RGB16)
    yield "png rgb 16 key", png(rows(RGB16), 16, 2, (b"tRNS", struct.pack(">3H", *RGB16[4, 5]))), wide / 257, 1
    # A key of 16 bits whose lower bytes are another pixel's colour: that one stays.
    low = np.array([[[0x1234, 0x5678, 0x9ABC], [0x3400, 0x7800, 0xBC00]]], np.uint16)
    yield (
        "png rgb 16 false key",
        png(rows(low), 16, 2, (b"tRNS", struct.pack(">3H", *low[0, 0])), width=2),
        np.array([[[255] * 3, [0x34, 0x78, 0xBC]]]),
        0,
    )
    la, rgba = np.dstack([GREY, ALPHA]), np.dstack([RGB, ALPHA])
    yield "png la 8", png(rows(la), 8, 4), on_white(rgb(GREY), ALPHA), 1
    yield "png la 16", png(rows(la.astype(np.uint16) * 257), 16, 4), on_white(rgb(GREY), ALPHA), 1
    yield "png rgba 8", png(rows(rgba), 8, 6), on_white(RGB, ALPHA), 1
    yield "png rgba 16", png(rows(rgba.astype(np.uint16) * 257), 16, 6), on_white(RGB, ALPHA), 1
    yield "png interlaced", png(laced(RGB), 8, 2, lace=1), RGB, 0


# ---- TIFF, as another library writes it


def tiff(values: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def tiffs() -> Iterator[Kind]:
    planes: Callable[[Array], Array] = lambda values: np.ascontiguousarray(values.transpose(2, 0, 1))  # noqa: E731
    signed = DICE.integers(-90_000, 90_000, (H, W)).astype(np.int32)
    huge = DICE.integers(0, 2**32, (H, W)).astype(np.uint32)
    unit = DICE.random((H, W)).astype(np.float32)
    floats = (unit * 900 - 300).astype(np.float32)
    stretched = lambda v: 255 * (v.astype(float) - v.min()) / (v.max() - v.min().astype(float))  # noqa: E731
    for order, name in (("<", "ii"), (">", "mm")):
        for packing in (None, "zlib"):
            more: dict[str, Any] = {"byteorder": order, "compression": packing}
            says = f"{name} {packing or 'plain'}"
            yield f"tiff grey 8 {says}", tiff(GREY, **more), rgb(GREY), 0
            yield f"tiff white is zero 8 {says}", tiff(GREY, photometric="miniswhite", **more), rgb(255 - GREY), 0
            yield f"tiff grey 16 {says}", tiff(GREY16, **more), rgb(np.rint(GREY16 / 257)), 0
            yield f"tiff rgb 8 {says}", tiff(RGB, photometric="rgb", **more), RGB, 0
            yield f"tiff rgb 16 {says}", tiff(RGB16, photometric="rgb", **more), RGB16 / 257, 1
            yield f"tiff planes {says}", tiff(planes(RGB), photometric="rgb", planarconfig="separate", **more), RGB, 0
            yield f"tiff int32 {says}", tiff(signed, **more), rgb(stretched(signed)), 0.5
            yield f"tiff float 0 to 1 {says}", tiff(unit, **more), rgb(unit * 255), 0.5
            yield f"tiff float {says}", tiff(floats, **more), rgb(stretched(floats)), 0.5
    yield (
        "tiff planes 16",
        tiff(planes(RGB16), photometric="rgb", planarconfig="separate", compression="zlib"),
        RGB16 / 257,
        1,
    )
    yield "tiff white is zero 16", tiff(GREY16, photometric="miniswhite"), rgb(255 - np.rint(GREY16 / 257)), 0
    yield "tiff white is zero float", tiff(unit, photometric="miniswhite"), rgb(255 - unit * 255), 0.5
    yield "tiff uint32", tiff(huge), rgb(stretched(huge)), 0.5
    yield "tiff int16", tiff(signed.astype(np.int16)), rgb(stretched(signed.astype(np.int16))), 0.5
    rgba = np.dstack([RGB, ALPHA])
    yield "tiff rgba", tiff(rgba, photometric="rgb", extrasamples=["unassalpha"]), on_white(RGB, ALPHA), 1
    premultiplied = np.rint(RGB * (ALPHA / 255)).astype(np.uint8)
    yield (
        "tiff premultiplied",
        tiff(np.dstack([premultiplied, ALPHA]), photometric="rgb", extrasamples=["assocalpha"]),
        on_white(RGB, ALPHA),
        3,
    )
    yield (
        "tiff la",
        tiff(np.dstack([GREY, ALPHA]), photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"),
        on_white(rgb(GREY), ALPHA),
        1,
    )
    yield (
        "tiff rgba 16",
        tiff(rgba.astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        on_white(RGB, ALPHA),
        1,
    )
    table = DICE.integers(0, 256, (3, 256)).astype(np.uint16)
    yield "tiff palette", tiff(GREY, photometric="palette", colormap=table * 257), table.T[GREY], 0
    ink = np.dstack([RGB, np.where(ALPHA > 128, 0, ALPHA)])
    paper = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    yield "tiff cmyk", tiff(ink, photometric="separated"), paper, 1
    yield "tiff bilevel", tiff(GREY > 99, photometric="minisblack"), rgb((GREY > 99) * 255), 0
    yield (
        "tiff first page",
        encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("RGB", (3, 3))]),
        RGB,
        0,
    )


# ---- JPEG, GIF, WebP and the rest

ARITHMETIC, HUFFMAN = (
    base64.b64decode(
        f"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNyw{rest}"
    )
    for rest in (
        "tQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT"
        "09PT09PT0//yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSW/v55m9g2Ie/1OQyTlxoX1zSjCl6C2zslvSoSnR3I4"
        "wBLifESin2GxtGdRv1gOybgOi/LlSVNX4G4VIp3uteqiD/2Q==",
        "tQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT"
        "09PT09PT0//wAARCAAQABgDASIAAhEBAxEB/8QAFwAAAwEAAAAAAAAAAAAAAAAAAAQGBf/EACAQAQACAQMFAQAAAAAAAAAAAAEAEQMCBCESIjFBUX"
        "H/xAAWAQEBAQAAAAAAAAAAAAAAAAAEAgP/xAAbEQACAgMBAAAAAAAAAAAAAAAAAQQRAgMTIf/aAAwDAQACEQMRAD8ApcOvtsqzjmN6cwWljXiTGL"
        "eLT6fkZ075qnhCyJcTmjSPFdG5kzh1K/vuEnMm/wCEtr4whcvHRWyG7P/Z",
    )
)  # the same coefficients in both: two lossless encodings of one JPEG
SMOOTH = np.asarray(photo(48, 32))


def jpegs() -> Iterator[Kind]:
    finest: dict[str, Any] = {"quality": 100, "subsampling": 0}
    picture = Image.fromarray(SMOOTH)
    yield "jpeg", encoded(picture, "JPEG", **finest), SMOOTH, 6
    yield "jpeg progressive", encoded(picture, "JPEG", progressive=True, **finest), SMOOTH, 6
    yield "jpeg grey", encoded(Image.fromarray(SMOOTH[..., 0]), "JPEG", quality=100), rgb(SMOOTH[..., 0]), 3
    ink = Image.fromarray(255 - SMOOTH).convert("RGB")
    cmyk = Image.merge("CMYK", (*ink.split(), Image.new("L", ink.size)))  # black is not used
    adobe = encoded(cmyk, "JPEG", **finest)
    yield "jpeg cmyk of Adobe, inverted", adobe, SMOOTH, 6
    start = adobe.index(b"\xff\xee")
    marker = 2 + int.from_bytes(adobe[start + 2 : start + 4])
    yield "jpeg cmyk without a mark, taken for Adobe's", adobe[:start] + adobe[start + marker :], SMOOTH, 6
    arithmetic = np.asarray(Image.open(io.BytesIO(HUFFMAN)))
    yield "jpeg arithmetic", ARITHMETIC, arithmetic, 0


def others() -> Iterator[Kind]:
    picture, rgba = Image.fromarray(RGB), Image.fromarray(np.dstack([RGB, ALPHA]))
    frames: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (W, H), "blue")]}
    yield "apng", encoded(picture, "PNG", **frames), RGB, 0
    for form, options in (("WEBP", {"lossless": True, "exact": True}), ("JPEG2000", {"irreversible": False})):
        yield form.lower(), encoded(picture, form, **options), RGB, 0
        yield f"{form.lower()} alpha", encoded(rgba, form, **options), on_white(RGB, ALPHA), 1
    yield "webp animated", encoded(picture, "WEBP", lossless=True, **frames), RGB, 0
    if features.check("avif"):
        yield "avif", encoded(Image.fromarray(SMOOTH), "AVIF", quality=100, subsampling="4:4:4"), SMOOTH, 6
    values, table = GREY % 7, DICE.integers(0, 256, (7, 3), np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(table.tobytes())
    yield "gif", encoded(palette, "GIF", optimize=False), table[values], 0
    key = np.where(rgb(values) == 3, 255, table[values])
    yield "gif key", encoded(palette, "GIF", transparency=3, optimize=False), key, 0
    yield (
        "gif animated",
        encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", (W, H))], optimize=False),
        table[values],
        0,
    )
    small = bytearray(encoded(palette, "GIF", optimize=False))
    small[6:10] = struct.pack("<HH", W + 3, H + 2)  # a larger screen than its first frame fills
    yield "gif partly filled", bytes(small), np.pad(table[values], ((0, 2), (0, 3), (0, 0)), constant_values=255), 0
    yield "bmp", encoded(picture, "BMP"), RGB, 0
    yield "bmp palette", encoded(palette, "BMP"), table[values], 0
    yield "bmp bilevel", encoded(Image.fromarray(GREY > 99), "BMP"), rgb((GREY > 99) * 255), 0
    yield "ppm", b"P6 %d %d 255\n" % (W, H) + RGB.tobytes(), RGB, 0
    yield "pgm 16", b"P5 %d %d 65535\n" % (W, H) + GREY16.astype(">u2").tobytes(), rgb(np.rint(GREY16 / 257)), 0
    yield "pbm", b"P4 %d %d\n" % (W, H) + b"".join(bits(GREY % 2, 1)), rgb((1 - GREY % 2) * 255), 0
    yield "tga", encoded(rgba, "TGA"), on_white(RGB, ALPHA), 1
    yield "qoi", encoded(picture, "QOI"), RGB, 0
    yield "row", encoded(Image.fromarray(RGB[:1]), "PNG"), RGB[:1], 0
    yield "column", encoded(Image.fromarray(RGB[:, :1]), "PNG"), RGB[:, :1], 0
    yield "single pixel", encoded(Image.fromarray(RGB[:1, :1]), "PNG"), RGB[:1, :1], 0


# ---- EXIF: what is stored, and how a viewer turns it

SHOWN: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def exif(orientation: int, order: str) -> bytes:
    """An EXIF block with one entry."""
    entry = struct.pack(f"{order}HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + entry


def turned() -> Iterator[Kind]:
    picture = Image.fromarray(RGB)
    stored = np.asarray(Image.open(io.BytesIO(encoded(picture, "JPEG", quality=95))).convert("RGB"))
    for value, shown in SHOWN.items():
        for order, name in (("<", "ii"), (">", "mm")):
            block = exif(value, order)
            yield f"jpeg turned {value} {name}", encoded(picture, "JPEG", quality=95, exif=block), shown(stored), 0
            yield f"png turned {value} {name}", encoded(picture, "PNG", exif=block), shown(RGB), 0
        webp = encoded(picture, "WEBP", lossless=True, exif=exif(value, "<"))
        yield f"webp turned {value}", webp, shown(RGB), 0
        tags = [(0x0112, "H", 1, value, True)]
        yield f"tiff turned {value}", tiff(RGB, photometric="rgb", extratags=tags), shown(RGB), 0
        rgba = encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG", exif=exif(value, ">"))
        yield f"png alpha turned {value}", rgba, shown(on_white(RGB, ALPHA)), 1
        yield (
            f"png 16 turned {value}",
            encoded(Image.fromarray(GREY16), "PNG", exif=exif(value, ">")),
            shown(rgb(np.rint(GREY16 / 257))),
            0,
        )
    for value in (0, 9, 65535):
        yield f"png turned {value}", encoded(picture, "PNG", exif=exif(value, "<")), RGB, 0


# ---- ICC: profiles made from primaries, and the arithmetic of colour

TO_XYZ = np.array([SRGB_RED, SRGB_GREEN, SRGB_BLUE]).T
SPACES = {  # primaries at D50, gamma
    "Display P3 like": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2),
    "Adobe RGB like": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446), 563 / 256),
    "ProPhoto like": ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249), 1.8),
    "sRGB, channels swapped": (SRGB_BLUE, SRGB_GREEN, SRGB_RED, 2.2),
}


def in_srgb(values: Array, red: Any, green: Any, blue: Any, gamma: float) -> Array:
    """0 to 255 of a matrix space, as 0 to 255 of sRGB."""
    linear = (values / 255) ** gamma @ (np.linalg.inv(TO_XYZ) @ np.array([red, green, blue]).T).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def profiles() -> Iterator[Kind]:
    picture = Image.fromarray(RGB)
    for name, (*primaries, gamma) in SPACES.items():
        icc = profile(*primaries, gamma)
        seen = in_srgb(RGB, *primaries, gamma)
        yield f"png {name}", encoded(picture, "PNG", icc_profile=icc), seen, 2
        yield f"tiff {name}", encoded(picture, "TIFF", icc_profile=icc), seen, 2
        yield f"webp {name}", encoded(picture, "WEBP", lossless=True, icc_profile=icc), seen, 2
        rgba = encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG", icc_profile=icc)
        yield f"png alpha {name}", rgba, on_white(seen, ALPHA), 3
        stored = encoded(picture, "JPEG", quality=95)
        values = np.asarray(Image.open(io.BytesIO(stored)))
        yield (
            f"jpeg {name}",
            encoded(picture, "JPEG", quality=95, icc_profile=icc),
            in_srgb(values, *primaries, gamma),
            2,
        )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "png sRGB by profile", encoded(picture, "PNG", icc_profile=srgb), RGB, 0


KINDS = [*pngs(), *tiffs(), *jpegs(), *others(), *turned(), *profiles()]
NAMES = [kind[0] for kind in KINDS]


def test_the_table_is_a_table() -> None:
    assert len(set(NAMES)) == len(NAMES) > 150


def name_of(kind: str) -> str:
    return "x.tga" if kind == "tga" else "x.jpg"


@pytest.mark.parametrize(("name", "data", "expected", "tolerance"), KINDS, ids=NAMES)
def test_what_a_person_sees(name: str, data: bytes, expected: Array, tolerance: float) -> None:
    picture = decode(name_of(name), data)
    assert not isinstance(picture, Failure), picture
    assert picture.mode == "RGB"
    pixels = np.asarray(picture).astype(float)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= tolerance
    assert tolerance <= 6


def original(data: bytes, name: str, size: int) -> Array:
    """The preprocessing of the original code: resize to the shortest side, centre crop, RGB. Pillow alone."""
    picture: Image.Image = Image.open(io.BytesIO(data), formats=["TGA"] if name == "tga" else None)
    width, height = picture.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new = (new_short, new_long) if width <= height else (new_long, new_short)
    picture = picture.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


@pytest.mark.parametrize(("name", "data"), [kind[:2] for kind in KINDS], ids=NAMES)
def test_reference_is_the_original_bit_for_bit(name: str, data: bytes) -> None:
    for size in (8, 32):
        picture = decode(name_of(name), data, "reference")
        assert not isinstance(picture, Failure), picture
        pixels = transform(picture, Preprocess(), size, pixels="reference")
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), original(data, name, size))


@pytest.mark.parametrize("value", range(1, 9))
def test_strips_are_turned_as_the_whole(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture too big to be converted at once: each kind again, in strips."""
    monkeypatch.setattr(decode_module, "BIG", 0)
    monkeypatch.setattr(decode_module, "STRIP", 20)
    for name, data, expected, tolerance in KINDS:
        if f"turned {value}" in name or value == 1:
            picture = decode(name_of(name), data)
            assert np.abs(np.asarray(picture).astype(float) - expected).max() <= tolerance, name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RGB16 / np.float32(65535), photometric="rgb"), "unknown pixel mode"),
        (tiff(GREY16 / np.float64(65535)), "unknown pixel mode"),
        (tiff(RGB16.astype(np.uint32), photometric="rgb"), "unknown pixel mode"),
        (tiff(GREY16, photometric="miniswhite", byteorder=">"), "unknown pixel mode"),
        (
            tiff(np.ascontiguousarray(RGB16.transpose(2, 0, 1)), photometric="rgb", planarconfig="separate"),
            "16 bits in separate planes",
        ),
    ],
    ids=["rgb float", "float64", "rgb uint32", "white is zero, big-endian", "planes of 16 bits"],
)
def test_what_pillow_cannot_read_is_unsupported_and_not_garbage(data: bytes, reason: str) -> None:
    failure = Failure("x", FailureKind.UNSUPPORTED, f"a kind of tiff that can't be decoded: {reason}")
    assert decode("x", data) == failure
    cut = decode("x", data[:100])
    assert isinstance(cut, Failure) and cut.kind == FailureKind.TRUNCATED


@pytest.mark.parametrize(
    ("data", "extra", "module"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic", "pillow_heif"),
        (b"\xff\x0a\xfa\x7f", "jxl", "pillow_jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl", "pillow_jxl"),
    ],
)
def test_formats_of_an_extra_say_which(data: bytes, extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    decode_module._has_plugin.cache_clear()
    message = f'reading {extra} needs more: pip install "clipcli[{extra}]"'
    assert decode("x", data) == Failure("x", FailureKind.UNSUPPORTED, message)
    decode_module._has_plugin.cache_clear()
