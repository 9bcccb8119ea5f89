"""Values of parsed JSON: numbers as they were written, and how a value is named. Knows no records."""

from __future__ import annotations

import json
from typing import Any

MARK = "\ud800"  # around a Number


class Number(str):
    """A number with a fraction or an exponent, as it was written: nothing is rounded on its way through.

    It stands between two lone surrogates, which no text of a usable record has: the encoder writes it as a
    string, and `without_marks` takes the quotes away together with them.
    """

    __slots__ = ()

    @property
    def written(self) -> str:
        return self[1:-1]


def as_text(value: str | int) -> str:
    """A string as it is, a number as it was written, a boolean as JSON writes it."""
    if isinstance(value, str):
        return value.written if isinstance(value, Number) else value
    return json.dumps(value)


def json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")  # an int, or a Number
