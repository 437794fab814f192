"""The torture folder: everything that people's folders hold and tools die of, and the row that each has to get.

    for case in torture.build(folder): ...      # case.name below the folder -> case.kind

Seeded and small: some 200 kB, none of it larger than it looks but by its own word. Used by the tests, and by
benchmarks/torture.py to see what other tools make of the same folder.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pictures_made import encoded, oriented, photo, png_header
from PIL import Image

GOOD = "a label"  # the kind of what has to be classified
OTHER = "passed over"  # and of what has no row
GIF_BOMB = b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08\0;"


@dataclass(frozen=True)
class Case:
    """A name below the folder, as `os.fsdecode` makes it, and the kind of its row."""

    name: str
    kind: str


def build(folder: Path) -> list[Case]:
    """Make it; the cases in the order of the rows. What this system or user can't have is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [Case(os.fsdecode(name), kind) for name, kind in _files(folder)]
    return sorted(cases, key=lambda case: os.fsencode(case.name).replace(b"/", b"\0"))


def _files(folder: Path) -> Iterator[tuple[bytes, str]]:
    def put(name: str | bytes, data: bytes, kind: str) -> Iterator[tuple[bytes, str]]:
        raw = name if isinstance(name, bytes) else name.encode()
        path = os.path.join(os.fsencode(folder), raw)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        except OSError:  # this file system refuses the name
            return
        yield raw, kind

    picture = photo(96, 64)
    jpeg, png = encoded(picture, "JPEG", quality=90), encoded(picture, "PNG")
    for name, data in _good(picture).items():
        yield from put(f"good {name}", data, GOOD)
    for name, data, kind in _bad(jpeg, png):
        yield from put(name, data, kind)
    for length in (1, 2):
        yield from put(f"cut/{length:05}.jpg", jpeg[:length], "not-a-picture")
    for length in (3, 20, 200, len(jpeg) // 4, len(jpeg) // 2, len(jpeg) - 20):
        yield from put(f"cut/{length:05}.jpg", jpeg[:length], "truncated")
    for form in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM"):
        data = encoded(picture, form)
        for part in (3, 6, 9):
            yield from put(f"cut/{part} tenths.{form.lower()}", data[: len(data) * part // 10], "truncated")
    for name in _names():
        yield from put(name, jpeg, GOOD)
    for name, data in {
        "labels.txt": b"cat\ndog\nrocket\n",
        ".hidden.jpg": jpeg,
        ".folder/hidden.jpg": jpeg,
        "notes": b"BM is how this text begins\n",
        "film.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(500),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "paper.pdf": b"%PDF-1.7\n",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
    }.items():
        yield from put(name, data, OTHER)
    yield from put("folder.jpg/inner.png", png, GOOD)
    yield from put("no ending", jpeg, GOOD)
    yield from _special(folder)
    hostile_tar(folder / "hostile.tar", jpeg)
    hostile_zip(folder / "hostile.zip", jpeg)
    yield b"hostile.tar", OTHER
    yield b"hostile.zip", OTHER


def _good(picture: Image.Image) -> dict[str, bytes]:
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "trailing bytes.jpg": encoded(picture, "JPEG") + bytes(5000),
        "turned.jpg": oriented(6),
        "see-through.png": encoded(Image.new("RGBA", (30, 20), (9, 9, 9, 0)), "PNG"),
        "palette.gif": encoded(picture.convert("P"), "GIF"),
        "grey16.png": encoded(grey16, "PNG"),
        "float.tif": encoded(picture.convert("F"), "TIFF"),
        "bilevel.tif": encoded(picture.convert("1"), "TIFF"),
        "animated.webp": encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        "column.png": encoded(Image.new("RGB", (1, 20_000), "red"), "PNG"),
        "row.png": encoded(Image.new("RGB", (20_000, 1), "red"), "PNG"),
        "single pixel.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "broken exif.png": encoded(picture, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff nonsense"),
        "broken profile.png": encoded(picture, "PNG", icc_profile=b"nonsense"),
        "named wrongly.png": encoded(picture, "JPEG"),
        "CAPITALS.JPG": encoded(picture, "JPEG"),
    }


def _bad(jpeg: bytes, png: bytes) -> list[tuple[str, bytes, str]]:
    flipped = bytearray(png)
    flipped[60] ^= 0xFF  # in the compressed pixels, under a checksum
    return [
        ("bad/zero bytes.jpg", b"", "not-a-picture"),
        ("bad/text.jpg", b"cat\ndog\n", "not-a-picture"),
        ("bad/web page.png", b"<!DOCTYPE html><title>404</title>" * 20, "not-a-picture"),
        ("bad/postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-a-picture"),
        ("bad/nulls.jpg", bytes(5000), "not-a-picture"),
        ("bad/noise.jpg", np.random.default_rng(0).bytes(5000), "not-a-picture"),
        ("bad/mark alone.jpg", b"\xff\xd8\xff\xe0" + bytes(300) + b"\xff\xd9", "corrupt"),
        ("bad/flipped bit.png", bytes(flipped), "corrupt"),
        ("bad/60000 x 60000.png", png_header(60_000, 60_000), "too-large"),
        ("bad/65535 x 65535.gif", GIF_BOMB, "too-large"),
        ("bad/60000 x 60000.bmp", _bmp_header(60_000, 60_000), "too-large"),
        ("bad/20000 x 20000.png", png_header(20_000, 20_000), "too-large"),
        ("bad/telephone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "unsupported"),
        ("bad/new.jxl", b"\xff\x0a\xfa\x7f" + bytes(200), "unsupported"),
    ]


def _bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def _names() -> list[str | bytes]:
    return [
        "names/-rf.jpg",
        "names/--output.jpg",
        "names/ leading and trailing .jpg ",
        "names/'single' \"double\" `back`.jpg",
        "names/$(reboot);&|<>*?.jpg",
        "names/[red]bold[/red] :smile:.jpg",
        "names/tab\tand\\backslash\\n.jpg",
        "names/two\nlines.jpg",
        "names/return\r.jpg",
        "names/\x1b[31mred\x07.jpg",
        "names/emoji 🐈‍⬛.jpg",
        "names/right \u202egpj.to left.jpg",
        "names/combined e\u0301 and single \u00e9.jpg",
        "names/a.tar::b.jpg",
        "names/!truncated.jpg",
        'names/comma, "quote", =1+1.jpg',
        b"names/latin caf\xe9.jpg",
        b"names/no text \xff\xfe\x80.jpg",
        b"names/" + b"x" * 251 + b".jpg",
        "names/" + "猫" * 83 + ".jpg",
    ]


def _special(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Names behind which no bytes lie."""
    special = folder / "special"
    special.mkdir()
    (special / "empty folder.jpg").mkdir()
    make: dict[str, tuple[Callable[[Path], object], str]] = {
        "dead link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "missing"),
        "dead link": (lambda path: path.symlink_to("nowhere"), OTHER),
        "linked.jpg": (lambda path: path.symlink_to("../good cmyk.jpg"), GOOD),
        "loop.jpg": (lambda path: path.symlink_to("loop.jpg"), "unreadable"),
        "up": (lambda path: path.symlink_to(".."), OTHER),
        "pipe.jpg": (os.mkfifo, "unreadable"),
        "endless.jpg": (lambda path: path.symlink_to("/dev/zero"), "unreadable"),
    }
    if os.geteuid():  # root may read everything
        make["locked.jpg"] = (lambda path: (path.write_bytes(b"x"), path.chmod(0)), "unreadable")
        make["locked folder"] = (lambda path: path.mkdir(mode=0), "unreadable")
    for name, (maker, kind) in make.items():
        try:
            maker(special / name)
        except OSError:
            continue
        yield f"special/{name}".encode(), kind


# ---- archives, to be named as inputs

TAR_ROWS = [  # of `hostile.tar`
    Case("first.jpg", GOOD),
    Case("../../up.jpg", GOOD),
    Case("/etc/passwd.jpg", GOOD),
    Case("two\nlines [red] :smile:.jpg", GOOD),
    Case("caf\udce9.jpg", GOOD),
    Case("nul\0ä.jpg", "unsupported"),
    Case("link.jpg", "unsupported"),
    Case("text.jpg", "not-a-picture"),
    Case("cut.jpg", "truncated"),
    Case("bomb.png", "too-large"),
    Case("first.jpg", GOOD),  # again
    Case("no ending", GOOD),
    Case("", "corrupt"),  # the archive itself
]
ZIP_ROWS = [
    Case("first.jpg", GOOD),
    Case("../up.jpg", GOOD),
    Case("damaged.jpg", "corrupt"),
    Case("encrypted.jpg", "unsupported"),
    Case("link.jpg", "unsupported"),
    Case("last.jpg", GOOD),
]


def hostile_tar(path: Path, jpeg: bytes) -> None:
    """Members with names and contents of every kind, links, a device, and a damaged end."""
    contents = {"text.jpg": b"cat\n", "cut.jpg": jpeg[:500], "bomb.png": png_header(60_000, 60_000)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for case in TAR_ROWS[:-1]:
            info = tarfile.TarInfo(case.name)
            if case.name == "link.jpg":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
                continue
            data = contents.get(case.name, jpeg)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("words.txt", tarfile.REGTYPE), ("tty", tarfile.CHRTYPE), ("link", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        end = archive.offset
    path.write_bytes(path.read_bytes()[:end] + b"\xff" * 1024)


def hostile_zip(path: Path, jpeg: bytes) -> None:
    """A member that climbs, a damaged one, an encrypted one, a link."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for case in ZIP_ROWS:
            info = zipfile.ZipInfo(case.name)
            info.create_system = 3
            info.external_attr = ((stat.S_IFLNK if case.name == "link.jpg" else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, b"/etc/passwd" if case.name == "link.jpg" else jpeg)
    data = bytearray(path.read_bytes())
    data[data.index(b"damaged.jpg") + 400] ^= 0xFF
    data[data.rindex(b"encrypted.jpg") - 38] |= 1  # the flags in the table at the end
    path.write_bytes(data)
