"""The curves of a run: `log.csv` in, `curves.svg` out, by matplotlib (extra `plot`)."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path

from clipcli.errors import ModelError
from clipcli.train.run import COLUMNS, HELD_OUT, LOG
from clipcli.weights.folder import whole_file

NAME = "curves.svg"
_NO_SETS = COLUMNS.index(HELD_OUT)  # columns of the log before the evaluated sets

log = logging.getLogger("clipcli")


def plot(folder: Path) -> Path | None:
    """Draw loss and accuracies over the epochs; None where matplotlib isn't installed, which is told."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        log.warning('no curves drawn: that needs pip install "clipcli[plot]" (the figures are in %s)', folder / LOG)
        return None
    try:
        with (folder / LOG).open(newline="", encoding="utf-8", errors="replace") as file:
            table = csv.DictReader(file)
            names, rows = list(table.fieldnames or []), list(table)
    except (OSError, csv.Error) as error:
        raise ModelError(f"{folder / LOG}: {(getattr(error, 'strerror', None) or str(error)).lower()}") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, title, shown in zip(
        figure.subplots(1, 2), ("loss", "zero-shot accuracy"), (["loss"], names[_NO_SETS:]), strict=True
    ):
        axes.set(xlabel="epoch", ylabel=title)
        for name in shown:
            points = [(_number(row.get("epoch")), _number(row.get(name))) for row in rows]
            points = [point for point in points if all(map(math.isfinite, point))]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " ").replace("$", r"\$"))
        if axes.lines and shown != ["loss"]:
            axes.legend()
    with whole_file(folder / NAME) as file, rc_context({"svg.hashsalt": NAME}):  # equal logs make equal files
        figure.savefig(file, format="svg", metadata={"Date": None})
    return folder / NAME


def _number(text: str | None) -> float:
    """A cell's; nan where it is empty, or was written by another hand."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
