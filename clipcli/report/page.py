"""One HTML page in one file: headings, tables, pictures. Everything is inside it, and nothing is asked of any network.

In: text (escaped here), finished SVG, pixels. Out: HTML text. A Content-Security-Policy in the page forbids every
request, whatever a label or a file name may hold.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from clipcli.output.text import printable

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px;
  margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .6em 0 }
th, td { padding: .15em .8em .15em 0; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif }
.row { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start }
figure { margin: 0; width: 150px; font-size: 13px; overflow-wrap: anywhere }
figure img { display: block; margin-bottom: .3em }
small { color: #666 }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are finished HTML."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
    )
    body = "\n".join(parts)
    return f"{head}<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"


def text(value: str) -> str:
    """Text as HTML has it, control characters shown."""
    return escape(printable(value))


def heading(value: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{text(value)}</h{level}>"


def paragraph(value: str) -> str:
    """A paragraph."""
    return f"<p>{text(value)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [f"<tr>{''.join(f'<th>{text(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def folded(summary: str, content: str) -> str:
    """Something long that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def row(parts: Iterable[str]) -> str:
    """Things side by side, as many as the window holds."""
    return f'<div class="row">{"".join(parts)}</div>'


def figure(pixels: NDArray[np.uint8], lines: Sequence[str]) -> str:
    """A picture, uint8 [height, width, 3], as a JPEG inside the page, and what stands below it."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    height, width = pixels.shape[:2]
    source = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
    image = f'<img src="{source}" width="{width}" height="{height}" alt="">'
    first, *rest = map(text, lines)
    return f"<figure>{image}<b>{first}</b><br>{'<br>'.join(rest)}</figure>"
