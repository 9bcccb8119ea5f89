"""The registry of input formats: what lensd reads, by suffix and by content.

To add one, write its file in this folder and enter it in FORMATS; see "How to add" in `daemon/README.md`.
"""

from __future__ import annotations

import re

from daemon.errors import FileError
from daemon.source.formats.delimited import CSV, TSV
from daemon.source.formats.format import InputFormat
from daemon.source.formats.jsontext import JSON, JSON_LINES
from daemon.source.formats.parquet import PARQUET
from daemon.source.kinds import Compression

FORMATS: tuple[InputFormat, ...] = (JSON_LINES, JSON, PARQUET, CSV, TSV)

BY_SUFFIX = {suffix: one for one in FORMATS for suffix in one.suffixes}
COMPRESSIBLE = [suffix for suffix, one in BY_SUFFIX.items() if one.compressible]
PLAIN = [suffix for suffix, one in BY_SUFFIX.items() if not one.compressible]


def either(suffixes: list[str]) -> str:
    return "|".join(map(re.escape, suffixes))


ENDING = rf"(?:(?P<suffix>{either(COMPRESSIBLE)})(?P<compression>\.gz|\.zst)?|(?P<plain>{either(PLAIN)}))"
NAME = re.compile(rf"{ENDING}\Z", re.IGNORECASE)


def listed(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


EXPECTED = f"{listed(COMPRESSIBLE)}, optionally with .gz or .zst, or in {listed(PLAIN)}"


def format_of(name: str) -> tuple[InputFormat, Compression | None]:
    """The format and compression that a name implies; the content may overrule them.

    Raises FileError for another name.
    """
    match = NAME.search(name)
    if match is None:
        raise FileError("unsupported_format", f"the name must end in {EXPECTED}")
    compression: Compression | None = None
    if match["compression"]:
        compression = ".gz" if match["compression"].lower() == ".gz" else ".zst"
    return BY_SUFFIX[(match["suffix"] or match["plain"]).lower()], compression


def format_by_content(head: bytes) -> InputFormat | None:
    """The format of a content that begins so; None where that does not tell."""
    return next((one for one in FORMATS if one.begins(head)), None)


def is_input(name: str) -> bool:
    """Whether lensd reads files of this name, by its end alone."""
    return NAME.search(name) is not None


def without_suffix(name: str) -> str:
    """A file's name without what says its format."""
    return NAME.sub("", name)
