"""Makes the two tables that embedding-atlas is given: one of texts, one of features.

Memory grows with the texts that are drawn, of which there is a bound, and not with the outbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from daemon.findings.results import FloatArray, IntArray
from daemon.findings.study import (
    FEATURES,
    METRICS,
    TEXTS,
    Study,
    check_columns,
    metrics_schema,
    misfit,
    open_parquet,
    reading,
)

MOST_TEXTS = 30_000
MOST_ACTIVATIONS = 12_000_000
SIDE = "side"  # of the contrast; of its reference there is none
BATCH_ROWS = 4096
SEED = 0
KEYS = ("sample_id", "record_index", "domain", "complexity")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of a study that are shown: S of them, each with T texts. Text t of sample s is row s * T + t."""

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
        """(n_samples,) place of each sample among those drawn, -1 where it is not."""
        ranks = np.full(self.study.n_samples, -1, np.int64)
        ranks[self.samples] = np.arange(len(self.samples))
        return ranks

    @property
    def note(self) -> str | None:
        """A line for whoever believes that all are there."""
        if len(self.samples) == self.study.n_samples:
            return None
        return (
            f"{len(self.samples)} of {self.study.n_samples} samples, drawn at random: all would be more than"
            f" {MOST_TEXTS} texts or {MOST_ACTIVATIONS} activations"
        )


def draw(study: Study, most_texts: int = MOST_TEXTS, most_activations: int = MOST_ACTIVATIONS) -> Drawn:
    """All samples, or as many of them, at random, as keep within both bounds; at least one."""
    by_activations = study.n_samples * most_activations // max(study.n_stored(), 1)
    most = max(min(most_texts // len(study.texts), by_activations), 1)
    if study.n_samples <= most:
        return Drawn(study, np.arange(study.n_samples))
    chosen = np.random.default_rng(SEED).choice(study.n_samples, most, replace=False)
    return Drawn(study, np.sort(chosen))


def activations_of(drawn: Drawn) -> sparse.csr_array:
    """(n_rows, n_features) activations, those of one dictionary after those of the one before it.

    A text with several positions has their mean, silent ones counted as 0. Raises ConfigError where a feature
    is beyond its dictionary.
    """
    study, ranks = drawn.study, drawn.ranks
    widths = np.array([sae.d_sae for sae in study.saes])
    begins = np.cumsum(widths) - widths
    positions = np.zeros((drawn.n_rows, len(study.saes)), np.int32)
    found: list[sparse.csr_array] = []
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
        place = np.repeat(row, lengths[chosen]), begins[sae] + indices
        np.add.at(positions, (row, rows.sae[chosen]), 1)
        shape = (drawn.n_rows, drawn.n_features)
        found.append(sparse.csr_array((rows.values[taken].astype(np.float32), place), shape=shape))
        if len(found) > 8:
            found = [added(found)]
    total = added(found)
    of_value = np.repeat(np.arange(drawn.n_rows), np.diff(total.indptr))
    which = np.searchsorted(begins, total.indices, side="right") - 1
    total.data = total.data / positions[of_value, which].astype(np.float32)
    total.eliminate_zeros()
    return total


def added(parts: Sequence[sparse.csr_array]) -> sparse.csr_array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return sparse.csr_array(total)


def names_of_features(drawn: Drawn) -> list[str]:
    """Each column of the activations, such as l7/506."""
    return [f"{sae.prefix}/{feature}" for sae in drawn.study.saes for feature in range(sae.d_sae)]


def text_table(drawn: Drawn, activations: sparse.csr_array, places: FloatArray) -> pa.Table:
    """A row for each text of each sample: what it is, its numbers, the features that fire, where it lies."""
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
    return table.add_column(2, "content", contents_of(drawn, metrics["sample_id"].to_pylist()))


def drawn_metrics(drawn: Drawn) -> pa.Table:
    """The rows of metrics.parquet of the samples that are drawn, the columns that all folders have."""
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
    """The columns of one text, and their names without it; differences between texts keep theirs."""
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
    """`name` without the text's part: l7_fact_gini, n_tokens_fact, stability_fact_std; None where it has none."""
    for sae in study.saes:
        begin = f"{sae.prefix}_{text}_"
        if name.startswith(begin):
            return f"{sae.prefix}_{name.removeprefix(begin)}"
    for end in ("", "_std"):
        if name.endswith(f"_{text}{end}"):
            return name.removesuffix(f"_{text}{end}") + end
    return None


def contents_of(drawn: Drawn, sample_ids: Sequence[str]) -> pa.Array:
    """Each text as texts.parquet has it; the sample's id where there is none."""
    study, ranks = drawn.study, drawn.ranks
    contents = [sample_ids[row // drawn.n_texts] for row in range(drawn.n_rows)]
    texts = {name: place for place, name in enumerate(study.texts)}
    for number, folder in enumerate(study.folders):
        path = folder.file(TEXTS)
        if not path.is_file():
            continue
        first, last = study.starts[number : number + 2]
        mine = ranks[first:last]
        place_of = dict(
            zip(study.record_index[first:last][mine >= 0].tolist(), mine[mine >= 0].tolist(), strict=True)
        )
        columns = ["record_index", "text", "content"]
        with open_parquet(path) as file, reading(path):
            check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                kept = batch.filter(pc.is_in(batch["record_index"], pa.array(list(place_of), pa.int64())))
                for row in kept.to_pylist():
                    if row["text"] in texts and row["content"] is not None:
                        place = place_of[row["record_index"]] * drawn.n_texts + texts[row["text"]]
                        contents[place] = row["content"]
    return pa.array(contents, pa.string())


def feature_table(drawn: Drawn, activations: sparse.csr_array) -> pa.Table:
    """A row for each feature that fires on a text: how often, how much, and on which texts.

    Of a contrast those come first whose rates differ most between the two texts, else the most frequent.
    """
    study = drawn.study
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
    links = [study.saes[s].neuronpedia_id for s in sae]
    if any(links):
        table["neuronpedia"] = [
            None if link is None else f"https://www.neuronpedia.org/{link}/{f}"
            for link, f in zip(links, feature, strict=True)
        ]
    made = pa.table(table)
    made = made.append_column("description", pa.array([described(row, study) for row in made.to_pylist()]))
    return made.take(pa.array(np.lexsort((fires, order))))


def rates_in(rows: sparse.csr_array) -> FloatArray:
    """(n_features,) share of the rows in which each fires."""
    rates: FloatArray = np.bincount(rows.indices, minlength=rows.shape[1]) / max(rows.shape[0], 1)
    return rates


def described(row: dict[str, object], study: Study) -> str:
    rates = ", ".join(f"{text} {row[f'rate_{text}']:.1%}" for text in study.texts)
    return f"fires on {rates}; mean activation {row['mean_activation']:.3g}"
