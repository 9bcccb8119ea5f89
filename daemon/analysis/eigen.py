"""Every eigenvalue and the principal eigenvector of batches of small Gram matrices.

By compiled code on a CPU, by kernels of our own on CUDA (`kernels.py`), else by torch. Knows nothing about
the rows that the matrices are made of.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import structlog
import torch
from torch import Tensor

from daemon.devices import to_device, to_host
from daemon.native import eigen as native

SHIFT = 1e-11  # of the principal eigenvalue, by which inverse iteration stays off it
INVERSE_ITERATIONS = 2

log = structlog.get_logger()


@functools.cache
def kernels() -> Any:
    """`daemon.analysis.kernels`; None where there is no Triton, or where it can't make them work."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        from daemon.analysis import kernels as module

        for width in module.TILES:  # each tile has kernels of its own, which are made here
            gram = torch.zeros(1, width, width, dtype=torch.float64, device="cuda")
            gram[0, :2, :2] = torch.tensor([[3.0, 2], [2, 3]])
            values, principal = module.eigen_on_device(gram, torch.tensor([2], device="cuda"))
            found = torch.cat([values[0, :3], principal[0, :2].square()]).float().cpu()
            torch.testing.assert_close(found, torch.tensor([5, 1, 0, 0.5, 0.5]))
    except Exception as error:  # of a compiler, a driver or a kernel: the host's cores can do it too
        log.warning("geometry.not_on_device", reason=f"{type(error).__name__}: {error}".partition("\n")[0])
        return None
    return module


def eigen(gram: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """gram: (rows, width, width) float64, zero beyond the first `counts` (rows,) rows and columns.

    Without negative eigenvalues, but for rounding. Returns the eigenvalues (rows, width), descending, and the
    unit eigenvectors (rows, width) of the first, arbitrary where that is not above 0. On CUDA, matrices that
    our kernels can't take are solved on the host: to copy them there and back takes less time than CUDA's
    own routine.
    """
    device = gram.device
    if device.type == "cuda":
        if (ours := kernels()) is not None and gram.shape[-1] <= ours.WIDEST:
            on_device: tuple[Tensor, Tensor] = ours.eigen_on_device(gram, counts)
            return on_device
        if native.routine() is not None:
            values, principal = eigen(to_host(gram), to_host(counts))
            return to_device(values, device), to_device(principal, device)
    elif (solved := native.eigen(gram, counts)) is not None:
        return solved
    values = torch.linalg.eigvalsh(gram).flip(-1)
    return values, inverse_iteration(gram, values[:, 0])


def inverse_iteration(gram: Tensor, largest: Tensor) -> Tensor:
    """The unit eigenvectors (rows, width) of the `largest` eigenvalues (rows,).

    Each step divides the share of another eigenvector by its distance over SHIFT. Arbitrary where
    `largest` is not above 0.
    """
    above = largest > 0
    width = gram.shape[-1]
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    shift = torch.where(above, largest * (1 + SHIFT), 1)
    shifted = shift[:, None, None] * identity - gram.where(above[:, None, None], 0)
    factor = torch.linalg.cholesky_ex(shifted).L
    # an irregular start, so that no symmetry makes it orthogonal to the axis
    start = torch.cos(torch.arange(1, width + 1, dtype=gram.dtype, device=gram.device) ** 1.5)
    u = start.expand(len(gram), width).unsqueeze(2)
    for _ in range(INVERSE_ITERATIONS):
        u = torch.cholesky_solve(u, factor)
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u.squeeze(2)
