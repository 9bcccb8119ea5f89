"""Has an engine on a CPU give each text the same bits in any company, and tells whether it does.

Knows no texts but those that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from daemon.model.encoding import Encoder
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.onednn import ChunkedLinear, OneDnnLinear, TorchLinear
from daemon.model.row_sizes import RowSizes, TriedProduct, row_sizes

INVARIANT = "invariant"
ROUNDED = (torch.bfloat16, torch.float16)  # results that have fewer bits than their sums

Read = Callable[[Sequence[Sequence[int]]], list[Tensor]]  # texts to their values at each place, text by text


def settle_products(layers: Iterable[nn.Module]) -> RowSizes | None:
    """Have layers multiply rows by chunks of sizes that give the same bits; None where none multiplies so."""
    modules = [module for layer in layers for module in layer.modules()]
    fused = [module for module in modules if isinstance(module, FusedDecoderLayer)]
    linears = [module for module in modules if isinstance(module, ChunkedLinear)]
    if not linears:
        return None
    tried = dict([tried_linear(linear) for linear in linears] + [tried_mlp(layer) for layer in fused])
    sizes = row_sizes(list(tried.values()))
    for linear in linears:
        linear.sizes = sizes
    for layer in fused:
        layer.sizes = sizes
    return sizes


def settle_encoders(encoders: Iterable[Encoder]) -> bool:
    """The same for the products of encoders, each by itself; returns whether they could all be had so."""
    linears = [linear for encoder in encoders for linear in encoder.linears]
    tried = dict(map(tried_linear, linears))
    sizes = {key: row_sizes([product]) for key, product in tried.items()}
    for linear in linears:
        linear.sizes = sizes[tried_linear(linear)[0]]
    return all(one.invariant for one in sizes.values())


def tried_linear(linear: ChunkedLinear) -> tuple[object, TriedProduct]:
    """A product to be tried, and what tells it from products of another kind."""
    key = type(linear), linear.shape, linear.dtype
    if linear.dtype in ROUNDED:
        make = OneDnnLinear if isinstance(linear, OneDnnLinear) else TorchLinear
        return key, TriedProduct.cancelling(lambda weight: make(weight, None).multiply, *key[1:])
    return key, TriedProduct.on_random_rows(linear.multiply, linear.shape[1], linear.dtype)


def tried_mlp(layer: FusedDecoderLayer) -> tuple[object, TriedProduct]:
    _, _, mlp = layer.products
    gate = mlp.gate
    return (type(mlp), gate.shape, gate.dtype), TriedProduct.on_random_rows(
        lambda x: mlp(x, x), gate.shape[1], gate.dtype
    )


def differing_place(texts: Sequence[Sequence[int]], read: Read) -> int | None:
    """The first place whose bits differ between texts together and each text alone; None for none."""
    together = read(texts)
    start = 0
    for text in texts:
        for place, (values, alone) in enumerate(zip(together, read([text]), strict=True)):
            if not torch.equal(values[start : start + len(text)], alone):
                return place
        start += len(text)
    return None
