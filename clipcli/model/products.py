"""The matrix products of inference: a linear layer with what follows it, in as few passes over memory as there are.

On a CPU a weight can be packed: oneDNN keeps it in blocks, of which its products are up to twice as fast as those of
plain matrices, most of all with few rows, and adds bias, activation and residual while a block is in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcli.model.blocks import QuickGELU, ResidualAttentionBlock


class Product(nn.Module):
    """`activation(alpha * rows @ weight.T + bias)`, rows [R, in], weight [out, in]; no gradients.

    `activation` is none, "gelu" or "swish" (x · σ(x)). With `pack` the weight is copied and stays where it is.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, alpha: float = 1.0, activation: str = "none", *, pack: bool = False
    ) -> None:
        super().__init__()
        self.alpha, self.activation = alpha, activation
        self.weight: nn.Parameter
        self.bias: nn.Parameter
        self.packed = packed(alpha * weight.detach()) if pack else None
        for name, tensor in (("weight", None if self.packed is not None else weight), ("bias", bias)):
            if isinstance(tensor, nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, rows: Tensor) -> Tensor:
        """New rows [R, out]."""
        if self.packed is not None:
            algorithm = "none" if self.activation == "gelu" else ""
            return _onednn(rows, self.packed, self.bias, self.activation, [], algorithm)
        bias = rows.new_zeros(()) if self.bias is None else self.bias
        y = torch.addmm(bias, rows, self.weight.T, alpha=self.alpha)
        if self.activation == "gelu":
            return torch.ops.aten.gelu_(y)  # F.gelu has no `inplace`
        return F.silu(y, inplace=True) if self.activation == "swish" else y

    def onto(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x` [R, out] and the product of `rows`, without activation; `x` itself may be changed."""
        assert self.activation == "none" and self.bias is not None
        if self.packed is not None:
            return _onednn.binary(rows, x, self.packed, self.bias, "add")
        if x.dtype == torch.float32:
            return x.add_(self.bias).addmm_(rows, self.weight.T, alpha=self.alpha)
        # `x` is rounded once, as plain towers do
        return x.add_(torch.addmm(self.bias, rows, self.weight.T, alpha=self.alpha))


class BlockProducts(nn.Module):
    """The products and norms of a residual attention block, which its inference forms put together.

    `x · σ(1.702 x)` is `silu(1.702 x) / 1.702`: both factors belong to the products around it.
    """

    def __init__(self, block: ResidualAttentionBlock, *, pack: bool) -> None:
        super().__init__()
        self.heads = block.attn.heads
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        hidden, out = block.mlp.c_fc, block.mlp.c_proj
        factor, activation = (1.702, "swish") if isinstance(block.mlp.act, QuickGELU) else (1.0, "gelu")
        self.hidden = len(hidden.bias)
        self.out = Product(block.attn.out_proj.weight, block.attn.out_proj.bias, pack=pack)
        self.c_fc = Product(hidden.weight, factor * hidden.bias.detach(), factor, activation, pack=pack)
        self.c_proj = Product(out.weight, out.bias, 1 / factor, pack=pack)

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """All behind attention, of rows [R, width], which may change in place, and of what attention found for each."""
        x = self.out.onto(x, attended)
        return self.c_proj.onto(x, self.c_fc(norm(x, self.ln_2)))


class JointProducts(BlockProducts):
    """And the product that makes queries, keys and values."""

    def __init__(self, block: ResidualAttentionBlock, *, pack: bool) -> None:
        super().__init__(block, pack=pack)
        self.qkv = Product(block.attn.in_proj_weight, block.attn.in_proj_bias, pack=pack)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Layer normalisation, which sums in fp32 by itself."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def packed(weight: Tensor) -> Tensor | None:
    """The weight as oneDNN likes it; None where it can't be had: off the CPU, not in fp32, or without oneDNN."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or _onednn is None:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


# What torch's own compiler calls for a linear layer on a CPU; it isn't in every build.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch._C._has_mkldnn else None
