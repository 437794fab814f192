"""Kill a run with the model in play, again and again, and see what its row file has lost.

    python benchmarks/resume.py -o benchmarks/runs/<date>-<machine>/resume.md

Two hundred pictures made here (every tenth is broken) are listed until there are enough rows. `clipcli classify
--resume` gets `kill -9` at a random moment: while it starts, loads, or writes; when it comes through, another file is
begun, until it has been killed often enough. Nothing comes from the store, so each picture goes through the image
tower. Every file is then compared with that of a run that nobody disturbed: the same names in the same order, and no
score further off than batches of another composition make it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

COMMAND = ["classify", "--files-from", "list", "-L", "cat", "-L", "dog", "-L", "a photo of noise", "--no-cache", "-q"]
TOLERANCE = 1e-5


def make_pictures(folder: Path, rows: int) -> None:
    """`folder/list` names so many pictures."""
    chosen = np.random.default_rng(0)
    names = []
    for number in range(200):
        path = folder / f"{number:03}.jpg"
        Image.fromarray(chosen.integers(0, 255, (240, 320, 3), dtype=np.uint8)).save(path)
        if number % 10 == 0:
            path.write_bytes(path.read_bytes()[:5000])
        names.append(path.name)
    (folder / "list").write_text("".join(f"{names[n % len(names)]}\n" for n in range(rows)))


def start(folder: Path, model: str, output: str) -> subprocess.Popen[bytes]:
    """A run that goes on with `output`."""
    arguments = [*COMMAND, "-m", model, "-o", output, "--resume"]
    return subprocess.Popen([sys.executable, "-m", "clipcli", *arguments], cwd=folder)


def size(path: Path) -> int:
    """Bytes in a file that may not be there yet."""
    return path.stat().st_size if path.exists() else 0


def kill_once(folder: Path, model: str, output: str, chosen: random.Random, startup: float) -> str:
    """Where a run was when it was killed: `starting`, `writing`; or `done`, before that could happen."""
    file = folder / output
    before = size(file)
    with start(folder, model, output) as process:
        ends = time.monotonic() + chosen.uniform(0, startup)
        early = chosen.random() < 0.2
        while process.poll() is None and not (early and time.monotonic() > ends):
            if size(file) != before:
                time.sleep(chosen.uniform(0, 2.5))
                break
            time.sleep(0.005)
        process.kill()
        if process.wait() >= 0:
            return "done"
    return "starting" if size(file) == before else "writing"


def compare(file: Path, reference: Path) -> tuple[int, int, float]:
    """Rows lost, rows too many or in the wrong place, and the largest difference of a score."""
    rows, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (file, reference))
    wrong = sum(
        (a["path"], a["label"], a["error"]) != (b["path"], b["label"], b["error"])
        for a, b in zip(rows, expected, strict=False)
    )
    largest = max(abs((a["score"] or 0) - (b["score"] or 0)) for a, b in zip(rows, expected, strict=False))
    return max(0, len(expected) - len(rows)), max(0, len(rows) - len(expected)) + wrong, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=3000, help="in each file")
    parser.add_argument("-m", "--model", default="tiny", help="a name or a path")
    parser.add_argument("-o", "--output", type=Path, help="write a summary in Markdown there")
    options = parser.parse_args()
    model = os.path.abspath(options.model) if os.path.exists(options.model) else options.model
    chosen = random.Random(0)
    places = {"starting": 0, "writing": 0}
    lost = doubled = files = again = 0
    largest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, options.rows)
        began = time.monotonic()
        assert start(folder, model, "reference.jsonl").wait() == 3
        startup = (time.monotonic() - began) / 2
        while sum(places.values()) < options.kills:
            output = f"{files}.jsonl"
            while sum(places.values()) < options.kills:
                place = kill_once(folder, model, output, chosen, startup)
                if place == "done":
                    break
                places[place] += 1
                side_car = folder / f"{output}.run.json"
                kept = json.loads(side_car.read_text())["offset"] if side_car.exists() else 0
                data = (folder / output).read_bytes() if side_car.exists() else b""
                again += data[kept:].count(b"\n")
                print(f"\rkilled {sum(places.values())} times, file {files}", end="", file=sys.stderr)
            assert start(folder, model, output).wait() == 3
            missing, more, difference = compare(folder / output, folder / "reference.jsonl")
            lost, doubled, largest, files = lost + missing, doubled + more, max(largest, difference), files + 1
    summary = f"""# Killed and gone on

`python benchmarks/resume.py --kills {options.kills} --rows {options.rows} -m {os.path.basename(model)}`;
{os.cpu_count()} CPUs. Each run: `clipcli {shlex.join(COMMAND)} --resume`.

| | |
|---|---|
| `kill -9` while it started or loaded | {places["starting"]} |
| `kill -9` while rows came | {places["writing"]} |
| row files, {options.rows:,} rows each | {files} |
| rows lost | {lost} |
| rows doubled, or another than in the undisturbed run | {doubled} |
| largest difference of a score (allowed: {TOLERANCE:g}) | {largest:g} |
| rows written, not yet counted, and made again, per kill | {again / options.kills:.0f} |
"""
    print(f"\n{summary}")
    if options.output:
        options.output.write_text(summary, encoding="utf-8")
    sys.exit(bool(lost or doubled or largest > TOLERANCE))


if __name__ == "__main__":
    main()
