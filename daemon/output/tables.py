"""Assembles a finished part into Arrow tables, in record order however its batches were formed.

Vectorised: no Python loop per sample. Knows nothing about files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.output.finished import BlockRows, FinishedPart
from daemon.output.schema import SAMPLE_FIELDS
from daemon.records import FeatureRows, IntArray, ModelInfo, Sample

FLOAT16_MAX = float(np.finfo(np.float16).max)


def metrics_table(finished: FinishedPart, schema: pa.Schema) -> pa.Table:
    """One row per sample of the part. `schema` is `metrics_schema`'s; NaN becomes null.

    Raises AssertionError unless the pieces cover every sample exactly once, KeyError where a block lacks a
    column.
    """
    order = finished.row_order()
    if not len(order):
        return schema.empty_table()
    analysis = [
        pa.array(gather_column(finished.pieces, field.name, order), field.type, from_pandas=True)
        for field in list(schema)[len(SAMPLE_FIELDS) :]
    ]
    return pa.Table.from_arrays([*sample_arrays(finished.part.part.samples), *analysis], schema=schema)


def sample_arrays(samples: Sequence[Sample]) -> list[pa.Array]:
    """The columns of `SAMPLE_FIELDS`, each (n,)."""
    return [
        pa.array([getattr(sample, field.name) for sample in samples], field.type, from_pandas=True)
        for field in SAMPLE_FIELDS
    ]


def gather_column(pieces: Sequence[BlockRows], name: str, order: IntArray) -> npt.NDArray[np.generic]:
    """One analysis column of a part: (n,) values in record order."""
    rows = [piece.block.columns[name][piece.block_rows] for piece in pieces]
    return np.concatenate(rows)[order]


def features_table(finished: FinishedPart, schema: pa.Schema, info: ModelInfo) -> pa.Table:
    """The part's sparse activations, ordered by record, text, SAE and position.

    `schema` is `features_schema`'s. Where it says float16, activations beyond 65504 are stored as 65504.
    """
    if not finished.pieces:
        return schema.empty_table()
    rows = in_order(concatenate([piece_features(piece) for piece in finished.pieces]))
    samples = finished.part.part.samples
    columns = {
        "sample_id": repeated([sample.sample_id for sample in samples], pa.string(), rows.sample_row),
        "record_index": repeated([sample.record_index for sample in samples], pa.int64(), rows.sample_row),
        "text": repeated(finished.part.part.recipe.text_names, pa.string(), rows.text),
        "layer": repeated(info.layers, pa.int32(), rows.layer),
        "hook_name": repeated([sae.hook_name for sae in info.saes], pa.string(), rows.layer),
        "position": pa.array(rows.position, pa.int32()),
        "token_id": pa.array(rows.token_id, pa.int32()),
        "indices": ragged(rows.offsets, rows.indices),
        "values": ragged(rows.offsets, stored_values(rows, schema.field("values").type.value_type)),
    }
    return pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)


def repeated(values: Sequence[Any], kind: pa.DataType, rows: IntArray) -> pa.Array:
    """`values[rows]` as an Arrow array."""
    return pa.array(values, kind).take(pa.array(rows))


def ragged(offsets: IntArray, values: npt.NDArray[np.generic]) -> pa.Array:
    """List r holds `values[offsets[r]:offsets[r + 1]]`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def stored_values(rows: FeatureRows, value_type: pa.DataType) -> npt.NDArray[np.generic]:
    """The (nnz,) activations in the type they are stored in."""
    if pa.types.is_float16(value_type):
        return np.clip(rows.values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return rows.values.astype(np.float32, copy=False)


def piece_features(piece: BlockRows) -> FeatureRows:
    """The feature rows that a piece holds of its block, `sample_row` now the row in the part."""
    features = piece.block.features
    block_samples = len(next(iter(piece.block.columns.values())))
    part_row_of = np.full(block_samples, -1, np.int64)
    part_row_of[piece.block_rows] = piece.part_rows
    part_rows = part_row_of[features.sample_row]
    return take(dataclasses.replace(features, sample_row=part_rows), np.flatnonzero(part_rows >= 0))


def take(features: FeatureRows, rows: IntArray) -> FeatureRows:
    """Feature rows `rows`, in that order, with what they own of `indices` and `values`."""
    lengths = np.diff(features.offsets)[rows]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    owned = np.repeat(features.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return FeatureRows(
        sample_row=features.sample_row[rows],
        text=features.text[rows],
        layer=features.layer[rows],
        position=features.position[rows],
        token_id=features.token_id[rows],
        offsets=offsets,
        indices=features.indices[owned],
        values=features.values[owned],
    )


def concatenate(parts: Sequence[FeatureRows]) -> FeatureRows:
    """Feature rows laid end to end; each part's offsets start at 0."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return FeatureRows(
        sample_row=np.concatenate([part.sample_row for part in parts]),
        text=np.concatenate([part.text for part in parts]),
        layer=np.concatenate([part.layer for part in parts]),
        position=np.concatenate([part.position for part in parts]),
        token_id=np.concatenate([part.token_id for part in parts]),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        indices=np.concatenate([part.indices for part in parts]),
        values=np.concatenate([part.values for part in parts]),
    )


def in_order(features: FeatureRows) -> FeatureRows:
    """Sorted by sample, text, SAE and position."""
    keys = (features.position, features.layer, features.text, features.sample_row)  # the last is primary
    return take(features, np.lexsort(keys))
