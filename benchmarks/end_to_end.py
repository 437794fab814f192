"""From JPEG files to answers, fp32 on the CPU: clipcli's `classify`, and open_clip's loop with a DataLoader.

    python benchmarks/end_to_end.py ../shared/data -o benchmarks/runs/DATE-MACHINE

DATA holds webdataset tars of real photographs, of which two sets of JPEG files are made: 500 x 375, and sharp ones of
12 megapixels. ViT-B/32 with random weights, the same for both, and their embeddings are compared. The loops take turns
within each round, so that what else the machine does hits all of them; only ratios are to be trusted, and within 10 %
they are ties. open_clip's loop is run without and with two worker processes, and the faster of both counts; where
torchvision isn't there, its three transforms are made of the same calls of Pillow.

Each round also measures what clipcli's decoding and its model do alone, on the same cores: taking turns, both together
allow 1 / (1 / decoding + 1 / model) pictures a second, of which the table shows what the run reached. Nothing is kept
in a store. Writes end_to_end.json (all times) and end_to_end.md; `--try` is a run of seconds with a small tower.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoding import FULL, LARGE, MANY, SMALL, made, photographs
from image_tower import Form, config_of, machine, open_clip_form, ratio
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import clipcli
from clipcli.images.stream import batches, cpus, default_workers, make_prepare
from clipcli.model.config import Preprocess
from clipcli.records import Label, Source
from clipcli.tasks.embed import EmbedOptions
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

LABELS = 1000


class Files(Dataset[Tensor]):
    """Pictures as open_clip's preprocessing makes them."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (Preprocess().mean, Preprocess().std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.open(self.paths[index]).convert("RGB")
        scale = self.size / min(picture.size)
        width, height = (max(self.size, int(side * scale)) for side in picture.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(self.mean).div_(self.std)


@torch.inference_mode()
def loop(tower: Form, weight: Tensor, paths: Sequence[str], size: int, workers: int) -> Tensor:
    """The usual script: batches of 32, softmax, the best five. Returns the embeddings."""
    found = []
    for batch in DataLoader(Files(paths, size), batch_size=32, num_workers=workers):
        features = nn.functional.normalize(tower(batch), dim=1)
        (100 * features @ weight.T).softmax(dim=1).topk(5)
        found.append(features)
    return torch.cat(found)


def decoding(paths: Sequence[str], model: Model, options: EmbedOptions) -> None:
    """What `classify` does before the model."""
    prepare = make_prepare(model.config.preprocess, model.config.vision.image_size, decode=options.decode)
    batch_size, workers = options.speed(model)
    for _ in batches(map(Source, paths), prepare, batch_size=batch_size, workers=workers):
        pass


def encoding(count: int, model: Model, options: EmbedOptions) -> None:
    """What `classify` does after decoding, but for the labels."""
    size = model.config.vision.image_size
    batch_size, _ = options.speed(model)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, size, size), np.uint8)
    for start in range(0, count, batch_size):
        model.encode_image(pixels[: count - start])


def measure(paths: Sequence[str], model: Model, tower: Form | None, rounds: int) -> dict[str, list[float]]:
    """Seconds a picture, by what was run, one number a round."""
    size = model.config.vision.image_size
    dice = np.random.default_rng(1).standard_normal((LABELS, model.config.embed_dim), np.float32)
    weight = dice / np.linalg.norm(dice, axis=1, keepdims=True)
    names = tuple(Label(f"label {i}", ()) for i in range(LABELS))
    classifier = Classifier(weight, names, 100.0, model.name, model.image_fingerprint, model.text_fingerprint)
    usual, options = EmbedOptions(), clipcli.ClassifyOptions()
    runs: dict[str, Callable[[], object]] = {
        "clipcli": lambda: list(clipcli.classify(paths, classifier, model, options)),
        "clipcli, exact": lambda: list(
            clipcli.classify(paths, classifier, model, clipcli.ClassifyOptions(decode="exact"))
        ),
        "decoding alone": lambda: decoding(paths, model, usual),
        "model alone": lambda: encoding(len(paths), model, usual),
    }
    if tower is not None:
        for workers in (0, 2):
            runs[f"open_clip, {workers} workers"] = lambda workers=workers: loop(  # type: ignore[misc]
                tower, torch.from_numpy(weight), paths, size, workers
            )
        theirs = loop(tower, torch.from_numpy(weight), paths[:8], size, 0).numpy()
        ours = np.stack([row.vector for row in clipcli.embed(paths[:8], model) if isinstance(row, clipcli.Embedded)])
        assert (ours * theirs).sum(axis=1).min() >= 0.999, "open_clip gives other embeddings"
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            runs[name]()
            spent[name].append((time.perf_counter() - began) / len(paths))
    return spent


