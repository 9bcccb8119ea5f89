"""Attention over packed token tries, as Hugging Face modules call it. Knows no model and no texts.

Each block of queries reads only the keys that one of them attends to: for tries of short texts little more
than the block itself, for a long shared prompt that prompt and the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.compute.preorder import AttentionBlock, Preorder, attention_blocks

IMPLEMENTATION = "lensd_packed"  # the name by which Hugging Face modules find `packed_attention`
QUERY_BLOCK = {"cpu": 64, "cuda": 256}  # queries that share a set of keys


class UnsupportedAttention(Exception):
    """The model asks for something that packed attention does not do."""


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """An `AttentionBlock` on the device."""

    queries: slice
    keys: slice | Tensor
    mask: Tensor  # (Q, K) additive, of the model's dtype


@dataclass(slots=True)
class Plan:
    """Who attends to whom in one packed sequence, for every layer."""

    blocks: tuple[DeviceBlock, ...]
    depth: Tensor  # (n,) position of each token in its text
    windows: dict[int, tuple[Tensor, ...]]  # the blocks' masks under a sliding window, by its width

    def masks(self, window: int | None) -> tuple[Tensor, ...]:
        """The mask of each block: of those that it may attend to, a query sees the last `window`."""
        if window is None:
            return tuple(block.mask for block in self.blocks)
        if window not in self.windows:
            self.windows[window] = tuple(self._within(window, block) for block in self.blocks)
        return self.windows[window]

    def _within(self, window: int, block: DeviceBlock) -> Tensor:
        distance = self.depth[block.queries].unsqueeze(1) - self.depth[block.keys]  # (Q, K) tokens before
        return block.mask.masked_fill(distance >= window, -torch.inf)


def plan_attention(packed: Preorder, device: str, dtype: torch.dtype) -> Plan:
    """Move the attention of a packed sequence to the device."""
    block = QUERY_BLOCK[torch.device(device).type]
    blocks = (on_device(entry, device, dtype) for entry in attention_blocks(packed.end, block))
    return Plan(tuple(blocks), torch.from_numpy(packed.depth).to(device), {})


def on_device(block: AttentionBlock, device: str, dtype: torch.dtype) -> DeviceBlock:
    keys = block.keys if isinstance(block.keys, slice) else torch.from_numpy(block.keys)
    allowed = torch.from_numpy(block.mask)
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return DeviceBlock(
        queries=block.queries,
        keys=keys if isinstance(keys, slice) else keys.to(device),
        mask=mask.to(device),
    )


current: ContextVar[Plan] = ContextVar("current")


@contextlib.contextmanager
def attending(plan: Plan) -> Iterator[None]:
    """Within it, on this thread, `packed_attention` follows the plan."""
    token = current.set(plan)
    try:
        yield
    finally:
        current.reset(token)


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
    plan = current.get()
    result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for block, mask in zip(plan.blocks, plan.masks(sliding_window), strict=True):
        attended = attend(
            query[:, :, block.queries], rows(key, block.keys), rows(value, block.keys), mask, scaling, softcap
        )
        result[:, block.queries] = attended.transpose(1, 2)
    return result, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """(1, heads, Q, d_head), (1, key heads, K, d_head) twice and (Q, K) -> (1, heads, Q, d_head)."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[None, None], scale=scaling, enable_gqa=groups > 1
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap)) + mask
    return scores.softmax(-1) @ value


def rows(heads: Tensor, keys: slice | Tensor) -> Tensor:
    """heads: (1, heads, n, d_head) -> (1, heads, K, d_head)."""
    return heads[:, :, keys] if isinstance(keys, slice) else heads.index_select(2, keys)


def register() -> None:
    """Make `packed_attention` known to Hugging Face modules. Safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
