"""The type of an input format. One file of this folder registers each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from daemon.errors import FileError
from daemon.source.limits import ReadLimits
from daemon.source.parsing import Fields, RawRecord
from daemon.source.stream import InputStream

Blocks = Iterator[Iterable[RawRecord]]


@dataclass(frozen=True, slots=True)
class InputFormat:
    """How files of one format are recognised and read.

    `read` yields the records of a content in order, block by block. It blocks, holds about one block, and
    takes the same records from the same content every time. It raises FileError for a content that can't be
    used as a whole, at once or after some blocks. Its last argument are the fields of the recipes: a record
    has to have all those of one.
    """

    name: str  # part of a unit's identity: never change it
    suffixes: tuple[str, ...]
    read: Callable[[InputStream, ReadLimits, Sequence[Fields]], Blocks]
    compressible: bool = True  # with .gz or .zst after the suffix
    begins: Callable[[bytes], bool] = lambda _: False  # whether a content that begins so is of it for sure
    # Explains why no record is usable, by the beginning of the content, the number of records, the fields of
    # the recipes, and those of recipes that reach into fields.
    explain: Callable[[bytes, int, Sequence[Fields], Sequence[Fields]], FileError | None] = lambda *_: None
