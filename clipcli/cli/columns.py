"""Small tables of facts as aligned plain text, the same on a terminal and in a pipe.

In: rows of text. Out: lines, control characters escaped. Rows of a run are written by `output/`, not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clipcli.output.text import printable


def aligned(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset(), indent: str = "") -> Iterator[str]:
    """A line a row, the columns of `right` aligned to the right."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"{indent}{'  '.join(cells)}".rstrip()
