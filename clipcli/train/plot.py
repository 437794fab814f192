"""The curves of a run: `log.csv` in, `curves.svg` out, by matplotlib (extra `plot`)."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

from clipcli.errors import ModelError, OutputError
from clipcli.train.run import LOG

NAME = "curves.svg"
_NO_SETS = 8  # columns of the log before the evaluated sets

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
        with (folder / LOG).open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            names, rows = list(table.fieldnames or []), list(table)
    except OSError as error:
        raise ModelError(f"{folder / LOG}: {(error.strerror or 'not read').lower()}") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, title, shown in zip(
        figure.subplots(1, 2), ("loss", "zero-shot accuracy"), (["loss"], names[_NO_SETS:]), strict=True
    ):
        axes.set(xlabel="epoch", ylabel=title)
        for name in shown:
            points = [(float(row["epoch"]), float(row[name])) for row in rows if row[name]]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " ").replace("$", r"\$"))
        if axes.lines and shown != ["loss"]:
            axes.legend()
    try:
        with rc_context({"svg.hashsalt": NAME}):  # equal logs make equal files
            figure.savefig(folder / NAME, metadata={"Date": None})
    except OSError as error:
        raise OutputError(f"{folder / NAME}: {(error.strerror or 'not written').lower()}") from error
    return folder / NAME
