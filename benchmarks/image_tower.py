"""The image tower alone, fp32 on the CPU: the plain form, the fast one, and the peers that can be imported.

    python benchmarks/image_tower.py -o benchmarks/runs/DATE-MACHINE

Random weights of the real architectures, the same for all, and their embeddings are compared first. The forms take
turns within each round, so that what else the machine does hits all of them; only ratios are to be trusted, and within
10 % they are ties. Each round also multiplies two large square matrices, plain and packed: the most that this machine
can do, of which the table shows what the fast form reached, counting the operations that it really does.

Writes image_tower.json (all times) and image_tower.md. `--largest` tries other sizes of the parts that a batch goes
through in; `--try` is a run of seconds with small towers, to see whether it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import machine, open_clip
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipcli.model import fast as module
from clipcli.model.clip import build_image_tower, image_tower
from clipcli.model.config import ClipConfig, ResNetConfig, ViTConfig
from clipcli.model.fast import fast
from clipcli.model.products import Product

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

MODELS = {
    "ViT-B-32": (512, ViTConfig(224, 32, 768, 12, 12, 3072, "quick_gelu")),
    "ViT-B-16": (512, ViTConfig(224, 16, 768, 12, 12, 3072, "quick_gelu")),
    "ViT-B-32-256": (512, ViTConfig(256, 32, 768, 12, 12, 3072, "gelu")),
    "RN50": (1024, ResNetConfig(224, (3, 4, 6, 3), 64, 32)),
}
SMALL = {
    "small ViT": (64, ViTConfig(64, 16, 64, 2, 1, 256, "quick_gelu")),
    "small RN": (64, ResNetConfig(64, (1, 1, 1, 1), 8, 4)),
}
MATRIX = 4096  # rows and columns of the products that show the limit
Form = Callable[[Tensor], Tensor]
Arrays = dict[str, Any]


def config_of(model: str) -> ClipConfig:
    """A model with the image tower that is meant, and with hardly any text tower."""
    dim, vision = {**MODELS, **SMALL}[model]
    text = tiny.vit(activation=vision.activation if isinstance(vision, ViTConfig) else "gelu").text
    return replace(tiny.vit(), embed_dim=dim, vision=vision, text=text)


def plain_form(config: ClipConfig, arrays: Arrays) -> Form:
    """The readable tower of clipcli, which training trains."""
    return build_image_tower(config, {name.removeprefix("visual."): array for name, array in arrays.items()})


def fast_form(config: ClipConfig, arrays: Arrays) -> Form:
    """What clipcli runs."""
    tower = build_image_tower(config, {name.removeprefix("visual."): array for name, array in arrays.items()})
    return fast(tower, pack=True)


def open_clip_form(config: ClipConfig, arrays: Arrays) -> Form:
    """open_clip's tower. Raises ImportError."""
    settings = tiny.open_clip_config(config)["model_cfg"]
    if isinstance(config.vision, ResNetConfig):
        settings["vision_cfg"]["head_width"] = 32 * config.vision.width // config.vision.heads
    tower = open_clip().CLIP(**settings).visual
    state = {name.removeprefix("visual."): torch.from_numpy(array) for name, array in arrays.items()}
    missing = tower.load_state_dict(state, strict=False).missing_keys
    assert all("num_batches_tracked" in name for name in missing), missing
    return tower.eval()


def transformers_form(config: ClipConfig, arrays: Arrays) -> Form:
    """The tower of transformers, which has no ResNet. Raises ImportError, TypeError."""
    import transformers

    settings = tiny.transformers_config(config)
    vision = transformers.CLIPVisionConfig(**settings["vision_config"], projection_dim=config.embed_dim)
    tower = transformers.CLIPVisionModelWithProjection(vision)
    state = {name: torch.from_numpy(array) for name, array in tiny.transformers_arrays(arrays).items()}
    missing = tower.load_state_dict(state, strict=False).missing_keys
    assert all("position_ids" in name for name in missing), missing
    tower.eval()
    return lambda pixels: tower(pixel_values=pixels).image_embeds


