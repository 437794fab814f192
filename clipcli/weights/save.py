"""A model as a folder in the open_clip layout, which `-m` reads: configuration, weights, vocabulary, card.

Comes in: the configuration, the arrays under the original names, a vocabulary. The weights are held against the
configuration, and turned into what the file stores one at a time. Reading the folder back gives the same model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from clipcli.errors import ModelError, UsageError
from clipcli.model.config import ClipConfig, ResNetConfig, Shape, ViTConfig, expected_shapes
from clipcli.tokenizer import Tokenizer
from clipcli.weights.folder import CARD, IDS, SPECIAL_TOKENS, TRAINING, Content, write_folder
from clipcli.weights.open_clip import CONFIG, WEIGHTS
from clipcli.weights.tensors import NUMPY, Array, Tensor
from clipcli.weights.vocabulary import as_json, vocabulary_files

Weights = Mapping[str, Array]


def save_model(
    folder: Path,
    config: ClipConfig,
    arrays: Weights,
    *,
    merges: str | Path,
    card: str,
    training: Mapping[str, object] | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
    force: bool = False,
) -> None:
    """Write a model directory, whole or not at all.

    `merges`: the text of a `merges.txt`, or a vocabulary file of any form. fp16 halves every array of two or more
    dimensions (embeddings and positions too); gains, biases, BatchNorm's statistics, the class token and the logit
    scale stay fp32. Raises UsageError (`folder` exists and not `force`), OutputError, ModelError (numbers that the
    precision can't hold), VocabularyError.
    """
    kinds = {
        name: "F16" if precision == "fp16" and len(shape) > 1 else "F32"
        for name, shape in expected_shapes(config).items()
    }
    files = open_clip_files(config, stored(config, arrays, kinds), read_merges(merges, config.text.vocab_size), card)
    if training is not None:
        files[TRAINING] = as_json(dict(training))
    write_folder(folder, files, force=force)


def open_clip_files(
    config: ClipConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, card: str
) -> dict[str, Content]:
    """The files of a model in the open_clip layout; its configuration comes first. Raises UsageError."""
    words = vocabulary_files(tokenizer, config.text.context_length)
    del words[SPECIAL_TOKENS]
    if list(tokenizer.ids.values()) == list(range(tokenizer.vocab_size)):  # merges.txt says it all
        del words[IDS]
    return {
        CONFIG: as_json(open_clip_config(config)),
        WEIGHTS[0]: tensors,
        **words,
        CARD: card.encode(errors="replace"),
    }


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """The content of `open_clip_config.json`. Raises UsageError where it can't say what the model is."""
    vision, text, preprocess = config.vision, config.text, config.preprocess
    tower: dict[str, Any] = {"image_size": vision.image_size, "layers": vision.layers, "width": vision.width}
    if isinstance(vision, ViTConfig):
        if vision.activation != text.activation:
            both = f"{vision.activation} in the image tower, {text.activation} in the text tower"
            raise UsageError(f"{both}: open_clip has one activation for both", hint="use --layout transformers")
        tower |= {"patch_size": vision.patch_size, "head_width": vision.width // vision.heads}
        tower |= _mlp_ratio(vision.width, vision.mlp_width)
    else:
        tower["head_width"] = 32 * vision.width // vision.heads
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": tower,
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                **_mlp_ratio(text.width, text.mlp_width),
            },
        },
        "preprocess_cfg": {
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
        },
    }


def stored(config: ClipConfig, arrays: Weights, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of `config`, to be stored as `kinds` says (F16, F32), none read yet; and BatchNorm's counters."""
    tensors = {name: _cast(arrays, name, shape, kinds[name]) for name, shape in expected_shapes(config).items()}
    if isinstance(config.vision, ResNetConfig):
        means = [name for name in tensors if name.endswith("running_mean")]
        counters = [name.replace("running_mean", "num_batches_tracked") for name in means]  # open_clip insists
        tensors |= {name: Tensor((), "I64", partial(_counted, arrays, name)) for name in counters}
    return tensors


def _counted(arrays: Weights, name: str) -> Array:
    return np.asarray(arrays.get(name, 0), np.int64)


def read_merges(merges: str | Path, size: int | None = None) -> Tokenizer:
    """The vocabulary in a file, or in the text of a `merges.txt`. Raises VocabularyError if it isn't of that `size`."""
    if isinstance(merges, Path):
        return Tokenizer.from_file(merges, size)
    with TemporaryDirectory() as folder:
        file = Path(folder, "merges.txt")
        file.write_text(merges, encoding="utf-8")
        return Tokenizer.from_file(file, size)


def _cast(arrays: Weights, name: str, shape: Shape, kind: str) -> Tensor:
    def read() -> Array:
        array: Array = arrays[name]
        if array.shape != shape:
            raise ModelError(f"`{name}` is {list(array.shape)}, but the configuration says {list(shape)}")
        with np.errstate(over="ignore"):
            array = array.astype(NUMPY[kind])
        if not np.isfinite(array).all():
            raise ModelError(f"`{name}` holds numbers that are not finite in {kind.replace('F', 'fp')}")
        return array

    return Tensor(shape, kind, read)


def _mlp_ratio(width: int, mlp_width: int) -> dict[str, float]:
    """The ratio that readers get `mlp_width` back from by `int(width * ratio)`; 4 goes without saying."""
    ratio = mlp_width / width
    if int(width * ratio) < mlp_width:
        ratio = math.nextafter(ratio, math.inf)
    return {} if ratio == 4 else {"mlp_ratio": ratio}
