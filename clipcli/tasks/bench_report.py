"""What follows from a benchmark: the machine that it ran on, and advice on model, precision and batch.

In: the `Timing`s of `bench`. Out: sentences, and facts for a report. Nothing is measured here.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from clipcli import __version__
from clipcli.images.stream import cpus
from clipcli.tasks.bench import LIMIT, OURS, Timing
from clipcli.weights import catalog

PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "onnxruntime", "openvino", "open_clip_torch", "transformers")
_TIE = 1.1  # within it, figures are equal
_CALM = 1.3  # slowest round by fastest


def machine() -> dict[str, str]:
    """What the figures depend on."""
    import torch

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text(errors="replace")) if info.exists() else None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not there"
    return {
        "cpu": f"{named[1] if named else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{cpus()} of {os.cpu_count()}",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": str(torch.get_num_threads()),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "clipcli": __version__,
        **versions,
    }


def advice(found: Sequence[Timing]) -> list[str]:
    """What follows for the choice of model, precision and batch, and where clipcli is behind."""
    by_model = {name: [one for one in found if one.model == name] for name in dict.fromkeys(one.model for one in found)}
    said = [line for name, rows in by_model.items() for line in (*_batch(name, rows), *_decoding(name, rows))]
    said += [line for name, rows in by_model.items() for line in _precisions(name, rows)]
    said += _models({name: max(_rates(rows).values()) for name, rows in by_model.items() if _rates(rows)})
    others = [one for one in found if one.ratio is not None and not one.way.startswith(OURS) and one.way != LIMIT]
    lost = [
        f"{one.way} at {one.stage}, {one.case} ({one.ratio:.2f}{', a tie' if one.ratio * _TIE > 1 else ''})"
        for one in others
        if one.ratio is not None and one.ratio < 1
    ]
    if others:
        said.append(f"clipcli is behind {', '.join(lost)}" if lost else "clipcli is behind nowhere")
    spread = [max(one.seconds) / min(one.seconds) for one in found if len(one.seconds) > 1]
    if spread and statistics.median(spread) > _CALM:
        said.append(f"rounds differ by {statistics.median(spread):.1f} x: other work on this machine disturbs them")
    return said


def _rates(rows: Sequence[Timing]) -> dict[str, float]:
    """Pictures a second by batch, of the first of clipcli's own ways."""
    return {one.case: one.per_second for one in rows if one.stage == "model" and one.ratio is None}


def _batch(model: str, rows: Sequence[Timing]) -> Iterator[str]:
    rates = _rates(rows)
    if len(rates) > 1:
        best = max(rates.values())
        enough = next(case for case, rate in rates.items() if rate >= 0.95 * best)
        most = "" if rates[enough] == best else f", within 5 % of the best ({best:,.1f})"
        yield f"{model}: {enough} is large enough: {rates[enough]:,.1f} pictures/s{most}"


def _decoding(model: str, rows: Sequence[Timing]) -> Iterator[str]:
    """Which part of a run decoding is, where both parts were measured; on a CPU they share the cores."""
    rates = _rates(rows)
    for one in rows:
        if rates and one.stage == "decode" and one.ratio is None:
            decoding, forward = 1 / (one.per_second * cpus()), 1 / max(rates.values())
            share = decoding / (decoding + forward)
            cure = "pictures that are known aren't decoded again"
            if not find_spec("simplejpeg"):
                cure = 'pip install "clipcli[jpeg]" decodes faster'
            size = one.case.removesuffix(", a core")
            yield f"{model}: {share:.0%} of the work on {size} is decoding" + (f"; {cure}" if share > 0.3 else "")


def _precisions(model: str, rows: Sequence[Timing]) -> Iterator[str]:
    """What another precision gains at its best batch."""
    own = [one for one in rows if one.stage == "model" and one.way.startswith(f"{OURS}, ") and one.ratio is not None]
    for way in dict.fromkeys(one.way for one in own):
        best = max((one for one in own if one.way == way), key=lambda one: 1 / (one.ratio or 1))
        gain, name = 1 / (best.ratio or 1), way.removeprefix(f"{OURS}, ")
        what = "pays: clipcli models verify says what it changes" if gain > _TIE else "gains nothing"
        yield f"{model}: {name} is {gain:.2f} x as fast at {best.case}; it {what}"


def _models(rates: Mapping[str, float]) -> Iterator[str]:
    """The models by speed, with what is known of how good they are."""
    ranked = sorted(rates, key=lambda name: -rates[name])
    for name in ranked[:-1]:
        fast, slow = (
            f"{model} ({entry.top1:.1f} % on ImageNet)"
            if (entry := catalog.find(model)) and entry.top1 is not None
            else model
            for model in (name, ranked[-1])
        )
        yield f"{fast} is {rates[name] / rates[ranked[-1]]:.1f} x as fast as {slow}"
