"""Pixels as a person would see them, and one honest failure for every file that has none."""

from __future__ import annotations

import os
import random
import sys
import tarfile
import tracemalloc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from pictures_made import (
    QUADRANTS,
    SRGB_BLUE,
    SRGB_GREEN,
    SRGB_RED,
    encoded,
    oriented,
    photo,
    png_header,
    profile,
    quadrants,
)
from PIL import Image

from clipcli.images import decode as decode_module
from clipcli.images import read as read_module
from clipcli.images.budget import MAX_MEMORY, MAX_PIXELS
from clipcli.images.decode import Pixels, decode, open_picture
from clipcli.records import Failure, FailureKind, Source


def auto(data: bytes, path: str = "picture") -> Image.Image:
    picture = decode(path, data)
    assert not isinstance(picture, Failure), picture
    assert picture.mode == "RGB"
    return picture


def failed(data: bytes, path: str = "picture", policy: Pixels = "auto") -> tuple[str, str]:
    failure = decode(path, data, policy)
    assert isinstance(failure, Failure), failure
    assert failure.path == path
    assert "\n" not in failure.message
    assert not failure.message.endswith(".")
    return str(failure.kind), failure.message


def first(picture: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(picture)[0, 0].tolist())


# ---- what is shown


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    picture = auto(oriented(orientation, form))
    assert picture.size == (32, 16)
    corners = np.asarray(picture).astype(int)[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert np.abs(corners - np.array(QUADRANTS)).max() <= 25, "lossy, but not mistaken"


def test_reference_leaves_a_picture_as_it_is_stored() -> None:
    stored = decode("picture", oriented(6), "reference")
    assert isinstance(stored, Image.Image)
    assert stored.size == (16, 32)
    palette = decode("picture", encoded(quadrants().convert("P"), "GIF"), "reference")
    assert isinstance(palette, Image.Image)
    assert palette.mode == "P"


GREY = Image.new("L", (4, 4), 100)
PALETTE = Image.new("P", (4, 4), 3)
PALETTE.putpalette(bytes(range(30)))
HALF = Image.new("L", (4, 4), 51)  # a fifth of it is opaque: 0.2 * colour + 0.8 * white


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.merge("LA", (GREY, HALF)), "PNG"), (224, 224, 224)),
        (encoded(Image.merge("RGBA", (GREY, GREY, GREY, HALF)), "PNG"), (224, 224, 224)),
        (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG"), (9, 8, 7)),
        (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "TIFF"), (255, 255, 255)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 4)), (1, 2, 3)),
        (encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7), (255, 255, 255)),
        (encoded(PALETTE, "PNG", transparency=b"\xff\xff\xff\0"), (255, 255, 255)),
        (encoded(PALETTE, "GIF", transparency=3), (255, 255, 255)),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("1", (4, 4), 0), "TIFF"), (0, 0, 0)),
        (encoded(Image.new("L", (4, 4), 77), "BMP"), (77, 77, 77)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("YCbCr", (4, 4), (76, 85, 255)), "TIFF"), (254, 0, 0)),
        (encoded(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"), (255, 255, 255)),
    ],
)
def test_modes_and_transparency(data: bytes, expected: tuple[int, int, int]) -> None:
    assert np.abs(np.array(first(auto(data))) - expected).max() <= 1


def test_a_cmyk_jpeg_is_not_a_negative() -> None:
    red = auto(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(first(red)) - (255, 0, 0)).max() <= 4


