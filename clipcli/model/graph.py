"""The image towers as graphs for ONNX Runtime, tight as those of `fast.py`, written from configuration and weights.

A configuration and arrays by their original names come in (memory-mapped, fp16 or fp32); the graph goes out as bytes,
and apart from it the arrays that belong into it, by the graph's own names: so a graph of fp32 copies no weights, and
none is too large for a protobuf. Pictures are uint8, normalisation is inside, embeddings come out with the length that
they have. For int8, weights are rounded a row at a time and activations a product at a time, while it runs; the patch
embedding, the last block (one token) and the projection stay in fp32. Runs nothing and reads no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clipcli.model.config import ClipConfig, ResNetConfig, ViTConfig
from clipcli.model.plain import Part, Weights

PIXELS, EMBEDDINGS = "pixels", "embeddings"
_OURS = "com.microsoft"  # operators that ONNX Runtime adds to the standard's
_SMALL = 1024  # bytes up to which an array is a part of the graph: shapes, places, what operators are folded by

Array = NDArray[Any]


def build(config: ClipConfig, weights: Weights, most: int | None = None) -> tuple[bytes, dict[str, Array]]:
    """The image tower: pictures [B, 3, size, size] (uint8, RGB) to embeddings [B, embed_dim] (fp32), not normalised.

    `most`: the largest weight of the int8 form, 127 or less, which only a ViT has; None: everything is fp32.
    Returns an ONNX model without its larger weights, and these.
    """
    graph, vision = _Graph(most), config.vision
    tower = Part(weights, "visual.")
    mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (config.preprocess.mean, config.preprocess.std))
    x = graph("Sub", graph("Cast", PIXELS, to=TensorProto.FLOAT), mean * 255)
    x = graph("Mul", x, 1 / (255 * std))
    x = _vit(graph, vision, tower, x) if isinstance(vision, ViTConfig) else _resnet(graph, vision, tower, x)
    graph.nodes[-1].output[0] = EMBEDDINGS
    apart = {name: array for name, array in graph.arrays.items() if array.nbytes > _SMALL}
    size = vision.image_size
    whole = helper.make_graph(
        graph.nodes,
        "image tower",
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["batch", 3, size, size])],
        [helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, ["batch", config.embed_dim])],
        [
            _elsewhere(name, array) if name in apart else numpy_helper.from_array(array, name)
            for name, array in graph.arrays.items()
        ],
    )
    operators = [helper.make_opsetid("", 20), helper.make_opsetid(_OURS, 1)]
    return helper.make_model(whole, opset_imports=operators, ir_version=9).SerializeToString(), apart


def _elsewhere(name: str, array: Array) -> TensorProto:
    """A weight of which the graph knows type and shape alone."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="none")
    return tensor


class _Graph:
    """Nodes and weights so far. Values are known by name; arrays that operators are given become weights."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.nodes: list[Any] = []
        self.arrays: dict[str, Array] = {}

    def __call__(self, kind: str, *inputs: str | Array, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Add an operator; the name of what comes out, with several outputs that of the first (`name.1` is next)."""
        name = f"{kind}{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        taken = [value if isinstance(value, str) else self._weight(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, taken, names, domain=domain, **attributes))
        return name

    def _weight(self, array: Array) -> str:
        name = f"w{len(self.arrays)}"
        self.arrays[name] = np.require(array, requirements=["C", "A"]).reshape(array.shape)
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """`x` in another shape; 0 keeps a dimension."""
        return self("Reshape", x, np.array(shape, np.int64))

    def norm(self, x: str, part: Part) -> str:
        """Layer normalisation of the last dimension."""
        return self("LayerNormalization", x, part["weight"], part["bias"], axis=-1, epsilon=1e-5)

    def linear(self, x: str, weight: Array, bias: Array | None = None, rounded: bool = False) -> str:
        """`x @ weight.T + bias` of rows [N, inputs]; where it may be `rounded` and the graph is of int8, it is."""
        biases = () if bias is None else (bias,)
        if not rounded or self.most is None:
            return self("Gemm", x, weight, *biases, transB=1)
        scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / np.float32(self.most)
        whole = np.rint(weight / scale[:, None]).astype(np.int8).T
        return self("DynamicQuantizeMatMul", x, whole, scale, "", *biases, domain=_OURS)

    def one_query(self, query: str, x: str, key: Array, value: Array, heads: int) -> str:
        """What one query [B, width] a picture finds in `x` [B, N, width], by way of `fast._one_query`.

        The bias of the values is left to the caller, that of the keys changes nothing.
        """
        key, value = (weight.reshape(heads, -1, weight.shape[1]) for weight in (key, value))
        depth, width = key.shape[1:]
        query = self("Transpose", self.reshape(query, -1, heads, depth), perm=[1, 0, 2])
        query = self("MatMul", query, key * np.float32(depth**-0.5))  # [heads, B, width]
        query = self("Transpose", query, perm=[1, 0, 2])
        shares = self("Softmax", self("MatMul", query, self("Transpose", x, perm=[0, 2, 1])), axis=-1)  # [B, heads, N]
        found = self("Transpose", self("MatMul", shares, x), perm=[1, 0, 2])  # [heads, B, width]
        found = self("MatMul", found, value.transpose(0, 2, 1))  # [heads, B, width / heads]
        return self.reshape(self("Transpose", found, perm=[1, 0, 2]), -1, width)

    def convolution(self, x: str, part: Part, conv: str, bn: str, **attributes: Any) -> str:
        """A convolution with the BatchNorm after it."""
        gain = part[f"{bn}.weight"] / np.sqrt(part[f"{bn}.running_var"] + np.float32(1e-5))
        bias = part[f"{bn}.bias"] - gain * part[f"{bn}.running_mean"]
        return self("Conv", x, part[f"{conv}.weight"] * gain.reshape(-1, 1, 1, 1), bias, **attributes)


