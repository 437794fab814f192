"""The picture of one run in README.md: `clipcli demo` as a terminal shows it.

    python benchmarks/readme_svg.py                # writes docs/demo.svg, and prints its text for README.md

Runs the command in this process, on streams that pretend to be a terminal of 90 columns and 24-bit colour, in a folder
and with a store of its own; what is drawn is what was printed, but for the seconds, which are left out. The same model
gives the same file. It names no font that would have to be fetched: pictures in a page may fetch nothing.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import re
import tempfile
from contextlib import chdir, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from clipcli.cli.console import Talk, Ticker
from clipcli.cli.main import run

COMMAND = "clipcli demo"
WIDTH = 90
TARGET = Path(__file__).resolve().parents[1] / "docs" / "demo.svg"
THEME = TerminalTheme(
    (22, 27, 34),
    (214, 221, 228),
    [
        (22, 27, 34),
        (255, 123, 114),
        (126, 231, 135),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (214, 221, 228),
    ],
)
FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>DESCRIPTION</title>
<style>
.{unique_id}-matrix, .{unique_id}-title {{
  font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace
}}
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" shape-rendering="crispEdges">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
_LOWER = re.compile(
    r'<rect fill="(#\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="[\d.]+" shape-rendering="crispEdges"/>'
)
_UPPER = re.compile(r'<text class="c-(r\d+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)">▀+</text>')
LINE, BASELINE = 24.4, 20  # rich's own numbers, in pixels


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal, and keeps what is written."""

    def __init__(self) -> None:
        self.kept = io.BytesIO()
        super().__init__(self.kept, encoding="utf-8", newline="\n", write_through=True)

    def isatty(self) -> bool:
        """Yes."""
        return True


def printed() -> str:
    """What the command writes to a terminal, colours and all, without its seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLIPCLI_", "NO_COLOR", "FORCE"))}
    terminal = Terminal()
    with (
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
        patch.dict(os.environ, kept, clear=True),
        patch.dict(os.environ, {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(WIDTH)}),
        patch.dict(os.environ, {"CLIPCLI_CACHE_DIR": f"{folder}/.cache", "CLIPCLI_CONFIG_DIR": f"{folder}/.config"}),
        patch.object(Talk, "working", lambda self, text: nullcontext(Ticker())),  # what lives on a line leaves no trace
        redirect_stdout(terminal),
        redirect_stderr(terminal),
    ):
        code = run(COMMAND.split()[1:])
    text = terminal.kept.getvalue().decode()
    if code:
        raise SystemExit(text)
    return f"$ {COMMAND}\n" + re.sub(r", \d+\.\d s$", "", text, flags=re.MULTILINE)


def plain(text: str) -> str:
    """The text without colours and previews: for README.md, and for those who can't see the picture."""
    text = "".join(f"{line.rstrip()}\n" for line in Text.from_ansi(text).plain.splitlines())
    return re.sub(r"((.*▀.*\n)+.*\n)+\n", "", text)  # rows of previews, their names, and the empty line after them


def svg(text: str) -> str:
    """The text as a picture."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(text))
    drawn = console.export_svg(title=COMMAND, theme=THEME, code_format=FORMAT, unique_id="c")
    drawn = re.sub(r' clip-path="[^"]*"', "", drawn)
    fills = dict(re.findall(r"\.c-(r\d+) { fill: (#\w+)", drawn))
    drawn = _UPPER.sub(lambda found: _pixels(fills[found[1]], found, -BASELINE), drawn)
    drawn = _LOWER.sub(lambda found: _pixels(found[1], found, LINE / 2 - 1.5), drawn)
    drawn = re.sub(r"\.c-(r\d+) {.*}\n", lambda found: found[0] * (f'"c-{found[1]}"' in drawn), drawn)
    return drawn.replace("DESCRIPTION", html.escape(plain(text)))


def _pixels(fill: str, found: re.Match[str], down: float) -> str:
    """Pixels of a preview, as wide as what was found: a shape has no seams, as half blocks have in some fonts."""
    left, top, width = (float(number) for number in found.groups()[1:])
    top += down
    box = round(left), round(top), round(left + width) - round(left), round(top + LINE / 2) - round(top)
    return '<path fill="{}" d="M{} {}h{}v{}h-{}z"/>'.format(fill, *box, box[2])


def main() -> None:
    """Write the picture and print its text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    text = printed()
    options.output.write_text(svg(text), encoding="utf-8")
    print(plain(text))


if __name__ == "__main__":
    main()