def best_loop(spent: dict[str, list[float]]) -> str | None:
    """The faster of open_clip's loops."""
    loops = [name for name in spent if name.startswith("open_clip")]
    return min(loops, key=lambda name: statistics.median(spent[name]), default=None)


def of_allowed(spent: dict[str, list[float]]) -> float:
    """The part that `classify` reached of what decoding and model allow, the median over the rounds."""
    parts = zip(spent["clipcli"], spent["decoding alone"], spent["model alone"], strict=True)
    return statistics.median((decode + model) / whole for whole, decode, model in parts)


def summary(found: dict[str, Any]) -> Iterator[str]:
    """The Markdown of a whole run."""
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    yield "# From JPEG files to answers\n"
    yield f"`{found['command']}`; {found['rounds']} rounds, medians. {about[0].upper()}{about[1:]}.\n"
    yield f"{found['model']}, fp32, random weights, {LABELS:,} labels; {found['cpus']} CPUs, {found['workers']}"
    yield f"decoding threads; peak memory of the whole process {found['memory']:,} MiB.\n"
    names = list(found["results"][0]["seconds"])
    yield "| pictures | " + " | ".join(f"{name}, /s" for name in names) + " | ratio | of what both allow |"
    yield "|---|" + "---:|" * (len(names) + 2)
    for result in found["results"]:
        spent = result["seconds"]
        rates = " | ".join(f"{1 / statistics.median(spent[name]):.1f}" for name in names)
        peer = best_loop(spent)
        times = "–" if peer is None else f"{ratio(spent, 'clipcli', peer):.2f}"
        yield f"| {result['count']} of {result['pictures']} | {rates} | {times} | {of_allowed(spent):.0%} |"
    yield ""
    if best_loop(found["results"][0]["seconds"]) is None:
        yield "open_clip can't be imported here."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the tars")
    parser.add_argument("-o", "--output", type=Path, help="a folder for end_to_end.json and end_to_end.md")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs=2, default=[256, 64], help="small and large pictures")
    parser.add_argument("--try", dest="small", action="store_true", help="a few pictures, a small tower")
    given = parser.parse_args()
    if given.small:
        given.model, given.rounds, given.counts = "small ViT", 2, [12, 3]
    config = config_of(given.model)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = clipcli.load_model(tiny.save(Path(folder) / "model", config=config), device="cpu")
        try:
            arrays = {name: array for name, array in tiny.weights(config).items() if name.startswith("visual.")}
            tower: Form | None = open_clip_form(config, arrays)
        except ImportError as error:
            print(f"no open_clip ({error})", file=sys.stderr)
            tower = None
        sources = {
            SMALL: (photographs(given.data, *MANY), (500, 375)),
            LARGE: (photographs(given.data, FULL), (4000, 3000)),
        }
        for (name, (photos, size)), count in zip(sources.items(), given.counts, strict=True):
            few = list(islice(photos, count))
            paths = []
            for number, photo in enumerate(islice(cycle(few), count)):
                paths.append(f"{folder}/{size[0]}-{number}.jpg")
                Path(paths[-1]).write_bytes(made(photo, size, number))
            spent = measure(paths, model, tower, given.rounds)
            results.append({"pictures": name, "count": count, "seconds": spent})
            print(name, {k: f"{1 / statistics.median(v):.1f}/s" for k, v in spent.items()}, file=sys.stderr)
    found = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "model": given.model,
        "rounds": given.rounds,
        "cpus": cpus(),
        "workers": default_workers(),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "results": results,
    }
    text = "\n".join(summary(found))
    print(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "end_to_end.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.output / "end_to_end.md").write_text(text)


if __name__ == "__main__":
    main()
