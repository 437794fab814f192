"""What a model is, fact by fact, and where each fact was read.

In: an opened model, or an entry of the catalogue that isn't downloaded. Out: `Fact`s in the order of reading. Weights
are read only for the fingerprints, by numpy; no torch. Of a model card, the first paragraphs under `CARD`'s headings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcli.model.config import ClipConfig, ViTConfig
from clipcli.weights import catalog, open_clip, transformers
from clipcli.weights.catalog import Entry, size_text
from clipcli.weights.fetch import Located, here, read_config
from clipcli.weights.fields import read_fields
from clipcli.weights.hub_cache import Wanted, storage

if TYPE_CHECKING:
    from clipcli.weights.model import Model

CATALOGUE, SHAPES, WEIGHTS, DISK = "the catalogue", "the tensors' shapes", "the weights", "the disk"
CARD = {  # headings in the card of a model that `clipcli train` made, and the names of what stands under them
    "what it knows": "knows",
    "what it doesn't know": "does_not_know",
    "trained on": "trained_on",
    "terms": "terms",
}
DEFAULTS, OPTION = "not stated: the original's", "the command line"


@dataclass(frozen=True)
class Fact:
    """One thing known about a model."""

    name: str  # also its key in JSON
    value: Any
    source: str
    text: str = ""  # as people read it, where that isn't `value`

    def __str__(self) -> str:
        return self.text or ("-" if self.value is None else str(self.value))


def overview(entry: Entry) -> dict[str, Any]:
    """One row of the catalogue. Sizes that it doesn't know are read from the checkpoint, if that is here."""
    folder = here(Wanted(entry.name, entry.repo))
    config = entry.config or (read_config(folder) if folder else None)
    download = catalog.download_size(config) if config else None
    if folder and entry.shipped:
        download = sum((folder / name).stat().st_size for name in open_clip.WEIGHTS if (folder / name).is_file())
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "repository": None if entry.shipped else entry.repo,
        "parameters": sum(catalog.parameters(config).values()) if config else None,
        "download": download,
        "image_size": config.vision.image_size if config else entry.image_size,
        "imagenet_top1": entry.top1,
        "licence": entry.licence,
        "shipped": entry.shipped,
        "path": str(folder) if folder else None,
    }


def describe_entry(entry: Entry) -> Iterator[Fact]:
    """What is known of a model without having it."""
    yield Fact("name", entry.name, CATALOGUE)
    yield Fact("path", None, DISK, "missing: install clipcli again" if entry.shipped else "not downloaded")
    yield from _published(entry)
    if entry.config:
        yield from _architecture(entry.config, CATALOGUE)
        yield from _parameters(entry.config, CATALOGUE)
    if entry.download:
        yield Fact("download", entry.download, "computed: fp32", size_text(entry.download))


def describe(model: Model, located: Located) -> Iterator[Fact]:
    """All about a model that is on this disk."""
    checkpoint, config = model.checkpoint, model.config
    yield Fact("name", model.name, CATALOGUE if located.entry else DISK)
    yield Fact("path", str(checkpoint.path), DISK)
    if located.entry:
        yield from _published(located.entry)
    yield from _card(checkpoint.path / "README.md")
    settings = {"open_clip": open_clip.CONFIG, "transformers": transformers.CONFIG}.get(checkpoint.layout)
    yield Fact("layout", checkpoint.layout, DISK, "" if settings else "file (bare weights)")
    yield from _architecture(config, settings or SHAPES)
    yield Fact("activation", config.text.activation, _source_of_activation(checkpoint.path, settings))
    sources = _preprocessing(checkpoint.path, settings)
    if located.entry and located.entry.resize_mode:
        sources |= {"resize_mode": CATALOGUE}
    for name, value in asdict(config.preprocess).items():
        text = " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else ""
        yield Fact(name, value, sources.get(name, DEFAULTS), text)
    yield from _parameters(config, SHAPES)
    types = sorted({checkpoint.arrays.dtype(name) for name in checkpoint.arrays})
    yield Fact("stored_as", types, WEIGHTS, ", ".join(types))
    yield Fact("logit_scale", checkpoint.logit_scale, WEIGHTS, f"{checkpoint.logit_scale:.4f}")
    yield Fact("image_fingerprint", model.image_fingerprint, f"{WEIGHTS}, and what prepares pictures")
    yield Fact("text_fingerprint", model.text_fingerprint, WEIGHTS)
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    yield Fact("files", sizes, DISK, ", ".join(f"{name} ({size_text(size)})" for name, size in sizes.items()))
    yield _vocabulary(checkpoint.vocabulary, located)


