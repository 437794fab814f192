"""The image towers as inference runs them: the reference's weights and numbers (to 1e-5 in fp32), less work.

A plain tower in evaluation mode goes into `fast`, a module that maps pictures to the same embeddings comes out. What
it does otherwise:

- patches are cut by reshaping and embedded by one matrix product; all layers run on rows [B * N, width];
- residual sums and activations are made by the matrix products themselves (`products`), in place where that isn't so;
- of the last block only the class token is computed, and a single query needs no keys and values (`_one_query`);
- BatchNorm is folded into the convolutions, which run channels-last, the layout that attention pooling reads;
- on a CPU a large batch goes through in parts.

A ViT's weights are shared with the plain tower unless they are packed. There are no gradients: training runs the plain
towers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clipcli.model.blocks import ResidualAttentionBlock, positions
from clipcli.model.clip import ImageTower
from clipcli.model.products import BlockProducts, JointProducts, Product, norm
from clipcli.model.resnet import Bottleneck, ModifiedResNet
from clipcli.model.vit import VisionTransformer

LARGEST = 32 << 20  # bytes of an intermediate result on a CPU; more comes from the system anew, page by page


def fast(tower: ImageTower, *, pack: bool = False) -> nn.Module:
    """The inference form of `tower`, which it takes over: moving or casting one afterwards does it to both.

    With `pack` it stays where it is, a CPU, and in fp32, with weights in the layout that the CPU's products like best.
    """
    return FastViT(tower, pack=pack) if isinstance(tower, VisionTransformer) else FastResNet(tower)


class _Fast(nn.Module):
    """Pictures in as few parts as keep every intermediate result small."""

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pictures [B, 3, size, size] to embeddings [B, embed_dim], not normalised."""
        floats = self._floats(pixels.shape[-1]) * len(pixels) if pixels.device.type == "cpu" else 0
        parts = -(-floats * pixels.element_size() // LARGEST)
        if parts < 2:
            return self._embed(pixels)
        return torch.cat([self._embed(part) for part in pixels.chunk(parts)])

    def _floats(self, size: int) -> int:
        """Numbers in the largest intermediate result of one picture."""
        raise NotImplementedError

    def _embed(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class FastViT(_Fast):
    """A vision transformer."""

    def __init__(self, tower: VisionTransformer, *, pack: bool = False) -> None:
        super().__init__()
        self.patch = tower.conv1.kernel_size[0]
        self.embed = Product(tower.conv1.weight.flatten(1), None, pack=pack)
        self.class_embedding, self.positional_embedding = tower.class_embedding, tower.positional_embedding
        self.ln_pre, self.ln_post, self.proj = tower.ln_pre, tower.ln_post, tower.proj
        *first, last = tower.transformer.resblocks
        self.blocks = nn.ModuleList(FastBlock(block, pack=pack) for block in first)  # type: ignore[arg-type]
        self.last = LastBlock(last, pack=pack)  # type: ignore[arg-type]

    def _floats(self, size: int) -> int:
        return ((size // self.patch) ** 2 + 1) * self.last.hidden

    def _embed(self, pixels: Tensor) -> Tensor:
        batch, patch = len(pixels), self.patch
        grid = pixels.shape[-1] // patch
        x = pixels[..., : grid * patch, : grid * patch].reshape(batch, 3, grid, patch, grid, patch)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch * grid**2, 3 * patch**2)
        x = self.embed(x).view(batch, grid**2, -1)
        x = _tokens(self.class_embedding, x, self.positional_embedding)  # [B, grid ** 2 + 1, width]
        x = norm(x, self.ln_pre).flatten(0, 1)
        for block in self.blocks:
            x = block(x, batch)
        return norm(self.last(x, batch), self.ln_post) @ self.proj


class FastBlock(JointProducts):
    """A residual attention block over rows [B * N, width], which it may change in place."""

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """What the plain block makes of `x`."""
        y = self.qkv(norm(x, self.ln_1))  # [B * N, 3 * width]
        q, k, v = y.view(batch, -1, 3, self.heads, x.shape[1] // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, width / heads]
        return self.rest(x, y.transpose(1, 2).reshape(x.shape))


class LastBlock(BlockProducts):
    """The last one, of which only the class token [B, width] is wanted."""

    def __init__(self, block: ResidualAttentionBlock, *, pack: bool) -> None:
        super().__init__(block, pack=pack)
        self.in_proj_weight, self.in_proj_bias = block.attn.in_proj_weight, block.attn.in_proj_bias

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """The first token of each picture after this block."""
        width = x.shape[1]
        y = norm(x, self.ln_1).view(batch, -1, width)
        (query, key, value), bias = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        y = _one_query(F.linear(y[:, 0], query, bias[0]), y, key, value, self.heads) + bias[2]
        return self.rest(x.view(batch, -1, width)[:, 0].contiguous(), y)


class FastResNet(_Fast):
    """A ModifiedResNet."""

    def __init__(self, tower: ModifiedResNet) -> None:
        super().__init__()
        pairs = ((tower.conv1, tower.bn1), (tower.conv2, tower.bn2), (tower.conv3, tower.bn3))
        self.stem = nn.ModuleList(fuse_conv_bn_eval(conv, bn) for conv, bn in pairs)
        self.width = tower.conv3.out_channels
        self.avgpool = tower.avgpool
        stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
        self.blocks = nn.Sequential(*(FastBottleneck(block) for stage in stages for block in stage))  # type: ignore[arg-type]
        self.attnpool = tower.attnpool
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _floats(self, size: int) -> int:
        return self.width * (size // 2) ** 2  # the stem's end, and the first stage's

    def _embed(self, pixels: Tensor) -> Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last)
        for convolution in self.stem:
            x = convolution(x).relu_()
        x = self.blocks(self.avgpool(x))  # [B, 32 * width, grid, grid]
        pool, x = self.attnpool, x.permute(0, 2, 3, 1).flatten(1, 2)
        x = _tokens(x.mean(dim=1), x, pool.positional_embedding)  # [B, grid ** 2 + 1, 32 * width]
        x = _one_query(pool.q_proj(x[:, 0]), x, pool.k_proj.weight, pool.v_proj.weight, pool.heads)
        return pool.c_proj(x.add_(pool.v_proj.bias))


class FastBottleneck(nn.Module):
    """A bottleneck without BatchNorm."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
        self.conv2 = fuse_conv_bn_eval(block.conv2, block.bn2)
        self.avgpool = block.avgpool
        self.conv3 = fuse_conv_bn_eval(block.conv3, block.bn3)
        self.downsample: nn.Module = nn.Identity()
        if isinstance(block.downsample, nn.Sequential):
            _, conv, bn = block.downsample  # its average pool is that of the block, or over single places
            self.downsample = nn.Sequential(block.avgpool, fuse_conv_bn_eval(conv, bn))  # type: ignore[type-var, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, 4 * planes, H / stride, W / stride]."""
        y = self.conv1(x).relu_()
        y = self.conv2(y).relu_()
        y = self.conv3(self.avgpool(y))
        return y.add_(self.downsample(x)).relu_()


def _tokens(first: Tensor, rest: Tensor, embedding: Tensor) -> Tensor:
    """`first` [width] or [B, width] before `rest` [B, N, width], and to each its positional embedding added."""
    batch, count, width = rest.shape
    places = positions(embedding, count).to(rest.dtype)
    x = rest.new_empty(batch, 1 + count, width)
    x[:, 0] = first + places[0]
    torch.add(rest, places[1:], out=x[:, 1:])
    return x


def _one_query(query: Tensor, x: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """What one query [B, width] a picture finds in `x` [B, N, width], but for the bias of the values.

    `q · (K x) = (q K) · x`, and a mean of `V x` is `V` times the mean: what took two products of all places takes two
    of one place. The bias of the keys adds the same to all scores of a head; the softmax doesn't see it.
    """
    batch, width = query.shape
    key, value = (weight.view(heads, width // heads, width) for weight in (key, value))
    query = query.view(batch, heads, -1).transpose(0, 1) @ key  # [heads, B, width]
    query, x = query.transpose(0, 1).unsqueeze(1), x.unsqueeze(1)  # all heads look at the same: [B, 1, heads, width]
    x = F.scaled_dot_product_attention(query, x, x, scale=(width // heads) ** -0.5)[:, 0]  # [B, heads, width]
    x = x.transpose(0, 1) @ value.mT  # [heads, B, width / heads]
    return x.transpose(0, 1).reshape(batch, width)
