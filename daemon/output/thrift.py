"""Thrift's compact protocol, written with room for numbers that come later.

Such a number is a hole: a varint of fixed width, which is as valid as a shorter one. So everything after it
keeps its place, whatever the number is. Knows nothing about Parquet.
Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

HOLE_BYTES = 5  # 35 bits of varint: numbers below 2^34, since zigzag doubles them
I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types as the protocol numbers them
LONG_LIST = 15  # elements from which a list's length stands by itself

CONTINUED = sum(0x80 << 8 * place for place in range(HOLE_BYTES - 1))  # of every byte but the last

Bytes = npt.NDArray[np.uint8]


class Hole(NamedTuple):
    """Stands for an integer that is filled in later, by this name."""

    name: str


class Field(NamedTuple):
    """One field of a struct: `value` is an int or a Hole, str, a Sequence of elements, or of Fields.

    A list of structs is a Sequence of Sequences of Fields; `element` is the type of a list's elements.
    """

    number: int
    kind: int
    value: Any
    element: int = STRUCT


class Template:
    """A struct in bytes, and where its holes are."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.content = bytearray()
        self.holes: dict[str, list[int]] = {}  # by name, in the order they were met
        self._struct(fields)

    def _struct(self, fields: Sequence[Field]) -> None:
        before = 0
        for field in fields:  # numbers ascend by less than 16
            self.content.append((field.number - before) << 4 | field.kind)
            before = field.number
            self._value(field.kind, field.value, field.element)
        self.content.append(0)

    def _value(self, kind: int, value: Any, element: int) -> None:
        if kind == STRUCT:
            self._struct(value)
        elif kind == LIST:
            short = len(value) < LONG_LIST
            self.content.append((len(value) if short else LONG_LIST) << 4 | element)
            if not short:
                self.content += varint(len(value))
            for item in value:
                self._value(element, item, STRUCT)
        elif kind == BINARY:
            text = value.encode()
            self.content += varint(len(text)) + text
        elif isinstance(value, Hole):
            self.holes.setdefault(value.name, []).append(len(self.content))
            self.content += bytes(HOLE_BYTES)
        else:
            self.content += varint(value << 1)  # zigzag of a number that is not negative


def varint(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)


def wide_varint(values: npt.NDArray[np.int64]) -> Bytes:
    """Each of `values` (...), from 0 to 2^35 - 1, as a varint of fixed width: (..., HOLE_BYTES)."""
    digits = np.full(values.shape, CONTINUED, "<u8")
    for place in range(HOLE_BYTES):
        digits |= (values.astype("<u8") >> np.uint64(7 * place) & np.uint64(0x7F)) << np.uint64(8 * place)
    return digits[..., None].view(np.uint8)[..., :HOLE_BYTES]
