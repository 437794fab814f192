"""Relabelling: 100,000 embeddings of 512 dimensions by 1,000 labels, against the bare matrix product.

    python benchmarks/relabel.py [-n PICTURES] -o benchmarks/runs/DATE-MACHINE

Each round runs, one after the other: numpy's product of the same matrices in chunks of 1,024; `classify` on an
embeddings file; `classify` on as many files whose embeddings lie in the store. Both are whole processes that write a
JSON line a picture. A ratio is the wall time of the process by that of the product, in the same round.
Writes relabel.json (all times) and relabel.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from peers import compile_clipcli

DIM, LABELS, CHUNK = 512, 1_000, 1024
TITLES = ("the product alone", "from an embeddings file", "from the store, by file")


def unit(rows: int, seed: int) -> np.ndarray:
    """Random unit vectors [rows, DIM]."""
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_model(folder: Path) -> None:
    """A model with small towers and embeddings of DIM dimensions."""
    import torch

    from clipcli.model.clip import CLIP
    from clipcli.model.config import ClipConfig, Preprocess, TextConfig, ViTConfig
    from clipcli.weights.save import save_model

    vision = ViTConfig(32, 16, 32, 1, 1, 64, "gelu")
    text = TextConfig(context_length=16, vocab_size=514, width=32, layers=1, heads=1, mlp_width=64, activation="gelu")
    config = ClipConfig(DIM, vision, text, Preprocess())
    torch.manual_seed(0)
    arrays = {name: tensor.detach().numpy() for name, tensor in CLIP(config).state_dict().items()}
    save_model(folder, config, arrays, merges="#version: 0.2\n", card="For a benchmark.\n", training={})


def fill(folder: Path, count: int) -> None:
    """Model, classifier file, embeddings file, and files that the store knows."""
    from clipcli import Store, load_model, save_classifier
    from clipcli.output.spool import save_embeddings
    from clipcli.records import Embedded, Label
    from clipcli.store import keys
    from clipcli.tasks.embed import EmbedOptions, _Remembered
    from clipcli.zeroshot.classifier import Classifier

    make_model(folder / "model")
    with Store(folder / "cache" / "store.sqlite") as store:
        model = load_model(str(folder / "model"), store=store)
        names = tuple(Label(f"label {i}", (f"label {i}",)) for i in range(LABELS))
        weight = unit(LABELS, 0)
        fingerprints = (model.image_fingerprint, model.text_fingerprint)
        save_classifier(Classifier(weight, names, 100.0, model.name, *fingerprints), folder / "labels.safetensors")
        vectors = unit(count, 1)
        paths = [str(folder / "pictures" / f"{i // 1000:03}" / f"{i % 1000:03}.jpg") for i in range(count)]
        rows = map(Embedded, paths, vectors)
        save_embeddings(rows, folder / "pictures.safetensors", model, pixels="auto", crop="model")
        memory = _Remembered(model, EmbedOptions())
        files, known = {}, {}
        for path, vector in zip(paths, vectors, strict=True):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(path.encode())  # never decoded: the store knows them
            digest = keys.picture_digest(path.encode())
            files[keys.file_key(Path(path), "picture")] = digest
            known[keys.embedding_key(digest, memory._policy, *memory._maker)] = vector
        store.keep_pictures(files, known, model.image_fingerprint)


def product(vectors: np.ndarray, weight: np.ndarray) -> float:
    """Seconds of the bare product."""
    began = time.perf_counter()
    for start in range(0, len(vectors), CHUNK):
        vectors[start : start + CHUNK] @ weight.T
    return time.perf_counter() - began


def classify(folder: Path, pictures: Path, count: int) -> float:
    """Seconds of a whole process that writes a row for each of `pictures`."""
    command = [sys.executable, "-m", "clipcli", "classify", pictures, "-m", folder / "model", "-q"]
    options = ["-c", folder / "labels.safetensors", "-f", "jsonl"]
    began = time.perf_counter()
    with (folder / "rows.jsonl").open("wb") as rows:
        subprocess.run([*map(str, [*command, *options])], stdout=rows, check=True)
    seconds = time.perf_counter() - began
    with (folder / "rows.jsonl").open("rb") as rows:
        assert sum(b'"error": null' in row for row in rows) == count
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--pictures", type=int, default=100_000)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the two files")
    given = parser.parse_args()
    compile_clipcli()
    count = given.pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"CLIPCLI_CACHE_DIR": f"{name}/cache"}
        fill(folder, count)
        vectors, weight = unit(count, 1), unit(LABELS, 0)
        rounds = [
            (
                product(vectors, weight),
                classify(folder, folder / "pictures.safetensors", count),
                classify(folder, folder / "pictures", count),
            )
            for _ in range(given.rounds)
        ]
    lines = [
        f"{count:,} embeddings x {LABELS:,} labels, numpy {np.__version__}, {os.cpu_count()} CPUs, "
        f"orjson {'found' if find_spec('orjson') else 'not found'}",
        "",
        "| | seconds (median) | x the bare product (median of the rounds' ratios) |",
        "|---|---|---|",
    ]
    for place, title in enumerate(TITLES):
        seconds = statistics.median(one[place] for one in rounds)
        ratio = statistics.median(one[place] / one[0] for one in rounds)
        lines.append(f"| {title} | {seconds:.2f} | {ratio:.1f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        seconds = dict(zip(TITLES, zip(*rounds, strict=True), strict=True))
        found = {"pictures": count, "labels": LABELS, "seconds": seconds}
        (given.output / "relabel.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        about = f"# Relabelling\n\n`python benchmarks/relabel.py -n {count}`\n\n{text}"
        (given.output / "relabel.md").write_text(about, encoding="utf-8")


if __name__ == "__main__":
    main()
