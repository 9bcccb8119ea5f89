"""The face of rmsnorm_rope_attention.c: what a decoder layer does besides its matrix products, in float32.

Knows no layer's weights but its biases, and no texts.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from daemon.native.library import library
from daemon.native.threads import in_ranges

WIDTH, BLOCK = 8, 16  # numbers in a vector, and queries of a block, as in the C source

Project = Callable[[Tensor], Tensor]

POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Attention(ctypes.Structure):
    """`Attention` of the C source."""

    _fields_ = [
        *[(name, INTEGER) for name in ("n", "heads", "key_heads", "d_head")],
        *[(name, POINTER) for name in ("queries", "keys", "values", "end", "depth")],
        ("window", ctypes.c_int32),
        ("odd", ctypes.c_int32),
    ]


class Given(ctypes.Structure):
    """`Given` of the C source."""

    _fields_ = [
        *[(name, POINTER) for name in ("qkv", "x")],
        ("d_model", INTEGER),
        *[(name, NUMBER) for name in ("epsilon", "scale")],
        *[(name, POINTER) for name in ("bias", "cos", "sin")],
    ]


@dataclass(frozen=True, slots=True)
class Routines:
    """The functions of the C source."""

    add_norm: ctypes._FuncPointer
    turn: ctypes._FuncPointer
    attend: ctypes._FuncPointer


@functools.cache
def routines() -> Routines | None:
    """None where lensd was installed without a C compiler."""
    found = library()
    if found is None:
        return None
    add_norm, turn, attend = found.lensd_add_norm, found.lensd_turn, found.lensd_attend
    add_norm.argtypes = [*[POINTER] * 3, INTEGER, NUMBER, INTEGER, INTEGER]
    turn.argtypes = [POINTER, POINTER, INTEGER, INTEGER]
    attend.argtypes = [POINTER, INTEGER, INTEGER]
    add_norm.restype = turn.restype = None
    return Routines(add_norm, turn, attend)


@dataclass(frozen=True, slots=True)
class Nodes:
    """Who attends to whom in a trie of n nodes, padded to whole blocks."""

    end: Tensor  # (>= n,) int32, 0 past n
    depth: Tensor  # the same

    @classmethod
    def of(cls, end: Tensor, depth: Tensor) -> Nodes:
        more = -len(end) % BLOCK
        return cls(*(torch.nn.functional.pad(row.int(), (0, more)) for row in (end, depth)))


@dataclass(frozen=True, slots=True)
class Heads:
    """How a layer attends."""

    heads: int
    key_heads: int
    d_head: int
    scale: float
    window: int | None  # a query sees this many of the last tokens
    bias: Tensor | None  # (heads + 2 key heads) x d_head of queries, keys and values
    epsilon: float  # of the norm before them

    @property
    def fit(self) -> bool:
        """Whether the C source handles such heads."""
        return self.d_head % WIDTH == 0 and self.heads % self.key_heads == 0

    def attended(
        self, found: Routines, nodes: Nodes, x: Tensor, project: Project, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The attention's result of each head (n, heads x d_head).

        x: (n, d_model) hidden states; `project` makes their queries, keys and values: (n, (heads + 2 key
        heads) x d_head). cos and sin: (n, d_head). Raises MemoryError.
        """
        n, width = len(x), self.key_heads * self.d_head
        assert cos.shape == sin.shape == (n, self.d_head)  # C reads them by address
        tiles = -(-n // WIDTH)
        queries, values = x.new_empty(n, self.heads * self.d_head), x.new_empty(n, width)
        keys = x.new_empty(tiles * WIDTH * width)
        attention = Attention(
            n=n,
            heads=self.heads,
            key_heads=self.key_heads,
            d_head=self.d_head,
            queries=queries.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            end=nodes.end.data_ptr(),
            depth=nodes.depth.data_ptr(),
            window=self.window or 0,
        )
        at = ctypes.addressof(attention)
        qkv = project(x)
        assert qkv.shape == (n, self.heads * self.d_head + 2 * width)
        given = Given(
            qkv=qkv.data_ptr(),
            x=x.data_ptr(),
            d_model=x.shape[1],
            epsilon=self.epsilon,
            scale=self.scale,
            bias=None if self.bias is None else self.bias.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )
        in_ranges(functools.partial(found.turn, at, ctypes.addressof(given)), n, BLOCK)
        if any(in_ranges(functools.partial(found.attend, at), -(-n // BLOCK), 1)):
            raise MemoryError(f"attention over {n} tokens")
        return queries


def add_norm(found: Routines, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """x += y, both (n, d); returns x over the root mean square of its rows."""
    normed = torch.empty_like(x)
    rows = x.data_ptr(), y.data_ptr(), normed.data_ptr(), x.shape[1], epsilon
    in_ranges(lambda first, last: found.add_norm(*rows, first, last), len(x), BLOCK)
    return normed
