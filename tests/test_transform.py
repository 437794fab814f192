"""Resize, crop, RGB: bit for bit what the original does, and the other ways to make a square."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures_made import encoded, photo, quadrants
from PIL import Image

from clipcli.images.decode import open_picture
from clipcli.images.transform import Crop, normalise, transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, Source

SQUASH = Preprocess(resize_mode="squash")
LONGEST = Preprocess(resize_mode="longest")


def opened(path: Path) -> Image.Image:
    picture = open_picture(Source(str(path)), "reference")
    assert not isinstance(picture, Failure), picture
    return picture


def golden(reference: Path) -> list[tuple[dict[str, Any], Path]]:
    skimage = pytest.importorskip("skimage")
    wheel = Path(skimage.__file__).parents[1]
    described = json.loads((reference / "preprocess" / "pictures.json").read_text())["pictures"]
    return [
        (entry, (wheel if entry["file"].startswith("skimage/") else reference) / entry["file"]) for entry in described
    ]


def test_every_golden_picture_is_equal_bit_for_bit(reference: Path) -> None:
    compared = 0
    with (
        np.load(reference / "preprocess" / "crop224.npz") as crops,
        np.load(reference / "preprocess" / "squash224.npz") as squashes,
    ):
        for entry, path in golden(reference):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
            picture = opened(path)
            assert (picture.mode, list(picture.size)) == (entry["mode"], entry["size"])
            cropped = transform(picture, Preprocess(), 224, pixels="reference")
            squashed = transform(picture, SQUASH, 224, pixels="reference")
            expected = crops[entry["key"]].transpose(2, 0, 1)
            np.testing.assert_array_equal(cropped, expected, entry["key"])
            if not entry.get("squash_same_as_crop"):
                expected = squashes[entry["key"]].transpose(2, 0, 1)
            np.testing.assert_array_equal(squashed, expected, entry["key"])
            compared += 1
    assert compared == 28


def test_the_picture_that_the_original_code_prepared(reference: Path) -> None:
    picture = opened(reference / "openai" / "franz-kafka.jpg")
    pixels = transform(picture, Preprocess(), 224, pixels="reference")
    expected = np.load(reference / "openai" / "expected_preprocessed_image.npy")
    ours = normalise(pixels[None], Preprocess())
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


def test_auto_and_reference_agree_on_a_plain_photograph(reference: Path) -> None:
    compared = []
    for entry, path in golden(reference):
        original = opened(path)
        if entry["mode"] != "RGB" or original.getexif() or "icc_profile" in original.info:
            continue
        picture = open_picture(Source(str(path)))
        assert not isinstance(picture, Failure)
        expected = transform(original, Preprocess(), 64, pixels="reference")
        np.testing.assert_array_equal(transform(picture, Preprocess(), 64), expected, entry["key"])
        compared.append(entry["key"])
    assert {"coffee", "panorama_1000x37", "exact_224x224"} <= set(compared)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["model", "center", "squash", "pad"]))
@settings(max_examples=60, deadline=None)
def test_any_size_becomes_a_square(width: int, height: int, crop: Crop) -> None:
    for preprocess in (Preprocess(), SQUASH, LONGEST):
        pixels = transform(Image.new("RGB", (width, height), (9, 8, 7)), preprocess, 32, crop=crop)
        assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 32, 32), np.uint8, True)
        assert pixels[:, 15, 15].tolist() == [9, 8, 7]


def test_nothing_is_resampled_at_the_right_size() -> None:
    picture = photo(48, 48)
    for preprocess in (Preprocess(), SQUASH, LONGEST):
        np.testing.assert_array_equal(transform(picture, preprocess, 48), np.asarray(picture).transpose(2, 0, 1))


def test_crop_says_what_becomes_of_the_long_side() -> None:
    picture = quadrants(64, 16)  # four times as wide as high
    centre = transform(picture, SQUASH, 16, crop="center")
    np.testing.assert_array_equal(centre, np.asarray(picture)[:, 24:40].transpose(2, 0, 1))
    np.testing.assert_array_equal(transform(picture, Preprocess(), 16), centre)
    squashed = transform(picture, Preprocess(), 16, crop="squash")
    np.testing.assert_array_equal(squashed, transform(picture, SQUASH, 16))
    assert squashed[:, 2, 2].tolist() == [255, 0, 0]
    assert squashed[:, 13, 13].tolist() == [255, 255, 0]


def test_padding_is_the_mean_colour_unless_the_model_pads_itself() -> None:
    picture = quadrants(64, 16)
    padded = transform(picture, Preprocess(), 64, crop="pad")
    np.testing.assert_array_equal(padded[:, 24:40], np.asarray(picture).transpose(2, 0, 1))
    assert padded[:, 0, 0].tolist() == padded[:, 63, 63].tolist() == [123, 117, 104]
    assert np.abs(normalise(padded[None], Preprocess())[0, :, :24]).max() < 0.01, "next to nothing, for the model"
    for pixels in (transform(picture, LONGEST, 64), transform(picture, LONGEST, 64, crop="pad")):
        assert pixels[:, 0, 0].tolist() == [0, 0, 0]
        np.testing.assert_array_equal(pixels[:, 24:40], padded[:, 24:40])
    tall = transform(picture.rotate(90, expand=True), Preprocess(), 63, pixels="reference", crop="pad")
    assert tall[:, 30, :23].max() == 0
    assert tall[:, 30, 24:39].max(axis=0).min() > 0, "16 of 64 become 16 of 63, one more on the right"


def test_a_mean_beyond_all_colours_pads_with_the_nearest() -> None:
    padded = transform(quadrants(64, 16), Preprocess(mean=(1e308, -3.0, 0.5)), 64, crop="pad")
    assert padded[:, 0, 0].tolist() == [255, 0, 128]


def test_bilinear_is_another_filter() -> None:
    picture = photo(90, 60)
    resized = picture.resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    bilinear = transform(picture, Preprocess(interpolation="bilinear"), 32)
    np.testing.assert_array_equal(bilinear, np.asarray(resized).transpose(2, 0, 1))
    assert (bilinear != transform(picture, Preprocess(), 32)).any()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_very_long_picture_needs_no_giant_between(mode: str, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(400, 3).convert(mode)
    if turned:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    whole = transform(picture, Preprocess(), 32, pixels="reference").astype(int)
    monkeypatch.setattr("clipcli.images.transform.MAX_RESIZED", 1000)
    middle = transform(picture, Preprocess(), 32, pixels="reference").astype(int)
    # Nearest neighbour (palette, bilevel) may choose the other of two columns where their border lies.
    assert np.abs(middle - whole).max() <= 1 or (mode in "P1" and (middle != whole).mean() < 0.05)


@pytest.mark.parametrize("mode", ["RGB", "LA", "F"])
def test_squashing_a_very_high_picture_needs_no_giant_between(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(400, 3).transpose(Image.Transpose.TRANSPOSE).convert(mode)
    whole = transform(picture, SQUASH, 32, pixels="reference").astype(int)
    monkeypatch.setattr("clipcli.images.transform.MAX_RESIZED", 1000)
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    shrunk = transform(picture, SQUASH, 32, pixels="reference").astype(int)
    assert set(sizes) == {(3, 32), (32, 32)}, "never 32 wide and 400 high"
    assert np.abs(shrunk - whole).max() <= 1


def test_one_pixel_wide_and_20000_high() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    column = Image.fromarray(np.repeat(np.arange(20000) // 79, 3).astype(np.uint8).reshape(20000, 1, 3))
    pixels = transform(column, Preprocess(), 224)
    assert np.unique(pixels).tolist() == [126], "the middle of the column, which is one flat step"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_normalise_is_the_written_definition() -> None:
    preprocess = Preprocess(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    pixels = np.zeros((2, 3, 1, 2), np.uint8)
    pixels[1] = 255
    expected = np.array([[-1.0, -0.5, 0.0], [1.0, 1.5, 0.5]], np.float32)
    np.testing.assert_array_equal(normalise(pixels, preprocess), expected[:, :, None, None].repeat(2, axis=3))


def test_a_palette_is_resized_by_nearest_neighbour_under_reference_only(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(encoded(quadrants().convert("P"), "PNG"))
    reference = transform(opened(path), SQUASH, 11, pixels="reference")
    assert set(np.unique(reference)) == {0, 255}
    picture = open_picture(Source(str(path)))
    assert not isinstance(picture, Failure)
    assert len(np.unique(transform(picture, SQUASH, 11))) > 2
