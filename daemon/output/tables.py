"""Assembles finished parts into tables, in record order however their batches were formed.

Vectorised: no Python loop per sample. Knows nothing about files and folders.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.frozen import frozen
from daemon.output.finished import FinishedPart
from daemon.output.schema import SAMPLE_FIELDS
from daemon.output.smallfile import BoolArray, Ragged, SmallFile, SmallFiles, Values
from daemon.records import Block, FeatureRows, IntArray, ModelInfo, Recipe, Sample

FEW_ROWS = 64  # of a file, up to which to encode and compress each column costs more than it saves
DTYPES = {pa.int32(): np.int32, pa.int64(): np.int64, pa.float64(): np.float64, pa.string(): object}
FLOAT16_MAX = float(np.finfo(np.float16).max)


@frozen
class PartTables:
    """What one part adds to the two Parquet files; the whole file where that is small."""

    metrics: pa.Table | SmallFile
    features: pa.Table | SmallFile


def part_tables(
    parts: Sequence[FinishedPart], metrics: pa.Schema, features: pa.Schema, info: ModelInfo
) -> list[PartTables]:
    """The tables of several parts of one recipe, made together and cut apart: columns cost more than rows.

    The schemas are `metrics_schema`'s and `features_schema`'s. Raises AssertionError unless the pieces of
    each part cover its samples exactly once, KeyError where a block lacks a column.
    """
    gathered = gather(parts)
    samples = np.array([len(part.part.samples) for part in parts])
    rows = np.diff(np.searchsorted(gathered.feature_samples, np.cumsum(samples)), prepend=0)
    whole = np.array([part.part.part.number == 0 and part.part.part.last for part in parts])
    both = zip(
        cut_up(metrics_columns(gathered, metrics), metrics, samples, whole),
        cut_up(features_columns(gathered, features, info), features, rows, whole),
        strict=True,
    )
    return [PartTables(*pair) for pair in both]


def cut_up(
    columns: Sequence[Values], schema: pa.Schema, rows: IntArray, whole: BoolArray
) -> list[pa.Table | SmallFile]:
    """So many rows of the columns for each part; as a file where it is `whole` and has few."""
    small = whole & (rows > 0) & (rows <= FEW_ROWS)
    pieces: dict[int, pa.Table | SmallFile] = {}
    for chosen in (small, ~small):
        if not chosen.any():
            continue
        if not chosen.all():
            taken = np.flatnonzero(np.repeat(chosen, rows))
            picked = [column[taken] for column in columns]
        else:
            picked = list(columns)
        sizes = rows[chosen]
        made = small_files(schema).encode(picked, sizes) if chosen is small else slices(picked, schema, sizes)
        for number, piece in zip(np.flatnonzero(chosen), made, strict=True):
            pieces[int(number)] = piece
    return [pieces[number] for number in range(len(rows))]


small_files = functools.lru_cache(maxsize=64)(SmallFiles)


def slices(columns: Sequence[Values], schema: pa.Schema, sizes: IntArray) -> list[pa.Table]:
    """Tables of so many rows each; NaN becomes null."""
    arrays = [arrow(column, field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)
    return [table.slice(end - size, size) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


def arrow(column: Values, kind: pa.DataType) -> pa.Array:
    if isinstance(column, Ragged):
        return pa.ListArray.from_arrays(pa.array(column.offsets, pa.int32()), pa.array(column.values))
    return pa.array(column, kind, from_pandas=True)


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
    """The samples of parts end to end. Raises AssertionError unless the pieces cover each exactly once."""
    samples = tuple(entry.sample for part in parts for entry in part.part.samples)
    n = np.array([len(part.part.samples) for part in parts])
    pieces = [piece for part in parts for piece in part.pieces]
    blocks = {id(piece.block): piece.block for piece in pieces}
    number_of = {key: number for number, key in enumerate(blocks)}
    rows = np.array([len(piece.block_rows) for piece in pieces], np.int64)  # of each piece
    part_of = np.repeat(np.repeat(np.arange(len(parts)), [len(part.pieces) for part in parts]), rows)
    part_row = end_to_end([piece.part_rows for piece in pieces])
    paired = all(len(piece.block_rows) == len(piece.part_rows) for piece in pieces)
    if not paired or not covers(part_of, part_row, n):
        for part in parts:
            part.check_covered()
    order = np.argsort((np.cumsum(n) - n)[part_of] + part_row)
    block_of = np.repeat(np.array([number_of[id(piece.block)] for piece in pieces], np.int64), rows)[order]
    row_of = end_to_end([piece.block_rows for piece in pieces])[order]
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


def end_to_end(rows: Sequence[IntArray]) -> IntArray:
    return np.concatenate(rows) if rows else np.empty(0, np.int64)


def covers(part: IntArray, row: IntArray, n: IntArray) -> bool:
    """Whether rows of parts are all of `n[0]` of the first, of `n[1]` of the second, and so on, each once."""
    if len(row) != n.sum() or not ((row >= 0) & (row < n[part])).all():
        return False
    return len(np.unique((np.cumsum(n) - n)[part] + row)) == len(row)


def metrics_columns(gathered: Gathered, schema: pa.Schema) -> list[Values]:
    """One row per sample; NaN where a value is undefined."""
    sizes = [len(next(iter(block.columns.values()))) for block in gathered.blocks]
    first = np.concatenate(([0], np.cumsum(sizes)))
    rows = (first[gathered.block] + gathered.block_row).astype(np.int64)
    columns: list[Values] = [
        np.array([getattr(sample, field.name) for sample in gathered.samples], DTYPES[field.type])
        for field in SAMPLE_FIELDS
    ]
    for field in list(schema)[len(SAMPLE_FIELDS) :]:
        values = [block.columns[field.name] for block in gathered.blocks] or [np.empty(0)]
        columns.append(np.concatenate(values)[rows].astype(DTYPES[field.type], copy=False))
    return columns


def features_columns(gathered: Gathered, schema: pa.Schema, info: ModelInfo) -> list[Values]:
    """The sparse activations, ordered by sample, text, SAE and position.

    Where `schema` says float16, activations beyond 65504 are stored as 65504.
    """
    rows, samples = gathered.features, gathered.samples
    if rows is None:
        return [no_rows(field.type) for field in schema]
    columns: dict[str, Values] = {
        "sample_id": np.array([sample.sample_id for sample in samples], object)[rows.sample_row],
        "record_index": np.array([sample.record_index for sample in samples], np.int64)[rows.sample_row],
        "text": np.array(gathered.recipe.text_names, object)[rows.text],
        "layer": np.array(info.layers, np.int32)[rows.layer],
        "hook_name": np.array([sae.hook_name for sae in info.saes], object)[rows.layer],
        "position": rows.position.astype(np.int32),
        "token_id": rows.token_id.astype(np.int32),
        "indices": Ragged(rows.offsets, rows.indices),
        "values": Ragged(rows.offsets, stored_values(rows, schema.field("values").type.value_type)),
    }
    return [columns[field.name] for field in schema]


def no_rows(kind: pa.DataType) -> Values:
    if pa.types.is_list(kind):
        return Ragged(np.zeros(1, np.int64), np.empty(0, kind.value_type.to_pandas_dtype()))
    return np.empty(0, DTYPES[kind])


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
