"""The text tower without waste: many prompts in, their embeddings out, equal to the plain tower's to rounding.

No prompt is padded to the context length, and each is computed once. Prompts that begin alike, as a template's do,
share their first tokens: since no token sees a later one, these go through the tower once, and the rests look back at
the keys and values that were kept. The last block runs for the end tokens alone. The weights are the
`TextTransformer`'s own unless they are packed; it stays the reference. Nothing is normalised here, nor tokenized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcli.model.products import JointProducts, norm
from clipcli.model.text import TextTransformer

Row = tuple[int, ...]  # a prompt's token ids up to its end token
Kept = tuple[Tensor, Tensor]  # keys and values of a prefix in one block, each [heads, P, width / heads]


class Sizes(NamedTuple):
    """What a device likes, counted in token positions."""

    batch: int  # go through the tower together
    group: int  # cost as much as one more group: its prefix, and the last of its rests, fill no batch


ON_CPU = Sizes(1500, 64)  # larger batches gain nothing
ON_GPU = Sizes(16_384, 4096)  # a pass takes a GPU as long as thousands of positions


@dataclass(frozen=True)
class Group:
    """Prompts that begin alike."""

    prefix: Row  # computed once; may be empty
    batches: list[list[Row]]  # whole prompts, the shortest first

    @property
    def positions(self) -> int:
        """Token positions that go through the tower: the prefix, and all rests, without padding."""
        return len(self.prefix) + sum(len(row) - len(self.prefix) for batch in self.batches for row in batch)


class FastText(nn.Module):
    """The text tower's parts as `encode` uses them. With `pack` it stays on the CPU, in fp32 (`products`)."""

    blocks: Sequence[JointProducts]

    def __init__(self, tower: TextTransformer, *, pack: bool = False) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding
        blocks = [JointProducts(block, pack=pack) for block in tower.transformer.resblocks]  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.ln_final, self.text_projection = tower.ln_final, tower.text_projection


