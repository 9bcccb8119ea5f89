"""Attention over packed token tries, as Hugging Face modules call it. Knows no model and no texts.

Each block of queries reads only the keys that one of them attends to: for tries of short texts little more
than the block itself, for a long shared prompt that prompt and the block. On a CPU block by block, on CUDA
all blocks at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.model.between import Nodes
from daemon.model.cuda_streams import moved, on_cuda
from daemon.model.trie import AttentionBlock, Preorder, attention_blocks

IMPLEMENTATION = "lensd_packed"  # the name by which Hugging Face modules find `packed_attention`
QUERY_BLOCK, CUDA_QUERY_BLOCK = 64, 128  # queries that share a set of keys


class UnsupportedAttention(Exception):
    """The model asks for something that packed attention does not do."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer asks for."""

    query: Tensor  # (1, heads, n, d_head)
    key: Tensor  # (1, key heads, n, d_head)
    value: Tensor  # the same
    window: int | None  # of those that a query may attend to, it sees the last so many
    scale: float  # of the scores
    softcap: float | None


class Plan(Protocol):
    """Who attends to whom in one packed sequence of n tokens, for every layer."""

    @property
    def slides(self) -> bool:
        """Whether a layer asked for a sliding window."""
        ...

    def attend(self, call: Call) -> Tensor:
        """-> (1, n, heads, d_head)."""
        ...


def plan_attention(packed: Preorder, device: str, dtype: torch.dtype) -> Plan:
    """The attention of a packed sequence, on the device."""
    end, depth = (moved(row, device) for row in (packed.end, packed.depth))
    if on_cuda(device):
        return GroupedPlan.of(attention_blocks(packed.end, CUDA_QUERY_BLOCK), end, depth, dtype)
    return BlockPlan(end, depth, dtype)


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """An `AttentionBlock` on the device."""

    queries: slice
    keys: slice | Tensor
    mask: Tensor  # (Q, K) additive, of the model's dtype


def on_device(block: AttentionBlock, nodes: Tensor, end: Tensor, dtype: torch.dtype) -> DeviceBlock:
    """nodes, end: (n,) of all nodes. The mask, most of what a plan weighs, is made where it is needed."""
    keys = block.keys if isinstance(block.keys, slice) else moved(block.keys, end.device)
    queries = nodes[block.queries].unsqueeze(1)
    allowed = (nodes[keys] <= queries) & (queries < end[keys])
    return DeviceBlock(queries=block.queries, keys=keys, mask=additive(allowed, dtype))


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where it is allowed, else -inf."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


@dataclass(slots=True)
class BlockPlan:
    """Block after block, each with no more keys than it needs: for a CPU, where a call costs little."""

    end: Tensor  # (n,) one past each node's last descendant
    depth: Tensor  # (n,) position of each token in its text
    dtype: torch.dtype
    slides: bool = False  # whether a layer asked for a sliding window
    _within: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # the blocks' masks, by window
    _blocks: tuple[DeviceBlock, ...] = ()
    _nodes: Nodes | None = None

    def attend(self, call: Call) -> Tensor:
        query, key, value = call.query, call.key, call.value
        result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for block, mask in zip(self.blocks, self.masks(call.window), strict=True):
            ours = query[:, :, block.queries]
            theirs = rows(key, block.keys), rows(value, block.keys)
            result[:, block.queries] = attend(ours, *theirs, mask, call.scale, call.softcap).transpose(1, 2)
        return result

    @property
    def blocks(self) -> tuple[DeviceBlock, ...]:
        """Made when they are first asked for: see `nodes`."""
        if not self._blocks:
            nodes = torch.arange(len(self.end), device=self.end.device)
            blocks = attention_blocks(self.end.numpy(), QUERY_BLOCK)
            self._blocks = tuple(on_device(block, nodes, self.end, self.dtype) for block in blocks)
        return self._blocks

    def nodes(self, window: int | None) -> Nodes:
        """For layers that attend by themselves: what they need instead of blocks."""
        self.slides |= window is not None
        if self._nodes is None:
            self._nodes = Nodes.of(self.end, self.depth)
        return self._nodes

    def masks(self, window: int | None) -> tuple[Tensor, ...]:
        """The mask of each block."""
        if window is None:
            return tuple(block.mask for block in self.blocks)
        self.slides = True
        if window not in self._within:
            self._within[window] = tuple(self._mask(window, block) for block in self.blocks)
        return self._within[window]

    def _mask(self, window: int, block: DeviceBlock) -> Tensor:
        distance = self.depth[block.queries].unsqueeze(1) - self.depth[block.keys]  # (Q, K) tokens before
        return block.mask.masked_fill(distance >= window, -torch.inf)


