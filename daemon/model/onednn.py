"""Matrix products by packed weights (oneDNN), which a CPU without Intel's own kernels runs twice as fast.

Replaces the linear layers of a module and fuses gated MLPs. Knows nothing about attention or batches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

TYPICAL_ROWS = 512  # of a batch; the packed form is laid out for about that many
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a replacement to what it replaces

# How oneDNN calls the activation of a gated MLP: name and algorithm.
FUSED_ACTIVATIONS = {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}

SUMMANDS = 3  # bfloat16 numbers of 8 bits each that hold the 24 of a float32
LEAST_STEP = 16  # rows
STEPS = 16  # to a doubling of the rows

Product = Callable[[Tensor], Tensor]


def prepared_rows(rows: int) -> int:
    """The number from `rows` up that packed products are run with; less than a sixteenth more, or 16.

    oneDNN prepares a kernel for each number of rows it meets, which takes a millisecond and about half a MiB,
    and keeps a thousand: with few numbers to meet, that is done once.
    """
    step = max(LEAST_STEP, (1 << rows.bit_length()) // (2 * STEPS))
    return -(-rows // step) * step


def filled_rows(rows: int) -> int:
    """The number from `rows` up that runs in `row_chunks`."""
    return -(-rows // LEAST_STEP) * LEAST_STEP


def row_chunks(rows: int) -> list[slice]:
    """Rows in pieces of about as many as products do well with, each a multiple of LEAST_STEP if all are.

    So few numbers of rows are met, with less to fill up than by `prepared_rows`, and what passes between
    products stays in the caches.
    """
    units = -(-rows // LEAST_STEP)
    n = max(1, round(rows / (TYPICAL_ROWS * torch.get_num_threads())))
    bounds = [units * i // n * LEAST_STEP for i in range(n)]
    return [slice(*piece) for piece in itertools.pairwise([*bounds, rows])]


def chunk_sizes(threads: int) -> range:
    """The numbers of rows, whole LEAST_STEPs, that a piece of `row_chunks` may have."""
    return range(LEAST_STEP, TYPICAL_ROWS * threads * 3 // 2, LEAST_STEP)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN has a packed product for such weights here."""
    return weight.device.type == "cpu" and weight.dtype in AGREEMENT and works(weight.dtype)


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, multiplies packed weights, and rightly."""
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).to(dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        got = torch.ops.mkldnn._linear_pointwise(weight, pack(weight), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return agrees(F.linear(weight, weight), got)


def pack(weight: Tensor) -> Tensor:
    """weight: (out, in), in the layout of oneDNN."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    return packed


def product(weight: Tensor, bias: Tensor | None) -> Product:
    """x (N, in) -> x @ weight.T + bias (N, out), for weights (out, in) that stay as they are."""
    if not packs(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = pack(weight)

    def multiply(x: Tensor) -> Tensor:
        more = prepared_rows(len(x)) - len(x)
        filled = F.pad(x, (0, 0, 0, more)) if more else x
        result: Tensor = torch.ops.mkldnn._linear_pointwise(filled, packed, bias, "none", [], "")
        return result[: len(x)]

    return multiply


def split_product(weight: Tensor, bias: Tensor | None) -> Product:
    """`product` on CUDA for x (N, in) whose values bfloat16 holds: float32 weights, several times as fast.

    A bfloat16 summand of a weight times x is exact in float32. The sums are the tensor cores', which round
    down: off by 1e-5 of a result's size in the mean, where rounding x to bfloat16 moved it by 1e-3.
    """
    stacked = torch.cat(summands_of(weight), dim=1).T  # (3 in, out)

    def multiply(x: Tensor) -> Tensor:
        repeated = x.bfloat16().repeat(1, SUMMANDS)
        result: Tensor = torch.mm(repeated, stacked, out_dtype=torch.float32)
        return result if bias is None else result.add_(bias)

    return multiply


def summands_of(weight: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is the float32 `weight`, exactly but for what is below 1e-38."""
    summands: list[Tensor] = []
    for _ in range(SUMMANDS):
        summands.append(weight.bfloat16())
        weight = weight - summands[-1].to(weight.dtype)
    return summands


class PackedLinear(nn.Module):
    """A linear layer by packed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        super().__init__()
        self.packed = pack(weight)
        self.bias = bias

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.packed.shape

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class PackedGatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), and more to be added, with all of that inside the matrix products."""

    def __init__(
        self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, act: tuple[str, str]
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self._act, self._algorithm = act

    @property
    def shape(self) -> torch.Size:
        """(d_mlp, d_model)."""
        return self.gate.shape

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x: (n, d_model), plus: the same."""
        ops = torch.ops.mkldnn._linear_pointwise
        gate = ops(x, self.gate.packed, self.gate.bias, self._act, [], self._algorithm)
        hidden = ops.binary(x, gate, self.up.packed, self.up.bias, "mul")
        down = self.down
        result: Tensor = (
            down(hidden) if plus is None else ops.binary(hidden, plus, down.packed, down.bias, "add")
        )
        return result


def pack_linears(layers: Iterable[nn.Module]) -> int:
    """Replace the linear layers and the gated MLPs in `layers`; how many were.

    Where oneDNN has nothing for them, they stay. A gated MLP is fused only if that gives the same result.
    """
    replaced = 0
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if (packed := packed_linear(child)) is not None:
                    setattr(module, name, packed)
                    replaced += 1
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if (fused := fused_mlp(child)) is not None:
                    setattr(module, name, fused)
    return replaced


def packed_linear(module: nn.Module) -> PackedLinear | None:
    """The packed form of a linear layer, or of Hugging Face's transposed one."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
    elif isinstance(module, Conv1D):
        weight, bias = module.weight.T, module.bias  # (in, out) there
    else:
        return None
    return PackedLinear(weight, bias) if packs(weight) else None


def fused_mlp(module: nn.Module) -> PackedGatedMlp | None:
    """The fused form of a gated MLP, if it is one: same parts, same result."""
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    act = FUSED_ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    if act is None or not (
        isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and isinstance(down, PackedLinear)
    ):
        return None
    fused = PackedGatedMlp(gate, up, down, act)
    x = torch.randn(4, gate.packed.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = agrees(module(x.to(gate.packed.dtype)), fused(x.to(gate.packed.dtype)))
    return fused if same else None


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    error = torch.linalg.vector_norm((got - expected).float())
    return bool(error <= AGREEMENT[expected.dtype] * torch.linalg.vector_norm(expected.float()))
