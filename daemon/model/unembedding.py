"""The end of a language model: from the last layer's output to the logits of the next token.

Runs the model's own final norm and head. How the family changes logits after that (a soft cap, a scale) is
taken from its configuration, and held against the model's own logits of one short text. Knows no texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from daemon.devices import to_device
from daemon.model.float64 import full_precision
from daemon.model.placement import tokens_device
from daemon.model.plain_hooks import hook_tensor
from daemon.model.probe import random_ids
from daemon.model.trunk import UnknownModel, decoder_layers

TRACED_TOKENS = 9  # of the text
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # names in configurations
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
ROUNDINGS = 32.0  # of logits, in units of their dtype's epsilon
RUN_ERRORS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


class UnknownEnd(Exception):
    """The logits are made in another way than by a norm and a product."""


@dataclass(frozen=True, slots=True)
class Unembedding:
    """The model's modules from the last layer to the logits."""

    norm: nn.Module  # the final norm
    head: nn.Module
    dtype: torch.dtype
    scale: float = 1.0  # of the logits
    softcap: float | None = None  # they stay below it: cap * tanh(logits / cap)

    @property
    def weight(self) -> Tensor:
        """(vocab, d_model) the rows that stand for tokens."""
        head: Any = self.head
        weight: Tensor = head.weight
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output (N, d_model), before the norm -> (N, vocab), in float32 at least."""
        with torch.inference_mode(), full_precision(self.dtype):
            raw = self.head(self.norm(hidden.to(self.dtype)))
        return self.of_raw(raw)

    def of_raw(self, raw: Tensor) -> Tensor:
        """The logits of what the head gives."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def unembedding_of(model: Any) -> Unembedding:
    """The end of a Hugging Face causal language model that nothing has changed. Runs it on a short text.

    Raises UnknownEnd, with the reason, where its logits are not those of the model itself.
    """
    try:
        head = model.get_output_embeddings()
        layers = decoder_layers(model)
        vocabulary = len(model.get_input_embeddings().weight)
        if head is None or head.weight.ndim != 2 or head.weight.shape[0] < vocabulary:
            raise UnknownEnd(f"{type(model).__name__} has no head with a row for each token")
        trace = Trace.of(model, layers, head, vocabulary)
    except UnknownModel as error:
        raise UnknownEnd(str(error)) from error
    except RUN_ERRORS as error:
        raise UnknownEnd(f"{type(model).__name__} gives no logits ({type(error).__name__})") from error
    norm = final_norm(model, trace)
    for scale, softcap in changes(model):
        found = Unembedding(norm, head, trace.hidden.dtype, scale, softcap)
        if agrees(trace.logits, found.of_raw(trace.raw)):
            return found
    raise UnknownEnd(
        f"{type(model).__name__} changes its logits in a way that its configuration does not say"
    )


@dataclass(frozen=True, slots=True)
class Trace:
    """One text on its way through the end of a model."""

    hidden: Tensor  # the last layer's output
    outside: dict[nn.Module, tuple[Tensor, Tensor]]  # what each module outside the layers reads and gives
    before_head: Tensor
    raw: Tensor  # what the head gives
    logits: Tensor

    @classmethod
    def of(cls, model: Any, layers: nn.ModuleList, head: nn.Module, vocabulary: int) -> Trace:
        inside = set(layers.modules())
        given: dict[nn.Module, Tensor] = {}
        read: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note_input(module: nn.Module, tensor: Tensor | None) -> None:
            if tensor is not None:
                given[module] = tensor.clone()

        def note_output(module: nn.Module, tensor: Tensor | None) -> None:
            if tensor is not None and module in given:
                read[module] = given[module], tensor.clone()

        dtype = model.get_input_embeddings().weight.dtype
        with ExitStack() as hooks, torch.inference_mode(), full_precision(dtype):
            for module in [layers[-1], *(one for one in model.modules() if one not in inside)]:
                for side, note in (("in", note_input), ("out", note_output)):
                    hooks.callback(hook_tensor(module, side, partial(note, module)).remove)
            tokens = torch.tensor([random_ids(vocabulary, TRACED_TOKENS)])
            logits = model(input_ids=to_device(tokens, tokens_device(model)), use_cache=False).logits
        before, raw = read[head]
        return cls(read[layers[-1]][1], read, before, raw, logits)


def final_norm(model: Any, trace: Trace) -> nn.Module:
    """The module that reads the last layer's output and gives what the head reads. Raises UnknownEnd."""
    for module, (given, gives) in trace.outside.items():
        if (
            "norm" in type(module).__name__.lower()
            and same(given, trace.hidden)
            and same(gives, trace.before_head)
        ):
            return module
    raise UnknownEnd(f"{type(model).__name__} has more than a norm between its last layer and its head")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same rows, wherever they are."""
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def changes(model: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and soft caps of the logits that a configuration names, those that may hold together first."""
    config = model.config.get_text_config()
    scales = [*numbers(config, FACTORS), *(1 / by for by in numbers(config, DIVISORS)), 1.0]
    yield from itertools.product(scales, [*numbers(config, SOFT_CAPS), None])


def numbers(config: Any, names: Iterable[str]) -> Iterator[float]:
    """Those of the settings that are numbers, and not 0."""
    for value in (getattr(config, name, None) for name in names):
        if isinstance(value, int | float) and value:
            yield float(value)


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether two times logits differ by rounding alone."""
    if expected.shape != got.shape or not bool(expected.isfinite().all()):
        return False
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return float((expected.double().cpu() - got.double().cpu()).abs().max()) <= allowed
