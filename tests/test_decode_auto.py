"""`--decode auto`: as near to `exact` as promised, with and without simplejpeg, torch, and a reason to shrink."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Run
from pictures_made import encoded, photo, profile
from PIL import Image
from test_pixels import ARITHMETIC, KINDS, NAMES, SHOWN, SPACES, name_of

from clipcli.images import fast
from clipcli.images.crops import crop_name
from clipcli.images.decode import decode
from clipcli.images.fast import fast_square
from clipcli.images.resample import _by_torch, by_numpy, resample
from clipcli.images.stream import Prepared, decoder, make_prepare
from clipcli.images.transform import Crop, transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Source
from clipcli.tasks.embed import EmbedOptions

Array = npt.NDArray[np.uint8]

LABELS = ("-L", "cat", "-L", "dog")
CROPS: tuple[Crop, ...] = ("center", "squash", "pad")


@pytest.fixture(params=["pillow", "simplejpeg"])
def with_(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """JPEGs decoded by this package."""
    if request.param == "pillow":
        monkeypatch.setattr(fast, "simplejpeg", lambda: None)
    else:
        pytest.importorskip("simplejpeg")
    return str(request.param)


@pytest.fixture
def shrinking(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Even small JPEGs count as large; the shapes that were decoded."""
    shapes: list[tuple[int, ...]] = []

    def watched(picture: Array, *rest: Any) -> Array:
        shapes.append(picture.shape)
        return resample(picture, *rest)

    monkeypatch.setattr(fast, "LARGE", 0)
    monkeypatch.setattr(fast, "resample", watched)
    return shapes


def exact(data: bytes, size: int, crop: Crop = "model", preprocess: Preprocess | None = None) -> Array | Failure:
    picture = decode("x", data)
    return picture if isinstance(picture, Failure) else transform(picture, preprocess or Preprocess(), size, crop=crop)


def check(data: bytes, size: int, crop: Crop = "model", most: int = 2, mean: float = 0.05, name: str = "x") -> None:
    """One picture both ways: the same failure, or pixels within these bounds."""
    ours = fast_square(name, data, Preprocess(), size, crop)
    picture = decode(name, data)
    if isinstance(picture, Failure):
        assert ours == picture
        return
    assert not isinstance(ours, Failure), ours
    assert ours.shape == (3, size, size) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    difference = np.abs(ours.astype(int) - transform(picture, Preprocess(), size, crop=crop))
    assert difference.max() <= most, (size, crop)
    assert difference.mean() <= mean, (size, crop)


