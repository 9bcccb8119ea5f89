"""Gathers the activations of many samples by feature, a block of features at a time, within a budget.

One pass over `features.parquet` counts them, so that every later one fills arrays of known size. Where
everything fits the budget there is one such pass. Rows of a text at several positions are pooled: the text
fires a feature where any position does, and its activation is the mean over the positions read, 0 where
silent. Knows no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from daemon.errors import ConfigError
from daemon.findings.results import FloatArray, IntArray
from daemon.findings.study import FEATURES, ActivationRows, Study, misfit

BUDGET_BYTES = 128 << 20  # of the activations of the blocks of one pass
OnRows = Callable[[int], None]  # is told how many rows of features.parquet were read


@dataclass(frozen=True, slots=True)
class Counts:
    """How many activations there are of each feature."""

    per_feature: tuple[IntArray, ...]  # by dictionary (n_texts, d_sae): at least as many as samples that fire
    positions: npt.NDArray[np.int32]  # (n_saes, n_texts, n_samples) rows of each text

    def dead(self, sae: int) -> int:
        """Count the features of a dictionary that fire on no text."""
        return int((self.per_feature[sae].sum(0) == 0).sum())


@dataclass(frozen=True, slots=True)
class StudyBlock:
    """The activations of features [first, last) of one dictionary, in some of the texts."""

    sae: int
    first: int
    last: int
    by_text: dict[str, sparse.csc_array]  # (n_samples, last - first); what is not stored is 0


def count_activations(study: Study, on_rows: OnRows = lambda _: None) -> Counts:
    """Raises ConfigError where features.parquet lacks a text of a sample, or has it twice."""
    n_texts = len(study.texts)
    per_feature = tuple(np.zeros((n_texts, sae.d_sae), np.int64) for sae in study.saes)
    positions = np.zeros((len(study.saes), n_texts, study.n_samples), np.int32)
    for rows in study.scan():
        for sae, text, sample, acts in matrices(study, rows, range(n_texts)):
            np.add.at(positions[sae, text], sample, 1)
            pooled, _ = pool(study, sample, acts)
            per_feature[sae][text] += np.bincount(pooled.indices, minlength=acts.shape[1])
        on_rows(len(rows.sample))
    check_positions(study, positions)
    return Counts(per_feature, positions)


def check_positions(study: Study, positions: npt.NDArray[np.int32]) -> None:
    wrong = positions == 0 if study.pools_positions else positions != 1
    if wrong.any():
        sae, text, sample = map(int, np.argwhere(wrong)[0])
        folder = study.folders[study.folder_of(sample)]
        raise misfit(
            folder.file(FEATURES),
            f"{positions[sae, text, sample]} rows of {study.saes[sae].prefix} and text {study.texts[text]} of"
            f" record_index {study.record_index[sample]}",
        )


def matrices(
    study: Study, rows: ActivationRows, texts: Sequence[int]
) -> Iterator[tuple[int, int, IntArray, sparse.csr_array]]:
    """Give, of each dictionary and text, the sample of each of its R rows, and the rows as (R, d_sae)."""
    lengths = np.diff(rows.offsets)
    kind = rows.sae * len(study.texts) + rows.text
    for sae, entry in enumerate(study.saes):
        for text in texts:
            chosen = np.flatnonzero(kind == sae * len(study.texts) + text)
            if not len(chosen):
                continue
            n = lengths[chosen]
            offsets = np.concatenate(([0], np.cumsum(n)))
            places = np.repeat(rows.offsets[chosen] - offsets[:-1], n) + np.arange(offsets[-1])
            indices = rows.indices[places]
            if len(indices) and int(indices.max()) >= entry.d_sae:
                folder = study.folders[study.folder_of(int(rows.sample[chosen[0]]))]
                raise misfit(
                    folder.file(FEATURES),
                    f"feature {indices.max()} of {entry.prefix}, which has {entry.d_sae}",
                )
            acts = sparse.csr_array(
                (rows.values[places], indices.astype(np.int32), offsets), shape=(len(chosen), entry.d_sae)
            )
            yield sae, text, rows.sample[chosen], acts


def pool(study: Study, sample: IntArray, acts: sparse.csr_array) -> tuple[sparse.csr_array, IntArray]:
    """Sum the rows of each sample that has several; return the sums, (samples, d_sae), and the samples.

    The rows of a sample follow one another. One cut in two by the pieces of the file comes twice.
    """
    if not study.pools_positions:
        return acts, sample
    begins = np.flatnonzero(np.diff(sample, prepend=sample[0] - 1))
    summed = sparse.csr_array(
        (np.ones(len(sample)), np.arange(len(sample)), np.append(begins, len(sample))),
        shape=(len(begins), len(sample)),
    )
    return summed @ acts.astype(np.float64), sample[begins]


@dataclass(frozen=True, slots=True)
class Span:
    """Features [first, last) of one dictionary."""

    sae: int
    first: int
    last: int


def plan_passes(
    study: Study, counts: Counts, texts: Sequence[int], budget: int = BUDGET_BYTES
) -> list[list[Span]]:
    """Return spans of features for each pass, so that the activations of each pass fit the budget.

    One feature that alone does not fit is a pass of its own.
    """
    value_bytes = value_type(study).itemsize
    passes: list[list[Span]] = [[]]
    room = budget
    for sae, found in enumerate(counts.per_feature):
        sizes = found[list(texts)].sum(0) * (value_bytes + 4)
        first = 0
        while first < len(sizes):
            ends = np.cumsum(sizes[first:])
            fits = int(np.searchsorted(ends, room, side="right"))
            if not fits and not passes[-1]:
                fits = 1
            if fits:
                passes[-1].append(Span(sae, first, first + fits))
                room -= int(ends[fits - 1])
                first += fits
            if first < len(sizes):
                passes.append([])
                room = budget
    return [spans for spans in passes if spans]


def activation_blocks(
    study: Study,
    counts: Counts,
    texts: Sequence[str],
    *,
    budget: int = BUDGET_BYTES,
    on_rows: OnRows = lambda _: None,
) -> Iterator[StudyBlock]:
    """Give every feature of every dictionary, block by block, in their order.

    What a block holds is let go once the next one is asked for.
    """
    chosen = [study.texts.index(text) for text in texts]
    for spans in plan_passes(study, counts, chosen, budget):
        blocks = [Filling(study, counts, span, chosen) for span in spans]
        by_sae: dict[int, list[Filling]] = {}
        for block in blocks:
            by_sae.setdefault(block.span.sae, []).append(block)
        for rows in study.scan():
            for sae, text, sample, acts in matrices(study, rows, chosen):
                if sae in by_sae:
                    pooled, which = pool(study, sample, acts)
                    columns = pooled.tocsc()
                    for block in by_sae[sae]:
                        block.add(text, which, columns)
            on_rows(len(rows.sample))
        by_sae.clear()
        while blocks:
            yield blocks.pop(0).finished()


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """The activations of a few features of one dictionary, in every text."""

    sae: int
    features: IntArray  # (k,)
    by_text: dict[str, sparse.csc_array]  # (n_samples, k)

    def of(self, text: str, feature: int) -> tuple[IntArray, FloatArray]:
        """Return the samples that fire a feature, and how much."""
        columns, place = self.by_text[text], int(np.flatnonzero(self.features == feature)[0])
        begin, end = columns.indptr[place : place + 2]
        return columns.indices[begin:end].astype(np.int64), columns.data[begin:end].astype(np.float64)


def feature_columns(
    study: Study, counts: Counts, wanted: Sequence[tuple[int, int]], on_rows: OnRows = lambda _: None
) -> dict[int, FeatureColumns]:
    """Return by dictionary the activations of its `wanted` features, which are (dictionary, feature)."""
    features = {
        sae: np.array(sorted({feature for owner, feature in wanted if owner == sae}), np.int64)
        for sae in sorted({sae for sae, _ in wanted})
    }
    texts = range(len(study.texts))
    pieces: dict[tuple[int, int], list[tuple[IntArray, sparse.coo_array]]] = {
        (sae, text): [] for sae in features for text in texts
    }
    for rows in study.scan():
        for sae, text, sample, acts in matrices(study, rows, texts):
            if sae in features:
                pooled, which = pool(study, sample, acts)
                found = pooled[:, features[sae]].tocoo()
                pieces[sae, text].append((which[found.coords[0]], found))
        on_rows(len(rows.sample))
    return {
        sae: FeatureColumns(
            sae,
            which,
            {
                name: joined(study, pieces[sae, text], counts.positions[sae, text], len(which))
                for text, name in enumerate(study.texts)
            },
        )
        for sae, which in features.items()
    }


def joined(
    study: Study,
    pieces: Sequence[tuple[IntArray, sparse.coo_array]],
    positions: npt.NDArray[np.int32],
    k: int,
) -> sparse.csc_array:
    """Join pieces, with the sample of each activation, to (n_samples, k)."""
    sample = np.concatenate([np.zeros(0, np.int64), *(which for which, _ in pieces)])
    column = np.concatenate([np.zeros(0, np.int64), *(found.coords[1] for _, found in pieces)])
    values = np.concatenate([np.zeros(0), *(found.data for _, found in pieces)])
    if study.pools_positions:
        values = values / positions[sample]
    return sparse.coo_array((values, (sample, column)), shape=(study.n_samples, k)).tocsc()


def value_type(study: Study) -> np.dtype[np.floating]:
    """Return the type of activations in blocks: as stored, or of means double precision."""
    return np.dtype(np.float64 if study.pools_positions else np.float32)


class Filling:
    """A block while its activations come in, into arrays whose size was counted before."""

    def __init__(self, study: Study, counts: Counts, span: Span, texts: Sequence[int]) -> None:
        self.span = span
        self._study = study
        self._positions = counts.positions[span.sae]
        self._starts: dict[int, IntArray] = {}
        self._next: dict[int, IntArray] = {}
        self._samples: dict[int, npt.NDArray[np.int32]] = {}
        self._values: dict[int, npt.NDArray[np.floating]] = {}
        for text in texts:
            ends = np.cumsum(counts.per_feature[span.sae][text, span.first : span.last])
            self._starts[text] = np.concatenate(([0], ends))
            self._next[text] = self._starts[text][:-1].copy()
            self._samples[text] = np.empty(ends[-1], np.int32)
            self._values[text] = np.empty(ends[-1], value_type(study))

    def add(self, text: int, sample: IntArray, columns: sparse.csc_array) -> None:
        """Take in the span's features of some samples, (samples, d_sae)."""
        first, last = self.span.first, self.span.last
        begin, end = int(columns.indptr[first]), int(columns.indptr[last])
        lengths = np.diff(columns.indptr[first : last + 1]).astype(np.int64)
        begins = np.asarray(columns.indptr[first:last], np.int64) - begin
        places = np.repeat(self._next[text] - begins, lengths) + np.arange(end - begin)
        if len(places) and (self._next[text] + lengths > self._starts[text][1:]).any():
            raise ConfigError(f"{self._study.folders[0].path}: changed while it was read: run it again")
        self._samples[text][places] = sample[columns.indices[begin:end]]
        self._values[text][places] = columns.data[begin:end]
        self._next[text] += lengths

    def finished(self) -> StudyBlock:
        """Return the block, in which each sample comes once for each feature."""
        by_text = {}
        for text, starts in self._starts.items():
            values, samples = self._values.pop(text), self._samples.pop(text)
            if self._study.pools_positions:
                values /= self._positions[text][samples]
            shape = (self._study.n_samples, self.span.last - self.span.first)
            found = sparse.csc_array((values, samples, starts.astype(np.int32)), shape=shape)
            if self._study.pools_positions:
                found.sum_duplicates()
            by_text[self._study.texts[text]] = found
        return StudyBlock(self.span.sae, self.span.first, self.span.last, by_text)
