"""All comparisons with the peers, one after the other: tables, a plot, and the cases that we lose.

    python benchmarks/compare.py --vocabulary merges.txt --data ../shared/data -o benchmarks/runs/DATE-MACHINE

Runs each benchmark of PARTS in a process of its own, which takes turns with its peers in rounds and writes NAME.json
(all times) and NAME.md into the folder. Of all that lies there, also from earlier runs with `--only`, it makes

    summary.md    machine, ratios, where clipcli is behind, who was not there, peak memory, and the parts' own tables
    raw.csv       every time of every round
    ratios.svg    how many times as fast as each peer clipcli is, by case (needs matplotlib)
    command       what was run

A peer that can't be imported is named; `--peers` is an interpreter that has them all. Nothing is asserted but that
the parts end. `--try` is a run of minutes with small towers, to see whether it runs; `--collect` runs nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers import machine

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("open_clip", "transformers", "openvino", "Pillow", "tokenizers")  # what the names of their ways begin with
LIMITS = ("peak", "the product alone")  # of the machine; nobody is faster
TITLE = "# Side by side"


class Case(NamedTuple):
    """The rounds of one piece of work: seconds by way, of which `ours` is what clipcli does unasked."""

    part: str
    name: str
    ours: str
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, way: str) -> float:
        """How many times as fast as that way clipcli is: the median over the rounds."""
        rounds = zip(self.seconds[self.ours], self.seconds[way], strict=True)
        return statistics.median(theirs / ours for ours, theirs in rounds)

    @property
    def peers(self) -> list[str]:
        """The ways of others."""
        return [way for way in self.seconds if way.startswith(PEERS)]


# ---- what each part's JSON holds


def of_towers(found: dict[str, Any], ours: str = "fast") -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Image tower, by model and batch; a second's operations at the peak are no time."""
    for result in found["results"]:
        seconds = {way: spent for way, spent in result["seconds"].items() if way not in LIMITS}
        yield f"{result['model']}, batch {result['batch']}", ours, seconds


