"""Every operation on files that must survive a crash passes through here.

Keeping them in one narrow module makes the order of syncs and renames reviewable, and gives tests one
place to fail. Functions block: call them in a thread. None of them retries; in particular a failed fsync
is final, since the kernel may have dropped the dirty pages it could not write.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from daemon.errors import MachineError

AT_FDCWD = -100  # <fcntl.h>: a path is relative to the working folder
RENAME_NOREPLACE = 1  # <stdio.h>


def fsync_file(path: Path) -> None:
    """Flush one file's data and metadata to disk. Raises MachineError where the disk refuses."""
    fsync_path(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to disk. Raises MachineError where the disk refuses."""
    fsync_path(path, os.O_RDONLY | os.O_DIRECTORY)


def fsync_path(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise MachineError(f"{path}: fsync failed: {error.strerror}: check the disk, then restart") from error
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it. The folder's entry is not flushed: see `fsync_folder`."""
    with path.open("xb") as file:
        file.write(content)
    fsync_file(path)


def make_folder(path: Path) -> None:
    """Create a folder, and its parents, where missing."""
    path.mkdir(parents=True, exist_ok=True)


def rename(source: Path, target: Path) -> None:
    """Move within one file system, atomically. A non-empty folder at `target` refuses (OSError)."""
    os.rename(source, target)


def move_without_replacing(source: Path, target: Path) -> bool:
    """Move a file to a name that must be free. False, and nothing moved, where it is taken."""
    renamed = rename_without_replacing(source, target)
    if renamed is not None:
        return renamed
    try:  # link, then unlink: a plain rename would silently replace the target
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return False
    os.unlink(source)
    return True


def rename_without_replacing(source: Path, target: Path) -> bool | None:
    """One atomic step, and no hard link, which the kernel may deny on another user's file.

    None where this file system or C library can't.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return None
    if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return None
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def remove_empty_folder(path: Path) -> bool:
    """Remove a folder; False where something is in it. One that is gone already is fine."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def unlink(path: Path) -> None:
    """Remove a file's name."""
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it; one that is gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
