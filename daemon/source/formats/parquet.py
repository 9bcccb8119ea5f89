"""Parquet: each row is a record, its columns the fields. Read by row group, a batch of rows at a time.

Lists and structs are arrays and objects, maps arrays of `[key, value]`; decimals are numbers of as many
digits; dates, times and timestamps are text as ISO 8601 has them, with a space before the time, in UTC where
they have a time zone; durations are numbers in their unit; bytes are base64, and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from daemon.errors import FileError, SampleError
from daemon.source.content import BOMB_BYTES, unreadable
from daemon.source.formats.format import Blocks, InputFormat
from daemon.source.formats.table import check_columns, check_unique, record_of
from daemon.source.kinds import check_kind
from daemon.source.limits import ReadLimits
from daemon.source.parsing import Fields, Place, RawRecord, not_null, printable
from daemon.source.stream import InputStream

MAGIC = (b"PAR1", b"PARE")
ENCRYPTED = b"PARE"
BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20
DICTIONARY_BYTES = 512 << 20  # to which a batch may grow where each of its values is a whole dictionary
BUFFER_BYTES = 256 << 10  # of each column, read ahead
NOT_UTF8 = object()

T = TypeVar("T")


def begins(head: bytes) -> bool:
    return head.startswith(MAGIC)


def read(stream: InputStream, limits: ReadLimits, recipes: Sequence[Fields]) -> Blocks:
    if not stream.beginning:
        return
    table = Table(parquet_file(stream), limits)
    table.check(recipes)
    for group in range(table.groups):
        yield from table.blocks(group)


def parquet_file(stream: InputStream) -> BinaryIO:
    """Raises FileError where the content is not Parquet, or can't be read at any place."""
    head = stream.beginning
    if not begins(head):
        check_kind(head, "Parquet")
        raise FileError("binary", "the file is not Parquet: write it again, or name it as what it is")
    if head.startswith(ENCRYPTED):
        raise FileError("encrypted", "the Parquet file is encrypted: write it without encryption")
    if stream.file is None:
        raise FileError(
            "unsupported_compression",
            "the file is Parquet inside gzip or zstandard: decompress it, as Parquet compresses its columns",
        )
    return stream.file


