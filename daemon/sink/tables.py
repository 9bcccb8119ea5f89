"""Assembles finished parts into tables, in record order however their batches were formed.

Knows nothing about files and folders.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.model_info import ModelInfo
from daemon.recipes import Recipe
from daemon.records import FeatureRows, FinishedPart, IntArray, ResultRows, Sample
from daemon.sink.feature_rows import in_order
from daemon.sink.parts import StoredPart
from daemon.sink.schema import SAMPLE_FIELDS
from daemon.sink.text_rows import texts_table


def stored_parts(
    parts: Sequence[FinishedPart],
    metrics: pa.Schema,
    features: pa.Schema,
    info: ModelInfo,
    texts: pa.Schema | None = None,
) -> list[StoredPart]:
    """Parts of one recipe as they are stored; the schemas are those of `daemon.sink.schema`, that of texts is
    None where they are not stored.

    All tables are made as one and sliced: a table costs by its columns, and most parts of small files have
    one row. Raises AssertionError unless the pieces of each part cover its samples exactly once, KeyError
    where a batch result lacks a column.
    """
    for part in parts:
        part.check_covered()
    bounds = np.cumsum([0, *(len(part.part.samples) for part in parts)])
    if not bounds[-1]:  # all records were rejected
        none = metrics.empty_table(), features.empty_table(), texts and texts.empty_table()
        return [stored_part(part, *none, clipped=0) for part in parts]
    samples = [sample for part in parts for sample in part.part.part.samples]
    pieces = pieces_by_result(parts, bounds)
    rows, clipped = feature_rows(pieces, features)
    whole_metrics = metrics_table(samples, pieces, metrics)
    recipe = parts[0].part.part.recipe
    whole_features = features_table(samples, recipe, rows, features, info)
    whole_texts = None
    if texts is not None:
        whole_texts = texts_table([entry for part in parts for entry in part.part.samples], recipe, texts)
    row_bounds = np.searchsorted(rows.sample_row, bounds)
    return [
        stored_part(
            part,
            whole_metrics.slice(first, last - first),
            whole_features.slice(first_row, last_row - first_row),
            whole_texts and texts_of(whole_texts, recipe, first, last),
            int(clipped[first_row:last_row].sum()),
        )
        for part, (first, last), (first_row, last_row) in zip(
            parts, itertools.pairwise(bounds.tolist()), itertools.pairwise(row_bounds.tolist()), strict=True
        )
    ]


def texts_of(table: pa.Table, recipe: Recipe, first: int, last: int) -> pa.Table:
    """The texts of a run of samples."""
    each = len(recipe.templates)
    return table.slice(first * each, (last - first) * each)


def stored_part(
    finished: FinishedPart, metrics: pa.Table, features: pa.Table, texts: pa.Table | None, clipped: int
) -> StoredPart:
    return StoredPart(
        extent=finished.part.part.extent,
        metrics=metrics,
        features=features,
        texts=texts,
        rejects=tuple(sorted(finished.rejects, key=lambda reject: reject.record_index)),
        layers=finished.layers,
        seconds=finished.seconds,
        clipped=clipped,
    )


def pieces_by_result(parts: Sequence[FinishedPart], bounds: IntArray) -> list[ResultRows]:
    """One piece for each batch result that parts share; its `part_rows` count the samples of all parts."""
    found: dict[int, list[ResultRows]] = {}
    for part, first in zip(parts, bounds[:-1], strict=True):
        for piece in part.pieces:
            moved = dataclasses.replace(piece, part_rows=piece.part_rows + first)
            found.setdefault(id(piece.result), []).append(moved)
    return [
        ResultRows(
            pieces[0].result,
            np.concatenate([piece.result_rows for piece in pieces]),
            np.concatenate([piece.part_rows for piece in pieces]),
            row_bytes=0,
        )
        for pieces in found.values()
    ]


def metrics_table(samples: Sequence[Sample], pieces: Sequence[ResultRows], schema: pa.Schema) -> pa.Table:
    """One row per sample; NaN, which stands for what is undefined, becomes null."""
    order = np.argsort(np.concatenate([piece.part_rows for piece in pieces]))
    columns: list[Sequence[Any] | npt.NDArray[Any]] = [
        [getattr(sample, field.name) for sample in samples] for field in SAMPLE_FIELDS
    ]
    for name in schema.names[len(SAMPLE_FIELDS) :]:
        values = [piece.result.columns[name][piece.result_rows] for piece in pieces]
        columns.append(np.concatenate(values)[order])
    arrays = [
        pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def feature_rows(pieces: Sequence[ResultRows], schema: pa.Schema) -> tuple[FeatureRows, IntArray]:
    """The sparse activations of all samples, and how many of each row were clipped (R,)."""
    found = []
    for piece in pieces:
        numbers = np.full(piece.result.n_samples, -1)
        numbers[piece.result_rows] = piece.part_rows
        found.append((piece.result.features, numbers))
    return in_order(found, schema.field("values").type.value_type.to_pandas_dtype())


def features_table(
    samples: Sequence[Sample], recipe: Recipe, rows: FeatureRows, schema: pa.Schema, info: ModelInfo
) -> pa.Table:
    """The sparse activations, ordered by sample, text, SAE and position."""
    offsets = pa.array(rows.offsets, pa.int32())
    columns = {
        "sample_id": pa.array([sample.sample_id for sample in samples]).take(rows.sample_row),
        "record_index": pa.array([sample.record_index for sample in samples]).take(rows.sample_row),
        "text": pa.array(recipe.text_names).take(rows.text),
        "sae": pa.array(info.names).take(rows.layer),
        "layer": pa.array(info.layers, pa.int32()).take(rows.layer),
        "hook_name": pa.array([sae.hook_name for sae in info.saes]).take(rows.layer),
        "position": pa.array(rows.position, pa.int32()),
        "token_id": pa.array(rows.token_id, pa.int32()),
        "indices": pa.ListArray.from_arrays(offsets, pa.array(rows.indices)),
        "values": pa.ListArray.from_arrays(offsets, pa.array(rows.values)),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
