"""Runs a float64 model in float64 throughout.

Hugging Face modules raise norms, rotary tables and softmax to float32 by name, which for a float64 model
lowers them, and results then differ by 1e-5 with the shape of the batch. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Within it, on this thread, every request for float32 is one for float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.view:  # of the same bytes, as where offloaded weights are read
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(
            *(torch.float64 if arg is torch.float32 else arg for arg in args),
            **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()},
        )


def full_precision(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context in which a model of this dtype must run."""
    return KeepFloat64() if dtype == torch.float64 else contextlib.nullcontext()
