"""How often features fire, and which of them fire on the same samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from daemon.findings.grouped import ActivationBlock
from daemon.findings.results import CoOccurrence, IntArray, Prevalence
from daemon.findings.sparse import Columns, as_columns, fires, stored, sums

MIN_TOGETHER = 10  # samples that fire both, for a couple to be listed
MOST_FREQUENT = 0.5  # a feature that fires on more samples goes with everything
ROWS_AT_ONCE = 4096  # bounds the memory
MANY_FEATURES = 4096  # of a dictionary, that are looked at for couples: the most frequent


def prevalence(blocks: Iterable[ActivationBlock], text: str, couples: int = 20) -> Prevalence:
    """Return how often each feature fires in a text, and the couples that most fire together.

    Couples are looked for within a block: give a dictionary as one block to see all of its couples.
    """
    sae, feature, rate, mean_active = [], [], [], []
    together: list[CoOccurrence] = []
    for block in blocks:
        activations = as_columns(block.activations)
        n, k = activations.shape
        count = stored(activations)
        sae.append(np.full(k, block.sae, dtype=np.int64))
        feature.append(np.arange(block.first, block.first + k, dtype=np.int64))
        rate.append(count / n if n else np.full(k, np.nan))
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_active.append(sums(activations) / count)
        together += co_occurrence(activations, block.sae, block.first, couples)
    together.sort(key=_strength)
    return Prevalence(
        text=text,
        sae=np.concatenate(sae or [np.zeros(0, dtype=np.int64)]),
        feature=np.concatenate(feature or [np.zeros(0, dtype=np.int64)]),
        rate=np.concatenate(rate or [np.zeros(0)]),
        mean_active=np.concatenate(mean_active or [np.zeros(0)]),
        together=tuple(together[:couples]),
    )


def co_occurrence(activations: Columns, sae: int, first: int, couples: int = 20) -> list[CoOccurrence]:
    """Return the couples of features (n, k) with the largest Jaccard similarity of the samples that they fire
    on.

    Jaccard (1901): samples that fire both over those that fire either. Features that fire on more than half
    of the samples are left out, as are couples that fewer than MIN_TOGETHER samples fire.
    """
    n = activations.shape[0]
    count = stored(activations)
    candidates = np.flatnonzero((count >= MIN_TOGETHER) & (count <= MOST_FREQUENT * n))
    candidates = np.sort(candidates[np.argsort(-count[candidates], kind="stable")][:MANY_FEATURES])
    if len(candidates) < 2 or couples < 1:
        return []
    rows = fires(activations)[:, candidates].astype(np.float32).tocsr()
    both = np.zeros((len(candidates), len(candidates)), dtype=np.float32)  # whole numbers, exact below 2^24
    for start in range(0, n, ROWS_AT_ONCE):
        dense = rows[start : start + ROWS_AT_ONCE].toarray()
        both += dense.T @ dense
    size = count[candidates].astype(np.float32)
    jaccard = both / (size[:, None] + size - both)
    jaccard[both < MIN_TOGETHER] = 0
    jaccard[np.tril_indices(len(candidates))] = 0
    strongest = _largest(jaccard.ravel(), couples)
    found = []
    for place in strongest:
        i, j = divmod(int(place), len(candidates))
        shared = int(both[i, j])
        union = int(size[i]) + int(size[j]) - shared
        found.append(
            CoOccurrence(
                sae=sae,
                first=first + int(candidates[i]),
                second=first + int(candidates[j]),
                both=shared,
                jaccard=shared / union,
                lift=shared * n / (int(size[i]) * int(size[j])),
            )
        )
    return sorted(found, key=_strength)


def _strength(couple: CoOccurrence) -> tuple[float, int, int, int, int]:
    return -couple.jaccard, -couple.both, couple.sae, couple.first, couple.second


def _largest(values: np.ndarray[tuple[int], np.dtype[np.float32]], most: int) -> IntArray:
    """Return the places of the largest values above zero."""
    most = min(most, len(values))
    places = np.argpartition(-values, most - 1)[:most]
    return places[values[places] > 0].astype(np.int64)
