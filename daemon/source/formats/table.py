"""Rows of a table as records: their JSON, and the checks of its columns. Knows no file format."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

from daemon.errors import FileError
from daemon.source.parsing import Fields, is_record, number_as_written, printable, without_marks

SHOWN_COLUMNS = 8


def jsonable(value: object) -> str:
    """Convert a value that JSON has no type for: decimals to numbers of as many digits, bytes to base64."""
    if isinstance(value, Decimal):
        return number_as_written(str(value))
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


ENCODER = json.JSONEncoder(ensure_ascii=False, default=jsonable)


def record_of(columns: Sequence[str], row: Iterable[object], max_bytes: int) -> str | None:
    """The row as a JSON object; None where it has more bytes than that, for sure or very nearly."""
    record = dict(zip(columns, row, strict=True))
    if any(isinstance(value, str) and len(value) > max_bytes for value in record.values()):
        return None
    encoded = without_marks(ENCODER.encode(record))
    return encoded if len(encoded) <= max_bytes else None


def check_columns(columns: Sequence[str], recipes: Sequence[Fields]) -> None:
    """Raises FileError where two columns have one name, or where no recipe has its fields among them."""
    check_unique(columns)
    if not is_record(columns, recipes):
        wanted = " nor ".join(" and ".join(sorted(fields)) for fields in recipes)
        raise FileError(
            "no_recipe",
            f"the table has columns {shown(columns)}, and not {wanted}: rename them, or name your own in"
            " [texts] of the configuration",
        )


def check_unique(columns: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        ((twice, _),) = Counter(columns).most_common(1)
        raise FileError(
            "duplicate_column", f"the table has two columns named {printable(twice)}: rename or drop one"
        )


def shown(columns: Sequence[str]) -> str:
    """The columns' names for a message."""
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    return ", ".join(map(printable, columns[:SHOWN_COLUMNS])) + more
