"""The HTML report: what is in it, that nothing in it leaves the page, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import squares
from conftest import Run

from clipcli.report import page
from clipcli.report.plots import matrix, unit_plot

HOSTILE = '"><img src=http://clipcli.invalid/x onerror="document.title=1">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Parser(HTMLParser):
    """Counts elements, collects what they refer to, and holds opened elements against closed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> _Parser:
    parser = _Parser()
    parser.feed(text)
    assert parser.open == []
    return parser


@pytest.fixture
def report(cli: Run, model: Path, tmp_path: Path) -> Path:
    """A page about a set whose classes are named with hostile intent."""
    data = squares.make(tmp_path / "data", each=4)
    rows = [f"{path.relative_to(tmp_path)}\t{path.parent.name}" for path in sorted(data.rglob("*.png"))]
    (tmp_path / "truth.tsv").write_text("\n".join(["path\tlabel", *rows]) + "\n")
    words = {HOSTILE: ["red"], "green": ["green"], "blue": ["blue"], "<script>x</script>": ["pink"]}
    (tmp_path / "labels.json").write_text(json.dumps(words))
    file = tmp_path / "r.html"
    done = cli("eval", tmp_path / "truth.tsv", "-l", tmp_path / "labels.json", "-m", model, "--html", file)
    assert done.code == 0, done.err
    return file


def test_a_page_asks_for_nothing(report: Path) -> None:
    text = report.read_text()
    found = parsed(text)
    assert "script" not in found.seen and "link" not in found.seen
    assert found.references and all(one.startswith("data:image/jpeg;base64,") for one in found.references)
    assert {"svg", "polyline", "table", "figure", "details"} <= set(found.seen) or found.seen.count("table") > 4
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert HOSTILE not in text and "&lt;img src=" in text


def test_the_same_run_writes_the_same_page(cli: Run, model: Path, report: Path) -> None:
    folder = report.parent
    args = ("eval", folder / "truth.tsv", "-l", folder / "labels.json", "-m", model, "--html", folder / "again.html")
    assert cli(*args).code == 0
    assert (folder / "again.html").read_bytes() == report.read_bytes()


def test_a_picture_that_is_gone_has_no_thumbnail(cli: Run, model: Path, report: Path) -> None:
    from clipcli.cli.evaluation import as_page
    from clipcli.tasks.build import build_classifier
    from clipcli.tasks.evaluate import evaluate
    from clipcli.tasks.labelled import embed_set
    from clipcli.weights.model import load_model

    opened = load_model(model, device="cpu")
    pictures = embed_set([str(report.parent / "data")], opened)
    found = evaluate(pictures, build_classifier(opened, ["red", "green", "blue"]), name="squares")
    mistakes = parsed(as_page([found], [])).seen.count("figure")
    assert mistakes == (~found.hits).sum() > 0
    shutil.rmtree(report.parent / "data")
    assert parsed(as_page([found], [])).seen.count("figure") == 0


def test_plots_are_where_their_numbers_are() -> None:
    text = unit_plot("x", "y", {"a <line>": [(0, 0, 0), (0.5, 1, 1)]}, diagonal=True)
    points = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', text)
    assert points
    left, low, middle, high = map(float, points.groups())
    assert (middle - left, low - high) == (150, 300)
    assert "a &lt;line&gt;: 0.500, 1.000" in text and "stroke-dasharray" in text
    parsed(text)


def test_a_matrix_has_a_cell_for_every_count() -> None:
    text = matrix(["cat", "dog"], {(0, 0): 3, (0, 1): 1, (1, 1): 2})
    assert re.findall(r"<title>(.*?)</title>", text) == [
        "cat, answered cat: 3 of 4",
        "cat, answered dog: 1 of 4",
        "dog, answered dog: 2 of 2",
    ]
    assert "cat</text>" in text
    many = matrix([f"class {i}" for i in range(200)], {(i, i): 1 for i in range(200)})
    assert many.count("<title>") == 200 and "</text>" not in many


def test_a_figure_is_a_jpeg_in_the_page() -> None:
    text = page.figure(np.full((30, 40, 3), 200, np.uint8), ["<b>", "\u202etwo"])
    assert 'width="40" height="30"' in text and "&lt;b&gt;" in text and "\\u202etwo" in text
    assert parsed(text).references[0].startswith("data:image/jpeg;base64,/9j/")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_and_asks_no_network(report: Path, tmp_path: Path) -> None:
    log, shot = tmp_path / "net.json", tmp_path / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=900,1200", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=150)
    from PIL import Image

    with Image.open(shot) as picture:
        assert picture.size == (900, 1200)
        colours = picture.convert("RGB").getcolors(1 << 20) or []
    shown = {colour for count, colour in colours if count > 20}
    assert len(shown) > 20  # the plots, the table, and thumbnails
    assert (31, 111, 235) in shown or (209, 85, 31) in shown  # curves
    asked = log.read_text()
    assert report.name in asked and "clipcli.invalid" not in asked
