"""Finds the compiled numeric code: libraries of plain C, built once for each level of processor."""

from __future__ import annotations

import ctypes
import importlib.util

LIBRARIES = ("daemon.analysis._spectra", "daemon.analysis._sparse", "daemon.compute._lean")


def best_library(name: str) -> ctypes.CDLL | None:
    """The library of that module name for this processor; None where it was installed without a compiler.

    Its functions release the interpreter's lock.
    """
    baseline = library(name)
    return baseline and (library(f"{name}_v{baseline.lensd_level()}") or baseline)


def library(name: str) -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None
