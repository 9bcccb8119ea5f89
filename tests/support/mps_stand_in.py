"""Stands in for Apple's GPU (MPS): computes on the CPU, and refuses what MPS does not have.

Within `mps_stand_in`, on this thread, `device="mps"` gives tensors that say so, and every operation on one is
looked at. These raise: a result in float64 or complex numbers, an operand on the host, an operation that MPS
lacks or has been wrong at, a move to or from the host other than by `daemon.devices` or `Module.to`. So it
shows that the product keeps to what MPS has, and not that MPS computes right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformer_lens
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import daemon
from daemon import devices

DEVICE = torch.device("mps:0")
PRODUCT, DEVICES = str(Path(daemon.__file__).parent), devices.__file__
MODULES = torch.nn.modules.module.__file__
LIBRARIES = tuple(str(Path(one.__file__).parent) for one in (transformers, transformer_lens))
MOST_BYTES = 1 << 32  # of a tensor: MPS ends the process at more
NOT_THERE = torch.float64, torch.complex64, torch.complex128

# Operators of torch that MPS does not have, or has by way of the host only.
LACKING = frozenset(
    {
        *(
            "_linalg_eigh",
            "linalg_eigh",
            "linalg_eig",
            "linalg_eigvals",
            "linalg_eigvalsh",
            "_linalg_eigvals",
        ),
        *("_linalg_svd", "linalg_svd", "linalg_svdvals", "linalg_qr", "geqrf", "ormqr", "linalg_lstsq"),
        *(
            "linalg_ldl_factor_ex",
            "linalg_matrix_exp",
            "linalg_householder_product",
            "pin_memory",
            "_pin_memory",
        ),
        *("view_as_complex", "complex", "polar", "_fft_r2c", "_fft_c2c", "_fft_c2r", "_grouped_mm"),
    }
)
# Those that MPS lacked lately, or has done wrong without an error by the version of torch or macOS. The
# product uses none; what Transformers does within a model is checked at the start against the host.
IN_DOUBT = frozenset(
    {
        *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"),
        *("nonzero", "nonzero_static", "argwhere", "masked_select", "count_nonzero", "repeat_interleave"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
        *("_embedding_bag", "_embedding_bag_forward_only", "searchsorted", "bucketize", "histc", "aminmax"),
        *("median", "nanmedian", "mode", "kthvalue", "special_entr", "scatter_reduce", "scatter_reduce_"),
        *("index_add", "index_add_", "index_reduce", "index_reduce_", "logcumsumexp", "cummax", "cummin"),
        *("linalg_cholesky_ex", "cholesky_solve", "linalg_inv_ex", "_linalg_solve_ex", "_linalg_det"),
    }
)
INTEGER_SCANS = frozenset({"cumsum", "cumsum_", "cumprod", "cumprod_"})
OF_CONTIGUOUS = frozenset({"where", "scatter", "scatter_", "masked_fill", "masked_fill_"})
INDEXING = frozenset({"index", "index_put", "index_put_"})  # whose indices may be on the host


class RefusedOnMps(Exception):
    """An operation that MPS does not have, or that is in doubt there. The product recovers from none."""


class OnMps(Tensor):
    """A tensor that says that it is on MPS; what it holds is on the CPU."""

    inner: Tensor
    spoiled: ClassVar[dict[str, float]] = {}  # factors by which results of operations are off

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnMps:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return DEVICE

    def __repr__(self, **_: object) -> str:
        return f"OnMps({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        wrappers: dict[int, OnMps] = {}
        name = func.overloadpacket.__name__

        def unwrapped(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, OnMps):
                if tensor.ndim and name not in INDEXING:
                    raise RefusedOnMps(f"{func}: an operand of shape {tuple(tensor.shape)} is on the host")
                return tensor
            wrappers[id(tensor.inner)] = tensor
            return tensor.inner

        def wrapped(tensor: Tensor) -> Tensor:
            if id(tensor) in wrappers:  # changed in place
                return wrappers[id(tensor)]
            return placed(tensor, str(func))

        inner_args = tree_map_only(Tensor, unwrapped, args)
        inner_kwargs = tree_map_only(Tensor, unwrapped, kwargs or {})
        look_at(name, str(func), inner_args, inner_kwargs)
        results = func(*inner_args, **inner_kwargs)
        if name in cls.spoiled:
            results = results * cls.spoiled[name]
        return tree_map_only(Tensor, wrapped, results)


def look_at(name: str, func: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RefusedOnMps for an operation that MPS does not have, or that the product is not to ask for."""
    tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if name in LACKING or "sparse" in name:
        raise RefusedOnMps(f"{func} is not there on MPS")
    if asked_by_library():
        return
    if name in IN_DOUBT and not func.endswith("self_int"):  # of repeat_interleave: by a number
        raise RefusedOnMps(f"{func} is not to run on MPS")
    if name in INTEGER_SCANS and not tensors[0].is_floating_point():
        raise RefusedOnMps(f"{func} of {tensors[0].dtype} is not to run on MPS")
    if name in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1]):
        raise RefusedOnMps(f"{func} by a mask is not to run on MPS")
    if name in OF_CONTIGUOUS and not all(one.is_contiguous() for one in tensors if one.ndim > 1):
        raise RefusedOnMps(f"{func} of a view is not to run on MPS")
    if isinstance(out := kwargs.get("out"), Tensor) and not out.is_contiguous():
        raise RefusedOnMps(f"{func} into a view is not to run on MPS")


