"""The classifier file: a safetensors file with `weight`, perhaps `bias` and `threshold`, and a JSON string of metadata.

Read without torch. All metadata stand under one key, since safetensors writes several in random order. The file may
come from anywhere: every field is checked before it is used, by the rules of label and template files.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clipcli import __version__
from clipcli.errors import ClassifierError, LabelError, UsageError, reason
from clipcli.records import Label, Template
from clipcli.weights.folder import whole_file
from clipcli.weights.load import MOST_SCALE
from clipcli.zeroshot.classifier import Classifier, Features
from clipcli.zeroshot.files import as_json, checked, field, near_file
from clipcli.zeroshot.templates import MOST_WEIGHT

FORMAT, VERSION = "classifier", 1
KEY = "clipcli"
MAKE = "make one with: clipcli build-classifier"
LONGEST_WORD = 40  # characters of `made_by`
LONGEST = 1e6  # row of `weight`, where rows are not unit vectors; 1 / LONGEST is the shortest


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write `classifier` to `path`, whole or not at all; of a link, its target. Raises OutputError."""
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
        "temperature": classifier.temperature,
        "features": classifier.features,
        "model": classifier.model,
        "image_fingerprint": classifier.image_fingerprint,
        "text_fingerprint": classifier.text_fingerprint,
        "made_by": classifier.made_by,
        "how": dict(classifier.how),
        "clipcli": __version__,
    }
    tensors = {"weight": np.ascontiguousarray(classifier.weight)}
    if classifier.bias is not None:
        tensors["bias"] = np.ascontiguousarray(classifier.bias, dtype=np.float32)
    thresholds = [math.nan if x.threshold is None else x.threshold for x in classifier.labels]
    if not all(map(math.isnan, thresholds)):
        tensors["threshold"] = np.array(thresholds, dtype=np.float32)  # NaN: this label has none
    with whole_file(Path(path)) as file:
        file.write(save(tensors, {KEY: as_json(metadata)}))


