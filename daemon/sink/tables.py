"""Assembles a finished part into tables, in record order however its batches were formed.

Knows nothing about files and folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.model_info import ModelInfo
from daemon.records import FeatureRows, FinishedPart
from daemon.sink.feature_rows import in_order
from daemon.sink.schema import SAMPLE_FIELDS


@dataclass(frozen=True, slots=True)
class PartTables:
    """The rows that one part adds to the two Parquet files."""

    metrics: pa.Table
    features: pa.Table
    clipped: int  # activations that the stored type does not hold


def part_tables(
    finished: FinishedPart, metrics: pa.Schema, features: pa.Schema, info: ModelInfo
) -> PartTables:
    """The tables of a part; the schemas are `metrics_schema`'s and `features_schema`'s.

    Raises AssertionError unless the pieces of the part cover its samples exactly once, KeyError where a batch
    result lacks a column.
    """
    finished.check_covered()
    if not finished.part.samples:  # all of its records were rejected
        return PartTables(metrics.empty_table(), features.empty_table(), clipped=0)
    rows, clipped = feature_rows(finished, features)
    return PartTables(
        metrics_table(finished, metrics), features_table(finished, rows, features, info), clipped
    )


def metrics_table(finished: FinishedPart, schema: pa.Schema) -> pa.Table:
    """One row per sample; NaN, which stands for what is undefined, becomes null."""
    samples = finished.part.part.samples
    order = np.argsort(np.concatenate([piece.part_rows for piece in finished.pieces]))
    columns: list[Sequence[Any] | npt.NDArray[Any]] = [
        [getattr(sample, field.name) for sample in samples] for field in SAMPLE_FIELDS
    ]
    for name in schema.names[len(SAMPLE_FIELDS) :]:
        pieces = [piece.result.columns[name][piece.result_rows] for piece in finished.pieces]
        columns.append(np.concatenate(pieces)[order])
    arrays = [
        pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def feature_rows(finished: FinishedPart, schema: pa.Schema) -> tuple[FeatureRows, int]:
    """The part's sparse activations, `sample_row` counting its samples, and how many were clipped."""
    found = []
    for piece in finished.pieces:
        numbers = np.full(piece.result.n_samples, -1)
        numbers[piece.result_rows] = piece.part_rows
        found.append((piece.result.features, numbers))
    return in_order(found, schema.field("values").type.value_type.to_pandas_dtype())


def features_table(finished: FinishedPart, rows: FeatureRows, schema: pa.Schema, info: ModelInfo) -> pa.Table:
    """The sparse activations, ordered by sample, text, SAE and position."""
    samples, recipe = finished.part.part.samples, finished.part.part.recipe
    offsets = pa.array(rows.offsets, pa.int32())
    columns = {
        "sample_id": pa.array([sample.sample_id for sample in samples]).take(rows.sample_row),
        "record_index": pa.array([sample.record_index for sample in samples]).take(rows.sample_row),
        "text": pa.array(recipe.text_names).take(rows.text),
        "layer": pa.array(info.layers, pa.int32()).take(rows.layer),
        "hook_name": pa.array([sae.hook_name for sae in info.saes]).take(rows.layer),
        "position": pa.array(rows.position, pa.int32()),
        "token_id": pa.array(rows.token_id, pa.int32()),
        "indices": pa.ListArray.from_arrays(offsets, pa.array(rows.indices)),
        "values": pa.ListArray.from_arrays(offsets, pa.array(rows.values)),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