def grey(values: object, dtype: type, form: str = "TIFF") -> list[int]:
    picture = auto(encoded(Image.fromarray(np.array([values], dtype)), form))
    pixels = np.asarray(picture)[0]
    assert (pixels == pixels[:, :1]).all()
    return [int(value) for value in pixels[:, 0]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(form: str) -> None:
    assert grey([0, 128, 129, 257, 32768, 65406, 65407, 65535], np.uint16, form) == [0, 0, 1, 1, 128, 254, 255, 255]


def test_wider_ranges_are_stretched() -> None:
    assert grey([0, 25700, 65535], np.int32) == [0, 100, 255]
    assert grey([-100, 0, 100], np.int32) == [0, 128, 255]
    assert grey([0, 2**30, 2**31 - 1], np.int32) == [0, 128, 255]
    assert grey([0.0, 0.2, 1.0], np.float32) == [0, 51, 255]
    assert grey([-5.0, 0.0, 5.0], np.float32) == [0, 128, 255]
    assert grey([np.nan, 10.0, np.inf, 20.0], np.float32) == [0, 128, 0, 255]
    assert grey([7.0, 7.0], np.float32) == [0, 0]


def test_16_bit_grey_with_a_transparent_value() -> None:
    data = encoded(Image.fromarray(np.array([[1000, 2570]], np.uint16)), "PNG", transparency=1000)
    assert np.asarray(auto(data))[0, :, 0].tolist() == [255, 10]


def every_kind(noise: npt.NDArray[np.uint8]) -> Iterator[tuple[str, bytes]]:
    """Of the same random pixels, files that take each way through `_seen`."""
    seen = Image.fromarray(noise)
    colours, grey = seen.convert("RGB"), noise[..., 0]
    floats = np.where(grey == 7, np.nan, grey - 99.5).astype(np.float32)
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode in ("RGBA", "LA", "L", "1", "P"):
        yield mode, encoded(seen.convert(mode), "PNG")
    for mode in ("CMYK", "YCbCr", "LAB"):
        yield mode, encoded(colours.convert(mode) if mode != "LAB" else Image.merge("LAB", colours.split()), "TIFF")
    yield "profile", encoded(colours, "PNG", icc_profile=profile(SRGB_BLUE, SRGB_GREEN, SRGB_RED))
    yield "transparent colours", encoded(colours.quantize(50), "PNG", transparency=bytes(range(50)))
    yield "a transparent colour", encoded(colours.quantize(50), "GIF", transparency=3)
    yield "16 bits", encoded(Image.fromarray(grey * np.uint16(257)), "PNG", transparency=257 * 9)
    yield "32 bits", encoded(Image.fromarray(grey * np.int32(-70000)), "TIFF")
    yield "floats", encoded(Image.fromarray(floats), "TIFF")
    yield "turned", encoded(seen, "PNG", exif=turned)


@pytest.mark.parametrize("shape", [(90, 37, 4), (37, 90, 4), (60, 60, 4)])
def test_strips_are_seen_as_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(every_kind(np.random.default_rng(5).integers(0, 256, shape, np.uint8)))
    whole = {kind: np.asarray(auto(data)) for kind, data in files.items()}
    monkeypatch.setattr(decode_module, "BIG", 0)
    monkeypatch.setattr(decode_module, "STRIP", 4 * min(shape[:2]) + 1)
    for kind, data in files.items():
        assert whole[kind].std() > 1, kind
        np.testing.assert_array_equal(np.asarray(auto(data)), whole[kind], kind)


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70000), np.uint16(5)])
def test_wide_pixels_are_never_copied_whole(values: np.generic, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and numpy allocate for a high, narrow TIFF: Pillow's own memory is not traced."""
    picture = Image.fromarray(np.tile(np.array([0, values], values.dtype), (30_000, 35)))
    data = encoded(picture, "TIFF", compression="tiff_adobe_deflate")
    assert len(data) < 100_000 < 2_000_000 < picture.width * picture.height
    monkeypatch.setattr(decode_module, "STRIP", 1 << 15)
    tracemalloc.start()
    assert auto(data).size == (70, 30_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_memory_is_announced_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(size: int) -> None:
        raise LookupError(size)

    def announced(data: bytes) -> int:
        claims: list[int] = []
        decode("picture", data, "auto", claims.append)
        return claims[0]

    assert announced(encoded(photo(50, 20), "PNG")) == 8 * 1000
    assert announced(encoded(photo(50, 20), "WEBP")) == 20 * 1000
    icon = encoded(photo(64, 64), "ICO")
    assert announced(icon) == 1000 * len(icon), "a picture in a picture"
    path = tmp_path / "large.tif"
    with path.open("wb") as file:
        file.truncate(decode_module.BIG)  # a hole
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened before its turn"))
    with pytest.raises(LookupError, match=str(MAX_MEMORY)):
        open_picture(Source(str(path)), "auto", refused)


def test_the_first_of_several_frames() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "TIFF", "WEBP", "AVIF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert np.abs(np.array(first(auto(data))) - (255, 0, 0)).max() <= 3, form


def test_an_embedded_profile_is_converted_to_srgb() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    swapped = profile(SRGB_BLUE, SRGB_GREEN, SRGB_RED)
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert first(auto(encoded(red, form, icc_profile=swapped, **options))) == (0, 0, 255), form
    seen = Image.merge("RGBA", (*red.split(), HALF))
    assert first(auto(encoded(seen, "PNG", icc_profile=swapped))) == (204, 204, 255), "converted, then on white"
    stored = decode("picture", encoded(red, "PNG", icc_profile=swapped), "reference")
    assert isinstance(stored, Image.Image)
    assert first(stored) == (255, 0, 0)


@pytest.mark.parametrize(
    ("picture", "icc"),
    [
        (Image.new("RGB", (4, 4), (200, 100, 50)), profile(SRGB_BLUE, SRGB_GREEN, SRGB_RED)[:200]),
        (Image.new("RGB", (4, 4), (200, 100, 50)), b"nonsense"),
        (Image.new("L", (4, 4), 80), profile(SRGB_BLUE, SRGB_GREEN, SRGB_RED)),
        (Image.new("RGB", (4, 4), (200, 100, 50)), decode_module.ImageCms.ImageCmsProfile(
            decode_module.ImageCms.createProfile("sRGB")).tobytes()),
    ],
    ids=["broken", "no profile", "of another colour space", "srgb itself"],
)  # fmt: skip
def test_a_profile_that_says_nothing_changes_nothing(picture: Image.Image, icc: bytes) -> None:
    assert first(auto(encoded(picture, "PNG", icc_profile=icc))) == first(picture.convert("RGB"))


def test_a_real_adobe_rgb_photograph() -> None:
    """scikit-image's rocket, against the arithmetic of the two colour spaces."""
    skimage = pytest.importorskip("skimage")
    data = (Path(skimage.__file__).parent / "data" / "rocket.jpg").read_bytes()
    stored = decode("rocket.jpg", data, "reference")
    assert isinstance(stored, Image.Image)
    linear = (np.asarray(stored) / 255.0) ** 2.19921875
    linear = linear @ np.array([[1.39836, 0, 0], [-0.39836, 1, -0.04293], [0, 0, 1.04293]])
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0.003) ** (1 / 2.4) - 0.055)
    difference = np.abs(np.asarray(auto(data)) - 255 * curved.clip(0, 1))
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.999) < 2


