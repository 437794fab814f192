"""`clipcli demo`: what it puts where, what it leaves alone, the command that it runs, and its picture in the README."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage
from conftest import Run
from rich.console import Console

from clipcli.cli import demo, main
from clipcli.images.thumbnail import thumbnail
from clipcli.output.preview import HEIGHT, WIDTH, can_draw, sheet
from clipcli.records import Source
from clipcli.tasks import samples
from clipcli.zeroshot.lint import Lint
from clipcli.zeroshot.templates import read as read_templates

ROOT = Path(__file__).resolve().parents[1]
SVG = ROOT / "docs" / "demo.svg"
COMMAND = "$ clipcli classify clipcli-demo --labels clipcli-demo/labels.txt -m tiny"
NUMBER = re.compile(r"\d\.\d{4}|[█▏▎▍▌▋▊▉]+|[\xa0 ]+")


@pytest.fixture(autouse=True)
def here(cut_off: Path) -> Path:
    """No network, in a folder of our own."""
    return cut_off


@pytest.fixture(scope="session")
def drawing() -> ModuleType:
    """The script that makes the README's picture; it has a stream that says it is a terminal."""
    spec = importlib.util.spec_from_file_location("readme_svg", ROOT / "benchmarks" / "readme_svg.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- the run


def test_it_runs_what_it_prints(cli: Run) -> None:
    shown = cli("demo")
    assert shown.code == 0 and [line.split("\t")[0] for line in shown.lines] == [
        f"clipcli-demo/{name}" for name in sorted(samples.PHOTOS)
    ]
    lines = shown.err.splitlines()
    assert lines[:2] == ["clipcli: 9 photos and labels.txt are in clipcli-demo", COMMAND]
    assert lines[2].startswith("clipcli: tiny is a small model for trying out")
    assert shown.err.count("trying out") == 1 and "\x1b" not in shown.err + shown.out.decode()
    typed = cli(*shlex.split(COMMAND)[2:])
    assert typed.out == shown.out and typed.code == 0


def test_it_ends_with_commands_that_exist(cli: Run) -> None:
    talk = cli("demo").err.partition("\nnext:\n")[2]
    assert "605 MB" in talk and "-m tiny" in talk
    commands = [line.split() for line in talk.splitlines() if not line.strip().startswith("#")]
    assert [command[1] for command in commands] == ["classify", "classify", "build-classifier", "--help"]
    build = next(command for command in commands if command[1] == "build-classifier")
    assert cli(*build[1:]).code == 0 and Path("my.safetensors").is_file()


def test_quietly(cli: Run) -> None:
    result = cli("demo", "-q")
    assert (result.code, result.err) == (0, "") and len(result.lines) == 9


def test_again_with_the_user_s_changes(cli: Run) -> None:
    first = cli("demo")
    folder = Path("clipcli-demo")
    before = held(folder)
    again = cli("demo")
    assert again.out == first.out and held(folder) == before
    (folder / "labels.txt").write_text("apple\npear\n")
    (folder / "zebra.png").write_bytes(before["cat.png"])
    changed = cli("demo")
    assert changed.code == 0 and len(changed.lines) == 10
    assert {line.split("\t")[1] for line in changed.lines} <= {"apple", "pear"}
    (folder / "zebra.png").write_bytes(b"no picture")
    assert cli("demo").code == 3


@pytest.mark.parametrize("name", ["my demo", "it's", "-x", "a/b/c"])
def test_the_printed_command_is_quoted(cli: Run, name: str) -> None:
    result = cli("demo", "--", name)
    assert result.code == 0 and len(result.lines) == 9
    command = next(line for line in result.err.splitlines() if line.startswith("$ "))
    assert cli(*shlex.split(command)[2:]).out == result.out


def test_a_folder_named_tiny_is_in_nobody_s_way(cli: Run) -> None:
    Path("tiny").mkdir()
    result = cli("demo")
    assert result.code == 0 and f"{COMMAND.removesuffix('tiny')}clipcli/tiny\n" in result.err


def test_what_the_user_s_settings_say_holds_here_too(cli: Run) -> None:
    Path("clipcli.toml").write_text('[classify]\nformat = "paths"\nlabels = "gone.txt"\n')
    assert cli("demo").lines == [f"clipcli-demo/{name}" for name in sorted(samples.PHOTOS)]


# ---- what it puts there


def test_the_samples(here: Path) -> None:
    photos = samples.lay_out(here / "demo")
    data = Path(skimage.__file__).parent / "data"
    assert {photo.name: photo.read_bytes() for photo in photos} == {
        name: (data / theirs).read_bytes() for name, theirs in samples.PHOTOS.items()
    }
    assert sorted(os.listdir(here / "demo")) == sorted([*samples.PHOTOS, "labels.txt"])
    lint = Lint(str(here / "demo" / "labels.txt"), read_templates(["imagenet7"]))
    names = {label.name for label in lint.labels}
    assert lint.found == [] and 15 <= len(names) <= 20 and any(len(label.aliases) > 1 for label in lint.labels)
    answers = {photo.stem for photo in photos} - {"astronaut", "photographer"} | {"person"}
    assert answers <= names


def test_what_was_cut_short_is_completed(here: Path) -> None:
    samples.lay_out(here / "demo")
    whole = held(here / "demo")
    for name in ("labels.txt", "moon.png", "stars.jpg"):
        (here / "demo" / name).unlink()
    (here / "demo" / ".moon.png.part").write_bytes(b"half")
    samples.lay_out(here / "demo")
    assert held(here / "demo") == whole


def test_a_version_of_scikit_image_with_fewer_photos(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PHOTOS", {"cat.png": "chelsea.png", "gone.png": "gone.png"})
    assert samples.lay_out(here / "demo") == [here / "demo" / "cat.png"]


def test_without_scikit_image(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    result = cli("demo")
    assert (result.code, result.out) == (2, b"") and not Path("clipcli-demo").exists()
    assert result.err == (
        "clipcli: the sample photos are scikit-image's, which is not installed\n"
        'hint: pip install "clipcli[demo]"\n'
    )  # fmt: skip


# ---- what it leaves alone


def test_a_folder_that_holds_other_things(cli: Run) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    refused = cli("demo", "mine")
    assert refused.code == 2 and refused.err.startswith(
        "clipcli: mine: holds other things\nhint: choose another folder"
    )
    assert held(Path("mine")) == {"notes.txt": b"mine"}
    assert cli("demo", "mine", "--force").code == 0 and Path("mine/notes.txt").read_text() == "mine"
    assert cli("demo", "mine").code == 0


@pytest.mark.parametrize("name", ["cat.png", "labels.txt"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_no_file_is_overwritten(cli: Run, name: str, force: list[str]) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_bytes(b"mine")
    result = cli("demo", "mine", *force)
    assert result.code == 2 and result.err.startswith(f"clipcli: mine/{name}: another file of this name is there\n")
    assert held(Path("mine")) == {name: b"mine"}


def test_a_link_to_nothing_is_not_replaced(cli: Run) -> None:
    Path("mine").mkdir()
    Path("mine/cat.png").symlink_to("gone")
    assert cli("demo", "mine", "--force").code == 2 and os.readlink("mine/cat.png") == "gone"


def test_an_empty_folder_is_fine(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    result = cli("demo", ".")
    assert result.code == 0 and "$ clipcli classify . --labels ./labels.txt -m tiny\n" in result.err


def test_places_that_are_no_folders(cli: Run) -> None:
    Path("file").touch()
    assert cli("demo", "file").err.startswith("clipcli: file: is not a folder\n")
    beneath = cli("demo", "file/demo")
    assert beneath.code == 1
    assert beneath.err.startswith("clipcli: file/demo: the samples can't be put there: not a directory\nhint: ")


def test_a_full_disk(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = cli("demo")
    assert result.code == 1 and "no space left on device" in result.err and "Traceback" not in result.err


# ---- previews


def test_a_thumbnail_keeps_proportions_and_colours(photos: Path, tmp_path: Path) -> None:
    rocket = thumbnail(Source(str(photos / "rocket.jpg")), 14, 12)
    assert rocket is not None and rocket.shape == (9, 14, 3) and rocket.dtype == np.uint8
    assert rocket[0, :, 2].mean() > 1.5 * rocket[0, :, 0].mean()  # a blue sky
    camera = thumbnail(Source(str(photos / "sub" / "camera.png")), 14, 12)
    assert camera is not None and camera.shape == (12, 12, 3)
    assert thumbnail(Source(str(photos / "broken.jpg")), 14, 12) is None


def test_a_cell_is_two_pixels() -> None:
    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]], [[1, 2, 3], [4, 5, 6]]], np.uint8)
    text = sheet([("odd\x1b", pixels)], 80)
    console = Console(force_terminal=True, color_system="truecolor", legacy_windows=False, width=80)
    with console.capture() as capture:
        console.print(text)
    first, second, name = capture.get().splitlines()
    assert first.startswith("\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\x1b[38;2;0;255;0;48;2;9;9;9m▀\x1b[0m")
    assert second.startswith("\x1b[38;2;1;2;3m▀\x1b[0m\x1b[38;2;4;5;6m▀\x1b[0m") and "odd\\x1b" in name


@pytest.mark.parametrize(("width", "rows"), [(48, 3), (80, 2), (90, 2), (143, 1), (10, 9)])
def test_as_few_rows_as_fit(width: int, rows: int) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    lines = sheet([(str(number), pixels) for number in range(9)], width).plain.splitlines()
    assert len(lines) == rows * (HEIGHT // 2 + 1)
    assert max(map(len, lines)) <= max(width, WIDTH)


def test_different_heights_stand_on_one_line() -> None:
    flat, high = np.zeros((3, 14, 3), np.uint8), np.zeros((12, 6, 3), np.uint8)
    lines = sheet([("flat", flat), ("high", high)], 80).plain.splitlines()
    assert [line.count("▀") for line in lines] == [6, 6, 6, 6, 20, 20, 0]
    assert lines[-1] == f"{'flat':<{WIDTH}}  high"
    assert sheet([], 80).plain == ""


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, True),
        ({"color_system": "256"}, True),
        ({"color_system": "standard"}, False),
        ({"color_system": None}, False),
        ({"force_terminal": False}, False),
        ({"width": 40}, False),
    ],
)
def test_which_terminals_can(settings: dict[str, object], drawn: bool) -> None:
    usual: dict[str, object] = {"force_terminal": True, "color_system": "truecolor", "width": 80}
    assert can_draw(Console(legacy_windows=False, **{**usual, **settings})) is drawn  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ({"COLORTERM": "truecolor"}, True),
        ({}, True),
        ({"TERM": "xterm"}, False),
        ({"TERM": "dumb"}, False),
        ({"NO_COLOR": "1"}, False),
        ({"COLUMNS": "40"}, False),
    ],
    ids=str,
)
def test_previews_on_a_terminal(
    drawing: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], drawn: bool
) -> None:
    monkeypatch.delenv("COLORTERM", raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80"} | environment).items():
        monkeypatch.setenv(name, value)
    out, err = drawing.Terminal(), drawing.Terminal()
    monkeypatch.setattr(main.sys, "stdout", out)
    monkeypatch.setattr(main.sys, "stderr", err)
    demo._show(samples.lay_out(Path("demo")), "auto")
    shown = err.kept.getvalue().decode()
    assert out.kept.getvalue() == b"" and all((part in shown) is drawn for part in ("▀", "photographer", "\x1b"))


# ---- the picture in the README


def words(svg: str) -> str:
    """The text of the picture, without what differs in the last digits from processor to processor."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    return NUMBER.sub("#", html.unescape("\n".join(texts)))


def test_the_picture_is_what_the_script_makes(drawing: ModuleType) -> None:
    made, committed = drawing.svg(drawing.printed()), SVG.read_text(encoding="utf-8")
    assert words(made) == words(committed), "python benchmarks/readme_svg.py"
    outlines = [re.findall(r' d="([^"]*)"', svg) for svg in (made, committed)]
    assert outlines[0] == outlines[1] and len(outlines[0]) > 1000


def test_the_picture_fetches_nothing_and_can_be_read() -> None:
    svg = SVG.read_text(encoding="utf-8")
    assert not re.search(r"@font-face|@import|url\(|href|<script|https?://(?!www\.w3\.org/2000/svg)", svg)
    title = html.unescape(svg.partition("<title>")[2].partition("</title>")[0])
    assert title.startswith("$ clipcli demo\nclipcli: 9 photos") and COMMAND in title and "▀" not in title
    assert all(f"clipcli-demo/{name}" in title for name in samples.PHOTOS)
