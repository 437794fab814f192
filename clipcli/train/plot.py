"""The curves of a run: `log.csv` in, `curves.svg` out, by matplotlib (extra `plot`)."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

from clipcli.train.run import LOG

NAME = "curves.svg"
_NO_SETS = 8  # columns of the log before the evaluated sets

log = logging.getLogger("clipcli")


def plot(folder: Path) -> Path | None:
    """Draw loss and accuracies over the epochs; None where matplotlib isn't installed, which is told."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning('no curves drawn: that needs pip install "clipcli[plot]" (the figures are in %s)', folder / LOG)
        return None
    with (folder / LOG).open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ["loss"]), (right, header[_NO_SETS:])):
        for name in names:
            column = header.index(name)
            points = [(float(row[1]), float(row[column])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
        axes.set_xlabel("epoch")
    left.set_ylabel("loss")
    right.set_ylabel("zero-shot accuracy")
    if right.lines:
        right.legend()
    path = folder / NAME
    figure.savefig(path, metadata={"Date": None})
    return path
