"""`--save-crop`: what the model saw, under names that stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from clipcli.errors import OutputError, UsageError
from clipcli.images.crops import check_folder, crop_name, save_crop
from clipcli.images.decode import open_picture
from clipcli.images.transform import transform
from clipcli.model.config import Preprocess
from clipcli.records import Source

SQUARE = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
HOSTILE = [
    "../../up.jpg",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b/c.jpg",
    "a_b_c.jpg",
    "a.tar::../../b.jpg",
    "nul\0.jpg",
    "two\nlines.jpg",
    "caf\udce9.jpg",
    "-rf",
    ".hidden",
    "CON",
    "con",
    "x" * 5000 + ".jpg",
    "𠮷" * 300,
    "a" * 300 + "b.jpg",
    "c" * 300 + "b.jpg",
]


def test_names_are_labels(tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    for name in HOSTILE:
        save_crop(folder, name, SQUARE)
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == len(HOSTILE) == len({name.casefold() for name in files})
    assert all(name.endswith(".png") and name[0].isalnum() and name.isprintable() for name in files)
    assert max(len(os.fsencode(name)) for name in files) <= 255
    for name in HOSTILE:
        np.testing.assert_array_equal(np.asarray(Image.open(folder / crop_name(name))), SQUARE.transpose(1, 2, 0))


def test_a_name_can_be_read() -> None:
    assert crop_name("photos/cat 1.jpg").startswith("photos_cat_1.jpg-")
    assert crop_name("photos/猫.jpg").startswith("photos_猫.jpg-")
    assert crop_name("a") == crop_name("a") != crop_name("b")


def test_which_folder_may_be_written(tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    for folder in (full, tmp_path / "empty"):
        folder.mkdir()
    for path in (full / "x", file):
        path.touch()
    for good in (tmp_path / "new", tmp_path / "empty"):
        check_folder(good, force=False, walked=[str(full), str(file), "gone"])
    check_folder(full, force=True)
    check_folder(tmp_path / ".hidden", force=False, walked=[str(tmp_path)])
    for bad, message in [
        (full, "is not empty"),
        (file, "is no folder"),
        (tmp_path / "no" / "new", "does not exist"),
    ]:
        with pytest.raises(UsageError, match=message) as raised:
            check_folder(bad, force=False)
        assert raised.value.hint
    (tmp_path / "link").symlink_to(full)
    for walked in (tmp_path, full, tmp_path / "link"):
        with pytest.raises(UsageError, match="which this run walks"):
            check_folder(full / "seen", force=True, walked=[str(walked)])


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / crop_name("a")).mkdir()
    with pytest.raises(OutputError, match="can't be written"):
        save_crop(tmp_path, "a", SQUARE)


def test_the_crops_are_what_the_model_saw(
    cli: Run, photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    seen = tmp_path / "seen"
    command = ("classify", ".", "-L", "cat", "-L", "dog", "-m", model, "-f", "jsonl", "--decode", "exact")
    plain = cli(*command)
    for options in ((), ("--crop", "squash"), ("--crop", "pad"), ("--pixels", "reference")):
        result = cli(*command, *options, "--save-crop", seen, "--force")  # also where embeddings are known
        if not options:
            assert result.out == plain.out
        good = [row["path"] for row in result.rows if not row["error"]]
        assert sorted(path.name for path in seen.iterdir()) == sorted(map(crop_name, good)) and len(good) == 5
        pixels = "reference" if "reference" in options else "auto"
        crop = options[1] if "--crop" in options else "model"
        for path in good:
            picture = open_picture(Source(path), pixels)  # type: ignore[arg-type]
            expected = transform(picture, Preprocess(), 32, pixels=pixels, crop=crop)  # type: ignore[arg-type]
            np.testing.assert_array_equal(np.asarray(Image.open(seen / crop_name(path))).transpose(2, 0, 1), expected)


def test_a_folder_that_holds_something_is_refused(cli: Run, photos: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    for folder, says in ((tmp_path, "is not empty"), (photos / "seen", "which this run walks")):
        result = cli("classify", photos, "-L", "cat", "-L", "dog", "-m", model, "--save-crop", folder)
        assert result.code == 2 and says in result.err and result.out == b""
    assert not (photos / "seen").exists()