def asked_by_library() -> bool:
    """Whether code of a model's library asks for this, and not ours that it calls."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(LIBRARIES):
            return True
        if frame.f_code.co_filename.startswith(PRODUCT):
            return False
        frame = frame.f_back
    return False


def placed(tensor: Tensor, by: str) -> OnMps:
    """A tensor on the device. Raises RefusedOnMps where MPS can't hold it."""
    if tensor.dtype in NOT_THERE or tensor.layout != torch.strided:
        raise RefusedOnMps(f"{by}: MPS has no {tensor.dtype} in {tensor.layout}")
    if tensor.numel() * tensor.element_size() >= MOST_BYTES:
        raise RefusedOnMps(f"{by}: a tensor of {tensor.numel()} numbers")
    return OnMps(tensor)


def is_mps(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "mps"


def check_mover(by: str) -> None:
    """Raises RefusedOnMps where the product moves a tensor neither by `daemon.devices` nor as a module's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path in (DEVICES, MODULES):
            return
        if path.startswith(PRODUCT):
            raise RefusedOnMps(f"{by} in {path}:{frame.f_lineno}: move tensors by daemon.devices")
        frame = frame.f_back


class StandIn(TorchFunctionMode):
    """Makes tensors of `OnMps` where the device is MPS, and moves them."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_to_host = 0  # tensors

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "_has_compatible_shallow_copy_type":  # asked by `Module.to`
            return not any(isinstance(one, OnMps) for one in args)
        if args and isinstance(args[0], OnMps):
            if name == "__repr__":  # torch's own reads memory that is not there
                return OnMps.__repr__(args[0])
            if func is Tensor.cpu:
                return self._to(args[0], "cpu")
            if func is Tensor.tolist:
                return args[0].inner.tolist()
            if func in (Tensor.numpy, Tensor.pin_memory, Tensor.__array__, Tensor.cuda, Tensor.data_ptr):
                raise RefusedOnMps(f"{name} of a tensor on MPS")
            if name in LACKING or (name == "scaled_dot_product_attention" and not asked_by_library()):
                raise RefusedOnMps(f"{name} is not to run on MPS")
        if is_mps(kwargs.get("device")):
            kwargs["device"] = "cpu"
            return placed(func(*args, **kwargs), name)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = isinstance(tensor, OnMps)
        if device is None or is_mps(device) == here:
            return tensor if dtype is None else Tensor.type(tensor, dtype)
        check_mover(f"to({device})")
        if dtype in NOT_THERE:
            raise RefusedOnMps(f"to({device}, {dtype})")
        source = tensor.inner if here else tensor
        copy = source.detach().clone() if dtype is None else source.detach().to(dtype, copy=True)
        if not here:
            return placed(copy, f"to({device})")
        self.moved_to_host += 1
        return copy


@contextlib.contextmanager
def mps_stand_in() -> Iterator[StandIn]:
    """Within it, on this thread, there is an MPS device."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.backends.mps, "is_available", lambda: True)
        patched.setattr(torch.mps, "synchronize", lambda: None)
        patched.setattr(torch.mps, "empty_cache", lambda: None)
        with StandIn() as mode:
            yield mode