class Table:
    """An open Parquet file. Raises FileError wherever it can't be read."""

    def __init__(self, file: BinaryIO, limits: ReadLimits) -> None:
        self._limits = limits
        self._size = file.seek(0, 2)
        self._metadata = attempt(lambda: pq.read_metadata(file), "its footer")
        self._file = attempt(lambda: self._open(file), "its schema")
        self._columns: list[str] = self._file.schema_arrow.names
        self._fitting: list[Fields] = []  # of recipes, until a row has all those of one
        self._rows = 0  # read so far
        self._bytes = 0  # of what they hold
        self.groups: int = self._metadata.num_row_groups

    def _open(self, file: BinaryIO) -> pq.ParquetFile:
        return pq.ParquetFile(
            file,
            metadata=self._metadata,
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            coerce_int96_timestamp_unit="us",
            page_checksum_verification=True,
        )

    def check(self, recipes: Sequence[Fields]) -> None:
        """Raises FileError where the table has no usable columns, or is too large."""
        schema = self._file.schema_arrow
        check_columns(self._columns, recipes)
        for field in schema:
            check_names(field.type)
        self._fitting = [fields for fields in recipes if fields <= set(self._columns)]
        size = sum(self._metadata.row_group(number).total_byte_size for number in range(self.groups))
        self._check_size(size)
        if size > max(BOMB_BYTES, self._limits.max_compression_ratio * self._size):
            raise FileError(
                "compression_bomb",
                "the Parquet file unpacks to more than inbox.max_compression_ratio ="
                f" {self._limits.max_compression_ratio} times its size: split it, or raise the limit",
            )

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_decompressed_bytes:
            raise FileError(
                "decompressed_too_large",
                "the Parquet file unpacks to more than inbox.max_decompressed_bytes ="
                f" {self._limits.max_decompressed_bytes}: split it, or raise the limit",
            )

    def blocks(self, group: int) -> Iterator[Iterator[RawRecord]]:
        """The records of one row group, a batch at a time."""
        where = f"row group {group}"
        batches = self._file.iter_batches(self._batch_rows(group), row_groups=[group], use_threads=False)
        while (batch := attempt(lambda: next(batches, None), where)) is not None:
            self._bytes += batch.nbytes
            self._check_size(self._bytes)
            columns = attempt(lambda: list(map(values_of, batch.columns)), where)
            yield self._records(columns, group)

    def _batch_rows(self, group: int) -> int:
        """How many rows to read at a time: some MiB of them, and not too much in the worst case.

        Columns' own metadata says more, but pyarrow ends the process where it can't decrypt it.
        """
        metadata = self._metadata.row_group(group)
        size = max(1, metadata.total_byte_size)
        rows: int = min(BATCH_BYTES * metadata.num_rows // size, DICTIONARY_BYTES // size, BATCH_ROWS)
        return max(1, rows)

    def _records(self, columns: list[list[Any]], group: int) -> Iterator[RawRecord]:
        for row in zip(*columns, strict=True):
            position = self._rows * self._size // self._metadata.num_rows
            place = Place(self._rows, None, None, group, position)
            self._rows += 1
            if any(value is NOT_UTF8 for value in row):
                yield RawRecord(
                    place, None, SampleError("invalid_utf8", "has text that is not UTF-8: write it as UTF-8")
                )
            else:
                if self._fitting:
                    self._check_texts(row)
                yield RawRecord(place, record_of(self._columns, row, self._limits.max_record_bytes))

    def _check_texts(self, row: Sequence[Any]) -> None:
        """Raises FileError where the first row that has all the fields of a recipe has bytes for a text."""
        present = not_null(dict(zip(self._columns, row, strict=True)))
        fields = next((fields for fields in self._fitting if fields <= present), None)
        if fields is None:
            return
        self._fitting = []
        for name in sorted(fields):
            if is_bytes(self._file.schema_arrow.field(name).type):
                raise FileError(
                    "no_recipe", f"column {printable(name)} holds bytes, not text: write it as strings"
                )


def attempt(call: Callable[[], T], what: str) -> T:
    """The call's result. Raises FileError, naming `what` it is about, where the content is damaged."""
    try:
        return call()
    except OSError as error:
        if error.errno is not None:
            raise unreadable(error) from None
        raise damaged(what, error) from None
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise damaged(what, error) from None


def damaged(what: str, error: Exception) -> FileError:
    said = str(error).strip().split("\n")[0][:200]
    said = said if said.isprintable() else ascii(said)
    if "encrypt" in said.lower() or "decrypt" in said.lower():
        return FileError("encrypted", "the Parquet file is encrypted: write it without encryption")
    return FileError(
        "malformed_parquet",
        f"the Parquet file is damaged or cut off: {what} can't be read ({said}): write it again",
    )


def values_of(column: pa.Array) -> list[Any]:
    """The column's values as `record_of` takes them; NOT_UTF8 where text is none."""
    if pa.types.is_dictionary(column.type):
        values = values_of(column.dictionary)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    for kind in (with_leaves(column.type, in_utc), with_leaves(column.type, plain)):
        if kind != column.type:
            column = column.cast(kind)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [value_of(scalar) for scalar in column]
    return values


def value_of(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NOT_UTF8


def with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type of which each innermost type is what `leaf` makes of it."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(with_leaves(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(with_leaves(kind.key_type, leaf), with_leaves(kind.item_type, leaf))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(with_leaves(kind.value_type, leaf), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(with_leaves(kind.value_type, leaf))
    if pa.types.is_list(kind):
        return pa.list_(with_leaves(kind.value_type, leaf))
    return leaf(kind)


def in_utc(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit, "UTC")
    return kind


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of which Python's values are JSON's, or what `table.jsonable` knows."""
    if isinstance(kind, pa.BaseExtensionType):
        return with_leaves(kind.storage_type, plain)
    if pa.types.is_dictionary(kind):
        return with_leaves(kind.value_type, plain)
    if pa.types.is_duration(kind):
        return pa.int64()
    return pa.string() if pa.types.is_temporal(kind) and not pa.types.is_interval(kind) else kind


def is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def check_names(kind: pa.DataType) -> None:
    """Raises FileError where a struct has two fields of one name."""
    if pa.types.is_struct(kind):
        check_unique([field.name for field in kind])
    for number in range(kind.num_fields):
        check_names(kind.field(number).type)


PARQUET = InputFormat("parquet", (".parquet",), read, compressible=False, begins=begins)
