"""Records the inputs and outputs of one decoder layer's modules for one short text. Knows no hook names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from daemon.devices import to_exact

ATTENTION = ("self_attn", "attn", "self_attention", "attention", "multi_head_attention")
MIXERS = (*ATTENTION, "linear_attn", "mamba", "conv", "mixer", "temporal_block")  # what is in its place
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block")


class Unreachable(Exception):
    """No plain module gives the value at a hook point."""


Change = Callable[[Tensor], Tensor]  # (length, d) -> (length, d')


@dataclass(frozen=True, slots=True)
class Tap:
    """A place where a value is read: what a module is given, or what it gives."""

    module: nn.Module
    side: str  # "in" or "out"
    change: Change | None = None  # what is made of it

    def value(self, tensor: Tensor, length: int) -> Tensor:
        """The tensor there, of one text -> (length, d), heads side by side. Raises Unreachable."""
        rows = token_rows(tensor, length)
        if rows is None:
            raise Unreachable(f"a tensor of shape {tuple(tensor.shape)} is not one row for each token")
        return rows.clone() if self.change is None else self.change(rows)


@dataclass(slots=True)
class LayerTrace:
    """The inputs and outputs of a layer's modules for one text, by path and side, in order."""

    block: nn.Module
    config: Any  # of the language model
    length: int  # tokens
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (length, d), on the exact device

    def note(self, path: str, side: str, tensor: Tensor | None) -> None:
        rows = None if tensor is None else token_rows(tensor, self.length)
        if rows is not None and (path, side) not in self.values:
            self.values[path, side] = to_exact(rows).clone()  # modules change some tensors in place

    def get(self, path: str, side: str) -> Tensor:
        """Raises Unreachable where the module did not run."""
        if (path, side) not in self.values:
            raise Unreachable(f"no module {path or 'at all'} of the layer has one row for each token")
        return self.values[path, side]

    def tap(self, path: str, side: str, change: Change | None = None) -> Tap:
        self.get(path, side)
        return Tap(self.block.get_submodule(path), side, change)

    def at(self, tap: Tap) -> Tensor:
        """The value at a tap."""
        path = next(path for path, module in self.block.named_modules() if module is tap.module)
        return tap.value(self.get(path, tap.side), self.length)

    def paths(self, keep: Callable[[nn.Module], bool], parent: str = "") -> list[str]:
        """The modules of a kind that ran inside another, in the order in which they ended."""
        return [
            path
            for path, side in self.values
            if side == "out"
            and path.startswith(f"{parent}." if parent else "")
            and path != parent
            and keep(self.block.get_submodule(path))
        ]

    @property
    def norms(self) -> list[str]:
        return [path for path in self.paths(is_norm) if "." not in path]

    @property
    def attention(self) -> str:
        return self._child(ATTENTION, "attention")

    @property
    def mixer(self) -> str:
        return self._child(MIXERS, "attention, nor anything in its place")

    @property
    def mlp(self) -> tuple[str, str]:
        """The modules that the MLP begins and ends with: twice the same, where it is one."""
        if ("fc1", "in") in self.values and ("fc2", "out") in self.values:
            return "fc1", "fc2"
        mlp = self._child(MLP, "MLP")
        return mlp, mlp

    def _child(self, names: tuple[str, ...], kind: str) -> str:
        found = [name for name in names if (name, "out") in self.values]
        if not found:
            raise Unreachable(f"the layer has no {kind}")
        return found[0]


def token_rows(tensor: Tensor, length: int) -> Tensor | None:
    """(1, length, ...) or (length, ...) -> (length, d); None for another shape."""
    if tensor.ndim > 2 and len(tensor) == 1:
        tensor = tensor[0]
    return tensor.flatten(1) if tensor.ndim > 1 and len(tensor) == length else None


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not is_norm(module)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
