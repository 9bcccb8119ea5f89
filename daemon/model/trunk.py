"""A bare Hugging Face module, run up to the last place that is read: no cache, no logits.

Knows nothing about SAEs, texts or tries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from daemon.model.float64 import full_precision
from daemon.model.plain_hooks import hook_tensor
from daemon.model.plain_trace import Change, Tap, token_rows


class UnknownModel(Exception):
    """The module is not built the way decoders usually are."""


class AllRead(Exception):
    """Nothing after this place is wanted. Raised inside the forward pass, caught by `Trunk.run`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is read: what a decoder layer, or a module inside it, is given or gives."""

    layer: int
    side: str  # "in" or "out"; "in" of a whole layer: of the first one only
    path: str = ""  # of the module inside the layer; empty for the layer itself
    change: Change | None = None  # what is made of rows (K, d)
    ahead: bool = False  # read where tokens are predicted from, not where SAEs read

    @property
    def last_layer(self) -> int:
        """The last layer that must run; -1 where none must."""
        return -1 if (self.side, self.path) == ("in", "") else self.layer


def place_of(model: Any, tap: Tap) -> Place:
    """Where in the decoder a tap is; a layer is given what the one before gives. Raises UnknownModel."""
    for number, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            if module is tap.module:
                if (tap.side, path) == ("in", "") and number > 0:
                    return Place(number - 1, "out")
                return Place(number, tap.side, path, tap.change)
    raise UnknownModel(f"{type(tap.module).__name__} is in none of the decoder's layers")


@dataclass(slots=True)
class Run:
    """The positions that one run of a trunk is to read, and the values read so far."""

    trunk: Trunk
    n: int  # positions
    keep: Tensor | None  # (K,) of the flattened positions; None for all
    ahead: Tensor | None  # (P,) those of places `ahead`
    captured: dict[Place, Tensor] = field(default_factory=dict)

    def rows(self, place: Place, hidden: Tensor) -> Tensor:
        """The values at the wanted positions (K, d). Raises ValueError where there is no row for each."""
        rows = token_rows(hidden, self.n) if place.path else hidden.flatten(0, 1)
        if rows is None:
            raise ValueError(f"{place.path} has no row of values for each token")
        # a copy, for modules change some tensors in place
        keep = self.ahead if place.ahead else self.keep
        rows = rows.clone() if keep is None else rows.index_select(0, keep.to(rows.device))
        return rows if place.change is None else place.change(rows)


current: ContextVar[Run | None] = ContextVar("current", default=None)


class Trunk:
    """The values at some places of a decoder's layers. Several threads may run it at a time."""

    def __init__(self, model: Any, places: Iterable[Place]) -> None:
        """`model` is a Hugging Face causal language model, whose modules are hooked. Raises UnknownModel."""
        self._base: nn.Module = model.base_model
        self._layers = decoder_layers(model)
        self._places = list(places)
        self._wanted = len(set(self._places))
        self._dtype = next(model.parameters()).dtype
        self._last = max(place.last_layer for place in self._places)
        self._handles: dict[int, list[Any]] = {}
        self.watch()

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers that run."""
        return list(self._layers)[: self._last + 1]

    def is_read_inside(self, number: int) -> bool:
        """Whether a module inside a layer is read, so that the layer must keep it."""
        return any(place.layer == number and place.path for place in self._places)

    def replace(self, number: int, layer: nn.Module) -> None:
        """Run `layer` in place of one that runs."""
        self._layers[number] = layer
        self._watch(number)

    def watch(self) -> None:
        """Hook the modules that are read; once more after modules inside layers were replaced."""
        for number in {place.layer for place in self._places}:
            self._watch(number)

    def drop_idle(self) -> None:
        """Let go of the layers that don't run."""
        del self._layers[max(0, self._last) + 1 :]

    def leave_files(self) -> None:
        """Let go of weight files, which stay mapped whole while any part of them is in use."""
        leave_files(self._base)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        ahead: Tensor | None = None,
    ) -> list[Tensor]:
        """tokens, positions: (1, n) -> per place its values (n, d), heads side by side.

        With `keep` (K,), only those of some positions: (K, d); of places `ahead` those of `ahead` (P,). They
        are on the device of their layer.
        A `mask` of four dimensions reaches the attention as it is; without one, attention is causal. Of whole
        layers tokens may be (rows, width): then they give (rows * width, d_model).
        """
        run = Run(self, tokens.numel(), keep, ahead)
        token = current.set(run)
        try:
            with full_precision(self._dtype), suppress(AllRead):
                self._base(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
        finally:
            current.reset(token)
        return [run.captured[place] for place in self._places]

    def _watch(self, number: int) -> None:
        """Have the modules of a layer tell the run under way, if there is one, the values that are read."""
        for handle in self._handles.pop(number, ()):
            handle.remove()
        layer = self._layers[number]
        self._handles[number] = [
            hook_tensor(layer.get_submodule(place.path), place.side, self._reader(place))
            for place in dict.fromkeys(self._places)
            if place.layer == number
        ]

    def _reader(self, place: Place) -> Callable[[Tensor | None], None]:
        def read(hidden: Tensor | None) -> None:
            run = current.get()
            if run is None or run.trunk is not self or place in run.captured or hidden is None:
                return
            run.captured[place] = run.rows(place, hidden)
            if len(run.captured) == self._wanted:
                raise AllRead

        return read


def leave_files(module: nn.Module) -> None:
    """Have a module's weights on the host in memory of their own."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


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
