"""Runtimes for the image tower on a CPU: open_clip, what clipcli runs in torch, ONNX Runtime, OpenVINO; fp32 and int8.

    python benchmarks/runtime.py -o benchmarks/runs/DATE-MACHINE
    python benchmarks/runtime.py --data ../data --agreement DIR   # no times: what int8 changes, DIR is a trained model

Random weights of the real architectures, the same for all; ONNX Runtime and OpenVINO get the same graph, clipcli's.
In OpenVINO's int8 the weights are rounded as ours, a row at a time, and activations as it sees fit. The forms take
turns within each round: only ratios are to be trusted, and within 10 % they are ties. How far int8 is from fp32 is told
for noise and for the photographs of `--data` (webdataset tars, with those names). Writes runtime.json (all times) and
runtime.md. `--try` is a run of seconds with small towers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from image_tower import Form, build, config_of, measure, ratio
from numpy.typing import NDArray
from peers import machine

from clipcli import build_classifier, embed, load_model
from clipcli.images.decode import decode
from clipcli.images.transform import transform
from clipcli.model import graph
from clipcli.model.config import ClipConfig, ViTConfig
from clipcli.records import Embedded, Failure
from clipcli.tasks.verify import changed_answers
from clipcli.weights.load import Checkpoint, load_checkpoint
from clipcli.weights.model import Model
from clipcli.weights.onnx_images import OnnxImages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

MODELS, MORE, SMALL = ["ViT-B-32", "RN50"], ["ViT-B-32-256", "ViT-B-16"], ["small ViT", "small RN"]
DATA = ("caltech20-dev.tar", "imagenet-fullsize-20.tar", "food10-dev.tar", "pacs-dev.tar")
Pixels = NDArray[np.uint8]


def with_pixels(form: Form, config: ClipConfig) -> Form:
    """A form that takes normalised floats, as one that takes uint8."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.preprocess.mean, config.preprocess.std))
    return lambda pixels: form(pixels.float().div_(255).sub_(mean).div_(std))


class Dequantized(graph._Graph):
    """int8 as OpenVINO reads it: weights that are made floats before the product."""

    def linear(self, x: str, weight: Any, bias: Any = None, rounded: bool = False) -> str:
        """As it is there."""
        if not rounded:
            return super().linear(x, weight, bias)
        scale = np.abs(weight).max(axis=1) / np.float32(127)
        whole = np.rint(weight / scale[:, None]).astype(np.int8)
        return self("Gemm", x, self("DequantizeLinear", whole, scale, axis=0), bias, transB=1)


def openvino(checkpoint: Checkpoint, *, int8: bool) -> Form:
    """The graph in OpenVINO, which takes the weights from a file. Raises ImportError."""
    import onnx
    import openvino as ov

    with patch.object(graph, "_Graph", Dequantized if int8 else graph._Graph):
        written, arrays = graph.build(checkpoint.config, checkpoint.arrays, 127 if int8 else None)
    model = onnx.load_from_string(written)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "tower.onnx"))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = ov.Core().compile_model(Path(folder, "tower.onnx"), "CPU", settings)
    return lambda pixels: torch.from_numpy(compiled(pixels.numpy())[0].copy())


def forms_of(model: str, folder: Path) -> dict[str, Form]:
    """Those that there are."""
    config = config_of(model)
    forms = {name: with_pixels(form, config) for name, form in build(model, ["open_clip", "fast"]).items()}
    written = load_checkpoint(tiny.save(folder / model, config=config, vocabulary=False))
    checkpoint = replace(written, config=config)  # whose heads are as wide as they should be
    for int8 in (False, True)[: 1 + isinstance(config.vision, ViTConfig)]:
        precision = "int8" if int8 else "fp32"
        images = OnnxImages(checkpoint, precision, "", None)  # type: ignore[arg-type]
        forms[f"onnx {precision}"] = lambda pixels, own=images: torch.from_numpy(own.submit(pixels.numpy())())  # type: ignore[misc]
        try:
            forms[f"openvino {precision}"] = openvino(checkpoint, int8=int8)
        except (ImportError, RuntimeError) as error:  # its own errors are the latter
            print(f"{model}: no openvino {precision} ({' '.join(str(error).split())[:300]})", file=sys.stderr)
    return forms


