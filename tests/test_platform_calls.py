"""Calls that Linux and macOS answer differently: Linux's answers are real, macOS's are played."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from daemon import pause, platform_calls
from daemon.errors import SyncFailed
from daemon.fs import durable
from daemon.platform_calls import TaskInfo

FULL_SYNC = 51  # F_FULLFSYNC of macOS's <sys/fcntl.h>
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the answers of Linux")


@pytest.fixture
def libc(monkeypatch) -> Callable[..., None]:
    """Puts a C library of the functions given in place of this one's."""

    def replace(**functions: object) -> None:
        monkeypatch.setattr(platform_calls, "libc", lambda: SimpleNamespace(**functions))

    return replace


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """How descriptors were synced, on macOS."""
    asked: list[str] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_SYNC, raising=False)
    monkeypatch.setattr(
        fcntl, "fcntl", lambda descriptor, command: asked.append({FULL_SYNC: "full"}[command])
    )
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append("fsync"))
    return asked


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@LINUX
def test_linux_syncs_by_fsync(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "fsync", asked.append)
    with (tmp_path / "file").open("wb") as file:
        platform_calls.sync(file.fileno())
        assert asked == [file.fileno()]


def test_macos_has_the_drive_flushed_and_needs_no_fsync(synced, tmp_path):
    (tmp_path / "file").touch()
    durable.fsync_file(tmp_path / "file")
    durable.fsync_folder(tmp_path)
    assert synced == ["full", "full"]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_without_a_full_sync_is_asked_for_fsync(code, synced, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "fcntl", refusing(code))
    durable.fsync_folder(tmp_path)
    assert synced == ["fsync"]


def test_a_full_sync_that_the_disk_refuses_is_not_repeated(synced, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "fcntl", refusing(errno.EIO))
    with pytest.raises(SyncFailed):
        durable.fsync_folder(tmp_path)
    assert synced == []


@pytest.fixture(params=["this", "macOS", "neither"])
def renames(request, libc) -> str:
    """Renames without replacing: of this system, by macOS's call, by links where there is no such call."""
    if request.param == "macOS":

        def renamex_np(source: bytes, target: bytes, flags: int) -> int:
            assert flags == platform_calls.RENAME_EXCL
            try:
                os.link(source, target)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            os.unlink(source)
            return 0

        libc(renamex_np=renamex_np)
    elif request.param == "neither":
        libc()
    return request.param


def test_a_move_takes_a_free_name_and_no_other(renames, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    steps = []
    with durable.watch_operations(lambda operation: steps.append(operation.name)):
        assert not durable.move_without_replacing(tmp_path / "one", tmp_path / "other")
        assert durable.move_without_replacing(tmp_path / "one", tmp_path / "third")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"third": "one", "other": "other"}
    assert steps == (["link", "link", "unlink"] if renames == "neither" else ["rename", "rename"])