FORMS = {"open_clip": open_clip_form, "transformers": transformers_form, "plain": plain_form, "fast": fast_form}


def build(model: str, names: Sequence[str]) -> dict[str, Form]:
    """Those forms of a model that there are."""
    config = config_of(model)
    arrays = {name: array for name, array in tiny.weights(config).items() if name.startswith("visual.")}
    forms = {}
    for name in names:
        try:
            forms[name] = FORMS[name](config, arrays)
        except (ImportError, TypeError) as error:
            print(f"{model}: no {name} ({error})", file=sys.stderr)
    return forms


def with_parts(form: Form, largest: int) -> Form:
    """The fast form with other parts."""

    def run(pixels: Tensor) -> Tensor:
        usual, module.LARGEST = module.LARGEST, largest
        try:
            return form(pixels)
        finally:
            module.LARGEST = usual

    return run


def operations(model: str) -> tuple[int, int]:
    """Floating-point operations in the products of one picture: plain, fast."""
    with torch.device("meta"):
        tower = image_tower(config_of(model)).eval().to(torch.bfloat16)  # in fp32 it adds in place, which isn't counted
        pixels = torch.empty(1, 3, *2 * [config_of(model).vision.image_size], dtype=torch.bfloat16)
    counts = []
    for form in (tower, fast(tower)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            form(pixels)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Of one of so many runs."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def measure(
    forms: dict[str, Form], pixels: Tensor, rounds: int, matrix: int, least: float = 0.9999
) -> dict[str, list[float]]:
    """Seconds a batch of each form, and a second's operations of the square product under "peak", round by round.

    `least`: the cosine to the first form's embeddings that each must reach.
    """
    square = torch.randn(2, matrix, matrix)
    expected, times, spent = None, {}, {}
    for name, form in forms.items():
        times[name] = 1
        found = nn.functional.normalize(form(pixels).float())
        expected = found if expected is None else expected
        assert (found * expected).sum(dim=1).min() >= least, f"{name} gives other embeddings"
        times[name] = max(1, round(0.3 / seconds(lambda form=form: form(pixels))))  # type: ignore[misc]
        spent[name] = list[float]()
    packed = Product(square[1], None, pack=True)
    packed(square[0])
    spent["peak"] = []
    for number in range(rounds):
        for name in list(forms)[:: -1 if number % 2 else 1]:
            spent[name].append(seconds(lambda name=name: forms[name](pixels), times[name]))  # type: ignore[misc]
        best = min(seconds(lambda: torch.mm(*square)), seconds(lambda: packed(square[0])))
        spent["peak"].append(2 * matrix**3 / best)
    return spent