def encode(tower: FastText, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Embeddings of prompts (ragged token ids, up to the context length), not normalised, as batches are done.

    Yields (indices into `ids`, [len(indices), embed_dim] in the tower's dtype).
    """
    where: dict[Row, list[int]] = {}
    for index, row in enumerate(ids):
        where.setdefault(tuple(row[: row.index(max(row)) + 1]), []).append(index)
    for group in plan(where, ON_CPU if tower.text_projection.device.type == "cpu" else ON_GPU):
        past = _prefix(tower, group.prefix)
        for batch in group.batches:
            copies = [(index, number) for number, row in enumerate(batch) for index in where[row]]
            indices, numbers = map(list, zip(*copies, strict=True))
            yield indices, _rests(tower, batch, past)[numbers]


def plan(rows: Iterable[Row], sizes: Sizes = ON_CPU) -> list[Group]:
    """Which prompts share which prefix, and go through the tower together. Equal rows share nothing but a prefix.

    One level of prefixes: the full tree of a set of templates would have few positions less.
    """
    groups: list[Group] = []
    for prefix, members in _alike(sorted(rows), sizes.group):
        batches: list[list[Row]] = []
        room = 0
        for row in sorted(members, key=len):
            rest = len(row) - len(prefix)
            if rest > room:
                batches.append([])
                room = max(sizes.batch, rest)
            batches[-1].append(row)
            room -= rest
        groups.append(Group(prefix, batches))
    return groups


def _alike(rows: Sequence[Row], cost: int) -> Iterator[tuple[Row, list[Row]]]:
    """Each prefix that is worth its `cost`, with its rows; `rows` are sorted, and keep a token behind the prefix.

    Walks the tree of all prefixes without building it: `branches` lead from the root to where the walk is, each with
    its depth and the rows that are left to it. A branch that ends becomes a group if its rows would else pay more.
    """
    branches: list[tuple[int, list[Row]]] = [(0, [])]
    for row, other in zip_longest(rows, rows[1:], fillvalue=()):
        shared = _shared(row, other)  # with the next
        if shared > branches[-1][0]:
            branches.append((shared, []))
        branches[-1][1].append(row)
        while shared < branches[-1][0]:
            depth, members = branches.pop()
            if shared > branches[-1][0]:
                branches.append((shared, []))
            above, left = branches[-1]
            if len(members) * (depth - above) > depth + cost:
                yield members[0][:depth], members
            else:
                left += members
    if branches[0][1]:
        yield (), branches[0][1]


def _shared(a: Row, b: Row) -> int:
    """How many tokens two rows begin with alike, neither whole: the last token of each is to be read."""
    most = min(len(a), len(b)) - 1
    return next((place for place in range(most) if a[place] != b[place]), max(most, 0))


class _Rows(NamedTuple):
    """Rows of tokens that lie one behind the other, T tokens in all, and how to stand them below each other."""

    tokens: Tensor  # [T]: their ids
    places: Tensor  # [T]: where in its row each stands
    rows: Tensor  # [T]: which row that is
    table: Tensor  # [B, N]: which of the T stands there; behind a row's end its last once more
    ends: Tensor  # [B]: which of the T is a row's last


def _lay(rows: Sequence[Row], device: torch.device) -> _Rows:
    lengths = torch.tensor([len(row) for row in rows])
    taken = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, N]
    table = taken.flatten().cumsum(0).view(taken.shape) - 1
    numbers, places = taken.nonzero(as_tuple=True)
    tokens = torch.tensor(list(chain.from_iterable(rows)))
    return _Rows(*(x.to(device) for x in (tokens, places, numbers, table, lengths.cumsum(0) - 1)))


@torch.inference_mode()
def _prefix(tower: FastText, prefix: Row) -> list[Kept | None]:
    """The keys and values of each block for tokens that prompts begin with."""
    past: list[Kept | None] = [None] * len(tower.blocks)
    if prefix:
        rows = _lay([prefix], tower.text_projection.device)
        x = _embed(tower, rows, 0)
        for depth, block in enumerate(tower.blocks):
            x, past[depth] = _block(block, x, rows, None)
    return past


@torch.inference_mode()
def _rests(tower: FastText, batch: Sequence[Row], past: Sequence[Kept | None]) -> Tensor:
    """Embeddings [B, embed_dim] of rows whose first tokens are in `past`."""
    start = past[0][0].shape[1] if past[0] else 0
    rows = _lay([row[start:] for row in batch], tower.text_projection.device)
    x = _embed(tower, rows, start)
    *blocks, last = tower.blocks
    for block, kept in zip(blocks, past, strict=False):
        x, _ = _block(block, x, rows, kept)
    x, _ = _block(last, x, rows, past[-1], ends=True)  # [B, width]
    return norm(x, tower.ln_final) @ tower.text_projection


def _embed(tower: FastText, rows: _Rows, start: int) -> Tensor:
    """Tokens [T, width] of rows whose first stands at the place `start` of its prompt."""
    x = tower.token_embedding(rows.tokens)
    return x + tower.positional_embedding[start + rows.places].to(x.dtype)


def _block(
    block: JointProducts, x: Tensor, rows: _Rows, past: Kept | None, *, ends: bool = False
) -> tuple[Tensor, Kept]:
    """Map tokens [T, width] that stand behind `past` to the same, or with `ends` to the last of each row [B, width].

    Also returns the keys and values of the first row.
    """
    size, length = rows.table.shape
    qkv = block.qkv(norm(x, block.ln_1))[rows.table]  # [B, N, 3 * width]
    q, k, v = qkv.view(size, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, width / heads]
    places = torch.arange(length, device=x.device)
    if ends:  # the last of the table are the last of the rows
        x, q, seen = x[rows.ends], q[:, :, -1:], (places <= rows.places[rows.ends, None])[:, None, None]
        mixed = _attend(q, k, v, seen, past)[:, :, 0]  # [B, heads, width / heads]
    else:
        mixed = _attend(q, k, v, places <= places[:, None], past).transpose(1, 2)[rows.rows, rows.places]
    return block.rest(x, mixed.flatten(1)), (k[0], v[0])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, past: Kept | None) -> Tensor:
    """Attention in two parts under one softmax: all rows look at the same prefix in one product, each at its own rest.

    q [B, heads, Q, d]; k and v [B, heads, N, d]; `seen` [Q, N] or [B, 1, 1, N] of the rest. Returns q's shape.
    """
    if past is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    keys, values = past
    q = q * q.shape[-1] ** -0.5
    rest = (q @ k.mT).masked_fill(~seen, -torch.inf)  # [B, heads, Q, N]
    prefix = _apart(_together(q) @ keys.mT, q)  # [B, heads, Q, P]
    weights = torch.cat([prefix, rest], dim=-1).softmax(dim=-1)
    start = keys.shape[1]
    return weights[..., start:] @ v + _apart(_together(weights[..., :start]) @ values, q)


def _together(x: Tensor) -> Tensor:
    """[B, heads, Q, n] as [heads, B * Q, n]: what all rows do with one matrix a head is one product."""
    return x.transpose(0, 1).flatten(1, 2)


def _apart(x: Tensor, like: Tensor) -> Tensor:
    """[heads, B * Q, n] as [B, heads, Q, n], B and Q as in `like`."""
    return x.view(len(x), like.shape[0], like.shape[2], -1).transpose(0, 1)
