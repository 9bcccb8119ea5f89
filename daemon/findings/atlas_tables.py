"""Makes the two tables that embedding-atlas is given: one of texts, one of features.

Memory grows with the texts that are drawn, of which there is a bound, and not with the outbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from daemon.escaping import cut_short
from daemon.findings.details import NEURONPEDIA
from daemon.findings.results import FloatArray, IntArray
from daemon.findings.study import (
    FEATURES,
    METRICS,
    Study,
    metrics_schema,
    misfit,
    open_parquet,
    reading,
)

MOST_TEXTS = 30_000
MOST_ACTIVATIONS = 12_000_000
SIDE = "side"  # of the contrast; of its reference there is none
TOKENS = 1 << 24  # more than any vocabulary has
TOP_TOKENS = 5  # of a feature
VERDICTS = {  # of results.Verdict
    "holds": "differs, also at equal length",
    "controls": "differs, but not at equal length",
    "none": "no difference found",
    "few": "too few texts to test",
}
FIRST = {"holds": 2, "controls": 1}
FIRST_COLUMNS = ("feature", "verdict", "tokens", "firing_difference")
BATCH_ROWS = 4096
SEED = 0
KEYS = ("sample_id", "record_index", "domain", "complexity")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The S samples of a study that are shown, with T texts each: text t of sample s is row s * T + t."""

    study: Study
    samples: IntArray  # (S,) ascending

    @property
    def n_texts(self) -> int:
        return len(self.study.texts)

    @property
    def n_rows(self) -> int:
        return len(self.samples) * self.n_texts

    @property
    def n_features(self) -> int:
        return sum(sae.d_sae for sae in self.study.saes)

    @property
    def ranks(self) -> IntArray:
        """Return the place (n_samples,) of each sample among those drawn, -1 where it is not."""
        ranks = np.full(self.study.n_samples, -1, np.int64)
        ranks[self.samples] = np.arange(len(self.samples))
        return ranks

    @property
    def note(self) -> str | None:
        """Return a line that says how many are shown; None where all are."""
        if len(self.samples) == self.study.n_samples:
            return None
        return (
            f"{len(self.samples)} of {self.study.n_samples} samples, drawn at random: all would be more than"
            f" {MOST_TEXTS} texts or {MOST_ACTIVATIONS} activations"
        )


