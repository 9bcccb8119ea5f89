"""File names: made free by a number, cut to what a file system takes, shown in messages."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from daemon.errors import MachineError
from daemon.escaping import printable_name
from daemon.fs import durable

NAME_BYTES = 255  # of a file name, on every Linux file system
ENDING = re.compile(r"(\.\w{1,8}){1,2}\Z", re.ASCII)  # of a name: what says the format, as in .jsonl.gz
MAX_NUMBER = 1_000_000  # of names tried for one file


def numbered(name: str, number: int, max_bytes: int = NAME_BYTES) -> str:
    """`name`, then `name.1`, `name.2`, ..., cut to fit `max_bytes`."""
    suffix = f".{number}" if number else ""
    return cut(name, max_bytes - len(suffix)) + suffix


def numbered_stem(name: str, number: int) -> str:
    """`a.json.gz`, then `a.1.json.gz`, ...: what the name says about the format stays."""
    stem, dot, rest = name.partition(".")
    suffix = f".{number}{dot}{rest}"
    room = NAME_BYTES - len(os.fsencode(suffix))
    if number and room < 1 and (ending := ENDING.search(name)):
        stem, suffix = name[: ending.start()], f".{number}{ending[0]}"
        room = NAME_BYTES - len(os.fsencode(suffix))
    if not number or room < 1:
        return numbered(name, number)
    return cut(stem, room) + suffix


def cut(name: str, max_bytes: int) -> str:
    """At most so many bytes of a name, and no half characters."""
    raw = os.fsencode(name)
    if len(raw) <= max_bytes:
        return name
    while max_bytes > 1 and raw[max_bytes] & 0xC0 == 0x80:
        max_bytes -= 1
    return os.fsdecode(raw[:max_bytes])


def folded(name: str) -> str:
    """The same for names that some file systems, as those of macOS, take for one.

    They ignore case, and how an accented letter is composed.
    """
    return name if name.isascii() and name.islower() else unicodedata.normalize("NFD", name.casefold())


def move_to_free(
    path: Path, folder: Path, name: str, numbering: Callable[[str, int], str] = numbered_stem
) -> Path:
    """Move a file into `folder`, under the first of the numbered names that is free; where it lies now."""
    for number in range(MAX_NUMBER):
        target = folder / numbering(name, number)
        if durable.move_without_replacing(path, target):
            return target
    raise no_free_name(name, folder)


def no_free_name(name: str, folder: Path) -> MachineError:
    return MachineError(f"{folder}: no free name for {printable_name(name)}: clear the folder")
