"""One Parquet file, written in row groups of a steady size. Knows nothing about what the columns mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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
        self._gathered: list[pa.Table] = []
        self._gathered_bytes = 0
        self._file = pa.OSFile(os.fsencode(path), "wb")  # pyarrow refuses a str that is not UTF-8
        self._writer = pq.ParquetWriter(self._file, schema, **options)

    def append(self, table: pa.Table) -> None:
        if not len(table):
            return
        self.rows += len(table)
        self._gathered.append(table)
        self._gathered_bytes += table.nbytes
        if self._gathered_bytes >= self._group_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is gathered, and the footer. Closing again does nothing."""
        if self._file.closed:
            return
        self._flush()
        self._writer.close()
        self._file.close()

    def discard(self) -> None:
        """Let go of the file, its content no longer wanted."""
        self._gathered = []
        if self._file.closed:
            return
        try:
            self._writer.close()
        finally:
            self._file.close()

    def _flush(self) -> None:
        if self._gathered:
            group = pa.concat_tables(self._gathered).combine_chunks()
            self._gathered = []
            self._gathered_bytes = 0
            self._writer.write_table(group, row_group_size=len(group))
