"""Says of a JSON document that holds no records what it holds instead: a table by its columns, for example.

Knows the ways in which pandas and others write a table, and nothing about how records are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from daemon.errors import FileError
from daemon.source.formats.layout import value_at
from daemon.source.kinds import LEADING, end_of
from daemon.source.parsing import Fields, is_record

REMEDY = "write records, in pandas by df.to_json(path, orient='records', lines=True)"
LEVELS = 3  # of brackets that are looked into


def explain(
    beginning: bytes, records: int, recipes: Sequence[Fields], reaching: Sequence[Fields]
) -> FileError | None:
    """The error of a content without a usable record, by how it begins; None where that tells nothing.

    An object with the fields of a recipe that reaches into them is a record, whatever lists it has.
    """
    value, _ = value_at(beginning, end_of(LEADING, beginning), LEVELS)
    what = None
    if isinstance(value, list) and value and isinstance(value[0], list):
        what = "the file is an array of arrays (orient='values' in pandas)"
    elif isinstance(value, dict) and value and records == 1 and not is_record(value, reaching):
        what = described(value, recipes)
    return None if what is None else FileError("unsupported_layout", f"{what}: {REMEDY}")


def described(value: Mapping[str, Any], recipes: Sequence[Fields]) -> str | None:
    """Say how an object that is no record holds its data."""
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return "the file holds columns and rows apart (orient='split' in pandas)"
    inner = list(value.values())
    if all(isinstance(item, dict) for item in inner):
        if any(is_record(item, recipes) for item in inner):
            return "the file is an object of records by their index (orient='index' in pandas)"
        if is_record(value, recipes) or all(map(is_column, inner)):
            return "the file is column-oriented (what pandas writes unless it is told otherwise)"
    needed = [value[field] for fields in recipes if fields <= value.keys() for field in fields]
    columns = needed or inner
    if all(is_column(item) for item in columns):
        return "the file is column-oriented (a list for each column)"
    return None


def is_column(value: Any) -> bool:
    """Whether a value holds one column of a table: plain values, in a list or by their index."""
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], dict | list)
    if isinstance(value, dict):
        return (
            bool(value)
            and all(key.isdecimal() for key in value)
            and not any(isinstance(item, dict | list) for item in value.values())
        )
    return False