def draw(study: Study, most_texts: int = MOST_TEXTS, most_activations: int = MOST_ACTIVATIONS) -> Drawn:
    """Choose all samples, or at random as many as keep within both bounds; at least one."""
    by_activations = study.n_samples * most_activations // max(study.n_stored(), 1)
    most = max(min(most_texts // len(study.texts), by_activations), 1)
    if study.n_samples <= most:
        return Drawn(study, np.arange(study.n_samples))
    chosen = np.random.default_rng(SEED).choice(study.n_samples, most, replace=False)
    return Drawn(study, np.sort(chosen))


@dataclass(frozen=True, slots=True)
class Gathered:
    """Activations of the texts that are drawn, the features of one dictionary after those of another."""

    by_text: sparse.csr_array  # (n_rows, n_features)
    by_token: sparse.csr_array  # (n_features, tokens) sums


def gather(drawn: Drawn) -> Gathered:
    """Gather the activations in one pass over features.parquet.

    A text with several positions has their mean, silent ones counted as 0. Raises ConfigError where a feature
    is beyond its dictionary.
    """
    study, ranks = drawn.study, drawn.ranks
    widths = np.array([sae.d_sae for sae in study.saes])
    begins = np.cumsum(widths) - widths
    positions = np.zeros((drawn.n_rows, len(study.saes)), np.int32)
    by_text = sparse.csr_array((drawn.n_rows, drawn.n_features), dtype=np.float32)
    by_token = sparse.csr_array((drawn.n_features, TOKENS), dtype=np.float32)
    for rows in study.scan():
        chosen = np.flatnonzero(ranks[rows.sample] >= 0)
        row = ranks[rows.sample[chosen]] * drawn.n_texts + rows.text[chosen]
        lengths = np.diff(rows.offsets)
        taken = np.repeat(ranks[rows.sample] >= 0, lengths)
        sae = np.repeat(rows.sae, lengths)[taken]
        indices = rows.indices[taken].astype(np.int64)
        if (indices >= widths[sae]).any():
            path = study.folders[study.folder_of(int(rows.sample[chosen[0]]))].file(FEATURES)
            raise misfit(path, f"a feature above {widths.max() - 1}, which no dictionary has")
        column, values = begins[sae] + indices, rows.values[taken].astype(np.float32)
        text = np.repeat(row, lengths[chosen])
        token = np.repeat(rows.token_id[chosen], lengths[chosen])
        known = token >= 0
        np.add.at(positions, (row, rows.sae[chosen]), 1)
        by_text = by_text + sparse.csr_array((values, (text, column)), shape=by_text.shape)
        by_token = by_token + sparse.csr_array(
            (values[known], (column[known], token[known])), shape=by_token.shape
        )
    of_value = np.repeat(np.arange(drawn.n_rows), np.diff(by_text.indptr))
    which = np.searchsorted(begins, by_text.indices, side="right") - 1
    by_text.data = by_text.data / positions[of_value, which].astype(np.float32)
    by_text.eliminate_zeros()
    return Gathered(by_text, by_token)


def names_of_features(drawn: Drawn) -> list[str]:
    """Return the name of each column of the activations, such as l7/506."""
    return [f"{sae.prefix}/{feature}" for sae in drawn.study.saes for feature in range(sae.d_sae)]


def text_table(
    drawn: Drawn, contents: Sequence[str | None], activations: sparse.csr_array, places: FloatArray
) -> pa.Table:
    """Return a row for each text of each sample: its numbers, the features that fire, where it lies.

    Of a text without content its sample's id is shown.
    """
    study = drawn.study
    contrast = study.manifest.recipe.contrast
    metrics = drawn_metrics(drawn)
    folders = pa.array([study.folders[study.folder_of(int(sample))].path.name for sample in drawn.samples])
    tables = []
    for text in study.texts:
        columns = {"sample_id": metrics["sample_id"], "text": pa.array([text] * len(drawn.samples))}
        if contrast is not None:
            side = text if text in (contrast.positive, contrast.negative) else None
            columns[SIDE] = pa.array([side] * len(drawn.samples), pa.string())
        columns |= {name: metrics[name] for name in KEYS[1:] if name in metrics.column_names}
        columns |= {"folder": folders}
        columns |= {
            short: metrics[name] for name, short in columns_of_text(metrics.column_names, study, text).items()
        }
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables, promote_options="default")
    number = np.arange(drawn.n_rows)
    table = table.take(pa.array(number % drawn.n_texts * len(drawn.samples) + number // drawn.n_texts))
    names = pa.array(names_of_features(drawn))
    features = pa.ListArray.from_arrays(
        pa.array(activations.indptr, pa.int32()), names.take(pa.array(activations.indices))
    )
    table = table.append_column("features", features)
    table = table.append_column("x", pa.array(places[:, 0].astype(np.float64)))
    table = table.append_column("y", pa.array(places[:, 1].astype(np.float64)))
    ids = table["sample_id"].to_pylist()
    shown = [name if content is None else content for name, content in zip(ids, contents, strict=True)]
    return table.add_column(2, "content", pa.array(shown, pa.string()))


def drawn_metrics(drawn: Drawn) -> pa.Table:
    """Return the rows of metrics.parquet of the samples that are drawn, the columns that all folders have."""
    study = drawn.study
    names = [name for name in metrics_schema(study.folders[0]).names if name in study.columns]
    is_drawn = drawn.ranks >= 0
    parts: list[pa.Table] = []
    for number, folder in enumerate(study.folders):
        path, first = folder.file(METRICS), int(study.starts[number])
        with open_parquet(path) as file, reading(path):
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                kept = batch.filter(pa.array(is_drawn[first : first + len(batch)]))
                parts.append(pa.Table.from_batches([kept]).replace_schema_metadata(None).select(names))
                first += len(batch)
    return pa.concat_tables(parts, promote_options="permissive")


def columns_of_text(columns: Sequence[str], study: Study, text: str) -> dict[str, str]:
    """Return the columns of one text, and their names without it; differences between texts keep theirs."""
    found = {}
    for name in columns:
        if name in KEYS or name == "extra":
            continue
        owners = [(len(other), other) for other in study.texts if without_text(name, study, other)]
        if not owners:
            found[name] = name
        elif max(owners)[1] == text:
            found[name] = without_text(name, study, text) or name
    return found


def without_text(name: str, study: Study, text: str) -> str | None:
    """Return `name` without the text, as in l7_fact_gini or stability_fact_std; None where it has none."""
    for sae in study.saes:
        begin = f"{sae.prefix}_{text}_"
        if name.startswith(begin):
            return f"{sae.prefix}_{name.removeprefix(begin)}"
    for end in ("", "_std"):
        if name.endswith(f"_{text}{end}"):
            return name.removesuffix(f"_{text}{end}") + end
    return None


def feature_table(
    drawn: Drawn, words: Mapping[int, str], gathered: Gathered, verdicts: Sequence[str] | None = None
) -> pa.Table:
    """Return a row for each feature that fires: how often, how much, on which texts and words.

    `verdicts` has one for each of all features, or is left out.

    Of a contrast those come first that hold, then those whose rates differ most; else the most frequent.
    """
    study = drawn.study
    activations = gathered.by_text
    columns = activations.tocsc()
    counts = np.diff(columns.indptr)
    fires = np.flatnonzero(counts)
    sums = np.asarray(columns.sum(axis=0)).ravel()
    rates = {
        text: rates_in(activations[place :: drawn.n_texts])[fires] for place, text in enumerate(study.texts)
    }
    widths = [sae.d_sae for sae in study.saes]
    sae = np.repeat(np.arange(len(widths)), widths)[fires]
    feature = fires - (np.cumsum(widths) - widths)[sae]
    table = {
        "feature": [f"{study.saes[s].prefix}/{f}" for s, f in zip(sae, feature, strict=True)],
        "sae": [study.saes[s].prefix for s in sae],
        "layer": [study.saes[s].layer for s in sae],
        "index": feature,
        "firing_rate": counts[fires] / drawn.n_rows,
        "mean_activation": sums[fires] / counts[fires],
    }
    order = -table["firing_rate"]
    table |= {f"rate_{text}": rate for text, rate in rates.items()}
    if contrast := study.manifest.recipe.contrast:
        table["firing_difference"] = rates[contrast.negative] - rates[contrast.positive]
        order = -np.abs(table["firing_difference"])
    if verdicts is not None:
        table["verdict"] = [verdicts[column] for column in fires.tolist()]
        order = order - 2 * np.array([FIRST.get(verdict, 0) for verdict in table["verdict"]])
    table["topics"] = [
        [study.saes[s].prefix, *([] if verdicts is None else [VERDICTS[verdicts[column]]])]
        for s, column in zip(sae, fires.tolist(), strict=True)
    ]
    if words:
        table["tokens"] = [top_words(gathered.by_token, column, words) for column in fires.tolist()]
    links = [study.saes[s].neuronpedia_id for s in sae]
    if any(links):
        table["neuronpedia"] = [
            None if link is None else f"{NEURONPEDIA}/{link}/{f}"
            for link, f in zip(links, feature, strict=True)
        ]
    made = pa.table(table)
    made = made.append_column("description", pa.array([described(row, study) for row in made.to_pylist()]))
    first = [name for name in FIRST_COLUMNS if name in made.column_names]
    made = made.select([*first, *(name for name in made.column_names if name not in first)])
    return made.take(pa.array(np.lexsort((fires, order))))


def rates_in(rows: sparse.csr_array) -> FloatArray:
    """Return the share (n_features,) of the rows in which each fires."""
    rates: FloatArray = np.bincount(rows.indices, minlength=rows.shape[1]) / max(rows.shape[0], 1)
    return rates


def top_words(by_token: sparse.csr_array, feature: int, words: Mapping[int, str]) -> str:
    """Return the tokens on which a feature is strongest in sum, strongest first."""
    first, last = by_token.indptr[feature : feature + 2]
    strongest = np.argsort(-by_token.data[first:last], kind="stable")
    found = [words.get(token, "") for token in by_token.indices[first:last][strongest].tolist()]
    return " | ".join(cut_short(word) for word in list(dict.fromkeys(filter(None, found)))[:TOP_TOKENS])


def described(row: Mapping[str, Any], study: Study) -> str:
    """Return one line for the list of features."""
    verdict = VERDICTS.get(row.get("verdict", ""))
    rates = ", ".join(f"{text} {row[f'rate_{text}']:.1%}" for text in study.texts)
    parts = [verdict, row.get("tokens"), f"fires on {rates}; mean activation {row['mean_activation']:.3g}"]
    return "; ".join(filter(None, [*parts, row.get("neuronpedia")]))
