"""Every operation on files that must survive a crash passes through here, and nothing else does.

One narrow module makes the order of syncs and renames reviewable, and gives tests one place where a process
can be stopped or a disk can fail: `watch_operations` shows a function each operation just before it happens.
Functions block: call them in a thread. None of them retries; in particular a failed fsync is final, since the
kernel may have dropped the dirty pages that it could not write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from daemon import platform_calls
from daemon.errors import SyncFailed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

OperationName = Literal[
    "create", "write", "fsync_file", "fsync_folder", "mkdir", "rename", "link", "unlink", "rmdir"
]


@dataclass(frozen=True, slots=True)
class Operation:
    """One step that changes, or makes durable, what a disk holds.

    `path` is what it acts on; `target` is the new name of a `rename` or a `link`.
    """

    name: OperationName
    path: Path
    target: Path | None = None


Observer = Callable[[Operation], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def watch_operations(observer: Observer) -> Iterator[None]:
    """Call `observer` before every operation of this process; what it raises takes the operation's place."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def announce(name: OperationName, path: Path, target: Path | None = None) -> None:
    if _observers:
        operation = Operation(name, path, target)
        for observer in _observers:
            observer(operation)


class NewFile(io.FileIO):
    """An unbuffered file that did not exist before; `create` makes one."""

    def __init__(self, path: Path) -> None:
        announce("create", path)
        super().__init__(path, "xb")
        self._path = path

    def write(self, data: ReadableBuffer, /) -> int:
        """All of `data`, or OSError."""
        announce("write", self._path)
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                count = super().write(view[written:])
                assert count, "a blocking file takes at least one byte"
                written += count
        except OSError as error:  # which does not say what it is about
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        return written


def create(path: Path) -> NewFile:
    """Open a new file for writing. Nothing of it is flushed: see `fsync_file`."""
    return NewFile(path)


def write_whole(path: Path, content: ReadableBuffer) -> None:
    """Write a new file. Neither it nor the folder's entry is flushed: see `fsync_file` and `fsync_folder`."""
    with create(path) as file:
        file.write(content)


def fsync_file(path: Path) -> None:
    """Flush one file's data and metadata to disk. Raises SyncFailed where the disk refuses."""
    fsync_path("fsync_file", path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to disk. Raises SyncFailed where the disk refuses."""
    fsync_path("fsync_folder", path, os.O_RDONLY | os.O_DIRECTORY)


def fsync_path(name: OperationName, path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        announce(name, path)
        platform_calls.sync(descriptor)
    except OSError as error:
        raise SyncFailed(f"{path}: fsync failed: {error.strerror}: check the disk, then restart") from error
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder, and its parents, where missing. The last one's entry is not flushed."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_folder(path.parent)
        fsync_folder(path.parent.parent)
    announce("mkdir", path)
    path.mkdir(exist_ok=True)


def make_new_folder(path: Path) -> None:
    """Create a folder that must not exist yet (FileExistsError)."""
    announce("mkdir", path)
    os.mkdir(path)


def make_empty_folder(path: Path) -> None:
    """Create a folder, in the place of one that is there with whatever it holds."""
    try:
        make_new_folder(path)
    except FileExistsError:
        remove_folder(path)
        make_new_folder(path)


def rename(source: Path, target: Path) -> None:
    """Move within one file system, atomically. Replaces a file; a folder that holds anything refuses."""
    announce("rename", source, target)
    os.rename(source, target)


def move_without_replacing(source: Path, target: Path) -> bool:
    """Move a file to a name that must be free. False, and nothing moved, where it is taken."""
    renamed = rename_without_replacing(source, target)
    if renamed is not None:
        return renamed
    announce("link", source, target)
    try:  # link, then unlink: a plain rename would silently replace the target
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return False
    unlink(source)
    return True


def rename_without_replacing(source: Path, target: Path) -> bool | None:
    """One atomic step, and no hard link, which the kernel may deny on another user's file.

    None where this file system or C library can't.
    """
    if not platform_calls.can_rename_exclusive():
        return None
    announce("rename", source, target)
    return platform_calls.rename_exclusive(source, target)


def unlink(path: Path) -> None:
    """Remove a file's name."""
    announce("unlink", path)
    os.unlink(path)


def remove_empty_folder(path: Path) -> bool:
    """Remove a folder; False where something is in it. One that is gone already is fine."""
    announce("rmdir", path)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it; one that is gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(path) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                remove_folder(Path(entry.path))
            else:
                unlink(Path(entry.path))
        remove_empty_folder(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, on a file made where missing; waits for it.

    The lock is the kernel's (flock): it ends with the process, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
