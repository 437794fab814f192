"""One picture in a fresh process: clipcli, an open_clip script, transformers' pipeline. And from how many torch pays.

    python benchmarks/start.py --vocabulary merges.txt -o benchmarks/runs/DATE-MACHINE

The model has random weights and is written in the layouts that each program reads; all of them answer the same
question, ten labels and one template, and the answers are compared first. Then the programs take turns, a process each,
so that what else the machine does hits all of them; only ratios are to be trusted, and within 10 % they are ties.
clipcli finds its classifier in the store, as after any first run; the picture is new to it unless the line says known.

The second part shows from how many pictures on importing torch pays: the same command on more and more of them, with
numpy to the end, and with torch from the beginning. `FEW` of `clipcli/model/plain.py` is read off it.

A peer that can't be imported is named as such; `--peers` is another interpreter that has them. Where torchvision isn't
there, open_clip gets a stand-in for what it takes of it, which makes the same calls of Pillow. Writes start.json (all
times) and start.md; `--try` is a run with a small model, to see whether it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from image_tower import MODELS
from peers import STAND_IN, compile_clipcli, lacks_torchvision, machine
from PIL import Image

from clipcli.model import plain
from clipcli.model.config import ClipConfig, TextConfig, ViTConfig
from clipcli.tasks.peers import OPEN_CLIP, TRANSFORMERS
from clipcli.weights.export import export_model
from clipcli.weights.load import load_checkpoint
from clipcli.weights.save import save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

LABELS = ["cat", "dog", "bird", "car", "ship", "tree", "house", "person", "mountain", "book"]
SMALL = (64, ViTConfig(64, 16, 64, 2, 1, 256, "gelu"))
COMMAND = ["classify", "-l", "labels.txt", "-t", "a photo of a <>.", "-m", "model", "-d", "cpu", "-q"]
COUNTS = [1, 4, 16, 32, 64, 128]
OURS = "clipcli"

NUMPY = "from clipcli.model import plain; plain.few = lambda config: 1 << 30; "
TORCH = "from clipcli.model import plain; plain.few = lambda config: 0; "
LAUNCH = """
import json, os, sys, time
out = int(sys.argv[1])
began = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
spent = {"wall": time.perf_counter() - began, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024}
os.write(out, json.dumps(spent).encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""  # a process's peak counts what started it, which must therefore be small
MAIN = "from clipcli.cli.main import main; main()"


def make(folder: Path, config: ClipConfig, vocabulary: Path, pictures: int) -> None:
    """Both layouts of a model, labels, pictures, and a store that knows the classifier."""
    arrays = tiny.weights(config)
    save_model(folder / "model", config, arrays, merges=vocabulary, card="For a benchmark.\n")
    export_model(load_checkpoint(folder / "model"), folder / "hf", "transformers")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    noise = np.random.default_rng(0)
    for number in range(pictures):
        coarse = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg")
    arguments = ["build-classifier", "labels.txt", *COMMAND[3:]]
    run([sys.executable, "-m", "clipcli", *arguments], folder, folder / "filled")


class Spent(dict[str, float]):
    """What a process cost: `wall` and `cpu` seconds, `peak` MiB."""


def run(command: list[str], folder: Path, store: Path, modules: Path | None = None) -> tuple[Spent, str]:
    """A process: what it cost and what it printed. `modules` may be imported by it. Raises CalledProcessError."""
    environment = {**os.environ, "CLIPCLI_CACHE_DIR": str(store), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if modules:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(modules)]))
    with tempfile.TemporaryFile() as told:
        command = [sys.executable, "-S", "-c", LAUNCH, str(told.fileno()), *command]
        settings: dict[str, Any] = {"cwd": folder, "env": environment, "pass_fds": [told.fileno()]}
        done = subprocess.run(command, capture_output=True, check=True, **settings)
        told.seek(0)
        return Spent(json.load(told)), done.stdout.decode()