def photographs(data: Path, size: int, config: ClipConfig, most: int = 10) -> Pixels:
    """Squares [n, 3, size, size] from the archives in `data`, so many of each; fewer where there are no more."""
    squares = []
    for name in DATA:
        with tarfile.open(data / name) as archive:
            members = [member for member in archive if member.name.endswith((".jpg", ".png"))]
            for member in members[:: max(1, len(members) // most)][:most]:
                file = archive.extractfile(member)
                picture = decode(member.name, file.read()) if file else Failure(member.name, "missing", "")  # type: ignore[arg-type]
                if not isinstance(picture, Failure):
                    squares.append(transform(picture, config.preprocess, size))
    return np.stack(squares)


def agreement(forms: dict[str, Form], pictures: Pixels) -> dict[str, float]:
    """The least cosine of each form's embeddings to the fast one's, eight pictures at a time."""

    def unit(form: Form) -> torch.Tensor:
        parts = torch.from_numpy(pictures).split(8)
        return torch.nn.functional.normalize(torch.cat([form(part).float() for part in parts]))

    with torch.inference_mode():
        exact = unit(forms["fast"])
        return {name: float((unit(form) * exact).sum(dim=1).min()) for name, form in forms.items() if name != "fast"}


def trained(folder: Path, archive: Path) -> Iterator[str]:
    """What ONNX Runtime changes in a model that has learned something: a line for each precision."""
    with tarfile.open(archive) as opened:
        words = [opened.extractfile(member) for member in opened if member.name.endswith(".txt")]
        names = sorted({file.read().decode().strip() for file in words if file})
    exact = load_model(folder, device="cpu", runtime="torch")
    classifier = build_classifier(exact, names)

    def encode(model: Model) -> NDArray[np.float32]:
        return np.stack([row.vector for row in embed(str(archive), model) if isinstance(row, Embedded)])

    right = encode(exact)
    for precision in ("fp32", "int8"):
        model = load_model(folder, runtime="onnx", precision=precision)
        found = encode(model)
        answers = found @ classifier.weight.T, right @ classifier.weight.T
        changed = [changed_answers(*answers, classifier.logit_scale, margin) for margin in (-1, 0.01, 0.05)]
        yield (
            f"{model.arithmetic}: {len(found):,} pictures, {len(names)} labels, least cosine to torch-fp32 "
            f"{(found * right).sum(axis=1).min():.6f}; answers changed: {changed[0]}, where the margin exceeds 0.01 "
            f"{changed[1]}, 0.05 {changed[2]}"
        )


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The Markdown of what was measured."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"] if name != "peak"))
    yield "| model | batch | " + " | ".join(f"{name}, pictures/s (× open_clip)" for name in names) + " |"
    yield "|---|---:|" + "---:|" * len(names)
    for result in results:
        spent, batch = result["seconds"], result["batch"]
        cells = [
            f"{batch / statistics.median(spent[name]):.1f}"
            + (f" ({ratio(spent, name, 'open_clip'):.2f})" if "open_clip" in spent else "")
            if name in spent
            else "–"
            for name in names
        ]
        yield f"| {result['model']} | {batch} | {' | '.join(cells)} |"
    yield "\nLeast cosine to the fast form in torch:\n"
    for result in results:
        for what, found in result["agreement"].items():
            yield f"- {result['model']}, {what}: " + ", ".join(f"{name} {least:.6f}" for name, least in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the two files")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *MORE, *SMALL], default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--agreement", type=Path, metavar="DIR", help="only compare the answers of this model")
    parser.add_argument("--try", dest="small", action="store_true", help="small towers, and as little as possible")
    given = parser.parse_args()
    if given.agreement:
        print(*trained(given.agreement, given.data / "tiny-imagenet-val-dev.tar.gz"), sep="\n")
        return
    if given.small:
        given.models, given.batches, given.rounds = SMALL, [2, 5], 2
    results = []
    for model in given.models:
        config = config_of(model)
        size = config.vision.image_size
        noise = np.random.default_rng(0).integers(0, 256, (max(given.batches), 3, size, size), dtype=np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            forms = forms_of(model, Path(folder))
            agrees = {"noise": agreement(forms, noise[:8])}
            if given.data.is_dir():
                agrees["photographs"] = agreement(forms, photographs(given.data, size, config))
            for batch in given.batches:
                with torch.inference_mode():
                    spent = measure(forms, torch.from_numpy(noise[:batch]), given.rounds, 256, least=0.99)
                results.append({"model": model, "batch": batch, "seconds": spent, "agreement": agrees})
                agrees = {}
    found = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "rounds": given.rounds}
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())  # type: ignore[attr-defined]
    text = "\n".join(
        ["# Runtimes\n", f"`{found['command']}`; {given.rounds} rounds, medians. {about}.\n", *table(results), ""]
    )
    print(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        whole = json.dumps(found | {"results": results}, indent=1)
        (given.output / "runtime.json").write_text(whole + "\n", encoding="utf-8")
        (given.output / "runtime.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
