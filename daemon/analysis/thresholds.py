"""An SAE's activation that keeps what is above its feature's threshold, as ReLU and JumpReLU do.

On a CPU in float32 by the compiled routines of sparse.c, in one pass over what the product gave.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from daemon.analysis.sparse import SparseActs, from_dense
from daemon.analysis.threads import in_ranges
from daemon.libraries import best_library

ROWS = 16  # that one thread takes at least


@dataclass(frozen=True, slots=True)
class Routines:
    """The functions of sparse.c."""

    count: ctypes._FuncPointer
    compact: ctypes._FuncPointer
    strongest: ctypes._FuncPointer


@functools.cache
def routines() -> Routines | None:
    """sparse.c for this processor; None where it was installed without a compiler."""
    best = best_library("daemon.analysis._sparse")
    if best is None:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    count, compact, strongest = best.lensd_count, best.lensd_compact, best.lensd_strongest
    count.argtypes = [pointer, pointer, integer, pointer, integer, integer]
    compact.argtypes = [pointer, pointer, integer, pointer, integer, pointer, pointer, integer, integer]
    strongest.argtypes = [*[pointer] * 3, integer, pointer, integer, integer, pointer, integer, integer]
    count.restype = compact.restype = None
    return Routines(count, compact, strongest)


class Thresholds:
    """activate(pre_acts)_i = pre_acts_i where that is above thresholds_i, else 0."""

    def __init__(self, thresholds: Tensor) -> None:
        """thresholds: (d_sae,), none of them negative."""
        self._thresholds = thresholds.contiguous()

    def __call__(self, pre_acts: Tensor) -> Tensor:
        """(N, d_sae) -> dense feature activations (N, d_sae)."""
        return pre_acts.where(pre_acts > self._thresholds, 0)

    def compact(self, pre_acts: Tensor) -> SparseActs:
        """The same, sparse."""
        found = self._routines(pre_acts)
        if found is None:
            return from_dense(self(pre_acts))
        dense = pre_acts.contiguous()
        n, d = dense.shape
        counts = torch.empty(n, dtype=torch.int64)
        given = dense.data_ptr(), self._thresholds.data_ptr(), d, counts.data_ptr()
        in_ranges(lambda first, last: found.count(*given, first, last), n, ROWS)
        width = max(1, int(counts.max())) if n else 1
        acts = SparseActs(torch.empty(n, width, dtype=torch.int64), dense.new_empty(n, width), counts)
        taken = width, acts.indices.data_ptr(), acts.values.data_ptr()
        in_ranges(lambda first, last: found.compact(*given, *taken, first, last), n, ROWS)
        return acts

    def strongest(self, pre_acts: Tensor, bank: Tensor, draws: Tensor, top_k: int) -> Tensor | None:
        """The `top_k` strongest active features, first without noise (N, 1 + K, <= top_k); -1 for none.

        pre_acts: (N, d_sae); bank: (M, d_sae) noise, of which draws (N, K) are added. Ties go to the lower
        index. None where there is no routine for it. Raises MemoryError.
        """
        found = self._routines(pre_acts)
        if found is None or bank.dtype != pre_acts.dtype:
            return None
        x, bank, draws = (tensor.contiguous() for tensor in (pre_acts, bank, draws))
        (n, d), k = x.shape, draws.shape[1]
        sets = torch.empty(n, 1 + k, min(top_k, d), dtype=torch.int64)
        noise = bank.data_ptr(), draws.data_ptr(), k
        given = x.data_ptr(), *noise, self._thresholds.data_ptr(), d, sets.shape[2], sets.data_ptr()
        if any(in_ranges(lambda first, last: found.strongest(*given, first, last), n, ROWS)):
            raise MemoryError(f"the {top_k} strongest features")
        return sets

    def _routines(self, pre_acts: Tensor) -> Routines | None:
        on_host = pre_acts.device.type == "cpu" and self._thresholds.device.type == "cpu"
        exact = pre_acts.dtype == self._thresholds.dtype == torch.float32
        return routines() if on_host and exact else None
