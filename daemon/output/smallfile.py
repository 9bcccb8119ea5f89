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

from daemon.frozen import frozen
from daemon.output.footer import file_metadata, page_header
from daemon.output.ragged import Ragged, spread
from daemon.output.thrift import HOLE_BYTES, Bytes, Template, wide_varint
from daemon.records import IntArray

MAGIC = b"PAR1"
LEVELS_HEAD = 4 + HOLE_BYTES  # bytes before levels: how many bytes they are, and the head of their one run
LONG_BYTES = 256  # from which a piece is copied faster by itself than by an index for each of its bytes

BoolArray = npt.NDArray[np.bool_]


Values = npt.NDArray[Any] | Ragged  # numbers, NaN where a nullable one is null; str or None; or lists


@frozen
class SmallFile:
    """A whole Parquet file."""

    rows: int
    content: memoryview


class SmallFiles:
    """Makes files of one schema.

    Its columns are numbers, of which only float64 may be null, strings, or lists of numbers without nulls.
    """

    def __init__(self, schema: pa.Schema) -> None:
        kinds = [field.type for field in schema]
        self._numbers = [
            np.array([c for c, kind in enumerate(kinds) if kind == of], np.int64)
            for of in sorted({kind for kind in kinds if is_number(kind)}, key=str)
        ]
        self._strings = [c for c, kind in enumerate(kinds) if pa.types.is_string(kind)]
        self._lists = [c for c, kind in enumerate(kinds) if pa.types.is_list(kind)]
        self._nullable = np.array([field.nullable for field in schema])
        self._header = Template(page_header())
        self._footer = Template(file_metadata(schema))

    def encode(self, columns: Sequence[Values], n: IntArray) -> list[SmallFile]:
        """F files; the first holds the first `n[0]` rows of the columns, the next `n[1]`, and so on.

        The C columns are the schema's, N rows each, of its types; n: (F,), none of them 0. Raises
        UnicodeEncodeError for a string that is not Unicode.
        """
        rows = Rows.of(n)
        cells = self._cells(columns)
        sizes = np.empty((n.sum(), len(columns)), np.int64)  # (N, C) bytes
        for cell in cells:
            sizes[:, cell.columns] = cell.sizes
        entries = np.repeat(n[:, None], len(columns), axis=1)  # (F, C) of each page's levels
        levels = np.where(self._nullable, LEVELS_HEAD + groups_of_8(entries), 0)  # (F, C) bytes
        nested = {c: ListLevels.of(columns[c], rows) for c in self._lists}
        for c, of in nested.items():
            entries[:, c] = of.entries
            levels[:, c] = 2 * LEVELS_HEAD + 3 * of.groups
        before = np.pad(np.cumsum(sizes, axis=0), ((1, 0), (0, 0)))  # (N + 1, C)
        page = levels + before[rows.first + n] - before[rows.first]  # (F, C) bytes
        layout = Layout.of(page, head=len(self._header.content), foot=len(self._footer.content))
        place = Placement(np.empty(layout.length.sum(), np.uint8))

        place.copies(layout.base, MAGIC)
        place.template(layout.header_at, self._header, {"page_bytes": page, "values": entries})
        metadata = {
            "rows": n,
            "all_bytes": layout.chunk.sum(axis=1),
            "chunk_bytes": np.repeat(layout.chunk, 2, axis=1),  # uncompressed, and as they are
            "chunk_at": layout.chunk_at,
            "values": entries,
        }
        place.template(layout.footer_at, self._footer, metadata)
        place.copies(layout.end - 4 - len(MAGIC), len(self._footer.content).to_bytes(4, "little") + MAGIC)
        optional = self._nullable
        put_levels(place, layout.page_at[:, optional], sizes[:, optional] > 0, rows)
        for c, of in nested.items():
            of.put(place, layout.page_at[:, c])
        at = (layout.page_at + levels)[rows.file] + before[:-1] - before[rows.first][rows.file]  # (N, C)
        for cell in cells:
            place.ragged(at[:, cell.columns], cell.sizes, cell.content)
        return [
            SmallFile(count, place.content[begin:end].data)
            for count, begin, end in zip(n.tolist(), layout.base.tolist(), layout.end.tolist(), strict=True)
        ]

    def _cells(self, columns: Sequence[Values]) -> list[Cells]:
        numbers = [number_cells(of, np.stack([columns[c] for c in of], axis=1)) for of in self._numbers]
        return numbers + [
            list_cells(c, column) if isinstance(column := columns[c], Ragged) else text_cells(c, column)
            for c in self._strings + self._lists
        ]


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows that are dealt out to F files."""

    n: IntArray  # (F,) how many to each
    first: IntArray  # (F,)
    file: IntArray  # (N,)

    @classmethod
    def of(cls, n: IntArray) -> Rows:
        return cls(n, np.cumsum(n) - n, np.repeat(np.arange(len(n)), n))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of F files of C columns goes, the files laid end to end."""

    base: IntArray  # (F,) where each file begins
    end: IntArray  # (F,)
    length: IntArray  # (F,) bytes
    chunk: IntArray  # (F, C) bytes of each column: its header and its page
    chunk_at: IntArray  # (F, C) from the beginning of its file
    header_at: IntArray  # (F, C)
    page_at: IntArray  # (F, C)
    footer_at: IntArray  # (F,)

    @classmethod
    def of(cls, page: IntArray, *, head: int, foot: int) -> Layout:
        """page: (F, C) bytes of each page; `head` of each header, `foot` of each file's metadata."""
        chunk = head + page
        chunk_at = len(MAGIC) + np.cumsum(chunk, axis=1) - chunk
        length = len(MAGIC) + chunk.sum(axis=1) + foot + 4 + len(MAGIC)
        base = np.cumsum(length) - length
        header_at = base[:, None] + chunk_at
        end = base + length
        return cls(
            base, end, length, chunk, chunk_at, header_at, header_at + head, end - foot - 4 - len(MAGIC)
        )


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