class Bench:
    """A folder with everything in it, and the programs that may be run there."""

    def __init__(self, folder: Path, peers: str) -> None:
        self.folder = folder
        self.lacking = "open_clip script" if lacks_torchvision(peers) else ""
        ours = [*COMMAND, "-f", "jsonl", "-k", str(len(LABELS)), "000.jpg"]
        asked = ["000.jpg", *LABELS]
        self.programs = {
            OURS: [sys.executable, "-c", MAIN, *ours],
            "clipcli, known picture": [sys.executable, "-c", MAIN, *ours],
            "clipcli, by torch": [sys.executable, "-c", TORCH + MAIN, *ours],
            "open_clip script": [peers, "-c", OPEN_CLIP, "model", *asked],
            "transformers pipeline": [peers, "-c", TRANSFORMERS, "hf", *asked],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        self.missing: dict[str, str] = {}

    def start(self, name: str) -> tuple[Spent, str]:
        """A run of a program, on a store as it was in the beginning."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            store = Path(scratch) / "store"
            shutil.copytree(self.folder / ("known" if "known" in name else "filled"), store)
            return run(self.programs[name], self.folder, store, STAND_IN if name == self.lacking else None)

    def check(self) -> None:
        """Drop the peers that aren't there. Raises AssertionError where programs answer differently."""
        shutil.copytree(self.folder / "filled", self.folder / "known")
        run(self.programs[OURS], self.folder, self.folder / "known")
        expected: dict[str, float] = {}
        for name in list(self.programs):
            try:
                scores = _scores(self.start(name)[1])
            except subprocess.CalledProcessError as error:
                if OURS in name or name.startswith("python"):
                    raise
                self.missing[name] = (error.stderr.decode().strip().splitlines() or ["it failed"])[-1]
                del self.programs[name]
                continue
            expected = expected or scores
            for label, score in scores.items():
                assert abs(score - expected[label]) < 2e-3, f"{name}: {label} {score}, not {expected[label]}"

    def crossover(self, counts: list[int], rounds: int) -> list[dict[str, Any]]:
        """Wall seconds of so many pictures with numpy to the end, and with torch from the beginning."""
        names = sorted(path.name for path in self.folder.glob("*.jpg"))
        found: list[dict[str, Any]] = [{"pictures": count, "numpy": [], "torch": []} for count in counts]
        for number in range(rounds):
            for line in found:
                for runtime, begin in list({"numpy": NUMPY, "torch": TORCH}.items())[:: -1 if number % 2 else 1]:
                    pictures = names[: line["pictures"]]
                    self.programs["many"] = [sys.executable, "-c", begin + MAIN, *COMMAND, *pictures]
                    line[runtime].append(self.start("many")[0]["wall"])
        del self.programs["many"]
        return found


def _scores(printed: str) -> dict[str, float]:
    if not printed:
        return {}
    row = json.loads(printed)
    return {one["label"]: one["score"] for one in row["top"]} if "top" in row else row


def worth(lines: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Two straight lines through the medians: seconds a picture by numpy, by torch, and where the lines meet.

    Where numpy loses nothing on a picture, they meet nowhere: infinity.
    """
    counts = [line["pictures"] for line in lines]
    (a, b), (c, d) = (np.polyfit(counts, [statistics.median(x[way]) for x in lines], 1) for way in ("numpy", "torch"))
    return float(a), float(c), float((d - b) / (a - c)) if a > c else float("inf")


def table(spent: dict[str, list[Spent]], missing: dict[str, str]) -> Iterator[str]:
    """The Markdown of the first part. Ratios are medians over the rounds."""
    yield "| a process | wall s | × clipcli | CPU s | peak MiB |"
    yield "|---|---:|---:|---:|---:|"
    for name, rounds in spent.items():
        ratio = statistics.median(one["wall"] / ours["wall"] for one, ours in zip(rounds, spent[OURS], strict=True))
        wall, cpu, peak = (statistics.median(one[key] for one in rounds) for key in ("wall", "cpu", "peak"))
        yield f"| {name} | {wall:.2f} | {ratio:.2f} | {cpu:.2f} | {peak:.0f} |"
    for name, why in missing.items():
        yield f"| {name} | – | – | – | – |\n\n{name} did not run: {why}"


def crossing(result: dict[str, Any]) -> Iterator[str]:
    """The Markdown of the second part."""
    yield f"\n## From how many pictures on torch pays: {result['model']}\n"
    yield "| pictures | numpy, wall s | torch, wall s | numpy / torch |"
    yield "|---:|---:|---:|---:|"
    for line in result["crossover"]:
        ratio = statistics.median(a / b for a, b in zip(line["numpy"], line["torch"], strict=True))
        wall = " | ".join(f"{statistics.median(line[way]):.2f}" for way in ("numpy", "torch"))
        yield f"| {line['pictures']} | {wall} | {ratio:.2f} |"
    by_numpy, by_torch, meet = worth(result["crossover"])
    yield (
        f"\nA further picture: {1000 * by_numpy:.0f} ms by numpy, {1000 * by_torch:.0f} ms by torch. The lines meet at "
        f"{meet:.0f} pictures; clipcli changes over after {result['few']}."
    )


def measure(model: str, shape: tuple[int, ViTConfig], given: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one model."""
    dim, vision = shape
    layers = 2 if given.small else 12
    text = TextConfig(77, 49408, dim, layers, dim // 64, 4 * dim, vision.activation)
    config = replace(tiny.vit(), embed_dim=dim, vision=vision, text=text)
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), config, given.vocabulary.resolve(), max(given.counts))
        bench = Bench(Path(name), given.peers)
        bench.check()
        spent: dict[str, list[Spent]] = {program: [] for program in bench.programs}
        for number in range(given.rounds):
            for program in list(spent)[:: -1 if number % 2 else 1]:
                spent[program].append(bench.start(program)[0])
            print(f"\r{model}: round {number + 1} of {given.rounds}", end="", file=sys.stderr)
        lines = bench.crossover(given.counts, max(1, given.rounds // 2))
    return {"model": model, "few": plain.few(vision), "spent": spent, "missing": bench.missing, "crossover": lines}


def summary(found: dict[str, Any]) -> Iterator[str]:
    """The Markdown of a whole run."""
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    yield "# One picture in a fresh process\n"
    yield f"`{found['command']}`; {found['rounds']} rounds, medians. {about[0].upper()}{about[1:]}."
    yield "Random weights; ten labels, one template; a JPEG of 500 × 375; the disk's cache is warm."
    if found["stand_in"]:
        yield "torchvision isn't there: open_clip's transforms are a stand-in with the same calls of Pillow."
    yield ""
    for result in found["results"]:
        yield f"## {result['model']}\n"
        yield from table(result["spent"], result["missing"])
    for result in found["results"]:
        yield from crossing(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True, help="the published models' merges.txt")
    parser.add_argument("-o", "--output", type=Path, help="a folder for the two files")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], choices=[name for name in MODELS if "ViT" in name])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the interpreter of the peers")
    parser.add_argument("--try", dest="small", action="store_true", help="a small model, and as little as possible")
    given = parser.parse_args()
    compile_clipcli()
    if given.small:
        given.models, given.rounds, given.counts = ["small ViT"], 1, [1, 2]
    models = {"small ViT": SMALL, **MODELS}
    found = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {key: value for key, value in machine().items() if key != "torchvision"},
        "rounds": given.rounds,
        "stand_in": lacks_torchvision(given.peers),
        "results": [measure(model, models[model], given) for model in given.models],
    }
    text = "\n".join(summary(found)) + "\n"
    print(f"\n{text}")
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "start.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (given.output / "start.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