@dataclass(slots=True)
class GroupedPlan:
    """All blocks at once, each with as many keys as the widest: for CUDA, where every call costs.

    B blocks of Q queries, the last one filled up with queries that nobody reads.
    """

    n: int
    queries: Tensor  # (B, Q) nodes
    keys: Tensor  # (B, K) nodes
    mask: Tensor  # (B, Q, K) additive
    depth: Tensor  # (n,) position of each token in its text
    _within: dict[int, Tensor]  # masks by sliding window

    @classmethod
    def of(
        cls, blocks: Sequence[AttentionBlock], end: Tensor, depth: Tensor, dtype: torch.dtype
    ) -> GroupedPlan:
        nodes = np.arange(len(end))
        needed = [nodes[block.keys] for block in blocks]
        keys = np.full((len(blocks), max(map(len, needed))), -1)
        for row, of_block in zip(keys, needed, strict=True):
            row[: len(of_block)] = of_block
        width = blocks[0].queries.stop - blocks[0].queries.start
        all_queries = np.minimum(np.arange(len(blocks) * width), len(end) - 1).reshape(len(blocks), width)
        queries, key_nodes = moved(all_queries, end.device), moved(keys, end.device)
        i, j = queries.unsqueeze(2), key_nodes.unsqueeze(1)
        key_nodes = key_nodes.clamp(min=0)
        allowed = (j >= 0) & (j <= i) & (i < end[key_nodes].unsqueeze(1))
        return cls(len(end), queries, key_nodes, additive(allowed, dtype), depth, {})

    @property
    def slides(self) -> bool:
        return bool(self._within)

    def attend(self, call: Call) -> Tensor:
        grouped = taken(call.query, self.queries)
        keys, values = taken(call.key, self.keys), taken(call.value, self.keys)
        attended = attend(grouped, keys, values, self._mask(call.window), call.scale, call.softcap)
        return attended.transpose(1, 2).flatten(0, 1)[None, : self.n]

    def _mask(self, window: int | None) -> Tensor:
        """(B, 1, Q, K)."""
        if window is None:
            return self.mask.unsqueeze(1)
        if window not in self._within:
            distance = self.depth[self.queries].unsqueeze(2) - self.depth[self.keys].unsqueeze(1)
            self._within[window] = self.mask.masked_fill(distance >= window, -torch.inf)
        return self._within[window].unsqueeze(1)


current: ContextVar[Plan] = ContextVar("current")


@contextlib.contextmanager
def attending(plan: Plan) -> Iterator[None]:
    """Within it, on this thread, `packed_attention` follows the plan."""
    token = current.set(plan)
    try:
        yield
    finally:
        current.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What a Hugging Face attention module calls; query: (1, heads, n, d_head) -> (1, n, heads, d_head).

    key and value: (1, key heads, n, d_head). The module's own mask is not looked at. Raises
    UnsupportedAttention where the model wants attention sinks or position biases.
    """
    if unknown := [name for name in ("s_aux", "position_bias") if others.get(name) is not None]:
        raise UnsupportedAttention(f"attention with {unknown[0]}")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return current.get().attend(Call(query, key, value, sliding_window, scale, softcap)), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """(B, heads, Q, d_head), (B, key heads, K, d_head) twice, and a mask (Q, K) or (B, 1, Q, K)."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        mask = mask if mask.ndim == 4 else mask[None, None]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
    # The heads that share a key head side by side, as more queries of it.
    batch, heads, n, d_head = query.shape
    together = query.reshape(batch, heads // groups, groups * n, d_head)
    scores = (together @ key.mT).mul_(scale / softcap).tanh_().view(batch, heads, n, -1)
    scores = torch.add(mask, scores, alpha=softcap)
    attended = scores.softmax(-1).view(batch, heads // groups, groups * n, -1) @ value
    return attended.view(batch, heads, n, -1)


def taken(heads: Tensor, nodes: Tensor) -> Tensor:
    """heads: (1, heads, n, d_head), nodes: (B, M) -> (B, heads, M, d_head)."""
    flat = heads[0].index_select(1, nodes.flatten())
    return flat.view(len(flat), *nodes.shape, -1).transpose(0, 1)


def rows(heads: Tensor, keys: slice | Tensor) -> Tensor:
    """heads: (1, heads, n, d_head) -> (1, heads, K, d_head)."""
    return heads[:, :, keys] if isinstance(keys, slice) else heads.index_select(2, keys)


def register() -> None:
    """Make `packed_attention` known to Hugging Face modules. Safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
