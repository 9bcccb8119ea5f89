"""Writes files that appear under their names whole or not at all, whatever ends the process.

Until then a file has no name, so that even SIGKILL leaves nothing of it. Knows nothing about what is in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from daemon.errors import ConfigError
from daemon.platform_calls import link_descriptor

PARTIAL = ".{name}.{pid}.partial"  # `daemon.sink.report` removes such files of a report that was killed


def place_of(path: Path) -> Path:
    """Return where a file lies: what a symbolic link leads to is written, the link stays."""
    return Path(os.path.realpath(path))


def check_place(path: Path) -> None:
    """Raises ConfigError where no file can be written under this name, or something else lies there."""
    place = place_of(path)
    if place.is_dir():
        raise ConfigError(f"{path}: is a folder: name a file in it")
    if place.exists() and not place.is_file():
        raise ConfigError(f"{path}: is a pipe or a device, not a file: name another")
    if not place.parent.is_dir():
        raise ConfigError(f"{path}: no such folder {place.parent}: make it, or name another file")
    with writing(path, place.parent):
        tempfile.TemporaryFile(dir=place.parent).close()


@contextlib.contextmanager
def writing(path: Path, folder: Path) -> Iterator[None]:
    """Within it what the system refuses is one line. Raises ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: can't write into {folder} ({error.strerror}):"
            " name a file in a folder that you may write"
        ) from None


@contextlib.contextmanager
def unnamed_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file without a name, on the disk on which `path` will lie. It is gone at the end."""
    place = place_of(path)
    with writing(path, place.parent):
        file = open_unnamed(place.parent)
    with file:
        yield file


def open_unnamed(folder: Path) -> BinaryIO:
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # some filesystems have none such
            return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666), "w+b")
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


def publish(file: BinaryIO, path: Path) -> None:
    """Give an unnamed file its name; a file that is there is replaced in one step."""
    file.flush()
    place = place_of(path)
    if not place.exists() and linked(file, place):
        return
    partial = place.with_name(PARTIAL.format(name=place.name, pid=os.getpid()))
    try:
        if not linked(file, partial):
            copy(file, partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def linked(file: BinaryIO, place: Path) -> bool:
    """Link the file to a name that is free; return whether the system can."""
    try:
        link_descriptor(file.fileno(), place.parent, place.name)
    except OSError:
        return False
    return True


def copy(file: BinaryIO, place: Path) -> None:
    file.seek(0)
    with place.open("wb") as copied:
        shutil.copyfileobj(file, copied)
