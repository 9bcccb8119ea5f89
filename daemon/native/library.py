"""Finds the compiled numeric code: one library of plain C. Knows nothing about what it computes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

NAME = "daemon.native._native"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, whose functions release the interpreter's lock; None if installed without a C compiler."""
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None
