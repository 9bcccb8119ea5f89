"""The least time that the arithmetic takes: the multiply-adds needed, at the rate of a matrix product.

The rate is measured on products of the model's own shapes, by torch's own product and by the packed one, and
the faster of the two is the limit. Knows nothing about texts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from daemon.devices import finish
from daemon.model.loading import LoadedModel
from daemon.model.onednn import product
from daemon.model.sae import LoadedSae, last_layer_read
from daemon.model.trie import Trie
from daemon.model.trunk import decoder_layers

ROWS = 1024  # of the products that are timed
MEASURED_LAYERS = 6  # whose weights together exceed the caches
TRIES = 2


@dataclass(frozen=True, slots=True)
class Work:
    """The products that a model and its SAEs must compute."""

    shapes: tuple[tuple[int, int], ...]  # (out, in) of the products of one layer
    n_layers: int  # that run
    attention_width: int  # heads x d_head
    encoders: tuple[tuple[int, int], ...]  # (d_sae, d_in)

    @classmethod
    def of(cls, model: LoadedModel, saes: Sequence[LoadedSae]) -> Work:
        """Before the model's layers are packed."""
        layers = decoder_layers(model.model)[: last_layer_read(saes) + 1]
        shapes: list[tuple[int, int]] = []
        for module in layers[0].modules():
            if isinstance(module, nn.Linear):
                shapes.append((module.weight.shape[0], module.weight.shape[1]))
            elif isinstance(module, Conv1D):
                shapes.append((module.weight.shape[1], module.weight.shape[0]))
        config = model.model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            shapes=tuple(shapes),
            n_layers=len(layers),
            attention_width=heads * (getattr(config, "head_dim", None) or model.d_model // heads),
            encoders=tuple((entry.info.d_sae, entry.info.d_in) for entry in saes),
        )

    def multiply_adds(self, packed: Trie, readings: int) -> int:
        """For each token once, attending to what came before it, and `readings` encoded by every SAE."""
        linear = self.n_layers * sum(out * width for out, width in self.shapes)
        attention = 2 * self.n_layers * self.attention_width
        encoding = sum(d_sae * d_in for d_sae, d_in in self.encoders)
        return (
            linear * len(packed) + attention * (int(packed.depth.sum()) + len(packed)) + encoding * readings
        )


@dataclass(frozen=True, slots=True)
class ProductRate:
    """Multiply-adds per second."""

    torch: float  # torch.nn.functional.linear
    packed: float  # daemon.model.onednn.product

    @property
    def fastest(self) -> float:
        return max(self.torch, self.packed)


class Products:
    """Random matrices of a model's shapes, ready to be timed."""

    def __init__(self, work: Work, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        layers = min(work.n_layers, MEASURED_LAYERS)
        shapes = work.shapes * layers
        self._weights = [random(*shape) for shape in shapes]
        self._packed = [product(weight, None) for weight in self._weights]
        self._x = {width: random(ROWS, width) for _, width in work.shapes}
        self._inputs = [self._x[width] for _, width in shapes]
        self._multiply_adds = ROWS * sum(out * width for out, width in shapes)
        self._device = device

    def rate(self) -> ProductRate:
        """The better of a few tries of each."""
        with torch.inference_mode():
            return ProductRate(
                torch=self._best([functools.partial(F.linear, weight=w) for w in self._weights]),
                packed=self._best(self._packed),
            )

    def _best(self, products: Sequence[Callable[[Tensor], Tensor]]) -> float:
        def each_once() -> None:
            for multiply, x in zip(products, self._inputs, strict=True):
                multiply(x)

        return self._multiply_adds / best_seconds(each_once, self._device, TRIES)


def best_seconds(run: Callable[[], object], device: str, tries: int) -> float:
    """Of a few runs, each with all that it leaves the device to do."""
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        run()
        finish(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
