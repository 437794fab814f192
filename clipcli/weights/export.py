"""A loadable checkpoint of any kind, written anew in the layout that another program reads.

Goes out: a folder in open_clip's or transformers' layout, whole or not at all, with the weights in the precision that
they have. transformers is not imported. What a layout has no words for is refused: transformers has no ModifiedResNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipcli import __version__
from clipcli.errors import ModelError, UsageError, VocabularyError, reason
from clipcli.model.config import ClipConfig, Preprocess, TextConfig, ViTConfig
from clipcli.tokenizer import STANDARD_SIZE, Tokenizer
from clipcli.weights import open_clip, transformers
from clipcli.weights.folder import CARD, TRAINING, check_new_folder, write_folder
from clipcli.weights.load import Checkpoint
from clipcli.weights.save import open_clip_files, stored
from clipcli.weights.tensors import Tensor
from clipcli.weights.transformers import PARTS, PREPROCESSING, TOWERS, WHOLE, transposed
from clipcli.weights.vocabulary import as_json, vocabulary_files

Target = Literal["open_clip", "transformers"]
CARRIED = ("LICENSE", TRAINING)  # what a copy has of its source's other files
_HEADING = "\n## This copy\n"


def export_model(
    checkpoint: Checkpoint, out: Path, layout: Target, *, force: bool = False, origin: str = ""
) -> list[Path]:
    """Write `checkpoint` to the folder `out`, and say which files; `origin` is a sentence for the card.

    Raises UsageError (the folder exists and not `force`, or the layout can't hold the model), VocabularyError,
    OutputError, ModelError.
    """
    check_export(checkpoint, out, layout, force=force)
    config, arrays = checkpoint.config, checkpoint.arrays
    if checkpoint.vocabulary is None:
        raise VocabularyError(
            f"{checkpoint.path}: no vocabulary beside the weights, and an export needs one",
            hint="name one with --vocabulary FILE",
        )
    tokenizer = Tokenizer.from_file(checkpoint.vocabulary, config.text.vocab_size)
    kinds = {name: "F16" if arrays.dtype(name) == "F16" else "F32" for name in arrays}
    tensors = stored(config, arrays, kinds)
    card = _card(checkpoint, layout, origin)
    if layout == "open_clip":
        files = open_clip_files(config, tensors, tokenizer, card)
    else:
        files = {
            transformers.CONFIG: as_json(transformers_config(config, tokenizer)),
            transformers.WEIGHTS[0]: unname(tensors),
            PREPROCESSING[0]: as_json(preprocessor_config(config.preprocess, config.vision.image_size)),
            **vocabulary_files(tokenizer, config.text.context_length),
            CARD: card.encode(errors="replace"),
        }
    carried = [checkpoint.path / name for name in CARRIED]
    files |= {path.name: _read(path) for path in carried if path.is_file()}
    write_folder(out, files, force=force)
    return [out / name for name in files]


def has_own_vocabulary(config: ClipConfig) -> bool:
    """Whether the vocabulary is not that of the published models, which other programs have built in."""
    return config.text.vocab_size != STANDARD_SIZE


def check_export(checkpoint: Checkpoint, out: Path, layout: Target, *, force: bool = False) -> None:
    """Raise UsageError where `export_model` would, before anything is read."""
    config = checkpoint.config
    if out.exists() and out.resolve() == checkpoint.path.resolve():
        raise UsageError(f"{out}: is the model itself", hint="choose another place with --output")
    if layout == "transformers" and not isinstance(config.vision, ViTConfig):
        raise UsageError(
            f"{checkpoint.path}: transformers has no CLIP with a ResNet, and its layout no words for one",
            hint="use --layout open_clip",
        )
    if layout == "transformers" and config.preprocess.resize_mode == "longest":
        raise UsageError(
            f"{checkpoint.path}: pictures are padded to a square for it, which transformers' CLIP doesn't do",
            hint="use --layout open_clip",
        )
    check_place(out, layout, force=force)


def check_place(out: Path, layout: Target, *, force: bool) -> None:
    """Raise UsageError where nothing in `layout` can be written to `out`: known before there is a checkpoint."""
    check_new_folder(out, (open_clip if layout == "open_clip" else transformers).CONFIG, force=force)


def transformers_config(config: ClipConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `config.json` of a CLIPModel whose image tower is a ViT."""
    vision, text = config.vision, config.text
    assert isinstance(vision, ViTConfig)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": tokenizer.start_token,
            "eos_token_id": tokenizer.end_token,
            "pad_token_id": tokenizer.end_token,
            **_transformer(text, config.embed_dim),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **_transformer(vision, config.embed_dim),
        },
    }


def _transformer(tower: TextConfig | ViTConfig, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "projection_dim": embed_dim,
    }


def preprocessor_config(preprocess: Preprocess, size: int) -> dict[str, Any]:
    """The content of `preprocessor_config.json`."""
    square = {"height": size, "width": size}
    squash = preprocess.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }


def unname(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP with a ViT under transformers' names: the way back of `transformers.rename`."""
    whole = {ours: theirs for theirs, ours in WHOLE.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in whole:
            named[whole[name]] = transposed(tensor)
        elif ".attn.in_proj_" in name:
            for i, part in enumerate("qkv"):
                named[_theirs(name.replace(".in_proj_", f".{part}_proj."))] = _third(tensor, i)
        else:
            named[_theirs(name)] = tensor
    return named


def _theirs(name: str) -> str:
    if name == "logit_scale":
        return name
    tower, prefix = next((theirs, ours) for theirs, ours in TOWERS.items() if name.startswith(ours))
    name = name.removeprefix(prefix)
    for theirs, ours in PARTS.items():
        name = name.replace(ours, theirs)
    return tower + name


def _third(tensor: Tensor, index: int) -> Tensor:
    rows, *rest = tensor.shape
    return Tensor((rows // 3, *rest), tensor.dtype, lambda: np.split(tensor.read(), 3)[index])


def _read(path: Path) -> bytes:
    """A file that is copied from the model. Raises ModelError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {reason(error)}") from error


def _card(checkpoint: Checkpoint, layout: Target, origin: str) -> str:
    """The model's own card, if it has one, and what this copy is."""
    config, name = checkpoint.config, checkpoint.name
    own = checkpoint.path / CARD
    text = _read(own).decode(errors="replace") if own.is_file() else f"# {name}\n"
    said = [f"Written by clipcli {__version__} in the layout of {layout}, from {name} ({checkpoint.layout}). {origin}"]
    if layout == "open_clip" and has_own_vocabulary(config):
        said.append(
            f"The vocabulary is the model's own ({config.text.vocab_size:,} tokens). open_clip takes its built-in one "
            "unless `text_cfg` in `open_clip_config.json` says otherwise: set `hf_tokenizer_name` there to the path or "
            "the repository of this folder (its `tokenizer.json` is read by transformers, which must be installed)."
        )
    elif layout == "transformers":
        said.append("`CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` read it.")
    return f"{text.partition(_HEADING)[0].rstrip()}\n{_HEADING}\n" + "\n\n".join(line.strip() for line in said) + "\n"
