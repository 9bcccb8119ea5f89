"""JSON that every strict parser accepts, whatever strings came in. Knows nothing about what it holds."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class Constant(dict[str, Any]):
    """An object that nobody changes, and that is written many times."""

    @functools.cached_property
    def json(self) -> bytes:
        return to_json(dict(self))


def to_json(value: Any) -> bytes:
    """UTF-8 JSON, keys in the order given; a lone surrogate becomes the text of its escape.

    Raises ValueError for NaN and infinities.
    """
    text = ENCODER.encode(value)
    return LONE_SURROGATE.sub(lambda match: f"\\\\u{ord(match[0]):04x}", text).encode()


def to_json_lines(content: dict[str, Any]) -> bytes:
    """`to_json` of an object with a line for each of its keys: to be read by people, and fast to make."""
    lines = [
        b"  %s: %s" % (to_json(key), value.json if isinstance(value, Constant) else to_json(value))
        for key, value in content.items()
    ]
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """The fields of a dataclass, their values as they are: what takes `dataclasses.asdict` a deep copy."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def readable_name(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 as `\\xNN`."""
    return os.fsencode(name).decode(errors="backslashreplace")
