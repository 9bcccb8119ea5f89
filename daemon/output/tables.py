"""Assembles finished parts into tables, in record order however their batches were formed.

Vectorised: no Python loop per sample. Knows nothing about files and folders.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.output.finished import FinishedPart
from daemon.output.schema import SAMPLE_FIELDS
from daemon.output.smallfile import MAX_ROWS, SmallFile, SmallFiles, Values
from daemon.records import Block, FeatureRows, IntArray, ModelInfo, Recipe, Sample

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class PartTables:
    """What one part adds to the two Parquet files."""

    metrics: pa.Table | SmallFile  # the file itself where the part is all there is, and small
    features: pa.Table


def part_tables(
    parts: Sequence[FinishedPart], metrics: pa.Schema, features: pa.Schema, info: ModelInfo
) -> list[PartTables]:
    """The tables of several parts of one recipe, made together and cut apart: columns cost more than rows.

    The schemas are `metrics_schema`'s and `features_schema`'s. Raises AssertionError unless the pieces of
    each part cover its samples exactly once, KeyError where a block lacks a column.
    """
    tables: dict[int, PartTables] = {}
    for small in (False, True):
        numbers = [i for i, part in enumerate(parts) if is_small_file(part) == small]
        if not numbers:
            continue
        gathered = gather([parts[i] for i in numbers])
        columns = metrics_columns(gathered, metrics)
        sizes = np.array([len(parts[i].part.samples) for i in numbers])
        cut: Sequence[pa.Table | SmallFile] = (
            small_files(metrics).encode(columns, sizes)
            if small
            else cut_up(table_of(columns, metrics), sizes)
        )
        ends = np.searchsorted(gathered.feature_samples, np.cumsum(sizes))
        features_cut = cut_up(features_table(gathered, features, info), np.diff(ends, prepend=0))
        for number, *pair in zip(numbers, cut, features_cut, strict=True):
            tables[number] = PartTables(*pair)
    return [tables[number] for number in range(len(parts))]


def is_small_file(part: FinishedPart) -> bool:
    """Whether the part is a whole file of a few rows."""
    whole = part.part.part.number == 0 and part.part.part.last
    return whole and 0 < len(part.part.samples) <= MAX_ROWS


small_files = functools.lru_cache(maxsize=64)(SmallFiles)


def cut_up(table: pa.Table, sizes: IntArray) -> list[pa.Table]:
    """So many rows each, one after the other."""
    return [table.slice(end - size, size) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class Gathered:
    """N samples of several parts, in order, and where their results are."""

    samples: tuple[Sample, ...]  # (N,)
    recipe: Recipe
    blocks: tuple[Block, ...]
    block: IntArray  # (N,) index into blocks
    block_row: IntArray  # (N,)
    features: FeatureRows | None  # in order, `sample_row` counting the N samples; None without any

    @property
    def feature_samples(self) -> IntArray:
        return np.empty(0, np.int64) if self.features is None else self.features.sample_row


def gather(parts: Sequence[FinishedPart]) -> Gathered:
    """The samples of parts end to end."""
    blocks: dict[int, Block] = {}
    numbers: dict[int, int] = {}
    block: list[IntArray] = []
    block_row: list[IntArray] = []
    for part in parts:
        order = part.row_order()
        for piece in part.pieces:
            numbers.setdefault(id(piece.block), len(numbers))
            blocks[id(piece.block)] = piece.block
        of = [np.full(len(piece.block_rows), numbers[id(piece.block)]) for piece in part.pieces]
        if len(order):
            block.append(np.concatenate(of)[order])
            block_row.append(np.concatenate([piece.block_rows for piece in part.pieces])[order])
    samples = tuple(entry.sample for part in parts for entry in part.part.samples)
    block_of = np.concatenate(block) if block else np.empty(0, np.int64)
    row_of = np.concatenate(block_row) if block_row else np.empty(0, np.int64)
    found = [
        block_features(held, row_of[block_of == number], np.flatnonzero(block_of == number))
        for number, held in enumerate(blocks.values())
    ]
    return Gathered(
        samples=samples,
        recipe=parts[0].part.part.recipe,
        blocks=tuple(blocks.values()),
        block=block_of,
        block_row=row_of,
        features=in_order(concatenate(found)) if found else None,
    )


def metrics_columns(gathered: Gathered, schema: pa.Schema) -> list[Values]:
    """One row per sample; NaN where a value is undefined."""
    sizes = [len(next(iter(block.columns.values()))) for block in gathered.blocks]
    first = np.concatenate(([0], np.cumsum(sizes)))
    rows = first[gathered.block] + gathered.block_row
    columns: list[Values] = [
        [getattr(sample, field.name) for sample in gathered.samples] for field in SAMPLE_FIELDS
    ]
    for field in list(schema)[len(SAMPLE_FIELDS) :]:
        values = [block.columns[field.name] for block in gathered.blocks]
        columns.append(np.concatenate(values)[rows] if values else [])
    return columns


def table_of(columns: Sequence[Values], schema: pa.Schema) -> pa.Table:
    """As Arrow has it, NaN as null."""
    arrays = [
        pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def features_table(gathered: Gathered, schema: pa.Schema, info: ModelInfo) -> pa.Table:
    """The sparse activations, ordered by sample, text, SAE and position.

    Where `schema` says float16, activations beyond 65504 are stored as 65504.
    """
    if gathered.features is None:
        return schema.empty_table()
    rows, samples = gathered.features, gathered.samples
    columns = {
        "sample_id": repeated([sample.sample_id for sample in samples], pa.string(), rows.sample_row),
        "record_index": repeated([sample.record_index for sample in samples], pa.int64(), rows.sample_row),
        "text": repeated(gathered.recipe.text_names, pa.string(), rows.text),
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


def block_features(block: Block, block_rows: IntArray, samples: IntArray) -> FeatureRows:
    """The feature rows of a block's `block_rows`, `sample_row` now the number in `samples`."""
    sample_of = np.full(len(next(iter(block.columns.values()))), -1, np.int64)
    sample_of[block_rows] = samples
    sample_row = sample_of[block.features.sample_row]
    return take(dataclasses.replace(block.features, sample_row=sample_row), np.flatnonzero(sample_row >= 0))


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
