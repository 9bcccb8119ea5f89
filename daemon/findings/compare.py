"""Compares the two texts of a contrast over a study: its columns, its features, and probes of both.

Puts what was read into the form that the statistics take; computes none itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from daemon.analysis.columns import (
    CONTRAST_METRICS,
    LAYER_COLUMNS,
    LOG_PROB_COLUMNS,
    layer_column_name,
    token_count_name,
)
from daemon.findings.activations import Counts, StudyBlock, activation_blocks, plan_passes
from daemon.findings.clusters import clusters_of
from daemon.findings.grouping import Grouping
from daemon.findings.manifests import ContrastEntry
from daemon.findings.paired_columns import fdr_columns, paired_column
from daemon.findings.paired_features import FeatureBlock, PairedSettings, paired_features
from daemon.findings.probe import probe_pairs
from daemon.findings.progress import ReportProgress
from daemon.findings.residuals import residual_differences
from daemon.findings.results import (
    BoolArray,
    ColumnFinding,
    FloatArray,
    IntArray,
    PairedFeatures,
    Pairs,
    ProbeResult,
    SwapControl,
)
from daemon.findings.study import Study

LOG_PROB = "mean_log_prob"
PROBED_PAIRS = 4000  # at most: a probe of more takes long and tells little more
PIECE_VALUES = 1 << 20  # activations compared at a time


@dataclass(frozen=True, slots=True)
class ColumnSource:
    """A column of numbers whose difference is compared."""

    column: str
    sae: str | None
    unit: str
    meaning: str
    orientation: str
    values: FloatArray  # (n,) differences
    of_log_prob: bool = False  # so that log-probability is no control of it


def pairs_of(study: Study, contrast: ContrastEntry, grouping: Grouping) -> tuple[Pairs, str]:
    """The pairs of a study, and a note on how clusters were told."""
    cluster, note = clusters_of(study, contrast.reference)
    log_probs = [f"{LOG_PROB}_{text}" for text in (contrast.negative, contrast.positive)]
    d_log_prob = None
    if set(log_probs) <= study.columns:
        negative, positive = map(study.numbers, log_probs)
        d_log_prob = negative - positive
    pairs = Pairs(
        cluster=cluster,
        d_tokens=tokens_of(study, contrast.negative) - tokens_of(study, contrast.positive),
        d_log_prob=d_log_prob,
        group=grouping.group,
        group_names=grouping.names,
    )
    return pairs, note


def tokens_of(study: Study, text: str) -> FloatArray:
    return study.numbers(token_count_name(text))


def column_sources(study: Study, contrast: ContrastEntry) -> Iterator[ColumnSource]:
    """Every difference that the analysis has, then for each dictionary what is measured of both texts."""
    apart = f"{contrast.negative} - {contrast.positive}"
    reverse = f"{contrast.positive} - {contrast.negative}"
    for metric in CONTRAST_METRICS:
        name = f"{metric.name}_diff"
        if name in study.columns:
            meaning = metric.meaning.format(text="the text")
            orientation = apart if metric.sign > 0 else reverse
            yield ColumnSource(metric.name, None, metric.unit, meaning, orientation, study.numbers(name))
    for tokens in LOG_PROB_COLUMNS:
        name = f"{tokens.name}_diff"
        if name in study.columns:
            meaning = f"{tokens.meaning}; controlled for length alone"
            yield ColumnSource(tokens.name, None, tokens.unit, meaning, apart, study.numbers(name), True)
    for sae in study.saes:
        for column in LAYER_COLUMNS:
            names = [
                layer_column_name(sae.prefix, text, column.name)
                for text in (contrast.negative, contrast.positive)
            ]
            if column.kind != "class" and set(names) <= study.columns:
                negative, positive = map(study.numbers, names)
                yield ColumnSource(
                    f"{sae.prefix}_{column.name}",
                    sae.prefix,
                    column.unit,
                    column.meaning,
                    apart,
                    negative - positive,
                )


def compare_columns(
    study: Study, contrast: ContrastEntry, pairs: Pairs, settings: PairedSettings
) -> tuple[ColumnFinding, ...]:
    """Every column over all pairs, then in each group that has enough of them.

    The false discovery rate of all pairs is over columns; that of groups over columns and groups.
    """
    sizes = np.bincount(pairs.group[pairs.group >= 0], minlength=len(pairs.group_names))
    enough = [group for group, size in enumerate(sizes) if size >= settings.min_group_pairs]
    groups = enough if len(pairs.group_names) > 1 else []
    whole: list[ColumnFinding] = []
    parts: list[ColumnFinding] = []
    of_length = replace(pairs, d_log_prob=None)
    for source in column_sources(study, contrast):
        compared = of_length if source.of_log_prob else pairs
        for group in (None, *groups):
            inside = source.values if group is None else np.where(pairs.group == group, source.values, np.nan)
            found = ColumnFinding(
                source.column,
                source.sae,
                source.unit,
                source.meaning,
                source.orientation,
                None if group is None else pairs.group_names[group],
                paired_column(inside, compared, settings),
            )
            (whole if group is None else parts).append(found)
    return (*judged(whole, settings), *judged(parts, settings))


def judged(findings: Sequence[ColumnFinding], settings: PairedSettings) -> list[ColumnFinding]:
    """The same with the false discovery rate over all of them."""
    differences = fdr_columns([one.difference for one in findings], settings)
    return [
        ColumnFinding(one.column, one.sae, one.unit, one.meaning, one.orientation, one.group, difference)
        for one, difference in zip(findings, differences, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class FeatureComparison:
    """Every feature compared, the control, and how well a probe of each dictionary does."""

    features: PairedFeatures
    swapped: SwapControl
    probes: tuple[ProbeResult, ...]


def compare_features(
    study: Study,
    contrast: ContrastEntry,
    pairs: Pairs,
    counts: Counts,
    settings: PairedSettings,
    progress: ReportProgress,
) -> FeatureComparison:
    """Read every feature of both texts, block by block, and compare; probe each dictionary on the way."""
    texts = (contrast.positive, contrast.negative)
    chosen = [study.texts.index(text) for text in texts]
    passes = len(plan_passes(study, counts, chosen))
    progress.begin("comparing features", passes * study.n_rows())
    probes = FeatureProbes(study, pairs)

    def blocks() -> Iterator[FeatureBlock]:
        for block in activation_blocks(study, counts, texts, on_rows=progress.advance):
            positive, negative = (block.by_text[text] for text in texts)
            probes.add(block, positive, negative)
            for first, last in pieces(positive, negative):
                yield FeatureBlock(
                    block.sae, block.first + first, positive[:, first:last], negative[:, first:last]
                )

    features, swapped = paired_features(blocks(), pairs, settings)
    return FeatureComparison(features, swapped, probes.finished())


def pieces(positive: sparse.csc_array, negative: sparse.csc_array) -> Iterator[tuple[int, int]]:
    """Bounds of runs of columns with about PIECE_VALUES activations each."""
    stored = np.cumsum(np.diff(positive.indptr).astype(np.int64) + np.diff(negative.indptr))
    starts = [0, *(np.flatnonzero(np.diff(stored // PIECE_VALUES)) + 1).tolist(), len(stored)]
    yield from itertools.pairwise(dict.fromkeys(starts))


class FeatureProbes:
    """Gathers the differences of each dictionary until all its features came, then probes them."""

    def __init__(self, study: Study, pairs: Pairs) -> None:
        self._study = study
        self._rows, self._pairs = probed_pairs(pairs)
        self._gathered: list[sparse.csc_array] = []
        self._found: list[ProbeResult] = []

    def add(self, block: StudyBlock, positive: sparse.csc_array, negative: sparse.csc_array) -> None:
        difference = (negative - positive).astype(np.float32)
        whole = bool(self._rows.all())
        self._gathered.append(difference if whole else difference.tocsr()[self._rows].tocsc())
        entry = self._study.saes[block.sae]
        if block.last == entry.d_sae:
            x = sparse.hstack(self._gathered, format="csr")
            self._gathered = []
            self._found.append(probe_pairs(x, self._pairs, f"features of {entry.prefix}"))

    def finished(self) -> tuple[ProbeResult, ...]:
        return tuple(self._found)


def probed_pairs(pairs: Pairs) -> tuple[BoolArray, Pairs]:
    """Which pairs (n,) are probed, and these: whole clusters drawn at random where there are too many."""
    if pairs.n <= PROBED_PAIRS:
        return np.ones(pairs.n, np.bool_), pairs
    order = np.random.default_rng(0).permutation(pairs.n_clusters)
    sizes = np.bincount(pairs.cluster, minlength=pairs.n_clusters)[order]
    taken = np.zeros(pairs.n_clusters, np.bool_)
    taken[order[np.cumsum(sizes) <= PROBED_PAIRS]] = True
    rows: BoolArray = taken[pairs.cluster]
    return rows, subset(pairs, rows)


def subset(pairs: Pairs, rows: BoolArray) -> Pairs:
    _, cluster = np.unique(pairs.cluster[rows], return_inverse=True)
    numbered: IntArray = cluster.astype(np.int64)
    return Pairs(
        numbered,
        pairs.d_tokens[rows],
        None if pairs.d_log_prob is None else pairs.d_log_prob[rows],
        pairs.group[rows],
        pairs.group_names,
    )


def probe_controls(pairs: Pairs) -> Iterator[ProbeResult]:
    """How well length alone tells, and where it is there length with log-probability."""
    _, chosen = probed_pairs(pairs)
    yield probe_pairs(chosen.d_tokens[:, None], chosen, "length")
    if chosen.d_log_prob is not None:
        both = np.column_stack([standardised(chosen.d_tokens), standardised(chosen.d_log_prob)])
        yield probe_pairs(both, chosen, "log-probability and length")


def standardised(values: FloatArray) -> FloatArray:
    size = float(np.sqrt(np.mean(values**2)))
    return values / size if np.isfinite(size) and size > 0 else values


def probe_residuals(
    study: Study, contrast: ContrastEntry, pairs: Pairs, counts: Counts, progress: ReportProgress
) -> Iterator[ProbeResult]:
    """How well the vectors tell that the dictionaries read, where they are stored."""
    rows, chosen = probed_pairs(pairs)
    differences, reason = residual_differences(study, contrast, np.flatnonzero(rows), counts, progress)
    for number, sae in enumerate(study.saes):
        name = f"residual at {sae.prefix}"
        if number in differences:
            yield probe_pairs(differences[number], chosen, name)
        else:
            yield ProbeResult(name, None, None, chosen.n, int(chosen.matched.sum()), reason)
