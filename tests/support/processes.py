"""Fast tests start no daemon, server or mount: an audit hook refuses them all but a few commands."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Commands that do one thing and end; a program in Python is one where it is given as text.
COMMANDS = {"bash", "git", "make", "promtool", "python", "sh", "systemd-analyze", "uname", "zstd"}
LENSD = re.compile(r"(^|[\s/])lensd( |$)|-m\s+(daemon|tests\.reliability)\b")

_refusing = False


class NotInAFastTest(Exception):
    """A fast test is about to start something that only a slow one may."""


@contextlib.contextmanager
def refused(refuse: bool) -> Iterator[None]:
    """In the context, if `refuse`, starting anything but one of `COMMANDS` raises `NotInAFastTest`."""
    global _refusing
    _install()
    before, _refusing = _refusing, refuse
    try:
        yield
    finally:
        _refusing = before


@functools.cache
def _install() -> None:
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _refusing:
        return
    if event in ("os.fork", "os.forkpty", "os.system"):
        raise NotInAFastTest(f"{event}: mark the test as slow")
    if event == "subprocess.Popen":
        executable, words, *_ = args
        words = [words] if isinstance(words, str | bytes | os.PathLike) else words
        command = [os.fsdecode(word) for word in (executable, *words)]
        if not is_allowed(command):
            raise NotInAFastTest(f"{' '.join(command[1:])[:300]}: mark the test as slow")


def is_allowed(command: Iterable[str]) -> bool:
    """Whether a fast test may start it: the executable, then its arguments from the zeroth."""
    executable, _, *arguments = command
    program = Path(executable).name.rstrip("0123456789.")
    if program not in COMMANDS or LENSD.search(" ".join(arguments)):
        return False
    return program != "python" or "-c" in arguments
