"""The vision transformer in numpy: a few pictures are done before torch would be imported.

Weights come as any mapping of arrays by their original names, as stored (fp16, fp32, memory-mapped), and are looked
at layer by layer; all arithmetic is fp32. Written from the same paper as `vit.py` and sharing no code with it,
it is also what the tests hold that against. The last block computes the class token alone: nobody reads the others.
ModifiedResNets are torch's: convolutions in numpy are slower than importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipcli.model.config import Activation, ViTConfig

FEW = 32  # pictures of ViT-B/32 on which numpy loses less than importing torch costs (benchmarks/start.py)
_B32 = 4.25e9  # multiplications that one of them takes
_CHUNK = 1 << 17  # numbers that stay in the cache from one step of an activation to the next

Array = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]

# P(1 / (1 + _STRETCH · u)) · exp(-u² / 2) is the normal distribution's tail beyond u, to 1e-8 when multiplied by u.
# Fitted to `math.erfc` (least squares, weighted until the largest errors were equal), highest power first.
_STRETCH = 0.32
_TAIL = (-0.130775959, 0.499294634, -0.270856231, 0.318909811, 0.0781288375, 0.00529871019)


def few(config: ViTConfig) -> int:
    """How many pictures are worth doing here rather than importing torch: as much work as `FEW` of ViT-B/32."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    each = 4 * config.width**2 + 2 * config.width * config.mlp_width  # multiplications, by token and layer
    return max(1, int(FEW * _B32 / (tokens * config.layers * each)))


@np.errstate(all="ignore")  # numbers that are not finite are told by the result
def forward(config: ViTConfig, weights: Weights, pixels: Array) -> Array:
    """Map normalised pictures [B, 3, size, size] to embeddings [B, embed_dim], not normalised."""
    tower = Part(weights, "visual.")
    x = _patches(pixels, config.patch_size)  # [B, grid ** 2, 3 * patch ** 2]
    x = _linear(x, tower["conv1.weight"].reshape(config.width, -1))  # [B, grid ** 2, width]
    first = np.broadcast_to(tower["class_embedding"], (len(x), 1, config.width))
    x = np.concatenate([first, x], axis=1) + tower["positional_embedding"]  # [B, grid ** 2 + 1, width]
    x = _norm(x, tower.part("ln_pre."))
    for i in range(config.layers):
        x = _block(x, tower.part(f"transformer.resblocks.{i}."), config, last=i == config.layers - 1)
    return _norm(x[:, 0], tower.part("ln_post.")) @ tower["proj"]


class Part:
    """The weights whose names begin alike, in fp32."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self._weights[self._prefix + name], np.float32)

    def part(self, prefix: str) -> Part:
        """Those of them whose names go on with `prefix`."""
        return Part(self._weights, self._prefix + prefix)


def _patches(pixels: Array, size: int) -> Array:
    """Squares of `size` pixels, row by row: [B, grid ** 2, 3 * size ** 2]."""
    grid = pixels.shape[2] // size
    squares = pixels[..., : grid * size, : grid * size].reshape(-1, 3, grid, size, grid, size)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), grid**2, -1)


def _block(x: Array, block: Part, config: ViTConfig, *, last: bool) -> Array:
    """Attention, then the MLP; each normalised before and added after. Of the `last` one, token 0 alone."""
    kept = x[:, :1] if last else x
    kept = kept + _attention(_norm(x, block.part("ln_1.")), block.part("attn."), config.heads, last=last)
    mlp = block.part("mlp.")
    hidden = _linear(_norm(kept, block.part("ln_2.")), mlp["c_fc.weight"], mlp["c_fc.bias"])
    _activate(hidden, config.activation)
    kept += _linear(hidden, mlp["c_proj.weight"], mlp["c_proj.bias"])
    return kept


def _attention(x: Array, attention: Part, heads: int, *, last: bool) -> Array:
    """Every token asks every token; of the `last` block, token 0 alone asks."""
    width = x.shape[2]
    weight, bias = attention["in_proj_weight"], attention["in_proj_bias"]
    asking = x[:, :1] if last else x
    q = _linear(asking, weight[:width], bias[:width]) * np.float32((width // heads) ** -0.5)
    k, v = np.split(_linear(x, weight[width:], bias[width:]), 2, axis=2)
    q, k, v = (y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3) for y in (q, k, v))  # [B, heads, N, head width]
    shares = q @ k.transpose(0, 1, 3, 2)  # [B, heads, N, N]
    shares -= shares.max(axis=3, keepdims=True)
    np.exp(shares, out=shares)
    shares /= shares.sum(axis=3, keepdims=True)
    seen = (shares @ v).transpose(0, 2, 1, 3).reshape(asking.shape)
    return _linear(seen, attention["out_proj.weight"], attention["out_proj.bias"])


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x @ weight.T + bias` as one matrix product, whatever the leading dimensions."""
    y: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1)


def _norm(x: Array, norm: Part) -> Array:
    """Layer normalisation of the last dimension."""
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(1e-5))
    x *= norm["weight"]
    x += norm["bias"]
    return x


def _activate(x: Array, activation: Activation) -> None:
    """Apply the activation in place."""
    apply = _quick_gelu if activation == "quick_gelu" else _gelu
    flat = x.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        apply(flat[start : start + _CHUNK])


def _quick_gelu(x: Array) -> None:
    """`x · σ(1.702 x)`."""
    below = x * np.float32(-1.702)
    np.exp(below, out=below)
    below += 1
    x /= below


def _gelu(x: Array) -> None:
    """`x` times the normal distribution up to `x`: numpy has no erf, so what lies beyond |x| is taken off max(x, 0)."""
    size = np.abs(x)
    t = size * np.float32(_STRETCH)
    t += 1
    np.divide(1, t, out=t)
    beyond = np.full_like(t, _TAIL[0])
    for coefficient in _TAIL[1:]:
        beyond *= t
        beyond += np.float32(coefficient)
    beyond *= size
    size *= size
    size *= np.float32(-0.5)
    beyond *= np.exp(size, out=size)
    np.maximum(x, 0, out=x)
    x -= beyond
