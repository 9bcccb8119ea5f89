"""The errors that mean something to a user, each with the exit code or the folder it leads to.

A `SampleError` sets one record aside, a `FileError` one input file; a `ConfigError` ends the command
with exit code 2 and a `MachineError` with 3. Any other exception is a bug: it fails the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LensdError(Exception):
    """Base of every error whose message is written for the person who runs lensd."""


class ConfigError(LensdError):
    """A bad flag, setting, preset, model or SAE: says what, where and what is allowed."""


class MachineError(LensdError):
    """The machine failed: a folder that can't be written, a device that is gone, a failed fsync."""


class SyncFailed(MachineError):
    """A failed fsync: the kernel may have dropped what it could not write, so it is never repeated."""


class OutOfMemory(LensdError):
    """The device's memory does not hold a batch; `shared` where another one lay there too."""

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class WorkersDied(LensdError):
    """Every worker that was given this batch, and nothing else, died of it."""


class FileError(LensdError):
    """An input file as a whole can't be used; it moves to `failed/` with this message.

    `reason` is a short stable word for metrics and `reason.json`; the message is for people; `details` are
    more members of `reason.json`.
    """

    def __init__(self, reason: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.details = details or {}


class SampleError(LensdError):
    """One record can't be used; it becomes a line of `rejects.jsonl`.

    `reason` is a short stable word for metrics; the message is for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
