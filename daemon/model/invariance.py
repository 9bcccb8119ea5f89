"""Has an engine on a CPU give each text the same bits in any company, and tells whether it does.

Knows no texts but those that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from daemon.model.buffers import lasting
from daemon.model.encoding import Encoder
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.onednn import ChunkedLinear, OneDnnLinear, TorchLinear
from daemon.model.row_sizes import MOST_ROWS, RowSizes, TriedProduct, row_sizes
from daemon.model.stamps import Stamps

INVARIANT = "invariant"
ROUNDED = (torch.bfloat16, torch.float16)  # results that have fewer bits than their sums
PREPARED_NUMBERS = 1 << 22  # in the result of an encoder's product, up to which its kernel is made ahead

Make = Callable[[], TriedProduct]
Read = Callable[[Sequence[Sequence[int]]], list[Tensor]]  # texts to their values at each place, text by text


def settle_products(layers: Iterable[nn.Module], stamps: Stamps | None = None) -> RowSizes | None:
    """Have layers multiply rows by chunks of sizes that give the same bits; None where none multiplies so.

    Sizes that `stamps` remember of products of these kinds are not tried again.
    """
    modules = [module for layer in layers for module in layer.modules()]
    fused = [module for module in modules if isinstance(module, FusedDecoderLayer)]
    linears = [module for module in modules if isinstance(module, ChunkedLinear)]
    if not linears:
        return None
    kinds = dict([tried_linear(linear) for linear in linears] + [tried_mlp(layer) for layer in fused])
    sizes = known_sizes(kinds, stamps)
    for linear in linears:
        linear.sizes = sizes
    for layer in fused:
        layer.sizes = sizes
    return sizes


def settle_encoders(encoders: Iterable[Encoder], stamps: Stamps | None = None) -> bool:
    """The same for the products of encoders, each by itself; returns whether they could all be had so."""
    linears = [linear for encoder in encoders for linear in encoder.linears]
    kinds = dict(map(tried_linear, linears))
    sizes = {kind: known_sizes({kind: make}, stamps) for kind, make in kinds.items()}
    for linear in linears:
        linear.sizes = sizes[tried_linear(linear)[0]]
    return all(one.invariant for one in sizes.values())


def known_sizes(kinds: Mapping[str, Make], stamps: Stamps | None) -> RowSizes:
    """The sizes for products of these kinds: remembered, or else tried, and remembered for the next start."""
    subject = {"products": sorted(kinds)}
    known = None if stamps is None else stamps.read(subject)
    if known is not None:
        return RowSizes(**known)
    with lasting():  # so are the kernels that are made here
        sizes = row_sizes([make() for make in kinds.values()])
    if stamps is not None:
        stamps.write(subject, asdict(sizes))
    return sizes


def tried_linear(linear: ChunkedLinear) -> tuple[str, Make]:
    """The kind of a product, and what makes one of the kind to be tried."""
    n_out, width = linear.shape
    biased = "biased" if linear.bias is not None else "plain"  # another kernel
    kind = f"{type(linear).__name__} {n_out} {width} {linear.dtype} {biased}"
    if linear.dtype in ROUNDED:
        new = OneDnnLinear if isinstance(linear, OneDnnLinear) else TorchLinear
        return kind, partial(
            TriedProduct.cancelling,
            lambda weight: new(weight, None).multiply,
            linear.shape,
            linear.dtype,
        )
    return kind, partial(TriedProduct.on_random_rows, linear.multiply, width, linear.dtype)


def tried_mlp(layer: FusedDecoderLayer) -> tuple[str, Make]:
    _, _, mlp = layer.products
    gate = mlp.gate
    kind = f"GatedMlp of {type(gate).__name__} {tuple(gate.shape)} {gate.dtype} {type(mlp.act).__name__}"
    return kind, partial(TriedProduct.on_random_rows, lambda x: mlp(x, x), gate.shape[1], gate.dtype)


def preparations(layers: Iterable[nn.Module], encoders: Iterable[Encoder]) -> tuple[Callable[[], None], ...]:
    """Have oneDNN make its kernels for the numbers of rows that fused layers and encoders meet in a piece.

    Kernels made while batches run would stay in the heap and fragment it: run these within `lasting`, the
    first ones first. oneDNN makes a kernel only by multiplying, which takes long for a large model:
    `daemon.executor.preparing` knows when to stop.
    """
    fused = {tried_mlp(layer)[0]: layer for layer in layers if isinstance(layer, FusedDecoderLayer)}
    of_encoders = [linear for encoder in encoders for linear in encoder.linears]
    linears = [linear for layer in fused.values() for linear in layer.products[:2]]
    linears += [linear for linear in of_encoders if MOST_ROWS * linear.shape[0] <= PREPARED_NUMBERS]
    once = {tried_linear(linear)[0]: linear for linear in linears if isinstance(linear, OneDnnLinear)}

    def multiply(rows: int) -> None:
        for linear in once.values():
            if rows in linear.sizes.each:
                linear.multiply(torch.zeros(rows, linear.shape[1], dtype=linear.dtype))
        for layer in fused.values():
            if rows in layer.sizes.each:
                zeros = torch.zeros(rows, layer.products[2].shape[1])
                layer.products[2](zeros, zeros)

    sizes = sorted({rows for linear in once.values() for rows in linear.sizes.each}, reverse=True)
    return tuple(partial(multiply, rows) for rows in sizes)


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
