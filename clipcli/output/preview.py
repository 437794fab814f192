"""Small pictures on a terminal: a half block is two pixels, its colour the upper one, its background the lower.

In: names and pixels. Out: text for rich, pictures side by side, each above its name. Whether a terminal has the
colours for it, `can_draw` says; from 24 bits to 256 colours rich gets by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import set_cell_size
from rich.console import Console
from rich.style import Style
from rich.text import Text

from clipcli.output.text import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Preview = tuple[str, NDArray[np.uint8]]  # a name, and pixels [height, width, 3]

WIDTH, HEIGHT = 14, 12  # of a preview at most, in pixels: cells across, half cells down
GAP = 2


def can_draw(console: Console) -> bool:
    """Whether it is a terminal with half blocks, 256 colours at least, and room for three pictures."""
    if not console.is_terminal or not console.encoding.startswith("utf"):
        return False
    return console.color_system in ("256", "truecolor") and console.width >= 3 * (WIDTH + GAP)


def sheet(previews: Sequence[Preview], width: int) -> Text:
    """All of them within `width` cells, in as few rows as can be, the rows about equally long."""
    fitting = max(1, (width + GAP) // (WIDTH + GAP))
    rows = max(1, -(-len(previews) // fitting))
    each = max(1, -(-len(previews) // rows))
    starts = range(0, len(previews), each)
    return Text("\n").join(line for start in starts for line in _row(previews[start : start + each]))


def _row(previews: Sequence[Preview]) -> Iterator[Text]:
    """The lines of some pictures side by side, the pictures' feet on one line, and their names."""
    height = max(len(pixels) + len(pixels) % 2 for _, pixels in previews)
    for top in range(0, height, 2):
        yield Text(" " * GAP).join(
            _line(pixels, top - height + len(pixels) + len(pixels) % 2) for _, pixels in previews
        )
    yield Text((" " * GAP).join(set_cell_size(printable(name), WIDTH) for name, _ in previews).rstrip(), style="dim")


def _line(pixels: NDArray[np.uint8], top: int) -> Text:
    """Two rows of pixels, `top` and the next, as one line of WIDTH cells; blank above the picture."""
    line = Text()
    if top >= 0:
        for column in range(pixels.shape[1]):
            upper, lower = (_color(pixels, row, column) for row in (top, top + 1))
            line.append("▀", Style(color=upper, bgcolor=lower))
    return Text.assemble(line, " " * (WIDTH - line.cell_len))


def _color(pixels: NDArray[np.uint8], row: int, column: int) -> str | None:
    """A pixel as rich names it; None below the picture."""
    return "#{:02x}{:02x}{:02x}".format(*pixels[row, column]) if row < len(pixels) else None
