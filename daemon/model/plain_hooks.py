"""TransformerLens's hook names on plain Hugging Face modules, read by forward hooks, one text at a time.

An independent check of the engines: it shares no code with them, nor with TransformerLens. Names have the
meaning of TransformerLens's HookedTransformer: `hook_attn_out` and `hook_mlp_out` are what is added to the
residual stream (after post-norms and residual multipliers), `hook_normalized` is a norm's value before its
weight. `plain_layer` says by which module a name is read. Knows no SAEs and no batches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from daemon.model.float64 import full_precision
from daemon.model.plain_layer import find_tap
from daemon.model.plain_trace import LayerTrace, Tap, Unreachable

HOOK_NAME = re.compile(r"blocks\.(\d+)\.(\S+)")
LAYER_ENDS = {"hook_resid_pre": "in", "hook_in": "in", "hook_resid_post": "out", "hook_out": "out"}
TRACED_TOKENS = 9  # of the text by which modules are told apart


class Enough(Exception):
    """All that is wanted is read. Raised inside the forward pass, caught by `PlainHooks`."""


class PlainHooks:
    """The values at hook points of a Hugging Face model that nothing has changed."""

    def __init__(self, model: Any, hook_names: Iterable[str], vocabulary: int) -> None:
        """Find the module of each name. Raises Unreachable for a name that no module gives."""
        self._model = model
        weight = model.get_input_embeddings().weight
        self._dtype, self.device = weight.dtype, weight.device  # the device takes tokens
        if weight.is_meta:  # offloaded: Accelerate moves the tokens to where they are looked up
            self.device = torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(0, vocabulary, (TRACED_TOKENS,), generator=generator).tolist()
        self._blocks = self._running_blocks(text)
        self._taps: dict[str, Tap] = {}
        traces: dict[int, LayerTrace] = {}
        for name in hook_names:
            match = HOOK_NAME.fullmatch(name)
            if match is None or int(match[1]) >= len(self._blocks):
                raise Unreachable(f"{name} is no place inside a layer")
            layer, place = int(match[1]), match[2]
            if place in LAYER_ENDS:  # of any layer: no need to look inside
                self._taps[name] = Tap(self._blocks[layer], LAYER_ENDS[place])
                continue
            if layer not in traces:
                traces[layer] = self._trace(layer, text)
            self._taps[name] = find_tap(place, traces[layer])

    def tap(self, hook_name: str) -> Tap:
        """Where one of the names is read."""
        return self._taps[hook_name]

    def read(self, text: Sequence[int]) -> dict[str, Tensor]:
        """One text's token ids -> per hook name the values (length, d), heads side by side.

        Raises Unreachable where a module does not give one row for each token.
        """
        captured: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor | None) -> None:
            if tensor is not None and name not in captured:
                captured[name] = self._taps[name].value(tensor, len(text))
            if len(captured) == len(self._taps):
                raise Enough

        with ExitStack() as hooks:
            for name, tap in self._taps.items():
                hooks.enter_context(tapping(tap, functools.partial(keep, name)))
            self._run(text)
        if missing := self._taps.keys() - captured.keys():
            raise Unreachable(f"{min(missing)} is not computed for every text")
        return captured

    def _run(self, text: Sequence[int]) -> None:
        tokens = torch.tensor([list(text)], device=self.device)
        with torch.inference_mode(), full_precision(self._dtype), suppress(Enough):
            self._model.base_model(input_ids=tokens, use_cache=False)

    def _running_blocks(self, text: Sequence[int]) -> list[nn.Module]:
        """The decoder's layers: of the lists of so many modules, the first that runs."""
        n_layers = self._model.config.get_text_config().num_hidden_layers
        lists = [m for m in self._model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        ran: list[int] = []

        def note(number: int) -> None:
            ran.append(number)
            raise Enough

        with ExitStack() as hooks:
            for number, modules in enumerate(lists):
                hook = modules[0].register_forward_pre_hook(lambda *_, number=number: note(number))
                hooks.callback(hook.remove)
            self._run(text)
        if not ran:
            raise Unreachable(f"{type(self._model).__name__} has no list of {n_layers} layers that run")
        return list(lists[ran[0]])

    def _trace(self, layer: int, text: Sequence[int]) -> LayerTrace:
        trace = LayerTrace(self._blocks[layer], self._model.config.get_text_config(), len(text))

        def note(path: str, side: str, tensor: Tensor | None) -> None:
            trace.note(path, side, tensor)
            if (path, side) == ("", "out"):
                raise Enough

        with ExitStack() as hooks:
            for path, module in trace.block.named_modules():
                for side in ("in", "out"):
                    hooks.enter_context(tapping(Tap(module, side), functools.partial(note, path, side)))
            self._run(text)
        return trace


@contextmanager
def tapping(tap: Tap, keep: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Within it, `keep` is given the tensor at a tap whenever its module runs; None where it has none."""
    handle = hook_tensor(tap.module, tap.side, keep)
    try:
        yield
    finally:
        handle.remove()


def hook_tensor(module: nn.Module, side: str, keep: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Have `keep` given the tensor that a module is given ("in") or gives ("out"), whenever it runs."""

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(first_tensor([*args, kwargs.get("hidden_states"), *kwargs.values()]))

    def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(first_tensor([output] if isinstance(output, Tensor) else output or ()))

    if side == "in":
        return module.register_forward_pre_hook(begins, with_kwargs=True)
    return module.register_forward_hook(ends)


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)