def jpeg(width: int, height: int, orientation: int = 1, **options: Any) -> bytes:
    """A photograph, so to speak."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(photo(width, height), "JPEG", **{"quality": 90, "exif": tags, **options})


# ---- resizing

SIDES = [(500, 375), (375, 500), (33, 17), (7, 5), (1, 1), (1, 40), (40, 1), (224, 224), (1500, 3)]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), SIDES)
def test_numpy_resizes_as_torch_does_to_the_bit(width: int, height: int, kind: Any) -> None:
    dice = np.random.default_rng(0)
    noise = dice.integers(0, 256, (height, width, 3), np.uint8)
    for picture in (noise, noise // 128 * 255):
        for new in ((298, 224), (224, 298), (32, 33), (224, 1), (1, 7), (7, 7)):
            np.testing.assert_array_equal(by_numpy(picture, *new, kind), _by_torch(picture, *new, kind, None), str(new))
            if width >= 2 * new[0] and height >= 2 * new[1]:
                factors = ((new[0] + 1e-6) / (width - 0.25), (new[1] + 1e-6) / (height - 0.875))
                ours = by_numpy(picture, *new, kind, factors)
                np.testing.assert_array_equal(ours, _by_torch(picture, *new, kind, factors), f"{new} of a part")


def test_pillow_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(301, 200)
    for torch in (sys.modules.get("torch"), None):
        monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
        for new in ((64, 43), (301, 43), (64, 200), (500, 400), (301, 200)):
            expected = np.asarray(picture.resize(new, Image.Resampling.BICUBIC)).astype(int)
            difference = np.abs(resample(np.array(picture), *new, "bicubic") - expected)
            assert difference.max() <= 2 and difference.mean() < 0.01


def test_only_the_extent_is_resized() -> None:
    """A last column or row that is only partly meant counts so much."""
    picture = photo(200, 100)
    for extent in ((199.25, 100.0), (200.0, 99.25), (199.125, 99.5)):
        expected = np.asarray(picture.resize((40, 20), Image.Resampling.BICUBIC, box=(0, 0, *extent))).astype(int)
        assert np.abs(resample(np.array(picture), 40, 20, "bicubic", extent) - expected).max() <= 1
        assert np.abs(resample(np.array(picture), 40, 20, "bicubic", (200, 100)) - expected).max() > 1


# ---- every kind of picture


@pytest.mark.parametrize(("name", "data"), [kind[:2] for kind in KINDS], ids=NAMES)
def test_every_kind_is_what_it_is_exactly(name: str, data: bytes) -> None:
    for size in (8, 32):
        check(data, size, name=name_of(name))


def test_kinds_of_jpeg_are_left_alone_or_not(with_: str, shrinking: list[tuple[int, ...]]) -> None:
    """Those with a colour profile, of four inks, or huge, are decoded in full, as ever."""
    srgb = Image.open(io.BytesIO(jpeg(400, 300, progressive=True)))
    assert srgb.mode == "RGB"
    plain = {
        "baseline": jpeg(400, 300),
        "progressive": jpeg(400, 300, progressive=True),
        "grey": encoded(photo(400, 300).convert("L"), "JPEG"),
        "no subsampling": jpeg(400, 300, subsampling=0),
        "several": encoded(photo(400, 300), "MPO", save_all=True, append_images=[photo(400, 300, 1)]),
    }
    for name, data in plain.items():
        check(data, 32, most=8, mean=0.8)
        assert shrinking.pop() == (150, 200, 3), name
    *primaries, gamma = SPACES["Display P3 like"]
    odd = {
        "profile": jpeg(400, 300, icc_profile=profile(*primaries, gamma)),
        "inks": encoded(photo(400, 300).convert("CMYK"), "JPEG"),
    }
    for name, data in odd.items():
        check(data, 32)
        assert shrinking.pop() == (300, 400, 3), name
    check(ARITHMETIC, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(with_: str, orientation: int, shrinking: list[tuple[int, ...]]) -> None:
    for width, height in ((400, 300), (301, 403), (300, 37)):
        data = jpeg(width, height, orientation)
        for crop in CROPS:
            check(data, 32, crop, most=8, mean=0.8)
            upright = (width, height) if orientation < 5 else (height, width)
            shrink = 1 if orientation > 1 and width == 301 else 400 // shrinking[-1][1 - (orientation > 4)]
            expected = tuple(-(-side // shrink) for side in reversed(upright))
            assert width != 400 or shrinking[-1][:2] == expected
    fast.LARGE = 10**9  # what `shrinking` has patched
    check(jpeg(301, 203, orientation), 32)
    stored = np.asarray(Image.open(io.BytesIO(jpeg(301, 203, orientation))))
    square = fast_square("x", jpeg(301, 203, orientation), Preprocess(), 32, "squash")
    upright_picture = Image.fromarray(np.ascontiguousarray(SHOWN[orientation](stored)))
    expected_square = np.asarray(upright_picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(np.asarray(square, int) - expected_square).max() <= 2


ODD = [(1, 1), (2, 3), (9, 7), (17, 400), (400, 17), (1, 300), (2000, 3), (31, 31), (32, 32), (33, 65), (1021, 767)]


@pytest.mark.parametrize(("width", "height"), ODD)
def test_sizes(with_: str, width: int, height: int) -> None:
    files = [encoded(photo(width, height), form) for form in ("JPEG", "PNG")]
    for data in files:
        for crop in CROPS:
            check(data, 32, crop, mean=0.5)  # Pillow has begun to resize some heights first
            check(data, 33, crop, mean=0.5)


def test_other_filters_and_paddings(with_: str) -> None:
    data = jpeg(400, 300)
    for preprocess in (Preprocess(interpolation="bilinear"), Preprocess(resize_mode="longest")):
        for crop in ("model", "pad"):
            ours, expected = fast_square("x", data, preprocess, 48, crop), exact(data, 48, crop, preprocess)
            assert np.abs(np.asarray(ours, int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [(80_000, 2), (2, 80_000), (5, 5000)])
def test_ribbons_are_resized_as_ever(size: tuple[int, int]) -> None:
    for form in ("JPEG", "PNG") if max(size) < 65_000 else ("PNG",):
        data = encoded(Image.effect_noise(size, 50), form)
        for crop in CROPS:
            check(data, 224, crop, most=3, mean=0.5)
    ribbon = encoded(Image.effect_noise((80_000, 2), 50), "PNG")
    np.testing.assert_array_equal(fast_square("x", ribbon, Preprocess(), 224), exact(ribbon, 224))


def test_what_is_too_large_to_be_copied_is_resized_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(400, 300), "PNG")
    assert (np.asarray(fast_square("x", data, Preprocess(), 64)) != np.asarray(exact(data, 64))).any()
    monkeypatch.setattr(fast, "BIG", 8 * 400 * 300)
    np.testing.assert_array_equal(fast_square("x", data, Preprocess(), 64), exact(data, 64))


def test_memory_is_claimed_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def refuse(size: int) -> None:
        claimed.append(size)
        raise Refused

    claimed: list[int] = []
    monkeypatch.setattr(fast, "decode", lambda *rest: Failure("x", FailureKind.CORRUPT, "asked"))
    assert fast_square("x", jpeg(400, 300), Preprocess(), 32, take=refuse) == Failure("x", FailureKind.CORRUPT, "asked")
    assert claimed == [8 * 400 * 300]
    huge = bytearray(jpeg(400, 300))
    start = huge.index(b"\xff\xc0") + 5
    huge[start : start + 4] = b"\xff\x00\xff\x00"
    monkeypatch.undo()
    outcome = fast_square("x", bytes(huge), Preprocess(), 32)
    assert isinstance(outcome, Failure) and outcome == exact(bytes(huge), 32)
    assert outcome.kind == FailureKind.TOO_LARGE


# ---- shrinking


def test_twelve_megapixels_are_decoded_at_a_quarter(with_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[object] = []

    def watched(picture: Array, width: int, height: int, kind: Any, extent: Any) -> Array:
        shapes.append((picture.shape, (width, height), extent))
        return resample(picture, width, height, kind, extent)

    monkeypatch.setattr(fast, "resample", watched)
    large = photo(500, 375).resize((4000, 3000), Image.Resampling.BICUBIC)
    check(encoded(large, "JPEG"), 224, most=3, mean=0.3)
    check(encoded(large.crop((0, 0, 3999, 2997)), "JPEG"), 224, most=3, mean=0.3)
    check(encoded(large, "JPEG"), 224, "pad", most=3, mean=0.3)
    assert shapes == [
        ((750, 1000, 3), (298, 224), (1000, 750)),
        ((750, 1000, 3), (298, 224), (999.75, 749.25)),
        ((750, 1000, 3), (224, 168), (1000, 750)),
    ]
    check(encoded(large.resize((1280, 960)), "JPEG"), 224)  # too small for that
    assert shapes[-1] == ((960, 1280, 3), (298, 224), (1280, 960))
    check(encoded(large.resize((1200, 800)), "JPEG", exif=jpeg_turned()), 224)
    assert shapes[-1] == ((1200, 800, 3), (224, 336), (800, 1200))


def jpeg_turned() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


@pytest.mark.parametrize(
    ("upright", "mode", "size", "whole", "shrink"),
    [
        ((4000, 3000), "shortest", 224, False, 4),
        ((4000, 3000), "shortest", 256, False, 4),
        ((4032, 3024), "shortest", 336, False, 2),
        ((4000, 3000), "shortest", 64, False, 8),
        ((4000, 3000), "squash", 224, False, 4),
        ((4000, 3000), "longest", 224, False, 4),
        ((8000, 560), "shortest", 224, False, 1),  # the short side counts
        ((8000, 560), "squash", 224, False, 1),
        ((8000, 560), "longest", 224, False, 8),
        ((4001, 3001), "shortest", 224, False, 4),
        ((4001, 3001), "shortest", 224, True, 1),
        ((4002, 3002), "shortest", 224, True, 2),
        ((1000, 999), "shortest", 64, False, 1),  # it isn't large
        ((1001, 1000), "shortest", 64, False, 4),
    ],
)
def test_how_far_a_jpeg_shrinks(upright: tuple[int, int], mode: str, size: int, whole: bool, shrink: int) -> None:
    assert fast._shrink(upright, mode, size, whole=whole) == shrink


# ---- damage


def damaged() -> Iterator[bytes]:
    dice = random.Random(0)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 4}):
        whole = jpeg(160, 120, **options)
        for _ in range(30):
            yield whole[: dice.randrange(2, len(whole))]
        for _ in range(60):
            bent = bytearray(whole)
            near = dice.choice((200, 700, len(bent)))
            for _ in range(dice.choice((1, 3, 12))):
                bent[dice.randrange(2, near)] = dice.choice((0, 255, dice.randrange(256)))
            yield bytes(bent)
        yield whole + b"more"
        yield whole[:-2]
        yield b"\xff\xd8" + whole


def test_damage_is_told_as_ever(with_: str) -> None:
    kinds = []
    for number, data in enumerate(damaged()):
        made = exact(data, 32)
        ours = fast_square("x", data, Preprocess(), 32)
        if isinstance(made, Failure):
            kinds.append(made.kind)
            assert ours == made, number
        else:
            assert np.abs(np.asarray(ours, int) - made).max() <= 2, number
    assert {FailureKind.TRUNCATED, FailureKind.CORRUPT} <= {*kinds} and len(kinds) < number


def test_damage_is_told_where_it_would_shrink(with_: str, shrinking: list[tuple[int, ...]]) -> None:
    for number, data in enumerate(damaged()):
        made, ours = exact(data, 16), fast_square("x", data, Preprocess(), 16)
        assert ours == made if isinstance(made, Failure) else not isinstance(ours, Failure), number
    assert (60, 80, 3) in shrinking


# ---- real photographs


def test_real_photographs(with_: str, pictures: Path) -> None:
    seen = 0
    with tarfile.open(pictures / "imagenet-fullsize-20.tar") as archive:
        for member in archive:
            if not member.name.endswith((".txt", ".cls")):
                file = archive.extractfile(member)
                assert file
                check(file.read(), 224, mean=0.01)
                seen += 1
    assert seen == 20


# ---- without torch, without the extra


def test_without_torch_the_pixels_are_the_same_and_it_is_not_imported(tmp_path: Path) -> None:
    import torch

    assert torch
    (tmp_path / "a.jpg").write_bytes(jpeg(401, 300))
    program = """
        import sys
        from clipcli.images.stream import make_prepare
        from clipcli.model.config import Preprocess
        from clipcli.records import Source
        made = make_prepare(Preprocess(), 48, decode="auto")(Source(sys.argv[1]))
        assert "torch" not in sys.modules
        sys.stdout.buffer.write(made.square.tobytes())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.jpg")]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    here = make_prepare(Preprocess(), 48, decode="auto")(Source(str(tmp_path / "a.jpg")))
    assert isinstance(here, Prepared) and here.square is not None
    assert out == here.square.tobytes()


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    fast.simplejpeg.cache_clear()
    assert fast.simplejpeg() is None
    check(jpeg(400, 300), 64)
    fast.simplejpeg.cache_clear()