@pytest.mark.parametrize(
    "form",
    [
        *("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"),
        *("ICO", "QOI", "DDS", "ICNS", "PCX", "SGI", "XBM", "TGA"),
    ],
)
def test_every_format_opens_without_a_useful_name(form: str) -> None:
    picture = auto(
        encoded(photo(64, 64).convert("1" if form == "XBM" else "RGB"), form), "x.tga" if form == "TGA" else "x.jpg"
    )
    assert max(picture.size) >= 64


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    data = encoded(quadrants(), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff nonsense")
    assert np.asarray(auto(data)).tolist() == np.asarray(quadrants()).tolist()


def test_no_warning_leaves_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PALETTE, "PNG", transparency=b"\xff\xff\xff\0")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow warns from here on, and refuses twice as many
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert auto(encoded(quadrants(), "PNG")).size == (32, 16)
        stored = decode("picture", data, "reference")
        assert isinstance(stored, Image.Image)
        stored.convert("RGB")
    assert [str(warning.message) for warning in caught] == []


# ---- what fails

GIF_BOMB = b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08\0;"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", "not-a-picture", "the file is empty"),
        (b"cat\ndog\n", "not-a-picture", "no known picture format"),
        (b"%PDF-1.7\n", "not-a-picture", "no known picture format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-a-picture", "no known picture format"),
        (png_header(60000, 60000), "too-large", "it would decode to too many pixels"),
        (GIF_BOMB, "too-large", "it would decode to too many pixels"),
        (png_header(60, 60), "corrupt", "damaged png data: image file is truncated"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", 'reading heic needs more: pip install "clipcli[heic]"'),
        (b"\xff\x0a\xfa\x7f", "unsupported", 'reading jxl needs more: pip install "clipcli[jxl]"'),
        (b"\xff\xd8\xff\xe0" + bytes(200) + b"\xff\xd9", "corrupt", "damaged jpeg data"),
        (b"\x89PNG\r\n\x1a\n", "truncated", "the file ends before the picture does"),
        (
            encoded(quadrants(), "BMP")[:30] + b"\x09" + encoded(quadrants(), "BMP")[31:],
            "unsupported",
            "a kind of bmp that can't be decoded: unsupported bmp compression",
        ),
    ],
)  # fmt: skip
def test_failures(data: bytes, kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)  # not installed, whatever this machine has
    decode_module._has_plugin.cache_clear()
    for policy in ("auto", "reference"):
        assert failed(data, policy=policy) == (kind, message)  # type: ignore[arg-type]
    decode_module._has_plugin.cache_clear()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_cut_off_anywhere(form: str) -> None:
    picture = photo(48, 32)
    data = encoded(picture, form)
    for length in [*range(20, len(data) * 9 // 10, len(data) // 25), len(data) * 9 // 10]:
        kind, message = failed(data[:length])
        assert (kind, message) == ("truncated", "the file ends before the picture does"), length


def test_heic_is_cut_off_where_its_boxes_say() -> None:
    data = encoded(photo(48, 32), "AVIF")  # the same boxes
    assert not decode_module._ends_early(data, "heic", "")
    assert decode_module._ends_early(data[: len(data) // 2], "heic", "")


def test_progressive_and_trailing_bytes_are_fine() -> None:
    whole = auto(encoded(photo(), "JPEG", quality=90))
    data = encoded(photo(), "JPEG", quality=90, progressive=True)
    assert np.asarray(auto(data)).tolist() == np.asarray(whole).tolist()
    assert np.asarray(auto(data + b"\0" * 5000)).tolist() == np.asarray(whole).tolist()


def test_a_package_that_reads_heic_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow-heif: registers an opener, as that package does."""

    class HeifFile(decode_module.Image.Image):
        def __init__(self, *_: object) -> None:
            super().__init__()
            made = quadrants()
            self.im, self._mode, self._size = made.im, made.mode, made.size

    package = ModuleType("pillow_heif")
    accept = {"HEIF": (HeifFile, lambda prefix: prefix[4:8] == b"ftyp")}
    package.register_heif_opener = lambda: Image.OPEN.update(accept)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    decode_module._has_plugin.cache_clear()
    assert first(auto(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")) == (255, 0, 0)
    decode_module._has_plugin.cache_clear()


def test_pixels_that_nothing_makes_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> Image.Image:
        raise ValueError("conversion not supported")

    data = encoded(quadrants().convert("YCbCr"), "TIFF")
    monkeypatch.setattr(Image.Image, "convert", refusing)
    for policy in ("auto", "reference"):
        assert failed(data, policy=policy) == ("unsupported", "pixels of mode YCbCr can't be made RGB")  # type: ignore[arg-type]


def test_too_many_pixels_by_the_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a caller's choice, which is left as it is
    assert failed(png_header(20000, 20000)) == ("too-large", "20000 x 20000 pixels are too many")
    assert Image.MAX_IMAGE_PIXELS is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert failed(encoded(photo(), "PNG")) == ("too-large", "it would decode to too many pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", decode_module._PILLOW_LIMIT)
    auto(encoded(quadrants(), "PNG"))
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS // 2
    assert failed(png_header(16000, 12500))[0] != "too-large", "a telephone of 200 megapixels"


def test_no_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(decode_module, "_to_rgb", exhausted)
    assert failed(encoded(quadrants(), "PNG")) == ("too-large", "not enough memory for its pixels")


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "_to_rgb", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode("picture", encoded(quadrants(), "PNG"))


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(quadrants(), "PNG"))
    assert isinstance(open_picture(Source(str(path))), Image.Image)
    assert isinstance(open_picture(Source("no such file", path.read_bytes())), Image.Image)

    def why(name: str) -> tuple[str, str]:
        failure = open_picture(Source(name))
        assert isinstance(failure, Failure)
        assert failure.path == name
        return str(failure.kind), failure.message

    os.mkfifo(tmp_path / "pipe.jpg")
    assert why(str(tmp_path / "gone.png")) == ("missing", "no such file")
    assert why(str(path / "x")) == ("missing", "no such file")
    assert why(str(tmp_path)) == ("unreadable", "a folder, not a file")
    assert why(str(tmp_path / "pipe.jpg")) == ("unreadable", "a pipe, not a file")
    assert why("a\0b") == ("missing", "no file can have this name: it holds a NUL byte")
    monkeypatch.setattr(read_module, "MAX_BYTES", 10)
    assert why(str(path))[0] == "too-large"
    monkeypatch.undo()

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    assert why(str(path)) == ("unreadable", "permission denied")


def test_mutations_never_raise() -> None:
    """Seeded; each damaged file gives a picture or a failure, under both policies."""
    dice = random.Random(8)
    picture = photo(24, 16)
    forms = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI", "DDS", "PCX", "SGI"]
    files = [*(encoded(picture, form) for form in forms), *(oriented(6, form) for form in ("JPEG", "PNG", "WEBP"))]
    outcomes = set()
    for _ in range(600):
        data = bytearray(dice.choice(files))
        for _ in range(dice.choice((1, 3, 12))):
            data[dice.randrange(min(len(data), dice.choice((64, 100000))))] = dice.choice((0, 255, dice.randrange(256)))
        for policy in ("auto", "reference"):
            outcome = decode("picture", bytes(data), policy)  # type: ignore[arg-type]
            outcomes.add(outcome.kind if isinstance(outcome, Failure) else "picture")
    assert outcomes >= {"picture", FailureKind.CORRUPT, FailureKind.TRUNCATED, FailureKind.NOT_A_PICTURE}


def test_many_threads_decode_the_same(pictures: Path) -> None:
    with tarfile.open(pictures / "caltech20-dev.tar") as archive:
        members = [member for member in archive if member.name.endswith((".jpg", ".png"))][:40]
        files = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert len(files) == 40
    alone = [np.asarray(auto(data)) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = [np.asarray(picture) for picture in pool.map(auto, files)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