def of_text(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Seconds a prompt; clipcli's rounds go on over different prompts, so that the mean of all is its time."""
    spent = found["tower"]["spent"]
    mean = {way: sum(s for s, _ in rounds) / sum(n for _, n in rounds) for way, rounds in spent.items()}
    seconds = {way: [s / n for s, n in rounds] for way, rounds in spent.items() if way != "clipcli"}
    rounds = len(next(iter(spent.values())))
    yield f"{found['tower']['prompts']:,} prompts", "clipcli", seconds | {"clipcli": [mean["clipcli"]] * rounds}
    yield f"tokenizing {found['words']['texts']:,} prompts", "clipcli", found["words"]["spent"]


def of_start(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Wall seconds of a process."""
    for result in found["results"]:
        seconds = {way: [one["wall"] for one in rounds] for way, rounds in result["spent"].items()}
        yield f"one picture, {result['model']}", "clipcli", seconds


def of_decoding(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Seconds a picture on one core; `auto` with simplejpeg is what runs where that is installed."""
    for name, seconds in found["times"].items():
        ours = next(way for way in ("auto with simplejpeg", "auto") if way in seconds)
        yield f"JPEG, {name}", ours, seconds


def of_files(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Seconds a picture, from files to answers."""
    for result in found["results"]:
        alone = {way: spent for way, spent in result["seconds"].items() if not way.endswith(" alone")}
        yield f"{found['model']}, {result['pictures']}", "clipcli", alone


def of_relabelling(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Seconds of a process; nobody else does it, the bare product is the limit."""
    yield f"{found['pictures']:,} embeddings", "from an embeddings file", found["seconds"]


def of_runtimes(found: dict[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """As the image tower, once for each precision of the runtime that clipcli has."""
    for name, _, seconds in of_towers(found):
        for ours in (way for way in seconds if way.startswith("onnx")):
            yield f"{name}, {ours}", ours, {way: seconds[way] for way in seconds if way == ours or way in PEERS}


Read = Callable[[dict[str, Any]], Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]]
PARTS: dict[str, tuple[Read, str]] = {  # a part is benchmarks/NAME.py; {…} are the options of this script
    "image_tower": (of_towers, "--rounds 3"),  # the large batches take half a minute each
    "runtime": (of_runtimes, "--data {data}"),
    "text_tower": (of_text, "--vocabulary {vocabulary} --labels {labels}"),
    "start": (of_start, "--vocabulary {vocabulary} --models ViT-B-32"),
    "decoding": (of_decoding, "{data}"),
    "end_to_end": (of_files, "{data} --rounds 3"),
    "relabel": (of_relabelling, ""),
}


# ---- running


def run(part: str, given: argparse.Namespace, labels: Path) -> dict[str, Any]:
    """One part in a process of its own: what was typed, how long it took, its peak memory, and why it failed."""
    filled = PARTS[part][1].format(vocabulary=given.vocabulary, labels=labels, data=given.data)
    small = [] if not given.small else ["-n", "2000", "-r", "1"] if part == "relabel" else ["--try"]
    command = [f"benchmarks/{part}.py", *shlex.split(filled), *small, "-o", str(given.output)]
    print(f"{part} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryFile() as told:
        child = subprocess.Popen([given.peers, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=told)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)  # it is waited for; nobody else need do it
        told.seek(0)
        lines = told.read().decode(errors="replace").strip().splitlines()
    failed = f"ended with {child.returncode}: {(lines or ['it said nothing'])[-1]}" if child.returncode else ""
    shown = ["python", *(Path(word).name if Path(word).is_absolute() else word for word in command)]
    print(f"{part}: {failed or 'done'}", file=sys.stderr, flush=True)
    return {
        "command": shlex.join(shown),
        "seconds": round(time.monotonic() - began),
        "peak_mib": usage.ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20),
        "failed": anonymous(failed, given),
    }


def anonymous(text: str, given: argparse.Namespace) -> str:
    """The text without this machine's folders."""
    for path in (given.output, given.vocabulary, given.data, ROOT):
        if path is not None:
            text = text.replace(str(path), path.name)
    return text


def write_labels(data: Path, file: Path) -> None:
    """ImageNet's names, one a line; a few of our own where there are no data."""
    classes = data / "classes.json"
    names = [f"label {i}" for i in range(1000)]
    if classes.is_file():
        names = json.loads(classes.read_text(encoding="utf-8"))["datasets"]["imagenet-1k"]["names"]
    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


# ---- collecting


def cases(folder: Path) -> list[Case]:
    """Everything that was measured."""
    found = []
    for part, (read, _) in PARTS.items():
        file = folder / f"{part}.json"
        if file.is_file():
            found += [Case(part, *one) for one in read(json.loads(file.read_text(encoding="utf-8")))]
    return found


def write_raw(found: Sequence[Case], file: Path) -> None:
    """Every round."""
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("part", "case", "way", "round", "seconds"))
        for case in found:
            for way, rounds in case.seconds.items():
                table.writerows((case.part, case.name, way, number, f"{s:.9g}") for number, s in enumerate(rounds, 1))


def draw(found: Sequence[Case], file: Path) -> str:
    """A bar a peer, from the line where both are equal; why there is none, if so."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"No plot: {error}."
    bars = [(case, way) for case in found for way in case.peers]
    if not bars:
        return "No plot: no peer took part."
    with rc_context({"svg.hashsalt": "ratios", "font.size": 8}):
        figure = Figure(figsize=(8, 1 + 0.2 * len(bars)), layout="constrained")
        axes = figure.subplots()
        logs = [math.log2(case.ratio(way)) for case, way in bars]
        axes.barh(range(len(bars)), logs, color=["tab:blue" if log >= 0 else "tab:red" for log in logs])
        axes.set_yticks(range(len(bars)), [f"{case.name}: {way}" for case, way in bars])
        ticks = range(math.floor(min([*logs, 0])), math.ceil(max([*logs, 1])) + 1)
        axes.set_xticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
        axes.axvline(0, color="black", linewidth=1)
        axes.invert_yaxis()
        for place, log in enumerate(logs):
            axes.annotate(f" {2**log:.2f}", (max(log, 0), place), va="center")
        axes.margins(x=0.12)
        axes.set_xlabel("clipcli is × as fast; left of 1.0 it is slower")
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"![clipcli is × as fast as each peer, by case]({file.name})"


def ratios(found: Sequence[Case]) -> Iterator[str]:
    """The table, and the cases that are lost."""
    yield "| part | case | beside | clipcli is × as fast |"
    yield "|---|---|---|---:|"
    for case in found:
        for way in [*case.peers, *(way for way in case.seconds if way in LIMITS)]:
            yield f"| {case.part} | {case.name} | {way} | {case.ratio(way):.2f} |"
    lost = [
        f"- {case.name}: {way} ({ratio:.2f}{', a tie' if ratio > 1 / 1.1 else ''})"
        for case in found
        for way in case.peers
        if (ratio := case.ratio(way)) < 1
    ]
    yield from ("\n## Where clipcli is behind\n", *(lost or ["Nowhere."]))


def summary(found: Sequence[Case], folder: Path, plot: str, runs: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown of it all."""
    about = runs["machine"]
    yield f"{TITLE}\n"
    yield f"{about.pop('date')}, commit {about.pop('commit')}. " + "; ".join(f"{k} {v}" for k, v in about.items()) + "."
    yield "\nMedians of rounds in which the ways take turns: trust the ratios alone; within 10 % they are ties.\n"
    yield from (plot, "")
    yield from ratios(found)
    absent = [f"- {name}: {value}" for name, value in about.items() if "not there" in value]
    yield from ("\n## Not there\n", *(absent or ["Nobody is missing."]))
    yield from ("\n## Runs\n", "| part | minutes | peak MiB, peers included | |", "|---|---:|---:|---|")
    for part, one in runs["parts"].items():
        yield f"| {part} | {one['seconds'] / 60:.1f} | {one['peak_mib']} | {one['failed'] or 'done'} |"
    others = sorted(file.name for file in folder.glob("*.md") if file.stem not in (*PARTS, "summary"))
    if others:
        yield "\nAlso here: " + ", ".join(f"[{name}]({name})" for name in others) + "."
    for part in PARTS:
        file = folder / f"{part}.md"
        if file.is_file():  # its headings become one level deeper
            text = file.read_text(encoding="utf-8").strip()
            text = text if text.startswith("# ") else f"# {part.capitalize()}\n\n{text}"
            yield "\n" + re.sub(r"^#", "##", text, flags=re.MULTILINE)


def commit() -> str:
    """What was measured; marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def measure(given: argparse.Namespace, runs: dict[str, Any]) -> None:
    """Run the parts that were asked for, and remember what each cost in `runs`."""
    with tempfile.TemporaryDirectory() as scratch:
        labels = Path(scratch, "imagenet_names.txt")
        write_labels(given.data, labels)
        for part in given.only:
            needed = [name for name in ("vocabulary", "data") if f"{{{name}}}" in PARTS[part][1]]
            lacking = [name for name in needed if not (getattr(given, name) and getattr(given, name).exists())]
            if lacking:
                print(f"{part}: left out, it needs --{lacking[0]}", file=sys.stderr)
            elif (ROOT / "benchmarks" / f"{part}.py").is_file():
                runs["parts"][part] = run(part, given, labels)
                runs["machine"] = {"date": str(datetime.date.today()), "commit": commit(), **machine_of(given.peers)}
                (given.output / "runs.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def collect(given: argparse.Namespace, runs: dict[str, Any]) -> None:
    """Write the files about all parts. Raises SystemExit where there are none."""
    folder: Path = given.output
    for file in (*folder.glob("*.md"), *folder.glob("*.json")):
        file.write_text(anonymous(file.read_text(encoding="utf-8"), given), encoding="utf-8")
    found = cases(folder)
    if not found:
        raise SystemExit("nothing was measured")
    write_raw(found, folder / "raw.csv")
    plot = draw(found, folder / "ratios.svg")
    text = "\n".join(summary(found, folder, plot, runs))
    (folder / "summary.md").write_text(anonymous(text, given) + "\n", encoding="utf-8")
    lines = [one["command"] for one in runs["parts"].values()]
    (folder / "command").write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of this run")
    parser.add_argument("--vocabulary", type=Path, help="the published models' merges.txt")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the folder of the tars")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the interpreter of the peers")
    parser.add_argument("--try", dest="small", action="store_true", help="small towers, and as little as possible")
    parser.add_argument("--collect", action="store_true", help="run nothing: make the summary of what is there")
    given = parser.parse_args()
    given.output, given.data = given.output.resolve(), given.data.resolve()
    given.vocabulary = given.vocabulary and given.vocabulary.resolve()
    there = given.output / "summary.md"
    if there.is_file() and not there.read_text(encoding="utf-8").startswith(TITLE):
        parser.error(f"{there} is another summary: move it, or choose another folder")
    given.output.mkdir(parents=True, exist_ok=True)
    memory = given.output / "runs.json"
    runs = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {"parts": {}}
    runs.setdefault("machine", {"date": "unknown date", "commit": "unknown"})
    if not given.collect:
        measure(given, runs)
    collect(given, runs)


def machine_of(python: str) -> dict[str, str]:
    """What the figures depend on, as the interpreter of the peers sees it."""
    if python == sys.executable:
        return machine()
    code = "import json, peers; print(json.dumps(peers.machine()))"
    done = subprocess.run([python, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
