"""Makes the units of a comparison of groups: distinct texts, inside a group and outside it.

Samples of one side with the same text are no independent witnesses of it. They are one unit, with the mean of
their numbers. A text on both sides is a unit of either: their likeness makes a difference smaller than chance
would, never larger. Knows no tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from daemon.findings.results import BoolArray, FloatArray, IntArray
from daemon.findings.sparse import Columns, fires, keep_values, sum_rows, with_values

FIRES = 0.5  # share of a unit's samples from which it fires: of one text they differ by rounding alone


@dataclass(frozen=True, slots=True)
class Samples:
    """The n samples that are compared by group, in one of their texts."""

    cluster: IntArray  # (n,) from 0: samples of one cluster have the same text
    n_tokens: FloatArray  # (n,) of the text
    group: IntArray  # (n,) index into `group_names`; -1 where the sample has no value
    group_names: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Units:
    """The u units of one comparison."""

    member: IntArray  # (n,) unit of each sample, -1 where it belongs to neither side
    size: FloatArray  # (u,) samples of each
    inside: BoolArray  # (u,)
    n_tokens: FloatArray  # (u,)

    @property
    def n(self) -> int:
        return len(self.size)

    @property
    def n_inside(self) -> int:
        return int(self.inside.sum())

    @property
    def n_outside(self) -> int:
        return self.n - self.n_inside

    def mean_of(self, values: FloatArray) -> FloatArray:
        """Return the mean (u,) over the samples of each unit."""
        kept = self.member >= 0
        totals = np.bincount(self.member[kept], np.asarray(values, np.float64)[kept], minlength=self.n)
        return np.asarray(totals / self.size)

    def means(self, activations: Columns) -> Columns:
        """Return the mean activations (u, k) of columns (n, k)."""
        totals = sum_rows(activations, self.member, self.n)
        return with_values(totals, totals.data / self.size[totals.indices])

    def firing(self, activations: Columns, means: Columns) -> Columns:
        """Return those of the mean activations (u, k) whose unit fires."""
        if (self.size == 1).all():
            return means
        shares = sum_rows(fires(activations), self.member, self.n)
        fired = shares.data / self.size[shares.indices] >= FIRES
        chosen = keep_values(with_values(shares, np.ones(shares.nnz)), fired)
        return chosen.multiply(means).tocsc()


def units_of(samples: Samples, group: int, defined: BoolArray | None = None) -> Units:
    """Collapse the samples inside a group, and those of all others, by cluster.

    Samples without a group belong to neither side, nor those that are not `defined` (n,).
    """
    kept = samples.group >= 0 if defined is None else (samples.group >= 0) & defined
    keys = 2 * samples.cluster[kept] + (samples.group[kept] == group)
    found, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)  # units in the order of their samples: without repeated texts they are these
    place = np.empty(len(found), np.int64)
    place[order] = np.arange(len(found))
    member = np.full(len(kept), -1, np.int64)
    member[kept] = place[inverse]
    size = np.bincount(member[kept], minlength=len(found)).astype(np.float64)
    units = Units(member, size, (found[order] % 2).astype(np.bool_), np.zeros(len(found)))
    return Units(member, size, units.inside, units.mean_of(samples.n_tokens))


def compared_groups(samples: Samples, min_group: int) -> list[int]:
    """Return the groups that are compared: at least `min_group` distinct texts inside and outside.

    Of two groups the first alone: the second against the first is the same comparison.
    """
    enough = []
    for group in range(len(samples.group_names)):
        units = units_of(samples, group)
        if min(units.n_inside, units.n_outside) >= min_group:
            enough.append(group)
    return enough[:1] if len(samples.group_names) == 2 else enough


def small_groups(samples: Samples, min_group: int) -> tuple[str, ...]:
    """Return the names of the groups with fewer than `min_group` distinct texts."""
    return tuple(
        name
        for group, name in enumerate(samples.group_names)
        if len(np.unique(samples.cluster[samples.group == group])) < min_group
    )
