"""Peak memory of `classify` at 5,000 and at 50,000 files: it must not grow with their number.

    python benchmarks/memory.py [-m MODEL] [-n FILES] [-o FILE.md]

The files are small pictures, all different, in a temporary folder. Each run is a fresh process; peak memory is what
the system says of it when it has ended. The store is left out, then filled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("-L", "red", "-L", "green", "-L", "blue")


def fill(folder: Path, count: int) -> None:
    """Write `count` different pictures."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number // 1000:03}"
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(place / f"{number % 1000:03}.png")


def peak(folder: Path, model: str, *options: str) -> tuple[int, int]:
    """Rows written, and the peak of resident memory in MB, of one run over `folder`."""
    out = folder.parent / "rows.tsv"
    command = [sys.executable, "-m", "clipcli", "classify", folder, *LABELS, "-m", model, "-o", out, "--force", "-q"]
    process = subprocess.Popen([*map(str, command), *options], env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"clipcli ended with {os.waitstatus_to_exitcode(status)}")
    with out.open("rb") as rows:
        return sum(1 for _ in rows), usage.ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="tiny")
    parser.add_argument("-n", "--files", type=int, default=50_000)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    lines = ["| files | without the store, MB | filling the store, MB | all known, MB |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLIPCLI_CACHE_DIR"] = f"{folder}/cache"
        for count in (given.files // 10, given.files):
            pictures = Path(folder, str(count), "pictures")
            pictures.mkdir(parents=True)
            fill(pictures, count)
            runs = [peak(pictures, given.model, "--no-cache"), *(peak(pictures, given.model) for _ in range(2))]
            assert [rows for rows, _ in runs] == [count] * 3
            lines.append(f"| {count:,} | " + " | ".join(f"{size:,}" for _, size in runs) + " |")
    text = "\n".join([f"`{' '.join(['python', *sys.argv])}`", "", *lines, ""])
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