def list_cells(column: int, lists: Ragged) -> Cells:
    sizes = lists.values.itemsize * np.diff(lists.offsets)[:, None]
    return Cells(np.array([column]), sizes, as_bytes(lists.values.tobytes()))


def text_cells(column: int, values: npt.NDArray[Any]) -> Cells:
    """values: (N,) str or None"""
    plain = {value: plain_text(value) for value in set(values)}  # the same few, in most columns
    texts = [plain[value] for value in values]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))[:, None]
    return Cells(np.array([column]), sizes, as_bytes(b"".join(texts)))


def plain_text(value: str | None) -> bytes:
    if value is None:
        return b""
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
        width = pieces.shape[-1]
        whole = np.dtype(f"V{width}")  # w bytes are moved as one thing
        places = np.ndarray((max(0, len(self.content) - width + 1),), whole, self.content.data, strides=(1,))
        places[at] = np.ascontiguousarray(pieces).view(whole)[..., 0]

    def ragged(self, at: IntArray, sizes: IntArray, pieces: Bytes) -> None:
        """Pieces of `sizes` (...), which lie end to end, each to its place."""
        at, sizes = at.ravel(), sizes.ravel()
        if len(pieces) < LONG_BYTES * len(sizes):
            self.content[spread(at, sizes)] = pieces
            return
        begin = np.cumsum(sizes) - sizes
        for place, start, size in zip(at.tolist(), begin.tolist(), sizes.tolist(), strict=True):
            self.content[place : place + size] = pieces[start : start + size]

    def copies(self, at: IntArray, piece: bytes | bytearray) -> None:
        """The same piece to each of the places (...)."""
        if len(piece) < LONG_BYTES:
            self.each(at, np.broadcast_to(as_bytes(piece), (*at.shape, len(piece))))
            return
        for begin in at.ravel().tolist():
            self.content[begin : begin + len(piece)] = as_bytes(piece)

    def template(self, at: IntArray, template: Template, holes: dict[str, IntArray]) -> None:
        """Copies at `at` (...); holes of a name are filled by one value for all of them, or by one each."""
        self.copies(at, template.content)
        for name, values in holes.items():
            places = at[..., None] + np.array(template.holes[name])
            each = values if values.shape == places.shape else values[..., None]
            zigzag = wide_varint(2 * each)
            self.each(places, np.broadcast_to(zigzag, (*places.shape, HOLE_BYTES)))


def groups_of_8(n: IntArray) -> IntArray:
    """In how many groups of eight the levels of n values come."""
    return -(-n // 8)


def levels_head(groups: IntArray, width: int) -> Bytes:
    """What comes before levels of `width` bits in `groups` (...) groups: (..., LEVELS_HEAD)."""
    size = (HOLE_BYTES + width * groups).astype("<u4")
    return np.concatenate((size[..., None].view(np.uint8), wide_varint(groups << 1 | 1)), axis=-1)


def put_levels(place: Placement, at: IntArray, there: BoolArray, rows: Rows) -> None:
    """Which of the values of C' nullable columns are there. at: (F, C'), there: (N, C')"""
    groups = groups_of_8(rows.n)  # (F,)
    most = int(groups.max())
    bits = np.zeros((len(rows.n), 8 * most, there.shape[1]), np.bool_)
    bits[rows.file, np.arange(len(there)) - rows.first[rows.file]] = there
    packed = np.packbits(bits, axis=1, bitorder="little")  # (F, most, C')
    head = levels_head(groups, 1)[:, None]
    place.each(at, np.broadcast_to(head, (*at.shape, LEVELS_HEAD)))
    for group in range(most):
        has = groups > group
        place.each(at[has] + LEVELS_HEAD + group, packed[has, group, :, None])


@dataclass(frozen=True, slots=True)
class ListLevels:
    """The levels of a column of lists: where each begins, and which are empty.

    Repetition is 0 at the first entry of a row and 1 at the others. Definition is 2 at an element and 0 at
    the one entry of an empty list.
    """

    entries: IntArray  # (F,)
    groups: IntArray  # (F,)
    repetition: Bytes  # one bit an entry, each file's filled up to a group
    definition: Bytes  # two bits an entry

    @classmethod
    def of(cls, lists: Values, rows: Rows) -> ListLevels:
        assert isinstance(lists, Ragged)
        lengths = np.diff(lists.offsets)  # (N,)
        taken = np.maximum(lengths, 1)
        entries = np.add.reduceat(taken, rows.first)
        groups = groups_of_8(entries)
        first = 8 * (np.cumsum(groups) - groups)  # (F,)
        row_at = np.cumsum(taken) - taken
        row_at += (first - row_at[rows.first])[rows.file]
        repeated = np.zeros(8 * groups.sum(), np.bool_)
        defined = np.zeros((len(repeated), 2), np.bool_)
        repeated[spread(row_at + 1, taken - 1)] = True
        defined[spread(row_at, lengths), 1] = True
        return cls(
            entries,
            groups,
            np.packbits(repeated, bitorder="little"),
            np.packbits(defined, bitorder="little"),
        )

    def put(self, place: Placement, at: IntArray) -> None:
        """at: (F,)"""
        for levels, width in ((self.repetition, 1), (self.definition, 2)):
            place.each(at, levels_head(self.groups, width))
            place.ragged(at + LEVELS_HEAD, width * self.groups, levels)
            at = at + LEVELS_HEAD + width * self.groups


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
