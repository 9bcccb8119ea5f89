"""A new file that counts and hashes what is written to it. Knows nothing about what that is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.fs import durable
from daemon.records import FileTotals

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class HashedFile:
    """Only written to, from front to back."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = durable.create(path)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: ReadableBuffer) -> int:
        count = self._file.write(data)
        self._hash.update(data)
        self._bytes += count
        return count

    def totals(self, rows: int) -> FileTotals:
        """The file as it is now, which holds `rows` rows."""
        return FileTotals(name=self._name, rows=rows, bytes=self._bytes, sha256=self._hash.hexdigest())

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed
