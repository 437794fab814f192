"""Models that have a short name: where they lie, what they are, what was published about them. Data, not code.

In: a name as people type it. Out: its `Entry`, or the names that come near. Sizes follow from the architecture, and
where that isn't published with the model they are not known before the download. Nothing is read or fetched here.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal

from clipcli.model.config import (
    ClipConfig,
    Preprocess,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    expected_shapes,
    is_image_key,
)

DEFAULT = "ViT-B-32-256-datacomp"
VOCABULARY_REPO = "openai/clip-vit-base-patch32"  # its merges.txt is the vocabulary of all models listed here
MIT, NON_COMMERCIAL, APPLE = "MIT", "CC-BY-NC-4.0", "Apple, research only"
TRYING_OUT = "for trying out"  # trained on research data


@dataclass(frozen=True)
class Entry:
    """A checkpoint under a short name: on the Hub, or part of this package."""

    name: str
    repo: str
    architecture: str
    top1: float | None  # ImageNet, zero-shot, 80 templates, in percent, as published
    licence: str = MIT
    aliases: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()  # repositories that hold the same weights in another layout
    resize_mode: Literal["squash"] | None = None  # where the published configuration leaves it out
    shipped: bool = False  # it lies in this package, and `repo` is on no Hub

    @property
    def config(self) -> ClipConfig | None:
        """The architecture, if it is known without the checkpoint."""
        return ARCHITECTURES.get(self.architecture)

    @property
    def download(self) -> int | None:
        """Bytes of the weights in fp32."""
        return download_size(self.config) if self.config else None

    @property
    def image_size(self) -> int | None:
        """Pixels on a side."""
        size = self.architecture.rpartition("-")[2]
        return self.config.vision.image_size if self.config else int(size) if len(size) == 3 else None


def parameters(config: ClipConfig) -> dict[str, int]:
    """Trained numbers by tower: `image`, `text`. BatchNorm's statistics and the logit scale are not counted."""
    counts = {"image": 0, "text": 0}
    for name, shape in expected_shapes(config).items():
        if "running_" not in name and name != "logit_scale":
            counts["image" if is_image_key(name) else "text"] += math.prod(shape)
    return counts


def download_size(config: ClipConfig) -> int:
    """Bytes of the weights in fp32, what is around them aside."""
    return 4 * sum(map(math.prod, expected_shapes(config).values()))


def _text(width: int) -> TextConfig:
    return TextConfig(77, 49408, width, 12, width // 64, 4 * width, "quick_gelu")


def _resnet(embed: int, size: int, layers: tuple[int, int, int, int], width: int, text: int) -> ClipConfig:
    return ClipConfig(embed, ResNetConfig(size, layers, width, width // 2), _text(text), Preprocess())


def _vit(embed: int, size: int, patch: int, layers: int, width: int) -> ClipConfig:
    vision = ViTConfig(size, patch, width, layers, width // 64, 4 * width, "quick_gelu")
    return ClipConfig(embed, vision, _text(embed), Preprocess())


# The original paper's sizes; activation and preprocessing are the checkpoint's to tell. An architecture that is not
# here (H, g, bigG, TinyCLIP) is known once a checkpoint of it is.
ARCHITECTURES = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B-32": _vit(512, 224, 32, 12, 768),
    "ViT-B-32-256": _vit(512, 256, 32, 12, 768),
    "ViT-B-16": _vit(512, 224, 16, 12, 768),
    "ViT-L-14": _vit(768, 224, 14, 24, 1024),
    "ViT-L-14-336": _vit(768, 336, 14, 24, 1024),
}


def _openai(architecture: str, original: str, repo: str, top1: float, twin: str = "") -> Entry:
    aliases = tuple(dict.fromkeys((original, original.replace("/", "-"))))
    twins = (f"openai/clip-vit-{twin}",) if twin else ()
    return Entry(f"{architecture}-openai", f"timm/{repo}.openai", architecture, top1, MIT, aliases, twins)


TINY = Entry("tiny", "clipcli/tiny", "tiny", None, TRYING_OUT, ("clipcli/tiny",), shipped=True)

MODELS = (
    Entry(DEFAULT, "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K", "ViT-B-32-256", 72.81),
    Entry("ViT-B-32-datacomp", "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "ViT-B-32", 69.17),
    Entry("ViT-B-16-datacomp", "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", "ViT-B-16", 73.49),
    Entry("ViT-L-14-datacomp", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "ViT-L-14", 79.21),
    _openai("RN50", "RN50", "resnet50_clip", 59.82),
    _openai("RN101", "RN101", "resnet101_clip", 62.28),
    _openai("RN50x4", "RN50x4", "resnet50x4_clip", 66.27),
    _openai("RN50x16", "RN50x16", "resnet50x16_clip", 70.72),
    _openai("RN50x64", "RN50x64", "resnet50x64_clip", 73.91),
    _openai("ViT-B-32", "ViT-B/32", "vit_base_patch32_clip_224", 63.32, "base-patch32"),
    _openai("ViT-B-16", "ViT-B/16", "vit_base_patch16_clip_224", 68.34, "base-patch16"),
    _openai("ViT-L-14", "ViT-L/14", "vit_large_patch14_clip_224", 75.54, "large-patch14"),
    _openai("ViT-L-14-336", "ViT-L/14@336px", "vit_large_patch14_clip_336", 76.56, "large-patch14-336"),
    Entry("ViT-B-32-laion2b", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B-32", 66.56),
    Entry("ViT-B-16-laion2b", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "ViT-B-16", 70.23),
    Entry("ViT-L-14-laion2b", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L-14", 75.25),
    Entry("ViT-H-14-laion2b", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-H-14", 77.96),
    Entry("ViT-g-14-laion2b", "laion/CLIP-ViT-g-14-laion2B-s34B-b88K", "ViT-g-14", 78.47),
    Entry("ViT-bigG-14-laion2b", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "ViT-bigG-14", 80.09),
    Entry("ViT-B-16-dfn2b", "apple/DFN2B-CLIP-ViT-B-16", "ViT-B-16", 76.24, APPLE),
    Entry("ViT-L-14-dfn2b", "apple/DFN2B-CLIP-ViT-L-14", "ViT-L-14", 81.41, APPLE),
    Entry("ViT-L-14-dfn2b-39b", "apple/DFN2B-CLIP-ViT-L-14-39B", "ViT-L-14", 82.2, APPLE),
    Entry("ViT-H-14-dfn5b", "apple/DFN5B-CLIP-ViT-H-14", "ViT-H-14", 83.44, APPLE, resize_mode="squash"),
    Entry("ViT-H-14-378-dfn5b", "apple/DFN5B-CLIP-ViT-H-14-378", "ViT-H-14-378", 84.37, APPLE, resize_mode="squash"),
    Entry("ViT-B-32-metaclip", "timm/vit_base_patch32_clip_224.metaclip_2pt5b", "ViT-B-32", 67.66, NON_COMMERCIAL),
    Entry("TinyCLIP-ViT-8M-16", "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", "TinyCLIP-ViT-8M-16", 41.1),
    Entry("TinyCLIP-ViT-39M-16", "wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", "TinyCLIP-ViT-39M-16", 63.5),
    TINY,
)

_BY_NAME = {name.lower(): entry for entry in MODELS for name in (entry.name, *entry.aliases)}
_BY_REPO = {repo.lower(): entry for entry in MODELS for repo in (entry.repo, *entry.twins)}


def find(name: str) -> Entry | None:
    """The model of this short name or alias, upper or lower case."""
    return _BY_NAME.get(name.lower())


def find_repo(repo: str) -> Entry | None:
    """The model that lies in this repository."""
    return _BY_REPO.get(repo.lower())


def near(name: str) -> list[str]:
    """Short names like `name`, the nearest first; a repository's or an alias's nearness counts for its model."""
    known = {key: entry.name for key, entry in (_BY_REPO | _BY_NAME).items()}
    hits = difflib.get_close_matches(name.lower(), known, 9)
    return list(dict.fromkeys(known[hit] for hit in hits))[:3]


def size_text(size: float) -> str:
    """Bytes as people read them: `605 MB`, `3.9 GB`."""
    for unit in ("B", "kB", "MB"):
        if round(size) < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