def _vocabulary(file: Path | None, located: Located) -> Fact:
    if file is None:
        return Fact("vocabulary", None, DISK, "none")
    common = located.vocabulary is not None and file.is_relative_to(storage(catalog.VOCABULARY_REPO))
    source = catalog.VOCABULARY_REPO if common else OPTION if located.vocabulary else DISK
    return Fact("vocabulary", str(file), source, file.name if source == DISK else "")


def _published(entry: Entry) -> Iterator[Fact]:
    if entry.shipped:
        yield Fact("shipped", True, CATALOGUE, "with clipcli: nothing is downloaded")
    else:
        yield Fact("repository", entry.repo, CATALOGUE)
    yield Fact("licence", entry.licence, CATALOGUE)
    if entry.top1 is not None:
        yield Fact("imagenet_top1", entry.top1, CATALOGUE, f"{entry.top1} % (zero-shot, 80 templates, as published)")


def _card(file: Path) -> Iterator[Fact]:
    """What the card beside the weights says, if it is one of ours."""
    if file.is_file() and os.access(file, os.R_OK):
        text = file.read_text(encoding="utf-8", errors="replace")
        for heading, paragraph in re.findall(r"^## (.+)\n+((?:.+(?:\n|\Z))+)", text, re.MULTILINE):
            if name := CARD.get(heading.strip().lower()):
                yield Fact(name, " ".join(paragraph.split()), file.name)


def _architecture(config: ClipConfig, source: str) -> Iterator[Fact]:
    vision, text = config.vision, config.text
    if isinstance(vision, ViTConfig):
        form = (
            f"ViT: {vision.layers} layers of width {vision.width}, {vision.heads} heads, patches of {vision.patch_size}"
        )
    else:
        form = f"ModifiedResNet: {vision.layers} bottlenecks, width {vision.width}, {vision.heads} heads"
    words = f"{text.layers} layers of width {text.width}, {text.heads} heads, context {text.context_length}"
    yield Fact("image_tower", {"kind": type(vision).__name__.removesuffix("Config"), **_sizes(vision)}, source, form)
    yield Fact("text_tower", _sizes(text), source, f"{words}, vocabulary {text.vocab_size:,}")
    yield Fact("image_size", vision.image_size, source, f"{vision.image_size} px")
    yield Fact("embed_dim", config.embed_dim, source)


def _parameters(config: ClipConfig, source: str) -> Iterator[Fact]:
    counts = catalog.parameters(config)
    counts["all"] = sum(counts.values())
    yield Fact("parameters", counts, source, ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _sizes(tower: object) -> dict[str, Any]:
    return {name: value for name, value in asdict(tower).items() if name != "activation"}  # type: ignore[call-overload]


def _source_of_activation(path: Path, settings: str | None) -> str:
    if settings is None:
        return f"{OPTION}, or OpenAI's own file"
    fields = read_fields(path / settings)
    if settings == open_clip.CONFIG:
        return settings if "quick_gelu" in fields.values["model_cfg"] else f"{settings}: not stated, so gelu"
    is_stated = "hidden_act" in transformers.tower(fields, "text_config").values
    return settings if is_stated else f"{settings}: not stated, so quick_gelu"


def _preprocessing(path: Path, settings: str | None) -> dict[str, str]:
    """The file that tells each field of the preprocessing; what none tells is left out."""
    if settings is None:
        return {}
    if settings == open_clip.CONFIG:
        stated = read_fields(path / settings).section("preprocess_cfg").values
        return {name: settings for name in stated if stated[name] is not None}
    told = transformers.read_preprocessing(path)
    names = {"image_mean": "mean", "image_std": "std", "resample": "interpolation", "size": "resize_mode"}
    return {ours: told.path.name for theirs, ours in names.items() if theirs in told.values}
