"""Fast tests start no daemon, server or mount: an audit hook of Python refuses them."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SERVERS = {"chromium", "chromium-browser", "google-chrome", "java", "nginx", "prometheus"}
MOUNTS = {"mount", "umount", "unshare"}
LENSD = re.compile(r"(^|\s)(\S*/bin/)?lensd( |$)|-m\s+(daemon|tests\.reliability)\b")

_refusing = False


class NotInAFastTest(Exception):
    """A fast test is about to start a process that only a slow one may."""


@contextlib.contextmanager
def refused(refuse: bool) -> Iterator[None]:
    """In the context, if `refuse`, starting a daemon, server or mount, or a fork, raises `NotInAFastTest`."""
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
    if event in ("os.fork", "os.forkpty"):
        raise NotInAFastTest(f"{event}: mark the test as slow")
    if event == "subprocess.Popen":
        executable, words, *_ = args
        words = [words] if isinstance(words, str | bytes | os.PathLike) else words
        command = [os.fsdecode(executable), *map(os.fsdecode, words[1:])]
        if is_slow(command):
            raise NotInAFastTest(f"{' '.join(command)[:300]}: mark the test as slow")


def is_slow(command: Sequence[str]) -> bool:
    """Whether a command is a daemon, a server or a mount, or a shell's that starts lensd."""
    return Path(command[0]).name in SERVERS | MOUNTS or LENSD.search(" ".join(command)) is not None
