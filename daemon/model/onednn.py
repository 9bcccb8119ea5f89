"""Matrix products by oneDNN's packed weights, where they are faster than torch's own; and gated MLPs.

Replaces the linear layers of a module. Knows nothing about attention or batches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TYPICAL_ROWS = 512  # of a product; the packed layout is chosen for about that many
ROW_STEP = 16  # the numbers of rows that products run with are multiples of it
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a replacement to what it replaces

# How oneDNN calls the activation of a gated MLP: name and algorithm.
FUSED_ACTIVATIONS = {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}

SUMMANDS = 3  # bfloat16 numbers of 8 bits each that hold the 24 of a float32

Product = Callable[[Tensor], Tensor]


def padded_rows(rows: int) -> int:
    """The least multiple of ROW_STEP from `rows` up."""
    return -(-rows // ROW_STEP) * ROW_STEP


def row_chunks(rows: int) -> list[slice]:
    """Rows in chunks of about TYPICAL_ROWS for each thread, each a multiple of ROW_STEP if all rows are.

    oneDNN makes a kernel of half a MiB for each number of rows it meets; few numbers make few kernels.
    """
    steps = -(-rows // ROW_STEP)
    n = max(1, round(rows / (TYPICAL_ROWS * torch.get_num_threads())))
    bounds = [steps * i // n * ROW_STEP for i in range(n)]
    return [slice(*chunk) for chunk in itertools.pairwise([*bounds, rows])]


def chunk_sizes(threads: int) -> range:
    """The numbers of rows that chunks may have, where all rows are a multiple of ROW_STEP."""
    return range(ROW_STEP, TYPICAL_ROWS * threads * 3 // 2, ROW_STEP)


def by_chunks(function: Product, x: Tensor) -> Tensor:
    """function(x) for x (n, in), chunk by chunk; `function` gets multiples of ROW_STEP only."""
    n = len(x)
    more = padded_rows(n) - n
    x = F.pad(x, (0, 0, 0, more)) if more else x
    results = [function(x[rows]) for rows in row_chunks(len(x))]
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result[:n]


def packs(weight: Tensor) -> bool:
    """Whether such weights are multiplied by oneDNN here."""
    on_cpu = weight.device.type == "cpu" and weight.dtype in AGREEMENT
    return on_cpu and faster(weight.dtype) and works(weight.dtype)


def faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster than torch on this processor: with AVX2 alone it is not, in float32."""
    return dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() != "AVX2"


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, multiplies packed weights, and rightly."""
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).to(dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        got = torch.ops.mkldnn._linear_pointwise(weight, pack(weight), None, "none", [], "")
        turned = torch.ops.mkldnn._linear_pointwise(weight, pack(weight.T), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return agrees(F.linear(weight, weight), got) and agrees(F.linear(weight, weight.T), turned)


def pack(weight: Tensor) -> Tensor:
    """weight: (out, in), of any strides, in the layout of oneDNN."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return packed


def product(weight: Tensor, bias: Tensor | None) -> Product:
    """x (N, in) -> x @ weight.T + bias (N, out), for weights (out, in) that stay as they are."""
    if not packs(weight):
        return lambda x: F.linear(x, weight, bias)
    return OneDnnLinear(weight, bias)


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


class OneDnnLinear(nn.Module):
    """A linear layer by packed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        super().__init__()
        self.packed = weight if weight.is_mkldnn else pack(weight)
        self.bias = bias

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.packed.shape

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        rows = by_chunks(self._multiply, x.flatten(0, -2))
        return rows.view(*x.shape[:-1], rows.shape[1])

    def _multiply(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class TorchLinear(nn.Module):
    """A linear layer by torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in); copies it, so that a mapped weight file can be let go."""
        super().__init__()
        self.weight, self.bias = weight.clone(), bias

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


def linear(weight: Tensor, bias: Tensor | None) -> OneDnnLinear | TorchLinear:
    """The faster of the two. weight: (out, in)."""
    return OneDnnLinear(weight, bias) if packs(weight) else TorchLinear(weight, bias)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) + plus; in oneDNN all of that happens inside the matrix products."""

    def __init__(
        self,
        gate: OneDnnLinear | TorchLinear,
        up: OneDnnLinear | TorchLinear,
        down: OneDnnLinear | TorchLinear,
        act: nn.Module,
    ) -> None:
        """All three products of one kind; the activation is one of FUSED_ACTIVATIONS."""
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act

    @property
    def shape(self) -> torch.Size:
        """(d_mlp, d_model)."""
        return self.gate.shape

    def forward(self, x: Tensor, plus: Tensor) -> Tensor:
        """x, plus: (n, d_model), n one of `chunk_sizes`."""
        gate, up, down = self.gate, self.up, self.down
        if not (
            isinstance(gate, OneDnnLinear) and isinstance(up, OneDnnLinear) and isinstance(down, OneDnnLinear)
        ):
            added: Tensor = down(self.act(gate(x)).mul_(up(x))).add_(plus)
            return added
        multiply = torch.ops.mkldnn._linear_pointwise
        act, algorithm = FUSED_ACTIVATIONS[type(self.act).__name__]
        gated = multiply(x, gate.packed, gate.bias, act, [], algorithm)
        hidden = multiply.binary(x, gated, up.packed, up.bias, "mul")
        result: Tensor = multiply.binary(hidden, plus, down.packed, down.bias, "add")
        return result


def pack_linears(layers: Iterable[nn.Module]) -> int:
    """Replace the linear layers in `layers` where oneDNN has a product for them; returns how many."""
    replaced = 0
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if (packed := packed_linear(child)) is not None:
                    setattr(module, name, packed)
                    replaced += 1
    return replaced


def packed_linear(module: nn.Module) -> OneDnnLinear | None:
    """The packed form of a linear layer, or of Hugging Face's transposed one."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
    elif isinstance(module, Conv1D):
        weight, bias = module.weight.T, module.bias  # (in, out) there
    else:
        return None
    return OneDnnLinear(weight, bias) if packs(weight) else None


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    error = torch.linalg.vector_norm((got - expected).float())
    return bool(error <= AGREEMENT[expected.dtype] * torch.linalg.vector_norm(expected.float()))
