"""Kernels that torch compiles at start-up for an accelerator: of whole layers, and of attention over a trie.

Both need Triton, which comes with torch's builds for CUDA. Knows no texts, and of a model only its layers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from daemon.devices import on_cuda, to_device
from daemon.model.attention import Call, leave_uncompiled
from daemon.model.trie import Trie

BLOCK = 128  # queries, and keys, that are looked at or skipped together
WIDE_HEADS = {
    "BLOCK_M": 64,
    "BLOCK_N": 32,
    "num_warps": 4,
    "num_stages": 1,
}  # takes 0.64 of the time on an H200
RECOMPILATIONS = 64  # of one function: a layer may be compiled for each of its kinds


def can_compile(device: str) -> bool:
    """Whether torch can make kernels for the device."""
    return on_cuda(device) and importlib.util.find_spec("triton") is not None


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer for any number of tokens. `restore_layers` takes it back."""
    leave_uncompiled()
    for layer in layers:
        layer.forward = compiled(layer.forward)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call, once for tensors of any length."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.specialize_float = True  # the lowering of attention knows no variable ones
    result: Callable[..., Any] = torch.compile(function, dynamic=True)
    return result


def restore_layers(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.__dict__.pop("forward", None)


@dataclass(slots=True)
class FlexPlan:
    """Attention as one kernel, in which a block of queries reads the blocks of keys that it attends to."""

    n: int
    end: Tensor  # (n,) one past each node's last descendant
    depth: Tensor  # (n,) position of each token in its text
    deepest: int
    needed: Any  # blocks of keys (B, B) by block of queries: bool, on the host
    whole: Any  # the same, of which every query attends to every key
    slides: bool = False  # whether a layer asked for a sliding window
    _masks: dict[int | None, Any] = field(default_factory=dict)  # by window

    @classmethod
    def of(cls, trie: Trie, device: str) -> FlexPlan:
        needed, whole = block_pattern(trie)
        end, depth = (to_device(row.astype(np.int32), device) for row in (trie.end, trie.depth))
        return cls(len(trie), end, depth, int(trie.depth.max()), needed, whole)

    def attend(self, call: Call) -> Tensor:
        attended = flex()(
            call.query,
            call.key,
            call.value,
            score_mod=capped(call.softcap),
            block_mask=self.mask(call.window),
            scale=call.scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
            kernel_options=tiles(call.query),
        )
        return attended.transpose(1, 2)

    def mask(self, window: int | None) -> Any:
        """The block mask of a sliding window; no text is cut short by one that holds all of it."""
        self.slides |= window is not None
        if window is not None and self.deepest < window:
            window = None
        if window not in self._masks:
            self._masks[window] = self._block_mask(window)
        return self._masks[window]

    def _block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        end, depth = self.end, self.depth
        span = torch.tensor(window or 0, device=end.device)  # a number would be compiled for each width

        def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j])

        def attends_within(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j]) & (depth[i] - depth[j] < span)

        whole = self.whole if window is None else np.zeros_like(self.whole)
        device = str(end.device)
        return BlockMask.from_kv_blocks(
            *listed(self.needed & ~whole, device),
            *listed(whole, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=attends if window is None else attends_within,
            seq_lengths=(self.n, self.n),
        )


def block_pattern(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys each block of queries attends to at all, and which in whole: (B, B) bool each."""
    n = len(trie)
    starts = np.arange(0, n, BLOCK)
    last = np.minimum(starts + BLOCK, n) - 1
    latest, earliest = (ufunc.reduceat(trie.end, starts) for ufunc in (np.maximum, np.minimum))
    query, key = np.arange(len(starts))[:, None], np.arange(len(starts))
    # A key before the block is attended to by its first query if by any.
    needed = (key == query) | ((key < query) & (latest > starts[:, None]))
    whole = (key < query) & (earliest > last[:, None])
    return needed, whole


def listed(pattern: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """(B, B) bool -> how many blocks each row has (1, 1, B), and which: (1, 1, B, B), those first."""
    order = np.argsort(~pattern, axis=1, kind="stable").astype(np.int32)
    return to_device(pattern.sum(1).astype(np.int32), device)[None, None], to_device(order, device)[
        None, None
    ]


@functools.cache
def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Tensor] = flex_attention
    return compiled(function) if torch.cuda.is_available() else function


def tiles(query: Tensor) -> dict[str, Any] | None:
    """The kernel's tile sizes; None for torch's own choice, which suits long rows of keys."""
    return WIDE_HEADS if query.shape[3] == 256 and query.element_size() == 2 else None


@functools.cache
def capped(softcap: float | None) -> Callable[..., Tensor] | None:
    """The change of a score under a soft cap."""
    if softcap is None:
        return None

    def cap(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
