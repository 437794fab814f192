"""Real ViT-B/32 vectors at work: files that `classify` and `eval` read, and what a probe learns from them.

    python benchmarks/real_vectors.py VECTORS.npz FOLDER

In: 2,428 image vectors of Flickr8k pictures with five captions each, and the text vectors of 80 COCO names ("a dog"),
all of OpenAI's ViT-B/32. Out, in FOLDER: real.safetensors (embeddings), coco.safetensors (classifier), truth.csv, and
model, a stand-in with other towers: no weights came with the vectors, and the commands want a model of their width.

    clipcli classify FOLDER/real.safetensors -c FOLDER/coco.safetensors -m FOLDER/model

Truth is weak: a picture shows what two or more of its captions name, where that is one of 80 things alone, people
aside ("orange" is left out: nearly always the colour). Classes of fewer than 12 pictures are left out, and of larger
ones all but 40 at random.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from relabel import make_model

from clipcli import load_model, save_classifier, save_embeddings
from clipcli.cli.probe import table
from clipcli.records import Embedded, Label
from clipcli.tasks.labelled import LabelledSet
from clipcli.tasks.pairs import at_most
from clipcli.tasks.probe import probe
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Classifier

SCALE, NAMERS, LEAST, MOST = 100.0, 2, 12, 40  # OpenAI's scale; captions; pictures a class
UNSEEN = ("person", "orange")


def named(captions: str, names: list[str]) -> list[str]:
    """The names that enough of the captions say."""
    said = [[name for name in names if re.search(rf"\b{name}(e?s)?\b", line)] for line in captions.split("\n")]
    return [name for name in names if sum(name in line for line in said) >= NAMERS]


def classifier(names: list[str], vectors: np.ndarray, model: Model) -> Classifier:
    """The text vectors as a file keeps them."""
    weight = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = tuple(Label(name, (name,)) for name in names)
    return Classifier(weight, labels, SCALE, model.name, model.image_fingerprint, model.text_fingerprint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    make_model(args.folder / "model")
    model = load_model(args.folder / "model")

    data = np.load(args.vectors)
    files, names = data["image_files"].tolist(), data["coco_names"].tolist()
    images, texts = data["image_features"].astype(np.float32), data["coco_text_features"].astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    save_embeddings(map(Embedded, files, images), args.folder / "real.safetensors", model)
    save_classifier(classifier(names, texts, model), args.folder / "coco.safetensors")

    things = [name for name in names if name not in UNSEEN]
    rows: dict[str, list[int]] = defaultdict(list)
    for row, captions in enumerate(data["image_captions"].tolist()):
        found = named(captions, things)
        if len(found) == 1:
            rows[found[0]].append(row)
    classes = sorted(name for name in rows if len(rows[name]) >= LEAST)
    kept = at_most({name: rows[name] for name in classes}, MOST, seed=0)
    truth = np.array([next(i for i, name in enumerate(classes) if row in rows[name]) for row in kept])
    with (args.folder / "truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((files[r], classes[t]) for r, t in zip(kept, truth, strict=True))]
        )

    pictures = LabelledSet(images[kept], truth, tuple(classes), tuple(files[row] for row in kept), ())
    text = classifier(classes, texts[[names.index(name) for name in classes]], model)
    found = probe(pictures, model, text)
    print(f"{len(kept)} pictures of {len(classes)} classes: {', '.join(classes)}")
    print("\n".join(table(found)))
    print(f"equal to zero-shot: {found.equal_shots} shots; strengths: {dict(found.strengths)}")
    save_classifier(found.classifier, args.folder / "probe.safetensors")


if __name__ == "__main__":
    main()
