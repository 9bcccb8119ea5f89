"""A bare Hugging Face module, run up to the last layer that is read: no cache, no logits.

Knows nothing about SAEs, texts or tries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from daemon.model.float64 import full_precision

HookPoint = tuple[int, str]  # decoder layer, "pre" or "post"


class UnknownModel(Exception):
    """The module is not built the way decoders usually are."""


class LastLayerRead(Exception):
    """Nothing after this layer is wanted. Raised inside the forward pass, caught by `Trunk.run`."""


@dataclass(slots=True)
class Run:
    """The positions that one run of a trunk is to read, and the values read so far."""

    trunk: Trunk
    keep: Tensor | None  # (K,) of the flattened positions; None for all
    captured: dict[HookPoint, Tensor] = field(default_factory=dict)


current: ContextVar[Run | None] = ContextVar("current", default=None)


class Trunk:
    """The residual stream of a decoder at some of its layers. Several threads may run it at a time."""

    def __init__(self, model: Any, points: Iterable[HookPoint]) -> None:
        """`model` is a Hugging Face causal language model, whose layers are hooked. Raises UnknownModel."""
        self._base: nn.Module = model.base_model
        self._layers = decoder_layers(model)
        self._points = list(points)
        self._dtype = next(model.parameters()).dtype
        self._last = max(map(writer, self._points))
        for number in range(max(0, self._last) + 1):
            self._watch(number)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers that run."""
        return list(self._layers)[: self._last + 1]

    def replace(self, number: int, layer: nn.Module) -> None:
        """Run `layer` in place of one that runs."""
        self._layers[number] = layer
        self._watch(number)

    def drop_idle(self) -> None:
        """Let go of the layers that don't run."""
        del self._layers[max(0, self._last) + 1 :]

    def leave_files(self) -> None:
        """Let go of weight files, which stay mapped whole while any part of them is in use."""
        for tensor in itertools.chain(self._base.parameters(), self._base.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()

    def run(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> list[Tensor]:
        """tokens, positions: (rows, width) -> per hook point the residuals (rows * width, d_model).

        With `keep` (K,), only those of the flattened positions: (K, d_model). They are on the device of their
        layer. A `mask` of four dimensions reaches the attention as it is; without one, attention is causal.
        """
        run = Run(self, keep)
        token = current.set(run)
        try:
            with full_precision(self._dtype), suppress(LastLayerRead):
                self._base(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
        finally:
            current.reset(token)
        return [run.captured[point] for point in self._points]

    def _watch(self, number: int) -> None:
        """Have a layer tell the run under way, if there is one, what comes in and what goes out."""
        layer = self._layers[number]
        before = [point for point in self._points if number == 0 and writer(point) < 0]
        after = [point for point in self._points if writer(point) == number]

        def begins(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if (run := self._under_way()) is None:
                return
            for point in before:
                self._capture(run, point, args[0] if args else kwargs["hidden_states"])
            if self._last < 0:  # only the input of the first layer is read
                raise LastLayerRead

        def ends(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            if (run := self._under_way()) is None:
                return
            for point in after:
                self._capture(run, point, first(output))
            if number == self._last:
                raise LastLayerRead

        if before:
            layer.register_forward_pre_hook(begins, with_kwargs=True)
        if after:
            layer.register_forward_hook(ends)

    def _under_way(self) -> Run | None:
        """This trunk's run on this thread."""
        run = current.get()
        return run if run is not None and run.trunk is self else None

    def _capture(self, run: Run, point: HookPoint, hidden: Tensor) -> None:
        flat = hidden.flatten(0, 1)
        run.captured[point] = flat if run.keep is None else flat.index_select(0, run.keep.to(flat.device))


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
