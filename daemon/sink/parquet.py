"""One Parquet file, written in row groups of a steady size. Knows nothing about what the columns mean."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from daemon.records import FileTotals
from daemon.sink.files import HashedFile

BUFFER_BYTES = 64 << 10
SMALL_ROWS = 64  # of a file, up to which compression and the Arrow schema cost more than the rows
PLAIN = {"compression": "NONE", "compression_level": None, "store_schema": False}


class ParquetFile:
    """Gathers tables until they make a row group, so that small parts do not make a long footer.

    `group_bytes` is the size in memory at which what was gathered is written. Row groups depend on the
    tables and their order alone.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, group_bytes: int, options: dict[str, Any]) -> None:
        self.path = path
        self.rows = 0
        self._schema = schema
        self._group_bytes = group_bytes
        self._options = options
        self._gathered: list[pa.Table] = []
        self._gathered_bytes = 0
        self._file = HashedFile(path)
        self._sink: pa.NativeFile | None = None  # with its writer, from the first row group on
        self._writer: pq.ParquetWriter | None = None

    def append(self, table: pa.Table) -> None:
        """Add rows."""
        if not len(table):
            return
        if self._gathered:  # the size of a file's only table is not asked for: it takes as long as its rows
            self._gathered_bytes += self._gathered[-1].nbytes
            if self._gathered_bytes >= self._group_bytes:
                self._write_group(self._options)
        self.rows += len(table)
        self._gathered.append(table)

    def close(self) -> FileTotals:
        """Write what is gathered, and the footer; what the file then is."""
        self._write_group(self._options | (PLAIN if self.rows <= SMALL_ROWS else {}))
        assert self._writer is not None
        assert self._sink is not None
        self._writer.close()
        self._sink.close()
        self._file.close()
        return self._file.totals(self.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Let go of the file, its content no longer wanted."""
        self._gathered = []
        if self._file.closed:
            return
        if self._sink is not None:  # what it still holds would else be written whenever it is collected
            with contextlib.suppress(OSError):
                self._sink.close()
        self._file.close()

    def _write_group(self, options: dict[str, Any]) -> None:
        """Write what is gathered; `options` are of a file that has no row group yet."""
        if self._writer is None:
            self._sink = pa.BufferedOutputStream(pa.PythonFile(self._file, mode="w"), BUFFER_BYTES)
            self._writer = pq.ParquetWriter(self._sink, self._schema, **options)
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if gathered:  # not combined: that would hold a row group twice
            group = gathered[0] if len(gathered) == 1 else pa.concat_tables(gathered)
            self._writer.write_table(group, row_group_size=len(group))
