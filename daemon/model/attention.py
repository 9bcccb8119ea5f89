"""Attention over a trie of tokens, as Hugging Face modules call it. Knows no model and no texts.

Each block of queries reads only the keys that one of them attends to: for tries of short texts little more
than the block itself, for a long shared prompt that prompt and the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.devices import on_mps, to_device
from daemon.model.trie import AttentionBlock, Trie, attention_blocks
from daemon.native.rmsnorm_rope_attention import Heads, Nodes, routines

IMPLEMENTATION = "lensd_packed"  # the name by which Hugging Face modules find `trie_attention`
QUERY_BLOCK = 64  # queries that share a set of keys


class UnsupportedAttention(Exception):
    """The model asks for something that attention over a trie does not do."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a layer's call."""

    query: Tensor  # (1, heads, n, d_head)
    key: Tensor  # (1, key heads, n, d_head)
    value: Tensor  # the same
    window: int | None  # of the keys that a query may attend to, it sees the last so many
    scale: float  # of the scores
    softcap: float | None

    @property
    def heads(self) -> Heads:
        """How the layer attends, as compiled code is told."""
        _, heads, _, d_head = self.query.shape
        return Heads(heads, self.key.shape[1], d_head, self.scale, self.window, self.softcap)

    @property
    def fits_compiled(self) -> bool:
        """Whether compiled code can attend: on a CPU, with heads of one width, in no more than float32."""
        return (
            self.query.device.type == "cpu"
            and self.query.dtype != torch.float64
            and self.query.shape[3] == self.key.shape[3] == self.value.shape[3]
            and self.value.shape[1] == self.key.shape[1]
            and self.heads.fit
        )

    def qkv(self) -> Tensor:
        """(n, (heads + 2 key heads) x d_head) float32."""
        together = torch.cat([self.query, self.key, self.value], dim=1)[0]
        return together.transpose(0, 1).flatten(1).float().contiguous()


class Plan(Protocol):
    """Who attends to whom in one trie of n nodes, for every layer."""

    @property
    def slides(self) -> bool:
        """Whether a layer asked for a sliding window."""
        ...

    def attend(self, call: Call) -> Tensor:
        """-> (1, n, heads, d_head)."""
        ...


@dataclass(frozen=True, slots=True)
class MaskedBlock:
    """An `AttentionBlock` on the device, with its mask."""

    queries: slice
    keys: slice | Tensor
    mask: Tensor  # (Q, K) additive, of the model's dtype


@dataclass(slots=True)
class BlockPlan:
    """Attends block by block, each with no more keys than it needs."""

    trie: Trie
    device: str
    dtype: torch.dtype
    slides: bool = False  # whether a layer asked for a sliding window
    _blocks: dict[int | None, tuple[MaskedBlock, ...]] = field(default_factory=dict)  # by window
    _nodes: Nodes | None = None

    def attend(self, call: Call) -> Tensor:
        query, key, value = call.query, call.key, call.value
        if (found := routines()) is not None and call.fits_compiled:
            attended = call.heads.attended(found, self.nodes(call.window), call.qkv())
            return attended.to(query.dtype).view(1, len(attended), query.shape[1], -1)
        result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for block in self.blocks(call.window):
            ours = query[:, :, block.queries]
            theirs = rows(key, block.keys), rows(value, block.keys)
            attended = attend(ours, *theirs, block.mask, call.scale, call.softcap)
            result[:, block.queries] = attended.transpose(1, 2)
        return result

    def nodes(self, window: int | None) -> Nodes:
        """For layers that attend by compiled code: it needs no masks."""
        self.slides |= window is not None
        if self._nodes is None:
            self._nodes = Nodes.of(torch.from_numpy(self.trie.end), torch.from_numpy(self.trie.depth))
        return self._nodes

    def blocks(self, window: int | None) -> tuple[MaskedBlock, ...]:
        """Made at the first call for a window: masks are most of a plan's memory."""
        self.slides |= window is not None
        if window not in self._blocks:
            end, depth = (to_device(row, self.device) for row in (self.trie.end, self.trie.depth))
            self._blocks[window] = tuple(
                masked(block, end, depth, window, self.dtype)
                for block in attention_blocks(self.trie.end, QUERY_BLOCK)
            )
        return self._blocks[window]


