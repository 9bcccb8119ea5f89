"""Stands in for several accelerators on a machine without: tensors know a device, and compute on the CPU.

Within `on_this_thread`, on this thread, `device="xpu:1"` gives a tensor that says so. Operands on different
devices raise, as they do on real ones. It shows that what meets was moved, and not that a real device
computes right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

KIND = "xpu"  # which no build of torch for a CPU has
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # accept indices on the host


class MismatchedDevices(Exception):
    """Of no type that the product recovers from."""


class Placed(Tensor):
    """A tensor on a device that there is not."""

    place: torch.device

    @property
    def device(self) -> torch.device:
        return self.place

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        place = meeting_place(func, [*args, *(kwargs or {}).values()])
        args, kwargs = tree_map_only(Placed, on_host, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: placed(tensor, place), result)


class StandInDevices(TorchFunctionMode):
    """Makes tensors on the devices, and moves them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cpu:
            return on_host(args[0])
        if func is Tensor.to:
            return moved(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == KIND:
            return placed(func(*args, **{**kwargs, "device": "cpu"}), torch.device(device))
        return func(*args, **kwargs)


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`tensor.to(...)`."""
    asked = [*args, *kwargs.values()]
    like = [arg for arg in asked if isinstance(arg, Tensor)]
    places = [arg.device for arg in like] + [arg for arg in asked if isinstance(arg, str | torch.device)]
    dtypes = [arg.dtype for arg in like] + [arg for arg in asked if isinstance(arg, torch.dtype)]
    place = torch.device(places[0]) if places else tensor.device
    if KIND not in (place.type, tensor.device.type):
        return Tensor.to(tensor, *args, **kwargs)
    dtype = dtypes[0] if dtypes else tensor.dtype
    if (place, dtype) == (tensor.device, tensor.dtype):
        return tensor
    result = on_host(tensor).to(dtype, copy=True)
    return placed(result, place) if place.type == KIND else result


def placed(tensor: Tensor, place: torch.device) -> Tensor:
    """The same numbers, said to be on a device."""
    result = tensor if isinstance(tensor, Placed) else tensor.as_subclass(Placed)
    result.place = place
    return result


def on_host(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor) if isinstance(tensor, Placed) else tensor


def meeting_place(func: Callable[..., Any], values: list[Any]) -> torch.device:
    """The one device of the operands. Raises MismatchedDevices."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    places = {tensor.place for tensor in tensors if isinstance(tensor, Placed)}
    hosted = [tensor for tensor in tensors if not isinstance(tensor, Placed) and tensor.ndim]
    if len(places) > 1 or (hosted and func not in INDEXING):
        raise MismatchedDevices(
            f"{func.__name__} of {sorted(map(str, places))}{' and the host' * bool(hosted)}"
        )
    return places.pop()


def put(module: nn.Module, device: str) -> None:
    """Move a module's parameters and buffers."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = placed(tensor.detach().clone(), torch.device(device))


@contextlib.contextmanager
def on_this_thread() -> Iterator[None]:
    with StandInDevices():
        yield
