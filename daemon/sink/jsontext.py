"""JSON that every strict parser accepts, whatever strings came in. Knows nothing about what it holds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(value: Any) -> bytes:
    """UTF-8 JSON, keys in the order given.

    A lone surrogate becomes the text of its escape; NaN and infinities, which JSON has not, become null.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # a surrogate, or an integer of over 64 bits
        return ENCODER.encode(writable(value)).encode()


def writable(value: Any) -> Any:
    """The same without lone surrogates and numbers that JSON has not."""
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    if isinstance(value, str):
        return LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_lines(content: dict[str, Any]) -> bytes:
    """`to_json` of an object with a line for each of its keys, to be read by people."""
    lines = [b"  %s: %s" % (to_json(key), to_json(value)) for key, value in content.items()]
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """The fields of a dataclass, their values not copied, as `dataclasses.asdict` would."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
