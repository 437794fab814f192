"""Thousands of damaged pictures of every format: one outcome each, in order, and no good picture beside them changes.

Seeded, so that a failure comes back. A long run: `CLIPCLI_FUZZ=100000 pytest tests/test_fuzz_pictures.py --timeout 0`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from pictures_made import encoded, oriented, photo
from PIL import Image, features

from clipcli.images.stream import Batch, Prepared, batches, make_prepare
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Source

COUNT = int(os.environ.get("CLIPCLI_FUZZ", "4000"))
SIZE = 16
EVERY = 4  # one picture in four is whole
SLOWEST = 60.0  # seconds for one picture, on a machine that has much else to do


def originals() -> dict[str, bytes]:
    """A small picture of every format that Pillow writes, and of the modes that take other ways."""
    picture = photo(24, 16)
    alpha = Image.merge("RGBA", (*picture.split(), picture.getchannel("G")))
    frames = {"save_all": True, "append_images": [picture.rotate(90)]}
    made = {form: encoded(picture, form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")}
    made |= {form: encoded(picture, form) for form in ("ICO", "ICNS", "QOI", "DDS", "PCX", "SGI", "TGA")}
    if features.check("avif"):
        made["AVIF"] = encoded(picture, "AVIF")
    made |= {
        "XBM": encoded(picture.convert("1"), "XBM"),
        "progressive JPEG": encoded(picture, "JPEG", progressive=True),
        "CMYK JPEG": encoded(picture.convert("CMYK"), "JPEG"),
        "palette PNG": encoded(picture.convert("P"), "PNG", transparency=3),
        "16-bit PNG": encoded(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"),
        "alpha PNG": encoded(alpha, "PNG"),
        "alpha WebP": encoded(alpha, "WEBP", lossless=True),
        "animated GIF": encoded(picture, "GIF", **frames),
        "animated PNG": encoded(picture, "PNG", **frames),
        "animated WebP": encoded(picture, "WEBP", **frames),
        "float TIFF": encoded(picture.convert("F"), "TIFF"),
        "packed TIFF": encoded(picture, "TIFF", compression="tiff_lzw"),
        "JPEG in TIFF": encoded(picture, "TIFF", compression="jpeg"),
        "turned JPEG": oriented(6),
        "turned TIFF": oriented(8, "TIFF"),
        "PNG with profile": encoded(picture, "PNG", icc_profile=bytes(range(256)) * 2),
    }
    return made


def damaged(dice: random.Random, files: list[bytes]) -> bytes:
    """One of the files, bent in one of the ways in which files are bent."""
    data = bytearray(dice.choice(files))
    near = min(len(data), dice.choice((32, 200, len(data))))  # headers are where it hurts
    match dice.randrange(8):
        case 0:
            del data[dice.randrange(len(data)) :]
        case 1:
            place = dice.randrange(near)
            del data[place : place + dice.choice((1, 2, 7, 100))]
        case 2:
            place = dice.randrange(near)
            data[place:place] = dice.randbytes(dice.choice((1, 2, 7, 100)))
        case 3:
            other = dice.choice(files)
            place = dice.randrange(near)
            data[place:] = other[dice.randrange(len(other)) :]
        case 4:
            place = dice.randrange(near)
            data[place : place + 4] = dice.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff")
            )
        case 5:
            data[dice.randrange(near)] ^= 1 << dice.randrange(8)
        case _:
            for _ in range(dice.choice((1, 3, 12))):
                data[dice.randrange(near)] = dice.choice((0, 255, dice.randrange(256)))
    return bytes(data)


@pytest.mark.parametrize("policy", ["auto", "reference"])
def test_damage_is_contained(policy: str) -> None:
    whole = originals()
    prepare = make_prepare(Preprocess(), SIZE, policy)  # type: ignore[arg-type]
    names = [name for name in whole if name != "TGA"]  # whose name says what it is
    expected = {name: prepare(Source(name, whole[name])) for name in names}
    assert all(isinstance(made, Prepared) for made in expected.values())
    dice = random.Random(f"pictures {policy}")
    files = list(whole.values())
    slowest = 0.0

    def sources() -> Iterator[Source]:
        for number in range(COUNT // 2):
            if number % EVERY == 0:
                name = names[number // EVERY % len(names)]
                yield Source(f"{number}:{name}", whole[name])
            else:
                yield Source(f"{number}:{dice.choice(('.tga', '.jpg'))}", damaged(dice, files))

    def timed(source: Source) -> Prepared | Failure:
        nonlocal slowest
        began = time.monotonic()
        outcome = prepare(source)
        slowest = max(slowest, time.monotonic() - began)
        return outcome

    kinds: Counter[str] = Counter()
    count = 0
    for batch in batches(sources(), timed, batch_size=32, workers=2):
        for number, square in _outcomes(batch):
            assert int(number.partition(":")[0]) == count, "each once, in order"
            count += 1
            known = expected.get(number.partition(":")[2])
            if isinstance(square, Failure):
                assert known is None, "a whole picture fails beside a damaged one"
                assert square.message and square.message.isprintable() and len(square.message) < 200
                kinds[square.kind] += 1
            else:
                assert square.shape == (3, SIZE, SIZE)
                kinds["picture"] += 1
                if isinstance(known, Prepared):
                    np.testing.assert_array_equal(square, known.square, number)
    assert count == COUNT // 2
    assert slowest < SLOWEST
    assert {"picture", FailureKind.CORRUPT, FailureKind.TRUNCATED, FailureKind.NOT_A_PICTURE} <= set(kinds), kinds
    assert kinds["picture"] > COUNT // 2 // EVERY, "some damage does no harm"


def _outcomes(batch: Batch) -> Iterator[tuple[str, np.ndarray | Failure]]:
    rows = iter(batch.pixels)
    for item in batch.items:
        yield item.path, (item if isinstance(item, Failure) else next(rows))
    assert next(rows, None) is None
