"""The face of rmsnorm_rope_attention.c: what a decoder layer does besides its matrix products, in float32.

Knows no layer's weights but its biases, and no texts.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from daemon.native.library import library
from daemon.native.threads import in_ranges

WIDTH, BLOCK = 8, 16  # numbers in a vector, and queries of a block, as in the C source

POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Attention(ctypes.Structure):
    """`Attention` of the C source."""

    _fields_ = [
        *[(name, INTEGER) for name in ("n", "heads", "key_heads", "d_head")],
        *[(name, POINTER) for name in ("queries", "keys", "values", "end", "depth")],
        ("window", ctypes.c_int32),
        ("odd", ctypes.c_int32),
        ("softcap", NUMBER),
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
    """None without a library: installed without a C compiler, or built of another version of the code."""
    found = library()
    if found is None or built_sizes(found) != (ctypes.sizeof(Attention), ctypes.sizeof(Given)):
        return None
    add_norm, turn, attend = found.lensd_add_norm, found.lensd_turn, found.lensd_attend
    add_norm.argtypes = [*[POINTER] * 3, INTEGER, NUMBER, INTEGER, INTEGER]
    turn.argtypes = [POINTER, POINTER, INTEGER, INTEGER]
    attend.argtypes = [POINTER, INTEGER, INTEGER]
    add_norm.restype = turn.restype = None
    return Routines(add_norm, turn, attend)


def built_sizes(found: ctypes.CDLL) -> tuple[int, int] | None:
    """The sizes of `Attention` and `Given` in a library; None of one that doesn't tell."""
    try:
        sizes = found.lensd_sizes
    except AttributeError:
        return None
    sizes.restype = INTEGER
    both: int = sizes()
    return divmod(both, 1 << 32)


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
    scale: float  # of scores
    window: int | None  # a query sees this many of the last tokens
    softcap: float | None = None  # c: scores s become c tanh(s / c)

    @property
    def fit(self) -> bool:
        """Whether the C source handles such heads."""
        return self.d_head % WIDTH == 0 and self.heads % self.key_heads == 0

    @property
    def width(self) -> int:
        """Numbers in a token's queries, keys and values."""
        return (self.heads + 2 * self.key_heads) * self.d_head

    def attended(self, found: Routines, nodes: Nodes, qkv: Tensor) -> Tensor:
        """The attention's result of each head (n, heads x d_head) float32.

        qkv: (n, (heads + 2 key heads) x d_head) queries, keys and values, in float32 and turned by their
        positions. Raises MemoryError.
        """
        return self._attended(found, nodes, qkv, Given(scale=self.scale))

    def attended_after_norm(
        self,
        found: Routines,
        nodes: Nodes,
        qkv: Tensor,
        norm: InputNorm,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """The same of what is still to be divided by the norm, and turned by cos and sin (n, d_head)."""
        assert cos.shape == sin.shape == (len(qkv), self.d_head)  # C reads them by address
        given = Given(
            x=norm.x.data_ptr(),
            d_model=norm.x.shape[1],
            epsilon=norm.epsilon,
            scale=self.scale,
            bias=None if norm.bias is None else norm.bias.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )
        return self._attended(found, nodes, qkv, given)

    def _attended(self, found: Routines, nodes: Nodes, qkv: Tensor, given: Given) -> Tensor:
        n, width = len(qkv), self.key_heads * self.d_head
        assert qkv.shape == (n, self.width) and qkv.is_contiguous() and qkv.dtype == torch.float32
        tiles = -(-n // WIDTH)
        queries, values = qkv.new_empty(n, self.heads * self.d_head), qkv.new_empty(n, width)
        keys = qkv.new_empty(tiles * WIDTH * width)
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
            softcap=self.softcap or 0,
        )
        given.qkv = qkv.data_ptr()
        at = ctypes.addressof(attention)
        in_ranges(functools.partial(found.turn, at, ctypes.addressof(given)), n, BLOCK)
        if any(in_ranges(functools.partial(found.attend, at), -(-n // BLOCK), 1)):
            raise MemoryError(f"attention over {n} tokens")
        return queries


@dataclass(frozen=True, slots=True)
class InputNorm:
    """The norm before a layer's attention, which products have not yet been divided by."""

    x: Tensor  # (n, d_model) float32, before the norm
    epsilon: float
    bias: Tensor | None  # (heads + 2 key heads) x d_head, added after the norm


def add_norm(found: Routines, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """x += y, both (n, d); returns x over the root mean square of its rows."""
    normed = torch.empty_like(x)
    rows = x.data_ptr(), y.data_ptr(), normed.data_ptr(), x.shape[1], epsilon
    in_ranges(lambda first, last: found.add_norm(*rows, first, last), len(x), BLOCK)
    return normed
