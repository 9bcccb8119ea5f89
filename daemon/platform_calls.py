"""Calls of the operating system and the C library that Linux and macOS answer differently.

Each takes the platform's way where there is one, else a general one, and says what it gives without either.
Nobody else asks which system this is. Knows nothing about the daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

NO_FULL_SYNC = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})

AT_FDCWD = -100  # <fcntl.h> of Linux: a path is relative to the working folder
RENAME_NOREPLACE = 1  # <stdio.h> of glibc
RENAME_EXCL = 4  # <sys/stdio.h> of macOS

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h> of glibc

OWN_STATM = Path("/proc/self/statm")  # sizes in pages: of the address space, resident, ...
OWN_STATUS, OWN_CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
OWN_THREADS = Path("/proc/self/task")
CPU_INFO = Path("/proc/cpuinfo")
MACH_TASK_BASIC_INFO = 20  # <mach/task_info.h>


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's <malloc.h>: ten counts, in bytes or pieces."""

    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")],
        *[(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")],
    ]


class TaskInfo(ctypes.Structure):
    """`struct mach_task_basic_info` of <mach/task_info.h>, which packs to 4 bytes."""

    _pack_ = 4
    _fields_ = [
        *[(name, ctypes.c_uint64) for name in ("virtual_size", "resident_size", "resident_size_max")],
        *[(name, ctypes.c_int32) for name in ("user_s", "user_us", "system_s", "system_us")],
        *[(name, ctypes.c_int32) for name in ("policy", "suspend_count")],
    ]


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def function(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(libc(), name, None)


def sync(descriptor: int) -> None:
    """Have an open file or folder on the disk when this returns. Raises OSError.

    On macOS fsync hands over to the drive and waits for no more; F_FULLFSYNC waits for the drive. A file
    system that does not know it (SMB, WebDAV and others) is asked for fsync.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in NO_FULL_SYNC:  # the disk refused: it is asked no second time
                raise
    os.fsync(descriptor)


def rename_exclusive(source: Path, target: Path) -> bool | None:
    """Rename in one step to a name that must be free; False where it is taken. Raises OSError.

    None, and nothing is done, where the C library or the file system can't.
    """
    old, new = os.fsencode(source), os.fsencode(target)
    if (renameat2 := function("renameat2")) is not None:
        failed = renameat2(AT_FDCWD, old, AT_FDCWD, new, RENAME_NOREPLACE)
    elif (renamex_np := function("renamex_np")) is not None:
        failed = renamex_np(old, new, RENAME_EXCL)
    else:
        return None
    if not failed:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return None
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def can_rename_exclusive() -> bool:
    """Whether the C library has such a call."""
    return function("renameat2") is not None or function("renamex_np") is not None


def set_heap(parameter: int, value: int) -> None:
    """Set a parameter of the C library's heap, where it has such (glibc)."""
    if (mallopt := function("mallopt")) is not None:
        mallopt(parameter, value)


def trim_heap() -> None:
    """Give what is free in the heap back to the system, where the C library can."""
    if (malloc_trim := function("malloc_trim")) is not None:
        malloc_trim(0)
    elif (relieve := function("malloc_zone_pressure_relief")) is not None:  # macOS: of all zones, any amount
        relieve(None, ctypes.c_size_t(0))


def heap_info() -> MallInfo | None:
    """The C library's count of its heap (glibc 2.33 and later); None where it counts none."""
    count = function("mallinfo2")
    if count is None:
        return None
    count.restype = MallInfo
    info: MallInfo = count()
    return info


def resident_bytes() -> int | None:
    """The memory of this process that is in RAM; None where nobody says."""
    try:
        return int(OWN_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return mach_resident_bytes()


def mach_resident_bytes() -> int | None:
    """The same by macOS's kernel."""
    task_info = function("task_info")
    if task_info is None:
        return None
    info = TaskInfo()
    words = ctypes.c_uint32(ctypes.sizeof(info) // 4)
    with contextlib.suppress(ValueError):  # no such variable
        task = ctypes.c_uint32.in_dll(libc(), "mach_task_self_")
        if task_info(task, MACH_TASK_BASIC_INFO, ctypes.byref(info), ctypes.byref(words)) == 0:
            return int(info.resident_size)
    return None


def peak_bytes() -> int:
    """The most memory that this process had in RAM so far: Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_high_water() -> None:
    """Have `high_water_bytes` count from here on, where the system can (Linux)."""
    if OWN_CLEAR_REFS.exists():
        OWN_CLEAR_REFS.write_text("5")


def high_water_bytes() -> int:
    """The most memory in RAM since `restart_high_water`, or ever where that does nothing."""
    lines = OWN_STATUS.read_text().splitlines() if OWN_STATUS.exists() else []
    counted = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
    return counted[0] if counted else peak_bytes()


def usable_cores() -> int:
    """The cores that this process may use; where the system does not say, those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's name: a line of /proc/cpuinfo on Linux, `Apple M2 Pro` and the like on macOS."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return sysctl("machdep.cpu.brand_string") or platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def processor_features() -> str:
    """The CPU's instruction sets as Linux lists them: one name stands for several CPUs; else nothing."""
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def link_descriptor(descriptor: int, folder: Path, name: str) -> None:
    """Give an open file a free name in a folder. Raises OSError, also where the system can't."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # With a folder's descriptor Python calls linkat, which follows the link under /proc to the file.
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=opened, follow_symlinks=True)
    finally:
        os.close(opened)


def sysctl(name: str) -> str | None:
    """A string that the kernel has under a name; None where there is no `sysctlbyname`, or no such name."""
    read = function("sysctlbyname")
    if read is None:
        return None
    value = ctypes.create_string_buffer(256)
    length = ctypes.c_size_t(len(value))
    if read(name.encode(), value, ctypes.byref(length), None, ctypes.c_size_t(0)):
        return None
    return value.value.decode(errors="replace")


def thread_lives(native_id: int | None) -> bool:
    """Whether the kernel has a thread of this process; True where it can't be asked."""
    return not OWN_THREADS.is_dir() or (OWN_THREADS / str(native_id)).exists()


def error_codes(*names: str) -> frozenset[int]:
    """The numbers of errors by name, of those that this platform has."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))