def test_a_move_that_fails_says_where(renames, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        durable.move_without_replacing(tmp_path / "missing", tmp_path / "target")
    assert error.value.filename == str(tmp_path / "missing")


def test_a_file_system_that_can_not_rename_so_is_given_links(libc, tmp_path):
    def renamex_np(*_: object) -> int:
        ctypes.set_errno(errno.ENOTSUP)
        return -1

    libc(renamex_np=renamex_np)
    (tmp_path / "one").touch()
    assert durable.move_without_replacing(tmp_path / "one", tmp_path / "other")
    assert os.listdir(tmp_path) == ["other"]


@LINUX
def test_linux_counts_memory_cores_and_threads(tmp_path):
    resident, peak = platform_calls.resident_bytes(), platform_calls.peak_bytes()
    assert resident is not None and 1 << 20 < resident <= 1.1 * peak
    assert peak == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    platform_calls.restart_high_water()
    assert 0 < platform_calls.high_water_bytes() <= 1.1 * peak
    assert platform_calls.usable_cores() == len(os.sched_getaffinity(0))
    assert platform_calls.thread_lives(threading.get_native_id())
    assert not platform_calls.thread_lives(0)
    assert platform_calls.processor_name()


@pytest.fixture
def macos(monkeypatch, libc, tmp_path):
    """No /proc, no glibc; the kernel's counts."""
    for name in ("OWN_STATM", "OWN_STATUS", "OWN_CLEAR_REFS", "OWN_THREADS", "CPU_INFO"):
        monkeypatch.setattr(platform_calls, name, tmp_path / "proc" / name)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)

    def task_info(task: ctypes.c_uint32, flavor: int, info: object, words: object) -> int:
        assert (task.value, flavor, words._obj.value) == (7, platform_calls.MACH_TASK_BASIC_INFO, 12)
        info._obj.resident_size = 5 << 30
        return 0

    def sysctlbyname(name: bytes, value: ctypes.Array, length: object, new: None, new_length: object) -> int:
        if name != b"machdep.cpu.brand_string":
            return -1
        value.value = b"Apple M2 Pro"
        return 0

    libc(task_info=task_info, sysctlbyname=sysctlbyname)
    monkeypatch.setattr(ctypes.c_uint32, "in_dll", lambda library, name: ctypes.c_uint32(7), raising=False)


def test_macos_counts_memory_cores_and_threads(macos):
    assert ctypes.sizeof(TaskInfo) == 48
    assert platform_calls.resident_bytes() == 5 << 30
    assert platform_calls.peak_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    platform_calls.restart_high_water()
    assert platform_calls.high_water_bytes() >= platform_calls.peak_bytes() // 2
    assert platform_calls.usable_cores() == os.cpu_count()
    assert platform_calls.thread_lives(0)
    assert platform_calls.processor_name() == "Apple M2 Pro"
    assert platform_calls.sysctl("hw.unknown") is None


def test_a_system_that_says_nothing_is_asked_in_vain(macos, libc):
    libc()
    assert platform_calls.resident_bytes() is None
    assert platform_calls.processor_name() == platform.processor()
    assert platform_calls.heap_info() is None
    platform_calls.set_heap(platform_calls.M_ARENA_MAX, 2)
    platform_calls.trim_heap()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the answers of glibc")
def test_glibc_has_its_heap_set_trimmed_and_counted(libc):
    asked = []
    assert platform_calls.heap_info() is None or platform_calls.heap_info().arena > 0
    libc(mallopt=lambda *given: asked.append(given), malloc_trim=asked.append)
    platform_calls.set_heap(platform_calls.M_ARENA_MAX, 2)
    platform_calls.trim_heap()
    assert asked == [(-8, 2), 0]


def test_macos_trims_its_zones(libc):
    asked = []
    libc(malloc_zone_pressure_relief=lambda zone, goal: asked.append((zone, goal.value)))
    platform_calls.trim_heap()
    assert asked == [(None, 0)]


def test_errors_are_those_that_the_platform_has():
    assert platform_calls.error_codes("EIO", "ENOSUCHERROR") == {errno.EIO}
    assert errno.EIO in pause.BROKEN


@LINUX
def test_linux_names_more_errors():
    assert {errno.EREMOTEIO, errno.EUCLEAN} < pause.BROKEN
    assert errno.ENOMEDIUM in pause.REASON_OF


def test_no_other_module_asks_which_system_this_is():
    """One module holds what differs; no other may ask for what is listed here."""
    words = ("/proc/", "/sys/", "sched_getaffinity", "ru_maxrss", "CDLL(None", "F_FULLFSYNC", "sys.platform")
    words += ("os.fsync(", "posix_fadvise", "SOCK_CLOEXEC", "EREMOTEIO", "EUCLEAN", "ENOMEDIUM")
    root = Path(platform_calls.__file__).parent
    found = {
        (path.name, word)
        for path in root.rglob("*.py")
        if path != Path(platform_calls.__file__)
        for word in words
        if word in path.read_text()
    }
    assert found == {
        ("pause.py", word) for word in ("EREMOTEIO", "EUCLEAN", "ENOMEDIUM")
    }  # by name, where known
