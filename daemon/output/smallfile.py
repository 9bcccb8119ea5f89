"""Parquet files of a few rows and many columns, made many at a time.

A general writer spends ten microseconds on a column, which for a file of one row is nearly all there is. Here
every number in headers and footer has a fixed width (`daemon.output.thrift`), so that all files of a schema
share one layout: bytes are computed for all files together, and each goes to its place. Plain encoding, one
row group, one page a column, no compression, no statistics: in a few rows none of these would pay.
Knows nothing about what the columns mean.
Format: https://parquet.apache.org/docs/file-format/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.output.thrift import (
    BINARY,
    HOLE_BYTES,
    I32,
    I64,
    LIST,
    STRUCT,
    Bytes,
    Field,
    Hole,
    Template,
    hole_bytes,
)
from daemon.records import IntArray

MAX_ROWS = 63  # of a file: with them the head of a run of definition levels is one byte
MAGIC = b"PAR1"
LONG_BYTES = 256  # from which a piece is copied faster by itself than by an index for each of its bytes
LEVELS_HEAD = 5  # bytes before a page's definition levels: how many they are, and the head of their run

# The numbers of parquet.thrift.
DATA_PAGE, PLAIN, RLE, UNCOMPRESSED, OPTIONAL, UTF8 = 0, 0, 3, 0, 1, 0
PHYSICAL = {pa.int32(): 1, pa.int64(): 2, pa.float64(): 5, pa.string(): 6}
DTYPES = {pa.int32(): "<i4", pa.int64(): "<i8", pa.float64(): "<f8"}

BoolArray = npt.NDArray[np.bool_]
Values = npt.NDArray[Any] | Sequence[str | None]  # numbers, NaN where a nullable one is null; or strings


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A whole Parquet file."""

    rows: int
    content: memoryview


class SmallFiles:
    """Makes files of one schema: int32 and int64 columns that have no null, float64 and strings."""

    def __init__(self, schema: pa.Schema) -> None:
        kinds = [field.type for field in schema]
        self._numbers = {
            dtype: np.array([c for c, kind in enumerate(kinds) if kind == of], np.int64)
            for of, dtype in DTYPES.items()
        }
        self._strings = [c for c, kind in enumerate(kinds) if pa.types.is_string(kind)]
        self._nullable = np.array([field.nullable for field in schema])
        self._header = Template(page_header())
        self._footer = Template(file_metadata(schema))

    def encode(self, columns: Sequence[Values], n: IntArray) -> list[SmallFile]:
        """F files; the first holds the first `n[0]` rows of the columns, the next `n[1]`, and so on.

        The C columns are the schema's, each (N,); n: (F,), from 1 to MAX_ROWS. Raises UnicodeEncodeError for
        a string that is not Unicode.
        """
        cells = self._cells(columns)
        sizes = np.empty((n.sum(), len(columns)), np.int64)  # (N, C) bytes
        for cell in cells:
            sizes[:, cell.columns] = cell.sizes
        last = np.cumsum(n)
        first = last - n
        before = np.concatenate(
            (np.zeros((1, len(columns)), np.int64), np.cumsum(sizes, axis=0))
        )  # (N + 1, C)
        head, foot = len(self._header.content), len(self._footer.content)
        levels = np.where(self._nullable, LEVELS_HEAD + level_groups(n)[:, None], 0)  # (F, C) bytes
        page = levels + before[last] - before[first]  # (F, C) bytes
        chunk = head + page
        chunk_at = len(MAGIC) + np.cumsum(chunk, axis=1) - chunk  # (F, C) in its file
        footer_at = len(MAGIC) + chunk.sum(axis=1)  # (F,) in its file
        length = footer_at + foot + 4 + len(MAGIC)
        base = np.cumsum(length) - length  # (F,) where each file begins
        place = Placement(np.empty(length.sum(), np.uint8))

        place.copies(base, MAGIC)
        header_at = base[:, None] + chunk_at
        place.template(header_at, self._header, {"page_bytes": page[..., None], "rows": n[:, None, None]})
        metadata = {
            "rows": n[:, None],
            "all_bytes": chunk.sum(axis=1, keepdims=True),
            "chunk_bytes": np.repeat(chunk, 2, axis=1),  # uncompressed, and as they are
            "chunk_at": chunk_at,
        }
        place.template(base + footer_at, self._footer, metadata)
        place.copies(base + footer_at + foot, foot.to_bytes(4, "little") + MAGIC)

        file = np.repeat(np.arange(len(n)), n)  # (N,) of each row
        page_at = header_at + head
        optional = self._nullable
        rank = np.arange(len(file)) - first[file]
        put_levels(place, page_at[:, optional], sizes[:, optional] > 0, n, file, rank)
        values_at = (page_at + levels)[file] + before[:-1] - before[first[file]]  # (N, C)
        for cell in cells:
            place.cells(values_at[:, cell.columns], cell)
        ends = (base + length).tolist()
        return [
            SmallFile(rows, place.content[begin:end].data)
            for rows, begin, end in zip(n.tolist(), base.tolist(), ends, strict=True)
        ]

    def _cells(self, columns: Sequence[Values]) -> list[Cells]:
        numbers = [
            number_cells(of, np.stack([columns[c] for c in of], axis=1).astype(dtype))
            for dtype, of in self._numbers.items()
            if len(of)
        ]
        return numbers + [text_cells(c, columns[c]) for c in self._strings]


