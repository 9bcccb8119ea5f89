"""Lays samples out in two dimensions by their sparse activations. Knows no files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from daemon.findings.results import FloatArray

SEED = 0


def equal_shares(activations: sparse.csr_array, widths: Sequence[int]) -> sparse.csr_array:
    """Scale each dictionary's columns so that its rows (n, d_sae) have a mean squared norm of 1.

    Activations grow from layer to layer: without this the last dictionary alone would decide.
    """
    sizes = np.bincount(activations.indices, activations.data.astype(np.float64) ** 2, sum(widths))
    edges = np.cumsum([0, *widths])
    energy = np.array([sizes[first:last].sum() for first, last in itertools.pairwise(edges)])
    scale = np.sqrt(np.divide(activations.shape[0], energy, out=np.zeros_like(energy), where=energy > 0))
    return sparse.csr_array(activations @ sparse.diags_array(np.repeat(scale, widths)))


def principal_components(rows: sparse.csr_array) -> FloatArray:
    """Return the scores (n, 2) of rows (n, d) on their first two principal components, 0 without one.

    The rows are centred within the products, and stay sparse. Of each component's two directions the one
    is taken in which its largest loading is positive, so that the layout is the same each time.
    """
    n, d = rows.shape
    scores = np.zeros((n, 2))
    rank = min(2, n - 1, d - 1)
    if rank < 1 or not rows.nnz:
        return scores
    mean = np.asarray(rows.mean(axis=0)).ravel()

    def project(loadings: FloatArray) -> FloatArray:
        projected: FloatArray = rows @ loadings.ravel() - mean @ loadings.ravel()
        return projected

    def gather(weights: FloatArray) -> FloatArray:
        gathered: FloatArray = rows.T @ weights.ravel() - mean * weights.sum()
        return gathered

    centred = linalg.LinearOperator((n, d), matvec=project, rmatvec=gather, dtype=np.float64)
    start = np.random.default_rng(SEED).standard_normal(min(n, d))
    _, sizes, loadings = linalg.svds(centred, k=rank, v0=start)
    for place, component in enumerate(np.argsort(-sizes)):
        loading = loadings[component]
        sign = np.sign(loading[np.abs(loading).argmax()])
        scores[:, place] = sign * project(loading)
    return scores