# ---- which of the two, and where it is kept


def test_exact_is_what_it_was() -> None:
    png, data = encoded(photo(301, 200), "PNG"), jpeg(301, 200, 6)
    for file in (png, data):
        for plain in (make_prepare(Preprocess(), 64), make_prepare(Preprocess(), 64, decode="exact")):
            made = plain(Source("x", file))
            assert isinstance(made, Prepared)
            np.testing.assert_array_equal(made.square, exact(file, 64))
        stored = decode("x", file, "reference")
        assert isinstance(stored, Image.Image)
        reference = make_prepare(Preprocess(), 64, "reference", decode="auto")(Source("x", file))
        assert isinstance(reference, Prepared)
        np.testing.assert_array_equal(reference.square, transform(stored, Preprocess(), 64, pixels="reference"))
        quick = make_prepare(Preprocess(), 64, decode="auto")(Source("x", file))
        assert isinstance(quick, Prepared)
        np.testing.assert_array_equal(quick.square, fast_square("x", file, Preprocess(), 64))


def test_the_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = f"pillow {version('pillow')}"
    assert decoder("auto", "exact") == decoder("reference", "auto") == EmbedOptions(decode="exact").decoder == plain
    monkeypatch.setattr("PIL.__version__", "1")
    monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(__version__="2"))
    assert decoder("auto", "auto") == EmbedOptions().decoder == "pillow 1, simplejpeg 2, fast 1"
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # not installed
    assert EmbedOptions().decoder == "pillow 1, fast 1"