def load_classifier(path: str | Path) -> Classifier:
    """Read a classifier file.

    Raises UsageError where there is no such file, ClassifierError if it is broken, of another kind or a newer version.
    """
    path = Path(path)
    _check_place(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
                raise ClassifierError(f"{path}: a safetensors file, but no classifier", hint=MAKE)
            if metadata.get("version") != VERSION:
                version = reprlib.repr(metadata.get("version"))
                raise ClassifierError(
                    f"{path}: written in version {version} of the format, this clipcli reads {VERSION}",
                    hint="upgrade clipcli",
                )
            return _parse(metadata, {name: _tensor(file, name) for name in file.keys()})  # noqa: SIM118 -- no mapping
    except SafetensorError as error:
        raise _broken(path, "truncated, or no safetensors file") from error
    except (ValueError, LabelError) as error:  # also of numbers of thousands of digits
        raise _broken(path, str(error)[:120]) from error
    except RecursionError as error:
        raise _broken(path, "its metadata are nested too deep") from error


def _check_place(path: Path) -> None:
    """Raise UsageError unless a regular file lies there that may be read: safetensors can't tell why not."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path}: must be a regular file", hint="save it first: no pipe, device or folder will do")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        near = near_file(path)
        hint = near if near.startswith("did") else MAKE
        raise UsageError(f"{path}: no such file", hint=hint) from error
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from error


def _tensor(file: Any, name: str) -> NDArray[np.float32]:
    dtype = file.get_slice(name).get_dtype()
    if name not in ("weight", "bias", "threshold") or dtype != "F32":  # numpy lacks some of the other types
        raise ValueError(f"a tensor {name[:40]!r} of type {dtype} is not known to this clipcli")
    tensor: NDArray[np.float32] = file.get_tensor(name)
    return tensor


def _parse(metadata: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> Classifier:
    """The classifier, each part of it checked. Raises ValueError, LabelError."""
    entries = field(metadata, "labels", list)
    thresholds = tensors.get("threshold", np.full(len(entries), np.nan, np.float32))
    if thresholds.shape != (len(entries),) or (np.abs(thresholds) > 1).any():  # NaN isn't
        raise ValueError(f"threshold is not a number for each of {len(entries)} labels, from -1 to 1")
    labels = tuple(map(_label, entries, range(len(entries)), thresholds.tolist()))
    if len({label.name for label in labels}) != len(labels):
        raise ValueError("a label stands twice")
    bias = tensors.get("bias")
    if bias is not None and (bias.shape != (len(entries),) or not (np.abs(bias) <= LONGEST).all()):  # NaN is neither
        raise ValueError(f"bias is not a number for each of {len(entries)} labels")
    if metadata.get("features") not in get_args(Features):
        raise ValueError(f"it needs features that this clipcli doesn't make: {reprlib.repr(metadata.get('features'))}")
    how = field({"how": {}, **metadata}, "how", dict)
    if not all(isinstance(value, str | int | float) for value in how.values()):
        raise ValueError(f"how is {reprlib.repr(how)}")
    made_by = field(metadata, "made_by", str)
    if not 0 < len(made_by) <= LONGEST_WORD or (made_by == "zero-shot" and bias is not None):
        raise ValueError(f"made_by is {reprlib.repr(made_by)}{' with a bias' if bias is not None else ''}")
    return Classifier(
        weight=_weight(tensors, len(labels), unit=made_by == "zero-shot"),
        labels=labels,
        logit_scale=_number(metadata, "logit_scale", MOST_SCALE),
        model=field(metadata, "model", str),
        image_fingerprint=field(metadata, "image_fingerprint", str),
        text_fingerprint=field(metadata, "text_fingerprint", str),
        templates=tuple(_template(entry, i) for i, entry in enumerate(field(metadata, "templates", list))),
        template_set=field(metadata, "template_set", str),
        made_by=made_by,
        bias=bias,
        features=metadata["features"],
        temperature=_number({"temperature": 1.0, **metadata}, "temperature", MOST_SCALE),
        how=how,
    )


def _weight(tensors: dict[str, NDArray[np.float32]], labels: int, *, unit: bool) -> NDArray[np.float32]:
    weight = tensors.get("weight", np.zeros(0, np.float32))
    if weight.ndim != 2 or len(weight) != labels or not weight.size:
        raise ValueError(f"weight is {list(weight.shape)} for {labels} labels")
    lengths = np.sqrt(np.einsum("ij,ij->i", weight, weight, dtype=np.float64))
    least, most = (1 - 1e-3, 1 + 1e-3) if unit else (1 / LONGEST, LONGEST)
    wrong = np.flatnonzero(~((least <= lengths) & (lengths <= most)))  # NaN is neither
    if len(wrong):
        raise ValueError(f"row {wrong[0] + 1} of weight has the length {lengths[wrong[0]]:g}")
    return weight


def _label(entry: object, index: int, threshold: float) -> Label:
    where = f"label {index + 1}"
    return Label(
        name=checked(field(entry, "name"), "name", where),
        aliases=tuple(checked(alias, "alias", where) for alias in field(entry, "aliases", list)),
        descriptions=tuple(checked(text, "description", where) for text in field(entry, "descriptions", list)),
        group=None if field(entry, "group") is None else checked(field(entry, "group"), "group", where),
        threshold=None if math.isnan(threshold) else threshold,
    )


def _template(entry: object, index: int) -> Template:
    text = checked(field(entry, "text"), "text", f"template {index + 1}")
    if "<>" not in text:
        raise ValueError(f"template {index + 1} has no place for the label")
    return Template(text, _number(entry, "weight", MOST_WEIGHT))


def _number(entry: object, key: str, most: float) -> float:
    """A number from 1 / `most` to `most`."""
    value = field(entry, key)
    if type(value) not in (int, float) or not 1 / most <= value <= most:
        raise ValueError(f"{key} is {reprlib.repr(value)}")
    return float(value)


def _broken(path: Path, why: str) -> ClassifierError:
    return ClassifierError(f"{path}: broken classifier file: {why}", hint="build it again: clipcli build-classifier")