def peak_memory(model: str, name: str, batch: int) -> int | None:
    """MiB of a process that does nothing but run this form, at its most; None where the system doesn't tell."""
    command = [sys.executable, __file__, "--memory", name, "--models", model, "--batches", str(batch)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return int(printed) if printed else None


def print_memory(model: str, name: str, batch: int) -> None:
    """The child's part of `peak_memory`: what the peak is once the form is built."""
    form = build(model, [name])[name]
    gc.collect()
    with torch.inference_mode():
        form(torch.randn(1, 3, *2 * [config_of(model).vision.image_size]))
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        except OSError:
            return
        form(torch.randn(batch, 3, *2 * [config_of(model).vision.image_size]))
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    if found:
        print(int(found[1]) // 1024)


def ratio(spent: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast as `other`: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(spent[name], spent[other], strict=True))


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The Markdown of what was measured."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"] if name != "peak"))
    peers = [name for name in names if name in FORMS and name != "fast"]
    shown = [*(f"{name}, pictures/s" for name in names), *(f"fast / {peer}" for peer in peers), "of the peak"]
    yield "| model | batch | " + " | ".join(shown) + " |"
    yield "|---|---:|" + "---:|" * len(shown)
    for result in results:
        spent, batch = result["seconds"], result["batch"]
        rates = (f"{batch / statistics.median(spent[name]):.1f}" if name in spent else "–" for name in names)
        ratios = (f"{ratio(spent, 'fast', peer):.2f}" if peer in spent else "–" for peer in peers)
        yield f"| {result['model']} | {batch} | {' | '.join(rates)} | {' | '.join(ratios)} | {result['of_peak']:.0%} |"
    yield ""
    slower = [
        f"{result['model']} at {result['batch']} against {name} ({ratio(result['seconds'], 'fast', name):.2f})"
        for result in results
        for name in result["seconds"]
        if name not in ("fast", "peak") and ratio(result["seconds"], "fast", name) < 1
    ]
    yield f"Where fast is behind: {', '.join(slower) or 'nowhere'}."
    memory = [result for result in results if any(result["memory"].values())]
    if memory:
        yield "\nPeak memory of a process that runs one form alone, MiB, weights and torch included:\n"
        yield "| model | batch | " + " | ".join(FORMS) + " |"
        yield "|---|---:|" + "---:|" * len(FORMS)
        for result in memory:
            sizes = " | ".join(f"{result['memory'].get(name) or '–'}" for name in FORMS)
            yield f"| {result['model']} | {result['batch']} | {sizes} |"


def summary(found: dict[str, Any]) -> str:
    """The Markdown of a whole run."""
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    peaks = [peak / 1e9 for result in found["results"] for peak in result["seconds"]["peak"]]
    work = "; ".join(f"{model} {a / 1e9:.2f}, {b / 1e9:.2f}" for model, (a, b) in found["operations"].items())
    return "\n".join(
        [
            "# The image tower alone\n",
            f"`{found['command']}`; {found['rounds']} rounds, medians. {about[0].upper()}{about[1:]}.\n",
            f"fp32, random weights. The product of two squares of {found['matrix']:,} did {min(peaks):.0f} to "
            f"{max(peaks):.0f} GFLOP/s; the peak of a line is the best of its rounds.",
            f"GFLOP a picture, plain and fast: {work}.\n",
            *table(found["results"]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the two files")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *SMALL], default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--largest", nargs="+", type=int, default=[], metavar="MIB", help="other sizes of parts")
    parser.add_argument("--try", dest="small", action="store_true", help="small towers, and as little as possible")
    parser.add_argument("--memory", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.memory:
        return print_memory(given.models[0], given.memory, given.batches[0])
    if given.small:
        given.models, given.batches, given.rounds = list(SMALL), [2, 5], 3
    matrix = 256 if given.small else MATRIX
    results = []
    for model in given.models:
        forms = build(model, list(FORMS))
        forms |= {f"fast, {size} MiB": with_parts(forms["fast"], size << 20) for size in given.largest}
        for batch in given.batches:
            pixels = torch.randn(batch, 3, *2 * [config_of(model).vision.image_size])
            with torch.inference_mode():
                spent = measure(forms, pixels, given.rounds, matrix)
            reached = operations(model)[1] * batch / statistics.median(spent["fast"])
            alone = [name for name in forms if name in FORMS] if batch == max(given.batches) else []
            memory = {name: peak_memory(model, name, batch) for name in alone if name == "fast" or not given.small}
            of_peak = reached / max(spent["peak"])
            results.append({"model": model, "batch": batch, "seconds": spent, "of_peak": of_peak, "memory": memory})
            print(
                f"{model}, {batch}: "
                + ", ".join(f"{k} {batch / min(v):.1f}/s" for k, v in spent.items() if k != "peak")
            )
    found = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "rounds": given.rounds,
        "matrix": matrix,
        "operations": {model: operations(model) for model in given.models},
        "results": results,
    }
    text = summary(found)
    print(f"\n{text}")
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "image_tower.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (given.output / "image_tower.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
