"""Matrix products by oneDNN's packed weights, where they are faster than torch's own; and gated MLPs.

Replaces the linear layers of a module. Knows nothing about attention or batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.model.row_sizes import MOST_ROWS, RowSizes

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a replacement to what it replaces

# How oneDNN calls the activation of a gated MLP: name and algorithm.
FUSED_ACTIVATIONS = {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}

SUMMANDS = 3  # bfloat16 numbers of 8 bits each that hold the 24 of a float32

Product = Callable[[Tensor], Tensor]


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
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, MOST_ROWS)
    return packed


def product(weight: Tensor, bias: Tensor | None) -> Product:
    """x (N, in) -> x @ weight.T + bias (N, out), for weights (out, in) that stay as they are."""
    if packs(weight):
        return OneDnnLinear(weight, bias)
    return TorchLinear(weight, bias) if weight.device.type == "cpu" else lambda x: F.linear(x, weight, bias)


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


class ChunkedLinear(nn.Module):
    """A linear layer on a CPU, which multiplies rows by chunks of certain sizes."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.sizes = RowSizes()

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out), n one of `sizes`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        rows = self.sizes.multiply(self.multiply, x.flatten(0, -2))
        return rows.view(*x.shape[:-1], rows.shape[1])


class OneDnnLinear(ChunkedLinear):
    """By packed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        super().__init__(bias)
        self.packed = weight if weight.is_mkldnn else pack(weight)

    @property
    def shape(self) -> torch.Size:
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def multiply(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class TorchLinear(ChunkedLinear):
    """By torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        super().__init__(bias)
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def linear(weight: Tensor, bias: Tensor | None) -> ChunkedLinear:
    """The faster of the two, with weights of its own, so that a mapped weight file can be let go.

    weight: (out, in).
    """
    return OneDnnLinear(weight, bias) if packs(weight) else TorchLinear(weight.clone(), bias)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) + plus; in oneDNN all of that happens inside the matrix products."""

    def __init__(
        self,
        gate: ChunkedLinear,
        up: ChunkedLinear,
        down: ChunkedLinear,
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
        """x, plus: (n, d_model), n one of the products' sizes."""
        gate, up, down = self.gate, self.up, self.down
        if not (
            isinstance(gate, OneDnnLinear) and isinstance(up, OneDnnLinear) and isinstance(down, OneDnnLinear)
        ):
            gated = self.act(gate.multiply(x)).mul_(up.multiply(x))
            return down.multiply(gated).add_(plus)
        multiply = torch.ops.mkldnn._linear_pointwise
        act, algorithm = FUSED_ACTIVATIONS[type(self.act).__name__]
        gated = multiply(x, gate.packed, gate.bias, act, [], algorithm)
        hidden = multiply.binary(x, gated, up.packed, up.bias, "mul")
        result: Tensor = multiply.binary(hidden, plus, down.packed, down.bias, "add")
        return result


def pack_linears(layers: Iterable[nn.Module]) -> int:
    """Replace the linear layers in `layers` by ones that multiply by chunks, on a CPU; returns how many."""
    replaced = 0
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if (packed := packed_linear(child)) is not None:
                    setattr(module, name, packed)
                    replaced += 1
    return replaced


def packed_linear(module: nn.Module) -> ChunkedLinear | None:
    """A linear layer on a CPU, or Hugging Face's transposed one, in the form that multiplies by chunks."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
    elif isinstance(module, Conv1D):
        weight, bias = module.weight.T, module.bias  # (in, out) there
    else:
        return None
    if weight.device.type != "cpu":
        return None
    return OneDnnLinear(weight, bias) if packs(weight) else TorchLinear(weight, bias)


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    error = torch.linalg.vector_norm((got - expected).float())
    return bool(error <= AGREEMENT[expected.dtype] * torch.linalg.vector_norm(expected.float()))