@dataclass(slots=True)
class PlanByDevice:
    """A plan for each device that layers attend on, made at the first call from there."""

    make: Callable[[str], Plan]
    _plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def slides(self) -> bool:
        return any(plan.slides for plan in self._plans.values())

    def attend(self, call: Call) -> Tensor:
        device = str(call.query.device)
        if device not in self._plans:
            self._plans[device] = self.make(device)
        return self._plans[device].attend(call)


def masked(
    block: AttentionBlock, end: Tensor, depth: Tensor, window: int | None, dtype: torch.dtype
) -> MaskedBlock:
    """end, depth: (n,) of all nodes. The mask is 0 where a query attends to a key, else -inf."""
    keys = block.keys if isinstance(block.keys, slice) else to_device(block.keys, end.device)
    nodes = torch.arange(len(end), device=end.device)
    queries = nodes[block.queries].unsqueeze(1)
    allowed = (nodes[keys] <= queries) & (queries < end[keys])
    if window is not None:
        allowed &= depth[block.queries].unsqueeze(1) - depth[keys] < window
    mask = torch.zeros(allowed.shape, dtype=dtype, device=end.device).masked_fill_(~allowed, -torch.inf)
    return MaskedBlock(block.queries, keys, mask)


current: ContextVar[Plan] = ContextVar("current")


@contextlib.contextmanager
def attending(plan: Plan) -> Iterator[None]:
    """Within it, on this thread, `trie_attention` follows the plan."""
    token = current.set(plan)
    try:
        yield
    finally:
        current.reset(token)


def trie_attention(
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
    """The function that Hugging Face attention modules call; query: (1, heads, n, d_head).

    key and value: (1, key heads, n, d_head). Returns (1, n, heads, d_head). Ignores the module's own mask.
    Raises UnsupportedAttention where the model wants attention sinks or position biases.
    """
    check_supported(others)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return current.get().attend(Call(query, key, value, sliding_window, scale, softcap)), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """(1, heads, Q, d_head), (1, key heads, K, d_head) twice, and a mask (Q, K)."""
    groups = query.shape[1] // key.shape[1]
    if on_mps(query.device):  # whose products, and more so whose own attention, have been wrong on views
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    elif softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[None, None], scale=scale, enable_gqa=groups > 1
        )
    # The heads that share a key head side by side, as more queries of it.
    batch, heads, n, d_head = query.shape
    together = query.reshape(batch, heads // groups, groups * n, d_head)
    scores = (together @ key.mT).view(batch, heads, n, -1)
    if softcap is None:
        return weighted((scores * scale + mask).float().softmax(-1).to(value.dtype), value)
    scores = torch.add(mask, scores.mul_(scale / softcap).tanh_(), alpha=softcap)
    return weighted(scores.softmax(-1), value)


def weighted(shares: Tensor, value: Tensor) -> Tensor:
    """shares: (1, heads, Q, K), value: (1, key heads, K, d_head) -> (1, heads, Q, d_head)."""
    batch, heads, n, _ = shares.shape
    attended = shares.view(batch, value.shape[1], heads // value.shape[1] * n, -1) @ value
    return attended.view(batch, heads, n, -1)


def rows(heads: Tensor, keys: slice | Tensor) -> Tensor:
    """heads: (1, heads, n, d_head) -> (1, heads, K, d_head)."""
    return heads[:, :, keys] if isinstance(keys, slice) else heads.index_select(2, keys)


def check_supported(others: Mapping[str, object]) -> None:
    """Raises UnsupportedAttention for arguments of a layer's call that change scores in another way."""
    if unknown := [name for name in ("s_aux", "position_bias") if others.get(name) is not None]:
        raise UnsupportedAttention(f"attention with {unknown[0]}")


def register() -> None:
    """Make `trie_attention` known to Hugging Face modules. Safe to repeat."""
    from transformers import AttentionInterface

    if IMPLEMENTATION not in AttentionInterface():
        AttentionInterface.register(IMPLEMENTATION, trie_attention)


def leave_uncompiled() -> None:
    """Have the compiler of torch, which takes a second to import, keep out of `trie_attention`."""
    from transformers import AttentionInterface

    disable: Callable[..., object] = torch.compiler.disable
    AttentionInterface.register(IMPLEMENTATION, disable(trie_attention))