@dataclass(frozen=True, slots=True)
class Cells:
    """The values of some columns as plain encoding has them: nothing for a null."""

    columns: IntArray  # (k,)
    sizes: IntArray  # (N, k) bytes of each
    content: Bytes  # all of them, row by row


def number_cells(columns: IntArray, values: npt.NDArray[Any]) -> Cells:
    """values: (N, k)"""
    there = values == values  # not NaN
    return Cells(columns, np.where(there, values.itemsize, 0), as_bytes(values[there].tobytes()))


def text_cells(column: int, values: Values) -> Cells:
    """values: (N,)"""
    texts = [b"" if value is None else plain_text(value) for value in values]
    sizes = np.array([[len(text)] for text in texts], np.int64)
    return Cells(np.array([column]), sizes, as_bytes(b"".join(texts)))


def plain_text(value: str) -> bytes:
    text = value.encode()
    return len(text).to_bytes(4, "little") + text


def as_bytes(content: bytes | bytearray) -> Bytes:
    return np.frombuffer(content, np.uint8)


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes that are put together piece by piece, many places at a time."""

    content: Bytes

    def each(self, at: IntArray, pieces: Bytes) -> None:
        """Pieces of w bytes, (..., w), each to its place `at` (...)."""
        self.content[at[..., None] + np.arange(pieces.shape[-1])] = pieces

    def copies(self, at: IntArray, piece: bytes | bytearray) -> None:
        """The same piece to each of the places (...)."""
        if len(piece) < LONG_BYTES:
            self.each(at, np.broadcast_to(as_bytes(piece), (*at.shape, len(piece))))
            return
        for begin in at.ravel().tolist():
            self.content[begin : begin + len(piece)] = as_bytes(piece)

    def template(self, at: IntArray, template: Template, holes: dict[str, IntArray]) -> None:
        """Copies at `at` (...), their holes filled: those of a name, k of them, by values (..., k or 1)."""
        self.copies(at, template.content)
        for name, values in holes.items():
            places = at[..., None] + np.array(template.holes[name])
            self.each(places, np.broadcast_to(hole_bytes(values), (*places.shape, HOLE_BYTES)))

    def cells(self, at: IntArray, cells: Cells) -> None:
        """Values to their places, (N, k)."""
        sizes = cells.sizes.ravel()
        starts = np.cumsum(sizes) - sizes  # in the values' own bytes
        if len(cells.content) < LONG_BYTES * len(sizes):
            self.content[np.repeat(at.ravel() - starts, sizes) + np.arange(len(cells.content))] = (
                cells.content
            )
            return
        for begin, start, size in zip(at.ravel().tolist(), starts.tolist(), sizes.tolist(), strict=True):
            self.content[begin : begin + size] = cells.content[start : start + size]


def level_groups(n: IntArray) -> IntArray:
    """In how many groups of eight the definition levels of n values come."""
    return -(-n // 8)


def put_levels(
    place: Placement, at: IntArray, there: BoolArray, n: IntArray, file: IntArray, rank: IntArray
) -> None:
    """Which values of C' nullable columns are there, as one bit-packed run for each file and column.

    at: (F, C'), there: (N, C'). Row r is the `rank[r]`-th of the n of its `file`.
    """
    groups = level_groups(n)  # (F,)
    most = int(groups.max())
    bits = np.zeros((len(n), 8 * most, there.shape[1]), np.bool_)
    bits[file, rank] = there
    packed = np.packbits(bits, axis=1, bitorder="little")  # (F, most, C')
    head = np.zeros((len(n), 1, LEVELS_HEAD), np.uint8)
    head[..., 0] = 1 + groups[:, None]
    head[..., -1] = (groups << 1 | 1)[:, None]
    place.each(at, np.broadcast_to(head, (*at.shape, LEVELS_HEAD)))
    for group in range(most):
        has = groups > group
        place.each(at[has] + LEVELS_HEAD + group, packed[has, group, :, None])


def page_header() -> list[Field]:
    """`PageHeader` of parquet.thrift."""
    data_page = [
        Field(1, I32, Hole("rows")),
        Field(2, I32, PLAIN),
        Field(3, I32, RLE),
        Field(4, I32, RLE),
    ]
    return [
        Field(1, I32, DATA_PAGE),
        Field(2, I32, Hole("page_bytes")),  # uncompressed
        Field(3, I32, Hole("page_bytes")),
        Field(5, STRUCT, data_page),
    ]


def file_metadata(schema: pa.Schema) -> list[Field]:
    """`FileMetaData` of parquet.thrift, of one row group."""
    root = [Field(4, BINARY, "schema"), Field(5, I32, len(schema))]
    row_group = [
        Field(1, LIST, [column_chunk(field) for field in schema], STRUCT),
        Field(2, I64, Hole("all_bytes")),
        Field(3, I64, Hole("rows")),
    ]
    return [
        Field(1, I32, 1),  # the format's version
        Field(2, LIST, [root, *(schema_element(field) for field in schema)], STRUCT),
        Field(3, I64, Hole("rows")),
        Field(4, LIST, [row_group], STRUCT),
        Field(6, BINARY, "lensd"),
    ]


def schema_element(field: pa.Field) -> list[Field]:
    element = [
        Field(1, I32, PHYSICAL[field.type]),
        Field(3, I32, OPTIONAL if field.nullable else 0),
        Field(4, BINARY, field.name),
    ]
    if pa.types.is_string(field.type):
        element.append(Field(6, I32, UTF8))
        element.append(Field(10, STRUCT, [Field(1, STRUCT, [])]))  # LogicalType: STRING
    return element


def column_chunk(field: pa.Field) -> list[Field]:
    metadata = [
        Field(1, I32, PHYSICAL[field.type]),
        Field(2, LIST, [PLAIN, RLE], I32),
        Field(3, LIST, [field.name], BINARY),
        Field(4, I32, UNCOMPRESSED),
        Field(5, I64, Hole("rows")),
        Field(6, I64, Hole("chunk_bytes")),  # uncompressed
        Field(7, I64, Hole("chunk_bytes")),
        Field(9, I64, Hole("chunk_at")),
    ]
    return [Field(2, I64, 0), Field(3, STRUCT, metadata)]  # no place of metadata outside the footer
