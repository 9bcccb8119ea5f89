"""All that is shown of the features at the top, beside their statistics.

Ranks features, and gathers their activations, examples, words, groups and links. Computes no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daemon.findings import examples
from daemon.findings.activations import Counts, FeatureColumns, feature_columns
from daemon.findings.grouping import Grouping
from daemon.findings.progress import ReportProgress
from daemon.findings.results import (
    Example,
    FeatureDetail,
    GroupedFeatures,
    IntArray,
    PairedFeatures,
    Prevalence,
    ShownText,
)
from daemon.findings.study import Study
from daemon.findings.words import Words, words_of

NEURONPEDIA = "https://www.neuronpedia.org"
FREQUENT = 0.5  # of the texts: what fires on more says little of any one

Wanted = list[tuple[int, int]]  # (dictionary, feature)


@dataclass(frozen=True, slots=True)
class Shown:
    """What features are shown on."""

    texts: tuple[str, ...]  # side by side
    cluster: IntArray  # (n_samples,) no two examples are of one
    grouping: Grouping


def top_paired(features: PairedFeatures, most: int) -> Wanted:
    """Return features that hold first, then by false discovery rate, then by effect; tested ones only."""
    effect = -np.abs(np.nan_to_num(features.d_z))
    order = np.lexsort((effect, np.nan_to_num(features.q, nan=2.0), features.verdict != "holds"))
    chosen = order[features.tested[order]][:most]
    return list(zip(features.sae[chosen].tolist(), features.feature[chosen].tolist(), strict=True))


def top_grouped(grouped: Sequence[GroupedFeatures], most: int) -> Wanted:
    """Return the same over all groups, each feature once."""
    if not grouped:
        return []
    q = np.concatenate([np.where(one.tested, np.nan_to_num(one.q, nan=2.0), 3.0) for one in grouped])
    holds = np.concatenate([one.verdict == "holds" for one in grouped])
    effect = np.concatenate([np.nan_to_num(one.firing) for one in grouped])
    keys = np.column_stack(
        [np.concatenate([one.sae for one in grouped]), np.concatenate([one.feature for one in grouped])]
    )
    order = np.lexsort((-np.abs(effect), q, ~holds))
    found = dict.fromkeys((int(sae), int(feature)) for sae, feature in keys[order[q[order] < 3]])
    return list(found)[:most]


def top_prevalent(prevalence: Sequence[Prevalence], most: int) -> Wanted:
    """Return the most frequent features, those that fire on more than half of the samples last."""
    if not prevalence:
        return []
    one = prevalence[-1]
    rate = np.nan_to_num(one.rate)
    order = np.lexsort((-rate, rate > FREQUENT))
    chosen = order[rate[order] > 0][:most]
    return list(zip(one.sae[chosen].tolist(), one.feature[chosen].tolist(), strict=True))


def details_of(
    study: Study, counts: Counts, wanted: Wanted, shown: Shown, progress: ReportProgress
) -> tuple[FeatureDetail, ...]:
    if not wanted:
        return ()
    progress.begin("gathering examples", study.n_rows())
    columns = feature_columns(study, counts, wanted, progress.advance)
    chosen = {
        (sae, feature): examples.strongest(columns[sae], feature, shown.texts, shown.cluster)
        for sae, feature in wanted
    }
    shelf = Shelf(study, chosen, progress)
    progress.begin("looking up words")
    by_sae = {
        sae: np.array([feature for owner, feature in wanted if owner == sae], np.int64) for sae in columns
    }
    words = words_of(study, by_sae)
    return tuple(
        detail(study, columns[sae], feature, shown, shelf.examples(sae, feature, shown, columns[sae]), words)
        for sae, feature in wanted
    )


class Shelf:
    """What the examples of all features are made of."""

    def __init__(
        self, study: Study, chosen: dict[tuple[int, int], list[int]], progress: ReportProgress
    ) -> None:
        self._study = study
        self._chosen = chosen
        samples = sorted({sample for some in chosen.values() for sample in some})
        wanted = [(sample, sae, feature) for (sae, feature), some in chosen.items() for sample in some]
        progress.begin("reading examples", study.n_rows())
        self._readings = examples.read_positions(study, wanted, progress.advance)
        self._texts = examples.read_texts(study, samples)
        ids = study.metrics(["sample_id"])["sample_id"].take(samples).to_pylist() if samples else []
        self._ids = dict(zip(samples, ids, strict=True))

    def examples(self, sae: int, feature: int, shown: Shown, columns: FeatureColumns) -> tuple[Example, ...]:
        activations = {}
        for name in shown.texts:
            which, values = columns.of(name, feature)
            activations[name] = dict(zip(which.tolist(), values.tolist(), strict=True))
        return tuple(
            Example(
                sample_id=self._ids[sample],
                folder=self._study.folders[self._study.folder_of(sample)].name,
                record_index=int(self._study.record_index[sample]),
                group=group_of(shown.grouping, sample),
                texts=tuple(
                    self._text(sample, name, sae, feature, activations[name].get(sample, 0.0))
                    for name in shown.texts
                ),
            )
            for sample in self._chosen[sae, feature]
        )

    def _text(self, sample: int, name: str, sae: int, feature: int, activation: float) -> ShownText:
        key = sample, self._study.texts.index(name), sae, feature
        return examples.show_text(
            name, self._texts.get((sample, name)), self._readings.get(key), float(activation)
        )


def group_of(grouping: Grouping, sample: int) -> str | None:
    group = int(grouping.group[sample])
    return grouping.names[group] if group >= 0 else None


def detail(
    study: Study,
    columns: FeatureColumns,
    feature: int,
    shown: Shown,
    found: tuple[Example, ...],
    words: dict[tuple[int, int], Words],
) -> FeatureDetail:
    edges, counted = examples.histogram(columns, feature, shown.texts)
    told = words[columns.sae, feature]
    entry = study.saes[columns.sae]
    return FeatureDetail(
        sae=columns.sae,
        feature=feature,
        histogram_edges=edges,
        histogram=counted,
        examples=found,
        promotes=told.promotes,
        suppresses=told.suppresses,
        words_missing=told.missing,
        groups=group_rates(columns, feature, shown),
        link=f"{NEURONPEDIA}/{entry.neuronpedia_id}/{feature}" if entry.neuronpedia_id else None,
    )


def group_rates(
    columns: FeatureColumns, feature: int, shown: Shown
) -> tuple[tuple[str, float, float, int], ...]:
    """Return the share of each group's samples that fire, in the first text and in a second one."""
    group, names = shown.grouping.group, shown.grouping.names
    sizes = np.bincount(group[group >= 0], minlength=len(names))
    rates = []
    for text in shown.texts[:2]:
        fired = group[columns.of(text, feature)[0]]
        rates.append(np.bincount(fired[fired >= 0], minlength=len(names)) / np.maximum(sizes, 1))
    second = rates[1] if len(rates) > 1 else np.full(len(names), np.nan)
    return tuple(
        (name, float(rates[0][place]), float(second[place]), int(sizes[place]))
        for place, name in enumerate(names)
        if sizes[place]
    )
