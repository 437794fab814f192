"""Plots as SVG text, drawn here: curves and bars over the unit square, and a matrix of counts.

In: numbers and names. Out: an `<svg>` element, the same for the same numbers, that needs no script and no other file.
Every mark has its numbers as a `<title>`, which browsers show under the mouse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from clipcli.report.page import text as safe

COLOURS = ("#1f6feb", "#d1551f", "#2f855a", "#8250df")
NAMED = 40  # classes up to which a matrix shows their names

_SIDE, _LEFT, _TOP = 300, 46, 14  # of the unit square, in pixels

Points = Sequence[tuple[float, float, float]]  # x, y, and how much stands behind it: 0 to 1


def unit_plot(x: str, y: str, lines: Mapping[str, Points], *, diagonal: bool = False) -> str:
    """Curves by name over axes from 0 to 1, each point a disc by its weight; `diagonal` is what they should follow."""
    width, height = _LEFT + _SIDE + 14, _TOP + _SIDE + 44 + 18 * len(lines)
    return _svg(width, height, f"{y} by {x}", [*_frame(x, y, diagonal), *_curves(lines)])


def _frame(x: str, y: str, diagonal: bool) -> Iterator[str]:
    for step in range(6):
        at = step / 5
        yield _line(_place(at, 0), _place(at, 1), "#e3e3e3") + _line(_place(0, at), _place(1, at), "#e3e3e3")
        (left, below), (beside, height) = _place(at, 0), _place(0, at)
        yield _text(left, below + 15, f"{at:.1f}", "middle") + _text(beside - 6, height + 4, f"{at:.1f}", "end")
    if diagonal:
        yield _line(_place(0, 0), _place(1, 1), "#999", ' stroke-dasharray="4 4"')
    yield _text(_LEFT + _SIDE / 2, _TOP + _SIDE + 32, x, "middle")
    yield f'<g transform="rotate(-90 12 {_TOP + _SIDE / 2})">{_text(12, _TOP + _SIDE / 2, y, "middle")}</g>'


def _curves(lines: Mapping[str, Points]) -> Iterator[str]:
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [_place(x, y) for x, y, _ in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for (x, y, weight), (left, top) in zip(points, placed, strict=True):
            at = f'cx="{left:.1f}" cy="{top:.1f}" r="{2 + 8 * math.sqrt(weight):.1f}"'
            yield f'<circle {at} fill="{colour}" fill-opacity="0.7">{_title(f"{name}: {x:.3f}, {y:.3f}")}</circle>'
        below = _TOP + _SIDE + 52 + 18 * number
        yield f'<rect x="{_LEFT}" y="{below - 9}" width="10" height="10" fill="{colour}"/>'
        yield _text(_LEFT + 16, below, name)


def matrix(names: Sequence[str], counts: Mapping[tuple[int, int], int]) -> str:
    """Counts by (row, column), dark where they are a large share of their row; rows and columns have the same names."""
    size = len(names)
    cell = max(3, min(26, 800 // size))
    margin = min(180, 7 * max(map(len, names)) + 12) if size <= NAMED else 20
    totals = [0] * size
    for (row, _), count in counts.items():
        totals[row] += count
    marks = []
    for (row, column), count in sorted(counts.items()):
        share = count / totals[row]
        title = f"{names[row]}, answered {names[column]}: {count:,} of {totals[row]:,}"
        colour = COLOURS[0] if row == column else COLOURS[1]
        at = f'x="{margin + column * cell}" y="{margin + row * cell}" width="{cell}" height="{cell}"'
        marks.append(f'<rect {at} fill="{colour}" fill-opacity="{0.12 + 0.88 * share:.2f}">{_title(title)}</rect>')
        if cell >= 18:
            ink = "#fff" if share > 0.5 else "#222"
            left, top = margin + (column + 0.5) * cell, margin + (row + 0.5) * cell + 4
            marks.append(_text(left, top, str(count), "middle", ink))
    if size <= NAMED:
        for index, name in enumerate(names):
            place = margin + (index + 0.5) * cell + 4
            short = name if len(name) <= 24 else f"{name[:23]}…"
            marks.append(_text(margin - 6, place, short, "end"))
            marks.append(f'<g transform="rotate(-90 {place} {margin - 6})">{_text(place, margin - 6, short)}</g>')
    side = size * cell
    frame = f'<rect x="{margin}" y="{margin}" width="{side}" height="{side}" fill="none" stroke="#999"/>'
    return _svg(margin + side + 8, margin + side + 8, "truth by row, answer by column", [frame, *marks])


def _place(x: float, y: float) -> tuple[float, float]:
    return _LEFT + x * _SIDE, _TOP + (1 - y) * _SIDE


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{safe(label)}">{"".join(parts)}</svg>'


def _line(begin: tuple[float, float], end: tuple[float, float], colour: str, more: str = "") -> str:
    return f'<line x1="{begin[0]}" y1="{begin[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{safe(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{safe(text)}</title>"