def _vit(graph: _Graph, config: ViTConfig, tower: Part, x: str) -> str:
    """A vision transformer on rows [B * N, width]."""
    patch, width, grid = config.patch_size, config.width, config.image_size // config.patch_size
    tokens, used = grid**2 + 1, grid * patch
    if used < config.image_size:  # what a patch doesn't fill
        x = graph("Slice", x, *(np.array(edge, np.int64) for edge in ([0, 0], [used, used], [2, 3])))
    x = graph("Transpose", graph.reshape(x, -1, 3, grid, patch, grid, patch), perm=[0, 2, 4, 1, 3, 5])
    x = graph.linear(graph.reshape(x, -1, 3 * patch**2), tower["conv1.weight"].reshape(width, -1))
    places = tower["positional_embedding"].copy()
    places[0] += tower["class_embedding"]
    x = graph("Pad", graph.reshape(x, -1, tokens - 1, width), np.array([0, 1, 0, 0, 0, 0], np.int64))
    x = graph.norm(graph("Add", x, places), tower.part("ln_pre."))
    x = graph.reshape(x, -1, width)
    for i in range(config.layers):
        x = _block(graph, config, tower.part(f"transformer.resblocks.{i}."), x, tokens, last=i == config.layers - 1)
    return graph.linear(graph.norm(x, tower.part("ln_post.")), tower["proj"].T)


def _block(graph: _Graph, config: ViTConfig, block: Part, x: str, tokens: int, last: bool) -> str:
    """A residual attention block; of the `last` one the class tokens [B, width] alone."""
    width, heads, attn, mlp = config.width, config.heads, block.part("attn."), block.part("mlp.")
    weight, bias = attn["in_proj_weight"], attn["in_proj_bias"]
    y = graph.norm(x, block.part("ln_1."))
    if last:
        first = np.array(0, np.int64)
        x = graph("Gather", graph.reshape(x, -1, tokens, width), first, axis=1)
        y = graph.reshape(y, -1, tokens, width)
        query = graph.linear(graph("Gather", y, first, axis=1), weight[:width], bias[:width])
        y = graph.one_query(query, y, weight[width : 2 * width], weight[2 * width :], heads)
        y = graph("Add", y, bias[2 * width :])
    else:
        y = graph.reshape(graph.linear(y, weight, bias, rounded=True), -1, tokens, 3 * width)
        q = graph("Split", y, outputs=3, axis=-1, num_outputs=3)
        y = graph("MultiHeadAttention", q, f"{q}.1", f"{q}.2", domain=_OURS, num_heads=heads)
        y = graph.reshape(y, -1, width)
    x = graph("Add", x, graph.linear(y, attn["out_proj.weight"], attn["out_proj.bias"], rounded=not last))
    y = graph.norm(x, block.part("ln_2."))
    y = graph.linear(y, mlp["c_fc.weight"], mlp["c_fc.bias"], rounded=not last)
    y = graph("Gelu", y) if config.activation == "gelu" else graph("QuickGelu", y, domain=_OURS, alpha=1.702)
    return graph("Add", x, graph.linear(y, mlp["c_proj.weight"], mlp["c_proj.bias"], rounded=not last))


def _resnet(graph: _Graph, config: ResNetConfig, tower: Part, x: str) -> str:
    """A ModifiedResNet."""
    x = graph("Relu", graph.convolution(x, tower, "conv1", "bn1", strides=[2, 2], pads=[1, 1, 1, 1]))
    for i in (2, 3):
        x = graph("Relu", graph.convolution(x, tower, f"conv{i}", f"bn{i}", pads=[1, 1, 1, 1]))
    x = _shrunk(graph, x)
    for stage, blocks in enumerate(config.layers, 1):
        for i in range(blocks):
            part = tower.part(f"layer{stage}.{i}.")
            y = graph("Relu", graph.convolution(x, part, "conv1", "bn1"))
            y = graph("Relu", graph.convolution(y, part, "conv2", "bn2", pads=[1, 1, 1, 1]))
            if i == 0:
                x, y = (x, y) if stage == 1 else (_shrunk(graph, x), _shrunk(graph, y))
                x = graph.convolution(x, part, "downsample.0", "downsample.1")
            x = graph("Relu", graph("Add", graph.convolution(y, part, "conv3", "bn3"), x))
    pool, width, places = tower.part("attnpool."), 32 * config.width, (config.image_size // 32) ** 2
    x = graph("Transpose", graph.reshape(x, -1, width, places), perm=[0, 2, 1])
    mean = graph("ReduceMean", x, np.array([1], np.int64))  # [B, 1, width]
    x = graph("Add", graph("Concat", mean, x, axis=1), pool["positional_embedding"])
    query = graph.linear(graph("Gather", x, np.array(0, np.int64), axis=1), pool["q_proj.weight"], pool["q_proj.bias"])
    y = graph.one_query(query, x, pool["k_proj.weight"], pool["v_proj.weight"], config.heads)
    return graph.linear(graph("Add", y, pool["v_proj.bias"]), pool["c_proj.weight"], pool["c_proj.bias"])


def _shrunk(graph: _Graph, x: str) -> str:
    return graph("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
