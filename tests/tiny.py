"""Small random models for the tests, in every checkpoint layout, each with a small vocabulary of its own.

    path = tiny.save(folder)                                # open_clip layout, ViT, with merges.txt
    path = tiny.save(folder, "torchscript", tiny.resnet())  # what `load_checkpoint(path)` takes

Weights are seeded, have the spread of a real model's, and are exact in float16, so that every layout and
every precision of one configuration is the same function. The head width is 16: a file without a
configuration needs `head_width=16`. Nothing here is trained; answers are arbitrary, yet always the same.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clipcli.model.config import (
    Activation,
    ClipConfig,
    Preprocess,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    expected_shapes,
)

LAYOUTS = ("open_clip", "transformers", "bare", "openai_pt", "torchscript")
HEAD_WIDTH = 16
MERGES = 300
WORDS = """
    a an the of in on at with and one many some this that there is are it itap photo photograph picture
    image drawing painting sketch rendering origami video game art cartoon sculpture tattoo toy plushie
    close up bad good low high resolution blurry bright dark black white cropped clean dirty large small
    nice weird cool my hard to see cat tabby kitten dog puppy terrier retriever horse cow sheep goat bird
    heron eagle owl parrot fish shark whale insect bee butterfly spider snake turtle lizard frog car truck
    bus train bicycle motorcycle airplane boat ship rocket astronaut person man woman child crowd face hand
    house building bridge tower street road river lake ocean beach mountain forest tree flower rose daisy
    leaf grass fruit apple banana orange bread cake pizza soup coffee cup plate table chair lamp clock phone
    book computer keyboard screen camera guitar piano ball kite snow rain cloud sky sun moon star galaxy
    planet satellite centered type breed species kind texture pattern standing sitting running flying water
    grey tall red green blue yellow
"""


def vit(*, activation: Activation = "gelu", preprocess: Preprocess | None = None) -> ClipConfig:
    """The default: 32 px in patches of 8, 2 layers of width 32, embeddings of 16 dimensions."""
    vision = ViTConfig(
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=32 // HEAD_WIDTH,
        mlp_width=128,
        activation=activation,
    )
    return ClipConfig(16, vision, _text(activation), preprocess or Preprocess())


def resnet(*, image_size: int = 32, activation: Activation = "gelu") -> ClipConfig:
    """A ModifiedResNet with one bottleneck a stage; `activation` is the text tower's."""
    vision = ResNetConfig(image_size=image_size, layers=(1, 1, 1, 1), width=8, heads=8 * 32 // HEAD_WIDTH)
    return ClipConfig(16, vision, _text(activation), Preprocess())


def _text(activation: Activation) -> TextConfig:
    return TextConfig(
        context_length=77,
        vocab_size=512 + len(merges()) + 2,
        width=32,
        layers=2,
        heads=32 // HEAD_WIDTH,
        mlp_width=128,
        activation=activation,
    )


def weights(config: ClipConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 arrays for every tensor of `config`, each exact in float16 (`logit_scale` aside)."""
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in sorted(expected_shapes(config).items()):
        noise = random.standard_normal(shape)
        if name == "logit_scale":
            arrays[name] = np.array(math.log(100.0), np.float32)
            continue
        if name.endswith("running_var"):
            value = np.exp(0.2 * noise)
        elif len(shape) == 1 and name.endswith("weight"):  # gains of the normalisations
            value = 1 + 0.1 * noise
        elif len(shape) == 1 and name != "visual.class_embedding":  # biases, running means
            value = 0.1 * noise
        elif "embedding" in name:
            value = 0.5 * noise
        elif name in ("text_projection", "visual.proj"):  # stored as [inputs, outputs]
            value = noise * shape[0] ** -0.5
        else:
            value = noise * (1.5 / math.prod(shape[1:])) ** 0.5
        arrays[name] = value.astype(np.float16).astype(np.float32)
    return arrays


@cache
def merges() -> tuple[str, ...]:
    """The first `MERGES` byte-pair merges of `WORDS`, as lines of `merges.txt`; ties by alphabet."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS.split()]
    learned = []
    for _ in range(MERGES):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(f"{first} {second}")
        words = [_merge(word, first, second) for word in words]
    return tuple(learned)


def _merge(word: list[str], first: str, second: str) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == (first, second):
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def save(
    folder: Path,
    layout: str = "open_clip",
    config: ClipConfig | None = None,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
    vocabulary: bool = True,
) -> Path:
    """Write a checkpoint of `layout` into `folder` (made if need be); returns what `-m` takes.

    That is the folder for "open_clip" and "transformers", the weight file for the others. `arrays` are
    `weights(config)` unless given, stored as `dtype` (float32 or float16).
    """
    config = config or vit()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.asarray(array, dtype) for name, array in (arrays or weights(config)).items()
    }  # asarray keeps the scalar's shape
    if vocabulary:
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges(), ""]), encoding="utf-8")
    return {
        "open_clip": _save_open_clip,
        "transformers": _save_transformers,
        "bare": _save_bare,
        "openai_pt": _save_state_dict,
        "torchscript": _save_torchscript,
    }[layout](folder, config, arrays)


