"""Assembles finished parts into tables, in record order however their batches were formed.

Vectorised: no Python loop per sample. Knows nothing about files and folders.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.frozen import frozen
from daemon.output.featurerows import clipped, in_order
from daemon.output.finished import FinishedPart
from daemon.output.ragged import Ragged
from daemon.output.schema import SAMPLE_FIELDS
from daemon.output.smallfile import BoolArray, SmallFile, SmallFiles, Values
from daemon.records import Block, FeatureRows, IntArray, ModelInfo, Recipe, Sample

FEW_ROWS = 64  # of a file, up to which to encode and compress each column costs more than it saves
DTYPES = {pa.int32(): np.int32, pa.int64(): np.int64, pa.float64(): np.float64, pa.string(): object}


@frozen
class PartTables:
    """What one part adds to the two Parquet files; the whole file where that is small."""

    metrics: pa.Table | SmallFile
    features: pa.Table | SmallFile
    clipped: int  # activations that the stored type does not hold


def part_tables(
    parts: Sequence[FinishedPart], metrics: pa.Schema, features: pa.Schema, info: ModelInfo
) -> list[PartTables]:
    """The tables of several parts of one recipe, made together and cut apart: columns cost more than rows.

    The schemas are `metrics_schema`'s and `features_schema`'s. Raises AssertionError unless the pieces of
    each part cover its samples exactly once, KeyError where a block lacks a column.
    """
    gathered = gather(parts, features.field("values").type.value_type.to_pandas_dtype())
    samples = np.array([len(part.part.samples) for part in parts])
    rows = np.diff(np.searchsorted(gathered.feature_samples, np.cumsum(samples)), prepend=0)
    whole = np.array([part.part.part.number == 0 and part.part.part.last for part in parts])
    both = zip(
        cut_up(metrics_columns(gathered, metrics), metrics, samples, whole),
        cut_up(features_columns(gathered, features, info), features, rows, whole),
        strict=True,
    )
    ends = np.cumsum(samples)
    unheld = np.diff(np.concatenate(([0], np.cumsum(gathered.clipped)))[np.concatenate(([0], ends))])
    return [PartTables(*pair, number) for pair, number in zip(both, unheld.tolist(), strict=True)]


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
    clipped: IntArray  # (N,) activations that the stored type does not hold

    @property
    def feature_samples(self) -> IntArray:
        return np.empty(0, np.int64) if self.features is None else self.features.sample_row


def gather(parts: Sequence[FinishedPart], value_type: npt.DTypeLike) -> Gathered:
    """The samples of parts end to end, their activations of the type that is stored.

    Raises AssertionError unless the pieces cover each exactly once.
    """
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
    found = []
    for number, held in enumerate(blocks.values()):
        samples_of = np.flatnonzero(block_of == number)
        numbers = np.full(held.n_samples, -1)
        numbers[row_of[samples_of]] = samples_of
        found.append((held.features, numbers))
    return Gathered(
        samples=samples,
        recipe=parts[0].part.part.recipe,
        blocks=tuple(blocks.values()),
        block=block_of,
        block_row=row_of,
        features=in_order(found, value_type) if found else None,
        clipped=clipped(found, value_type, len(samples)),
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
    sizes = [block.n_samples for block in gathered.blocks]
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
    """The sparse activations, ordered by sample, text, SAE and position."""
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
        "values": Ragged(rows.offsets, rows.values),
    }
    return [columns[field.name] for field in schema]


def no_rows(kind: pa.DataType) -> Values:
    if pa.types.is_list(kind):
        return Ragged(np.zeros(1, np.int64), np.empty(0, kind.value_type.to_pandas_dtype()))
    return np.empty(0, DTYPES[kind])
