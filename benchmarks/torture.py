"""What three tools make of the torture folder (tests/torture.py): clipcli, a transformers pipeline, a ten-line script.

    nice python benchmarks/torture.py > benchmarks/runs/DATE-MACHINE/torture.md

All three run the same small random model, offline: what is compared is which files get an answer, not which answer. The
others are run twice: as their documentation shows it, and with the `try` around each picture that everybody adds on the
second day. They see the files that have a picture's ending, since neither walks folders.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
LABELS = ("cat", "dog")
SECONDS, PATIENCE = 30, 180  # of this process and of the clock, for one picture; what takes longer hangs
ENDINGS = {
    ".jpg",
    ".jpeg",
    ".png",
    ".gif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".jpeg2000",
    ".ppm",
    ".heic",
    ".jxl",
}
Answers = dict[str, str]  # path -> a label, or what went wrong
One = Callable[[str], str]

SCRIPT = """\
for path in paths:
    image = preprocess(Image.open(path).convert("RGB")).unsqueeze(0)
    with torch.no_grad():
        features = model.get_image_features(image)
    features = features / features.norm(dim=-1, keepdim=True)
    scores = (100 * features @ text.T).softmax(dim=-1)
    print(path, labels[scores.argmax()], float(scores.max()))
"""


class Hangs(Exception):
    """A picture took longer than it may."""


@contextlib.contextmanager
def bounded() -> Any:
    """Raise `Hangs` where the block takes too long."""

    def ring(*_: object) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def save_model(folder: Path) -> Path:
    """A small random model that both clipcli and transformers read."""
    import tiny

    path = tiny.save(folder, "transformers")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *tiny.merges(), ""]), encoding="utf-8")
    from clipcli.tokenizer import Tokenizer

    (path / "vocab.json").write_text(json.dumps(Tokenizer.from_file(path / "merges.txt").ids), encoding="utf-8")
    return path


def of_clipcli(folder: Path, model: Path) -> Answers:
    """The rows of one run."""
    command = [
        sys.executable,
        "-m",
        "clipcli",
        "classify",
        str(folder),
        "-m",
        str(model),
        "-f",
        "jsonl",
        "--no-cache",
        "-q",
    ]
    output = subprocess.run([*command, *(f"-L{label}" for label in LABELS)], capture_output=True, cwd=ROOT).stdout
    answers = {}
    for line in output.splitlines():
        row = json.loads(line)
        path = os.fsdecode(base64.b64decode(row["path_bytes"])) if "path_bytes" in row else row["path"]
        answers[path] = f"{row['error']['kind']}" if row["error"] else "label"
    return answers


def pipeline_of(model: Path) -> Any:
    """The pipeline as its documentation makes it."""
    from transformers import pipeline

    return pipeline("zero-shot-image-classification", model=str(model))


def script_of(model: Path) -> One:
    """What is done with one picture in the ten lines."""
    import numpy as np
    import torch
    from PIL import Image

    from clipcli.images.transform import normalise, transform
    from clipcli.weights.model import load_model

    loaded = load_model(str(model))
    preprocess, size = loaded.config.preprocess, loaded.config.vision.image_size

    def one(path: str) -> str:
        with Image.open(path) as picture:  # the model's preprocessing is the original one: equal bit for bit (tests)
            pixels = transform(picture.convert("RGB"), preprocess, size, pixels="reference")
        assert torch.isfinite(torch.from_numpy(normalise(pixels[None], preprocess))).all()
        assert np.isfinite(loaded.encode_image(pixels[None])).all()
        return "label"

    return one


def each(paths: Sequence[str], one: One) -> Answers:
    """With a `try` around each picture, and around the line that is printed."""
    answers = {}
    for path in paths:
        try:
            with bounded():
                answers[path] = one(path)
            f"{path}\tlabel\n".encode()  # as `print` does
        except Exception as error:
            answers[path] = "hangs" if isinstance(error, Hangs) else type(error).__name__
    return answers


def all_at_once(paths: Sequence[str], pipe: Any) -> tuple[int, str]:
    """A list goes in, a list comes out: answers, and what was raised in their place."""
    try:
        return len(pipe(list(paths), candidate_labels=list(LABELS))), "after the last file"
    except Exception as error:
        return 0, f"with {type(error).__name__}, and no answer for any"


def until_it_dies(paths: Sequence[str], one: One) -> tuple[int, str]:
    """Pictures answered before the first exception, and which that is."""
    for number, path in enumerate(paths):
        outcome = each([path], one)[path]
        if outcome != "label":
            return number, f"with {outcome} at `{ascii(Path(path).name)[1:-1]}`"
    return len(paths), "after the last file"


def seen_otherwise(pictures: Sequence[str]) -> list[str]:
    """Pictures whose squares, as the ten lines make them, are not what a person sees."""
    import numpy as np

    from clipcli.images.decode import open_picture
    from clipcli.images.transform import transform
    from clipcli.model.config import Preprocess
    from clipcli.records import Failure, Source

    found = []
    for path in pictures:
        stored, seen = open_picture(Source(path), "reference"), open_picture(Source(path), "auto")
        if isinstance(stored, Failure) or isinstance(seen, Failure):
            continue
        squares = transform(stored, Preprocess(), 64, pixels="reference"), transform(seen, Preprocess(), 64)
        if np.abs(squares[0].astype(int) - squares[1]).mean() > 8:
            found.append(Path(path).name)
    return found


def table(folder: Path, cases: Sequence[Any], answers: dict[str, Answers]) -> list[str]:
    """A line for each kind of file and outcome."""
    groups: Counter[tuple[str, ...]] = Counter()
    example: dict[tuple[str, ...], str] = {}
    for case in cases:
        path = str(folder / case.name)
        key = (case.kind, *(found.get(path, "no row") for found in answers.values()))
        groups[key] += 1
        example.setdefault(key, case.name)
    lines = [f"| files | such as | what it is | {' | '.join(answers)} |", "|---:|---|---|" + "---|" * len(answers)]
    for key, count in sorted(groups.items(), key=lambda item: (item[0][0] != "a label", item[0])):
        name = ascii(example[key])[1:-1].replace("|", "\\|")
        name = name if len(name) < 40 else f"{name[:36]}…"
        lines.append(f"| {count} | `{name}` | {key[0].replace('a label', 'a picture')} | {' | '.join(key[1:])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore")
    import PIL
    import torture
    import transformers

    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # names in the report are short ones
        folder, model = Path("t"), save_model(Path(place) / "model")
        cases = torture.build(folder)
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.is_dir())
        pipe = pipeline_of(model)

        def piped(path: str) -> str:
            pipe(path, candidate_labels=list(LABELS))
            return "label"

        script = script_of(model)
        with contextlib.redirect_stderr(io.StringIO()):
            answers = {
                "clipcli": of_clipcli(folder.resolve(), model),
                "pipeline, `try` around each": each(paths, piped),
                "ten lines, `try` around each": each(paths, script),
            }
            answers["clipcli"] = {os.path.relpath(path, Path.cwd()): kind for path, kind in answers["clipcli"].items()}
            otherwise = seen_otherwise(
                [path for path in paths if answers["ten lines, `try` around each"][path] == "label"]
            )
            died = {"pipeline": all_at_once(paths, pipe), "ten lines": until_it_dies(paths, script)}
    total = sum(case.kind != torture.OTHER for case in cases)
    pictures = [str(folder / case.name) for case in cases if case.kind == torture.GOOD]
    print("# The torture folder\n")
    print(f"{len(cases)} files, {total} of which should have a row, {len(pictures)} of these a label.")
    print(f"Pillow {PIL.__version__}, transformers {transformers.__version__}; `python benchmarks/torture.py`.\n")
    print("The ten lines, after a model and the vectors of the labels were loaded; open_clip is not installed here, so")
    print("that clipcli's own tower and `--pixels reference`, the original preprocessing, stand in for its model:\n")
    print(f"```python\n{SCRIPT}```\n")
    print("| | answers | pictures without an answer | ends |\n|---|---:|---:|---|")
    for tool, (rows, why) in died.items():
        print(f"| {tool}, as documented | {rows} | {len(pictures) - rows} | {why} |")
    for tool, found in answers.items():
        rows = sum(kind == "label" for kind in found.values())
        lost = sum(found.get(path) != "label" for path in pictures)
        told = f", with {len(found) - rows} failures as rows" if tool == "clipcli" else ""
        print(f"| {tool} | {rows} | {lost} | after the last file{told} |")
    print(f"\nOf the ten lines' answers, {len(otherwise)} are about other pixels than a person sees:", end=" ")
    print(", ".join(f"`{name}`" for name in otherwise) + ".")
    print("\nWhat became of each:\n")
    print("\n".join(table(folder, cases, answers)))


if __name__ == "__main__":
    main()