def test_verbose_says_it(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    for command in (("classify", *LABELS), ("embed", "-o", tmp_path / "a.npz", "--force")):
        for options in ((), ("--decode", "exact"), ("--pixels", "reference")):
            told = cli(*command, photos / "rocket.jpg", "-m", model, "-v", *options).err
            assert f"decoder: pillow {version('pillow')}" in told
            assert ("fast 1" in told) == (not options)


def test_embeddings_say_how_they_were_made(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    quick, plain = tmp_path / "quick.npz", tmp_path / "plain.npz"
    for file, options in ((quick, ()), (plain, ("--decode", "exact"))):
        assert cli("embed", photos / "rocket.jpg", "-m", model, "-o", file, *options).code == 0
        with np.load(file) as arrays:
            made = json.loads(arrays["clipcli"].tobytes())
        assert made["decode"] == ("exact" if options else "auto")
        assert made["decoder"] == decoder("auto", made["decode"])
    classify = ("classify", *LABELS, "-m", model, "-v")
    assert "--decode auto, torch-fp32" in cli(*classify, quick).err
    for taken in ((quick,), (plain,), (quick, plain), (plain, photos / "rocket.jpg"), (plain, "--decode", "exact")):
        assert cli(*classify, *taken).code == 0
    for refused in ((quick, "--decode", "exact"), (quick, photos / "rocket.jpg", "--decode", "exact")):
        done = cli(*classify, *refused)
        assert done.code == 2 and "quick.npz: its pictures were prepared with --decode auto, not exact" in done.err


def test_the_crop_that_is_saved_is_what_the_model_saw(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    picture = photos / "rocket.jpg"
    assert cli("classify", picture, *LABELS, "-m", model, "--save-crop", tmp_path / "seen").code == 0
    saved = np.asarray(Image.open(tmp_path / "seen" / crop_name(str(picture)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(saved, fast_square("x", picture.read_bytes(), Preprocess(), 32))