def _save_open_clip(folder: Path, config: ClipConfig, arrays: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    _dump(folder / "open_clip_config.json", open_clip_config(config))
    save_file(arrays, folder / "open_clip_model.safetensors")
    return folder


def _save_transformers(folder: Path, config: ClipConfig, arrays: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    _dump(folder / "config.json", transformers_config(config))
    preprocess = config.preprocess
    size: dict[str, int] = {"shortest_edge": config.vision.image_size}
    if preprocess.resize_mode == "squash":
        size = {"height": config.vision.image_size, "width": config.vision.image_size}
    _dump(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": config.vision.image_size, "width": config.vision.image_size},
            "do_center_crop": preprocess.resize_mode == "shortest",
            "image_mean": preprocess.mean,
            "image_std": preprocess.std,
            "resample": {"bicubic": 3, "bilinear": 2}[preprocess.interpolation],
            "size": size,
        },
    )
    save_file(transformers_arrays(arrays), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save_bare(folder: Path, config: ClipConfig, arrays: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(arrays, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def _save_state_dict(folder: Path, config: ClipConfig, arrays: dict[str, np.ndarray]) -> Path:
    import torch

    path = folder / "tiny.pt"
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, path)
    return path


def _save_torchscript(folder: Path, config: ClipConfig, arrays: dict[str, np.ndarray]) -> Path:
    """A traced archive like OpenAI's: the tensors as attributes of nested modules, three scalars beside."""
    import torch

    class Node(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    root = Node()
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node: torch.nn.Module = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node.get_submodule(part)
        tensor = torch.from_numpy(array.copy())
        if "running_" in leaf:
            node.register_buffer(leaf, tensor)
        else:
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
    scalars = {
        "input_resolution": config.vision.image_size,
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
    }
    for name, number in scalars.items():
        root.register_buffer(name, torch.tensor(number))
    file = folder / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files stay as they are
        torch.jit.trace(root.eval(), torch.zeros(1)).save(str(file))
    return file


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """`open_clip_config.json` of `config`."""
    vision: dict[str, Any] = {
        "image_size": config.vision.image_size,
        "layers": config.vision.layers,
        "width": config.vision.width,
        "head_width": HEAD_WIDTH,
    }
    if isinstance(config.vision, ViTConfig):
        vision |= {
            "patch_size": config.vision.patch_size,
            "head_width": config.vision.width // config.vision.heads,
            "mlp_ratio": config.vision.mlp_width / config.vision.width,
        }
    text = config.text
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
            },
        },
        "preprocess_cfg": {
            "mean": config.preprocess.mean,
            "std": config.preprocess.std,
            "interpolation": config.preprocess.interpolation,
            "resize_mode": config.preprocess.resize_mode,
        },
    }


def transformers_config(config: ClipConfig) -> dict[str, Any]:
    """`config.json` of `config`, which must be a ViT: transformers has no CLIP with a ResNet."""
    vision, text = config.vision, config.text
    if not isinstance(vision, ViTConfig):
        raise TypeError("the transformers layout is for ViT alone")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "hidden_act": text.activation,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "max_position_embeddings": text.context_length,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "hidden_act": vision.activation,
            "hidden_size": vision.width,
            "image_size": vision.image_size,
            "intermediate_size": vision.mlp_width,
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
        },
    }


def transformers_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under transformers' names: q, k, v apart, projections transposed."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        tower, rest = ("vision_model", name[7:]) if name.startswith("visual.") else ("text_model", name)
        rest = rest.replace("transformer.resblocks.", "encoder.layers.").replace("attn.", "self_attn.")
        for ours, theirs in (
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("ln_pre", "pre_layrnorm"),
            ("ln_post", "post_layernorm"),
            ("ln_final", "final_layer_norm"),
            ("token_embedding", "embeddings.token_embedding"),
            ("positional_embedding", "embeddings.position_embedding.weight"),
            ("class_embedding", "embeddings.class_embedding"),
            ("conv1", "embeddings.patch_embedding"),
        ):
            rest = rest.replace(ours, theirs)
        if "in_proj_" in rest:
            for part, third in zip("qkv", np.split(array, 3), strict=True):
                renamed[f"{tower}.{rest.replace('in_proj_', f'{part}_proj.')}"] = np.ascontiguousarray(third)
        elif name in ("visual.proj", "text_projection"):
            kind = "visual_projection" if tower == "vision_model" else "text_projection"
            renamed[f"{kind}.weight"] = np.ascontiguousarray(array.T)
        elif name == "logit_scale":
            renamed[name] = array
        else:
            renamed[f"{tower}.{rest}"] = array
    return renamed


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
