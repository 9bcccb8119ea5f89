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
from daemon.records import Block, FeatureRows, IntArray, ModelInfo, Sample

FLOAT16_MAX = float(np.finfo(np.float16).max)


class MetricsTables:
    """Metrics tables of parts that share blocks: each block becomes Arrow once, and parts take rows of it."""

    def __init__(self, schema: pa.Schema) -> None:
        """`schema` is `metrics_schema`'s."""
        self._schema = schema
        self._analysis = pa.schema(list(schema)[len(SAMPLE_FIELDS) :])
        self._blocks: dict[int, tuple[Block, pa.Table]] = {}

    def table(self, finished: FinishedPart) -> pa.Table:
        """One row per sample of the part; NaN becomes null.

        Raises AssertionError unless the pieces cover every sample exactly once, KeyError where a block lacks
        a column.
        """
        order = finished.row_order()
        if not len(order):
            return self._schema.empty_table()
        if len(finished.pieces) == 1:
            (piece,) = finished.pieces
            analysis = rows_of(self._block(piece.block), piece.block_rows[order])
        else:
            pieces = [rows_of(self._block(piece.block), piece.block_rows) for piece in finished.pieces]
            analysis = rows_of(pa.concat_tables(pieces), order)
        samples = sample_arrays(finished.part.part.samples)
        return pa.Table.from_arrays([*samples, *analysis.columns], schema=self._schema)

    def _block(self, block: Block) -> pa.Table:
        """The analysis columns of a block. It is kept, so that no other can come by its id."""
        if id(block) not in self._blocks:
            arrays = [
                pa.array(block.columns[field.name], field.type, from_pandas=True) for field in self._analysis
            ]
            self._blocks[id(block)] = block, pa.Table.from_arrays(arrays, schema=self._analysis)
        return self._blocks[id(block)][1]


def rows_of(table: pa.Table, rows: IntArray) -> pa.Table:
    """Rows `rows` of a table, in that order; without a copy where they follow each other."""
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return table.slice(rows[0], len(rows))
    return table.take(pa.array(rows))


def sample_arrays(samples: Sequence[Sample]) -> list[pa.Array]:
    """The columns of `SAMPLE_FIELDS`, each (n,)."""
    return [
        pa.array([getattr(sample, field.name) for sample in samples], field.type, from_pandas=True)
        for field in SAMPLE_FIELDS
    ]


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
