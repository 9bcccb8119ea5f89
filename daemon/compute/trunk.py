"""A bare Hugging Face module, run up to the last layer that is read: no cache, no logits.

Knows nothing about SAEs, texts or packing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from daemon.compute.float64 import full_precision

HookPoint = tuple[int, str]  # decoder layer, "pre" or "post"


class UnknownModel(Exception):
    """The module is not built the way decoders usually are."""


class LastLayerRead(Exception):
    """Nothing after this layer is wanted. Raised inside the forward pass, caught by `Trunk.run`."""


class Trunk:
    """The residual stream of a decoder at some of its layers."""

    def __init__(self, model: Any, points: Iterable[HookPoint]) -> None:
        """`model` is a Hugging Face causal language model. Raises UnknownModel."""
        self._base: nn.Module = model.base_model
        self._layers = decoder_layers(model)
        self._points = list(points)
        self._dtype = next(model.parameters()).dtype
        self._last = max(map(writer, self._points))
        self._narrows = False  # whether the last layer computes no more than it is asked to

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers that run."""
        return list(self._layers)[: self._last + 1]

    def replace(self, number: int, layer: nn.Module) -> None:
        """Run `layer` in place of one that runs. It takes `keep`: see `run`."""
        self._layers[number] = layer
        self._narrows |= number == self._last

    def run(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> list[Tensor]:
        """tokens, positions: (rows, width) -> per hook point the residuals (rows * width, d_model).

        With `keep` (K,), only those of the flattened positions: (K, d_model). A `mask` of four dimensions
        reaches the attention as it is; without one, attention is causal.
        """
        captured: dict[HookPoint, Tensor] = {}
        narrows = self._narrows and keep is not None and len(keep) < tokens.numel()

        def capture(point: HookPoint, hidden: Tensor) -> None:
            flat = hidden.flatten(0, 1)
            narrowed = narrows and writer(point) == self._last
            captured[point] = flat if keep is None or narrowed else flat.index_select(0, keep)

        with ExitStack() as hooks, full_precision(self._dtype):
            if narrows:
                hooks.callback(self._narrow(keep).remove)
            for point in self._points:
                hooks.callback(self._hook(point, capture).remove)
            hooks.callback(self._stop_after_last().remove)
            with suppress(LastLayerRead):
                self._base(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
        return [captured[point] for point in self._points]

    def _hook(self, point: HookPoint, capture: Callable[[HookPoint, Tensor], None]) -> Any:
        if (layer := writer(point)) >= 0:
            return self._layers[layer].register_forward_hook(
                lambda module, args, output: capture(point, first(output))
            )
        return self._layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: capture(point, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )

    def _narrow(self, keep: Tensor | None) -> Any:
        """The last layer is also given `keep`."""
        return self._layers[self._last].register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "keep": keep}), with_kwargs=True
        )

    def _stop_after_last(self) -> Any:
        def stop(module: nn.Module, *_: object) -> None:
            raise LastLayerRead

        if self._last < 0:  # only the input of the first layer is read
            return self._layers[0].register_forward_pre_hook(stop)
        return self._layers[self._last].register_forward_hook(stop)


def writer(point: HookPoint) -> int:
    """The layer whose output is read there; -1 for the input of the first."""
    layer, side = point
    return layer if side == "post" else layer - 1


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states in what a decoder layer returned."""
    return output if isinstance(output, Tensor) else output[0]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face model. Raises UnknownModel."""
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise UnknownModel(f"{type(model).__name__} has no list of {n_layers} decoder layers")
    return lists[0]
