"""What an answer rests on, for a person's eyes: below its row, labels across and prompts down, each
at the end of its line.

In: a `Prediction` with its `Evidence`. Out: lines. A row of cosines is a template (the mean over a label's aliases),
an alias (the mean over the templates, where a label has more than one), or a description; `*` marks the label that
comes first by that template. On a terminal with the colours for it the crop is drawn as the model saw it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from clipcli.output import preview
from clipcli.output.text import printable
from clipcli.records import Prediction, PromptCosine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMN = 12  # cells of a label's column at most
_INDENT = "  "


def explained(row: Prediction, *, draws: bool = False) -> Iterator[str]:
    """The lines below a row, without their ends."""
    evidence = row.evidence
    if evidence is None:
        return
    if draws and evidence.crop is not None:
        yield from _drawn(evidence.crop)
    labels = [one.label for one in row.top]
    near = f" above {printable(labels[1])}" if len(labels) > 1 else ""
    crop = f", the model saw {printable(evidence.crop_file)}" if evidence.crop_file else ""
    yield f"{_INDENT}margin {row.margin:.4f}{near}{crop}"
    table = [["", *labels], ["score", *(f"{one.score:.4f} " for one in row.top)]]
    table += [["cosine", *_marked([one.cosine for one in row.top])], *_by_prompt(labels, evidence.prompts)]
    yield from _aligned(table)


def _by_prompt(labels: Sequence[str], prompts: Sequence[PromptCosine]) -> Iterator[list[str]]:
    """The rows of templates, then those of aliases and descriptions, which are one label's each."""
    for template in dict.fromkeys(one.template for one in prompts if one.template is not None):
        same = [one for one in prompts if one.template == template]
        yield [template, *_marked([_mean([one for one in same if one.label == label]) for label in labels])]
    for place, label in enumerate(labels):
        own = [one for one in prompts if one.label == label]
        aliases = list(dict.fromkeys(one.alias for one in own if one.alias is not None))
        rows = {alias: [one for one in own if one.alias == alias] for alias in aliases if len(aliases) > 1}
        rows |= {f":: {one.text}": [one] for one in own if one.template is None}
        for name, part in rows.items():
            yield [name, *[""] * place, f"{_mean(part) or 0:.4f} ", *[""] * (len(labels) - place - 1)]


def _mean(prompts: Sequence[PromptCosine]) -> float | None:
    """By weight; None of a label that has no such prompt."""
    weight = sum(one.weight for one in prompts)
    return sum(one.weight * one.cosine for one in prompts) / weight if weight else None


def _marked(cosines: Sequence[float | None]) -> list[str]:
    most = max(cosine for cosine in cosines if cosine is not None)
    return ["" if cosine is None else f"{cosine:.4f}{'*' if cosine == most else ' '}" for cosine in cosines]


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells to the right, and the first of each row behind them; labels that are too long are cut."""
    shown = [[printable(cell) for cell in row] for row in table]
    shown[0] = [cell if cell_len(cell) <= COLUMN else f"{set_cell_size(cell, COLUMN - 1)}…" for cell in shown[0]]
    shown[0][1:] = [f"{cell} " for cell in shown[0][1:]]
    _, *widths = (max(map(cell_len, column)) for column in zip(*shown, strict=True))
    for name, *cells in shown:
        padded = [" " * (width - cell_len(cell)) + cell for cell, width in zip(cells, widths, strict=True)]
        yield f"{_INDENT}{' '.join([*padded, name])}".rstrip()


def _drawn(crop: NDArray[np.uint8]) -> Iterator[str]:
    """The crop, uint8 [3, H, W], as half blocks; nothing where the terminal lacks the colours for it."""
    out = StringIO()
    console = Console(file=out, force_terminal=True)
    if preview.can_draw(console):
        step = -(-crop.shape[1] // preview.HEIGHT)
        small = crop[:, step // 2 :: step, step // 2 :: step].transpose(1, 2, 0)
        console.print(preview.sheet([("", small)], console.width))
        yield from out.getvalue().rstrip().split("\n")
