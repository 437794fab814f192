"""The classifier file: a safetensors file with `weight` and one JSON string of metadata. Read without torch.

All metadata stand under one key, since safetensors writes several in random order. The file may come from anywhere:
every field is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clipcli import __version__
from clipcli.errors import ClassifierError, OutputError
from clipcli.records import Label, Template
from clipcli.zeroshot.classifier import Classifier

FORMAT, VERSION = "classifier", 1
KEY = "clipcli"


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write `classifier` to `path`, whole or not at all. Raises OutputError."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "labels": [
            {"name": x.name, "aliases": x.aliases, "descriptions": x.descriptions, "group": x.group}
            for x in classifier.labels
        ],
        "templates": [{"text": x.text, "weight": x.weight} for x in classifier.templates],
        "template_set": classifier.template_set,
        "logit_scale": classifier.logit_scale,
        "temperature": 1.0,
        "features": "projected",
        "model": classifier.model,
        "image_fingerprint": classifier.image_fingerprint,
        "text_fingerprint": classifier.text_fingerprint,
        "made_by": classifier.made_by,
        "clipcli": __version__,
    }
    tensors = {"weight": np.ascontiguousarray(classifier.weight)}
    thresholds = [math.nan if x.threshold is None else x.threshold for x in classifier.labels]
    if not all(map(math.isnan, thresholds)):
        tensors["threshold"] = np.array(thresholds, dtype=np.float32)  # NaN: this label has none
    path = Path(path)
    content = save(tensors, {KEY: json.dumps(metadata, ensure_ascii=False)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: can't be written: {error.strerror}", hint="choose another place with -o") from error


def load_classifier(path: str | Path) -> Classifier:
    """Read a classifier file. Raises ClassifierError: missing, broken, of another kind or a newer version."""
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
    except FileNotFoundError:
        raise ClassifierError(f"{path}: no such file", hint="make one with: clipcli build-classifier") from None
    except (SafetensorError, ValueError) as error:
        raise _broken(path, "truncated, or no safetensors file") from error
    except OSError as error:
        raise ClassifierError(f"{path}: can't be read: {error.strerror or error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ClassifierError(
            f"{path}: a safetensors file, but no classifier", hint="make one with: clipcli build-classifier"
        )
    if metadata.get("version") != VERSION:
        raise ClassifierError(
            f"{path}: written in version {metadata.get('version')} of the format, this clipcli reads {VERSION}",
            hint="upgrade clipcli",
        )
    try:
        return _parse(metadata, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"bad metadata ({error})") from error


def _parse(metadata: dict[str, Any], tensors: dict[str, Any]) -> Classifier:
    weight = tensors["weight"]
    thresholds = tensors.get("threshold")
    labels = tuple(
        Label(
            name=_text(entry["name"]),
            aliases=tuple(map(_text, entry["aliases"])),
            descriptions=tuple(map(_text, entry["descriptions"])),
            group=None if entry["group"] is None else _text(entry["group"]),
            threshold=None if thresholds is None or math.isnan(thresholds[i]) else float(thresholds[i]),
        )
        for i, entry in enumerate(metadata["labels"])
    )
    if len({label.name for label in labels}) != len(labels):
        raise ValueError("a label stands twice")
    if weight.dtype != np.float32 or weight.ndim != 2 or len(weight) != len(labels) or not len(labels):
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)} for {len(labels)} labels")
    if not np.isfinite(weight).all():
        raise ValueError("weight holds numbers that are not finite")
    scale = float(metadata["logit_scale"])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"logit_scale is {scale}")
    if metadata["features"] != "projected" or "bias" in tensors:
        raise ValueError("it needs features that this clipcli doesn't make")
    return Classifier(
        weight=weight,
        labels=labels,
        logit_scale=scale,
        model=_text(metadata["model"]),
        image_fingerprint=_text(metadata["image_fingerprint"]),
        text_fingerprint=_text(metadata["text_fingerprint"]),
        templates=tuple(Template(_text(x["text"]), float(x["weight"])) for x in metadata["templates"]),
        template_set=_text(metadata["template_set"]),
        made_by=_text(metadata["made_by"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _broken(path: Path, why: str) -> ClassifierError:
    return ClassifierError(f"{path}: broken classifier file: {why}", hint="build it again: clipcli build-classifier")
