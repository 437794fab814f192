"""From JPEG files to the squares that a model takes, on one core: Pillow's plain path, `--decode exact` and `auto`.

    python benchmarks/decoding.py ../shared/data -o benchmarks/runs/DATE-MACHINE

DATA holds webdataset tars of real photographs. They are made into two sets of JPEGs: 500 x 375, and sharp ones of 12
megapixels (enlarged, with texture added at the scale of single pixels). The ways take turns within each round, about a
second each with all the pictures of a set, so that what else the machine does hits all of them; seconds are those of
the thread, ratios the medians of the rounds; within 10 % they are ties. `decoder alone` is what `auto with simplejpeg`
can't go below: the call that turns the bytes into pixels, at the size that is wanted. `auto` is shown with and without
simplejpeg, and with and without torch, whose resizing numpy does to the bit.

Then what it changes: pixels, and for `tiny` and a ViT-B/32 with random weights the cosine between the embeddings of the
two squares, beside that between different pictures. For `tiny`, also answers among its 200 classes, of all photographs
as they are and of both sets. Writes decoding.json and decoding.md; `--try` is a run of seconds, to see whether it runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from image_tower import config_of, machine
from numpy.typing import NDArray
from PIL import Image, ImageOps

import clipcli
from clipcli.images import fast
from clipcli.images.archives import members
from clipcli.images.decode import decode
from clipcli.images.fast import fast_square
from clipcli.images.transform import normalise, transform
from clipcli.model.clip import build_image_tower
from clipcli.model.config import Preprocess
from clipcli.records import Failure
from clipcli.zeroshot.classifier import Classifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

FULL, MANY = "imagenet-fullsize-20.tar", ("caltech20-dev.tar", "clothing10-dev.tar", "dtd10-dev.tar", "food10-dev.tar")
MARGIN = 0.02  # of scores: answers as close as that may change
SMALL, LARGE = "500 x 375", "4000 x 3000"
AGAIN = {SMALL: 10, LARGE: 1}  # so often each picture in a turn, which then takes about a second: not one of noise
Square = NDArray[np.uint8]
Way = Callable[[bytes], Square]


def photographs(data: Path, *names: str) -> Iterator[bytes]:
    """The JPEGs in some of the tars, as they are."""
    for name in names:
        for member in members(str(data / name)):
            if not isinstance(member, Failure) and member.data.startswith(b"\xff\xd8"):
                yield member.data


def made(photograph: bytes, size: tuple[int, int], seed: int) -> bytes:
    """The picture as a JPEG of that size; what is enlarged gets texture, as strong as the picture's own is there."""
    picture = ImageOps.fit(Image.open(io.BytesIO(photograph)).convert("RGB"), size, Image.Resampling.LANCZOS)
    if size[0] > 1000:
        pixels = np.asarray(picture).astype(np.float32)
        dice = np.random.default_rng(seed)
        for scale in (1, 2, 4):  # pixels
            grain = dice.standard_normal((size[1] // scale, size[0] // scale, 1), np.float32)
            pixels += 4 * grain.repeat(scale, 0).repeat(scale, 1)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def plain(data: bytes, size: int) -> Square:
    """What the original code does, in a line each."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, int(side * scale)) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def exact(data: bytes, size: int) -> Square:
    """`--decode exact`."""
    picture = decode("", data)
    assert not isinstance(picture, Failure), picture
    return transform(picture, Preprocess(), size)


def auto(data: bytes, size: int, package: Any, with_torch: bool) -> Square:
    """`--decode auto`, as it is with or without simplejpeg, and where torch is imported or not."""
    with replaced(fast, "simplejpeg", lambda: package), without_torch(not with_torch):
        square = fast_square("", data, Preprocess(), size)
    assert not isinstance(square, Failure), square
    return square


def decoder_alone(data: bytes, size: int) -> Square:
    """The one call of simplejpeg in it."""
    with Image.open(io.BytesIO(data)) as picture:
        stored = picture.size
    shrunk = fast._by_simplejpeg(data, stored, fast._shrink(stored, Preprocess().resize_mode, size, whole=False))
    assert shrunk is not None
    return shrunk


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """Another function in the place of one of the module's."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def without_torch(hidden: bool) -> Iterator[None]:
    """As if nothing had imported it."""
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules["torch"] = torch


def ways(size: int) -> dict[str, Way]:
    """What is compared, the baseline first."""
    found: dict[str, Way] = {"Pillow": partial(plain, size=size), "exact": partial(exact, size=size)}
    packages = {"": None} | ({" with simplejpeg": fast.simplejpeg()} if fast.simplejpeg() else {})
    for name, package in packages.items():
        for with_torch in (True, False):
            label = f"auto{name}" if with_torch else f"auto{name}, without torch"
            found[label] = partial(auto, size=size, package=package, with_torch=with_torch)
    return found


def timed(ways: dict[str, Way], files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """CPU seconds a picture by way, one number a round."""
    for way in ways.values():
        way(files[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.thread_time()
            for data in files:
                ways[name](data)
            seconds[name].append((time.thread_time() - began) / len(files))
    return seconds


def differences(way: Way, files: list[bytes], size: int) -> tuple[int, float]:
    """Largest and mean difference of a pixel to `exact`, in 255ths."""
    apart = [np.abs(way(data).astype(np.int16) - exact(data, size)) for data in files]
    return max(int(each.max()) for each in apart), float(np.mean([each.mean() for each in apart]))


def answers(classifier: Classifier, vectors: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The best label of each, and its margin: the score above that of the second."""
    logits = classifier.logit_scale * (vectors @ classifier.weight.T).astype(np.float64)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    order = np.sort(scores, axis=1)
    return scores.argmax(axis=1), order[:, -1] - order[:, -2]


def compared(
    encode: Callable[[Square], NDArray[np.float32]], way: Way, files: list[bytes], size: int
) -> dict[str, Any]:
    """Embeddings of the squares of `way` beside those of `exact`."""
    ours, theirs = (encode(np.stack([one(data) for data in files])) for one in (way, partial(exact, size=size)))
    cosines = np.einsum("ij,ij->i", ours.astype(np.float64), theirs.astype(np.float64))
    others = (theirs @ theirs.T)[~np.eye(len(theirs), dtype=bool)]
    return {
        "pictures": len(files),
        "lowest cosine": float(cosines.min()),
        "median cosine": float(np.median(cosines)),
        "median cosine between pictures": float(np.median(others)),
        "vectors": (ours, theirs),
    }


def effects(data: Path, sets: dict[str, list[bytes]], few: int | None, small: bool) -> list[dict[str, Any]]:
    """What `auto`, with the decoder that is here, changes for two models."""
    as_they_are = list(photographs(data, FULL, *MANY))[:few]
    model = clipcli.load_model("tiny", device="cpu")
    names = json.loads((data / "classes.json").read_text(encoding="utf-8"))["datasets"]["tiny-imagenet"]["names"]
    classifier = clipcli.build_classifier(model, list(dict.fromkeys(names)))
    architecture = "small ViT" if small else "ViT-B-32"
    config = config_of(architecture)
    arrays = {name.removeprefix("visual."): x for name, x in tiny.weights(config).items() if name.startswith("visual.")}
    tower = build_image_tower(config, arrays)

    def at_random(squares: Square) -> NDArray[np.float32]:
        with torch.inference_mode():
            chunks = (squares[start : start + 16] for start in range(0, len(squares), 16))
            parts = [tower(torch.from_numpy(normalise(chunk, Preprocess()))) for chunk in chunks]
        x: NDArray[np.float32] = torch.nn.functional.normalize(torch.cat(parts)).numpy()
        return x

    rows = []
    for name, files in {"photographs as they are": as_they_are, **sets}.items():
        for what, encode, size in (
            ("tiny", model.encode_image, model.config.vision.image_size),
            (f"{architecture}, random weights", at_random, config.vision.image_size),
        ):
            way = partial(auto, size=size, package=fast.simplejpeg(), with_torch=True)
            found = compared(encode, way, files, size)
            ours, theirs = found.pop("vectors")
            if what == "tiny":
                (label, margin), (other, _) = answers(classifier, theirs), answers(classifier, ours)
                found["answers"] = {
                    "changed": int((label != other).sum()),
                    f"of them with a margin above {MARGIN}": int(((label != other) & (margin > MARGIN)).sum()),
                }
            rows.append({"model": what, "size": size, "set": name, **found})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    where = ", ".join(f"{name}: {value}" for name, value in result["machine"].items())
    lines = [f"`{result['command']}`", "", f"{where}. Times of one thread, squares of {result['size']} pixels.", ""]
    lines += ["| way | " + " | ".join(f"{name}: a second | ratio" for name in result["times"]) + " |"]
    lines += ["|---" * (1 + 2 * len(result["times"])) + "|"]
    for way in next(iter(result["times"].values())):
        cells = []
        for seconds in result["times"].values():
            ratio = statistics.median(a / b for a, b in zip(seconds["Pillow"], seconds[way], strict=True))
            cells.append(f"{1 / statistics.median(seconds[way]):.1f} | {ratio:.2f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", "| pixels, against `exact` | set | largest difference | mean |", "|---|---|---|---|"]
    lines += [f"| {way} | {name} | {most} | {mean:.4f} |" for way, name, most, mean in result["pixels"]]
    lines += [
        "",
        "| model | pictures | lowest cosine | median | between pictures | answers |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["effects"]:
        changed = ", ".join(f"{what}: {count}" for what, count in row.get("answers", {}).items()) or "–"
        cosines = f"{row['lowest cosine']:.6f} | {row['median cosine']:.6f}"
        lines.append(
            f"| {row['model']}, {row['size']} px | {row['pictures']}, {row['set']} | {cosines} "
            f"| {row['median cosine between pictures']:.3f} | {changed} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the tars")
    parser.add_argument("-o", "--output", type=Path, help="a folder for decoding.json and decoding.md")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", type=int, default=6, help="pictures of 12 megapixels")
    parser.add_argument("--try", dest="small", action="store_true", help="a few pictures, a small tower")
    given = parser.parse_args()
    torch.set_num_threads(1)
    few = 4 if given.small else None
    photos = list(photographs(given.data, FULL))[:few]
    sets = {SMALL: [made(photo, (500, 375), 0) for photo in photos]}
    large = photos[: 2 if given.small else given.large]
    sets[LARGE] = [made(photo, (4000, 3000), seed) for seed, photo in enumerate(large)]
    compared_ways = ways(given.size)
    timed_ways = compared_ways | (
        {"decoder alone": partial(decoder_alone, size=given.size)} if fast.simplejpeg() else {}
    )
    rounds = 2 if given.small else given.rounds
    times = {name: timed(timed_ways, files * AGAIN[name], rounds) for name, files in sets.items()}
    pixels = [
        (way, name, *differences(compared_ways[way], files, given.size))
        for way in compared_ways
        if way != "exact"
        for name, files in sets.items()
    ]
    torch.set_num_threads(os.cpu_count() or 1)
    versions = {"pillow": PIL.__version__, "simplejpeg": getattr(fast.simplejpeg(), "__version__", "not there")}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine() | versions,
        "size": given.size,
        "times": times,
        "pixels": pixels,
        "effects": effects(given.data, sets, few, given.small),
    }
    print(markdown(result))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "decoding.md").write_text(markdown(result), encoding="utf-8")
        (given.output / "decoding.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
