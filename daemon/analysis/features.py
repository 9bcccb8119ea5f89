"""The sparse activations of a batch as rows to store. Knows nothing about how they came about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from daemon.analysis.sparse import SparseActs
from daemon.devices import to_device, to_numpy
from daemon.records import FeatureRows, FloatArray, IntArray, Residuals


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """The features to store of N texts, of the SAEs that read the same tokens: R rows each, text by text."""

    saes: tuple[int, ...]  # the number of each SAE
    acts: tuple[SparseActs, ...]  # one per SAE, of K positions
    rows: IntArray  # (R,) into `acts`: texts may share a position
    offsets: IntArray  # (N + 1,) where each text's rows begin
    positions: IntArray  # (R,) token position in the text, -1 where the features belong to no one position
    token_ids: IntArray  # (R,) the token there, -1 likewise
    x: tuple[Tensor | None, ...] = ()  # per SAE what it read (K, d_in); None where rows have no one vector


def feature_rows(stored: Sequence[StoredFeatures], n_texts: int, *, residuals: bool = False) -> FeatureRows:
    """The rows by sample of `n_texts` texts, text, SAE and position; one group's after another's.

    With `residuals` what the SAEs read comes along.
    """
    groups = [rows_of(group, n_texts) for group in stored]
    rows = groups[0] if len(groups) == 1 else joined_rows(groups)
    return dataclasses.replace(rows, residuals=residuals_of(stored, rows)) if residuals else rows


def joined_rows(groups: Sequence[FeatureRows]) -> FeatureRows:
    together: dict[str, Any] = {
        field.name: np.concatenate([getattr(group, field.name) for group in groups])
        for field in dataclasses.fields(FeatureRows)
        if field.name not in ("offsets", "residuals")
    }
    lengths = np.concatenate([np.diff(group.offsets) for group in groups])
    return FeatureRows(offsets=np.concatenate(([0], np.cumsum(lengths))), **together)


def residuals_of(stored: Sequence[StoredFeatures], rows: FeatureRows) -> Residuals:
    """What the SAEs read, in float32, on the host; no row for what float32 does not hold."""
    row = np.concatenate([group.rows[row_order(group) % len(group.rows)] for group in stored])
    values: dict[int, npt.NDArray[np.float32]] = {}
    for group in stored:
        for sae, x in zip(group.saes, group.x, strict=True):
            of_sae = np.flatnonzero(rows.layer == sae)
            if x is None:
                values[sae], row[of_sae] = np.zeros((0, 0), np.float32), -1
                continue
            vectors: npt.NDArray[np.float32] = to_numpy(x.float())
            lost = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            row[of_sae[np.isin(row[of_sae], lost)]] = -1
            values[sae] = vectors
    return Residuals(row, tuple(values[sae] for sae in sorted(values)))


def row_order(stored: StoredFeatures) -> IntArray:
    """(L * R,) the order of storage: of rows that lie SAE by SAE, where each is. Within a text it is that."""
    text = np.repeat(np.arange(len(stored.offsets) - 1), np.diff(stored.offsets))  # (R,)
    return np.argsort(np.broadcast_to(text, (len(stored.acts), len(text))).ravel(), kind="stable")


def rows_of(stored: StoredFeatures, n_texts: int) -> FeatureRows:
    """The rows in the order of storage: by sample of `n_texts` texts, text, SAE and position."""
    n_rows = len(stored.rows)
    text = np.repeat(np.arange(len(stored.offsets) - 1), np.diff(stored.offsets))  # (R,)
    pieces = [flat_rows(acts, stored.rows) for acts in stored.acts]
    counts = np.stack([piece[0] for piece in pieces])  # (L, R)
    order = row_order(stored)
    lengths = counts.ravel()[order]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    begins = np.concatenate(([0], np.cumsum(counts.ravel())[:-1]))[order]
    source = np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])
    return FeatureRows(
        sample_row=text[order % n_rows] // n_texts,
        text=text[order % n_rows] % n_texts,
        layer=np.array(stored.saes)[order // n_rows],
        position=stored.positions[order % n_rows],
        token_id=stored.token_ids[order % n_rows],
        offsets=offsets,
        indices=np.concatenate([piece[1] for piece in pieces])[source],
        values=np.concatenate([piece[2] for piece in pieces])[source],
    )


Flat = tuple[IntArray, npt.NDArray[np.uint32], npt.NDArray[np.float32] | FloatArray]


def flat_rows(acts: SparseActs, rows: IntArray) -> Flat:
    """Of the positions `rows` (R,), on the host: counts (R,), and indices and values end to end."""
    if np.array_equal(rows, np.arange(len(acts.counts))):
        read = acts
    else:
        read = acts.select(to_device(rows, acts.counts.device))
    active = read.active
    values = read.values[active]  # NumPy has no bfloat16: what is not float64 becomes float32
    return (
        to_numpy(read.counts),
        to_numpy(read.indices[active].int()).view(np.uint32),
        to_numpy(values if values.dtype == torch.float64 else values.float()),
    )
