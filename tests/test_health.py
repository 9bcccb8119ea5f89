"""A supervisor sees whether a real daemon loads, drains, stalls, or may not write."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import machine, supervisor
from daemon.machine import Machine
from daemon.observe import health
from daemon.pause import DISK, FOLDERS, Pause
from tests.reliability.daemons import Job
from tests.reliability.handling import end, events, running, wait_until
from tests.reliability.hooks import CODE_OWNER
from tests.reliability.test_disk_full import get, pauses, url_of
from tests.support import health_hooks, tiny

VISIBLE_SECONDS = 30.0  # within which trouble must show


@pytest.fixture
def users_root() -> Iterator[Path]:
    """A place of an ordinary user, since nothing is read-only to root."""
    folder = Path(tempfile.mkdtemp(prefix="lensd-"))
    for name in ("inbox", "outbox"):
        (folder / name).mkdir()
    for path in (folder, *folder.iterdir()):
        os.chown(path, CODE_OWNER, -1)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Something mounted on a folder within the context; skips where that is refused."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount")
    told = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"mount is refused here: {told.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def job(root: Path, hook: str = "quick", *, flags: dict[str, object] | None = None, **args: object) -> Job:
    (root / "inbox").mkdir(exist_ok=True)
    return Job(
        root / "inbox",
        root / "outbox",
        root / "log",
        once=False,
        flags={"http.enabled": True, "http.address": "127.0.0.1:0", **(flags or {})},
        hook=f"tests.support.health_hooks:{hook}",
        hook_args=args,
    )


def drop(root: Path, name: str = "study.json") -> Path:
    path = root / "inbox" / name
    path.parent.mkdir(exist_ok=True)
    tiny.write_json(root / "draft", tiny.contrast_records(3))
    (root / "draft").rename(path)
    return path


def silence(url: str, loop: str) -> float:
    """For how long a loop made no progress, as monitoring works it out."""
    pattern = rf'^lensd_heartbeat_timestamp_seconds\{{loop="{loop}"\}} (\S+)$'
    match = re.search(pattern, get(f"{url}/metrics")[1], re.MULTILINE)
    assert match is not None
    return time.time() - float(match[1])


def becomes(url: str, status: int, reason: str, pid: int) -> None:
    """Wait for an answer with this status that gives this reason."""

    def so() -> bool:
        seen, body = get(url)
        return seen == status and reason in body

    wait_until(so, f"{url} to be {status} {reason}", pid)


def page_shows(url: str, state: str, alert: str, pid: int) -> None:
    """Wait until the page is in a state, with an alert that says why."""

    def so() -> bool:
        page = html.unescape(get(url)[1])
        head = re.search(r'<header[^>]*class="is-([a-z-]+)', page)
        alerts = re.search(r'<section[^>]*id="alerts".*?</section>', page, re.DOTALL)
        assert head is not None
        assert alerts is not None
        return head[1] == state and alert in alerts[0]

    wait_until(so, f"the page to show {state}: {alert}", pid)


def test_a_stalled_event_loop_is_told_while_it_stalls_and_is_over_when_it_goes_on(daemons, tmp_path):
    stall = tmp_path / "stall"
    with running(daemons, job(tmp_path, "stalling_loop", stall=str(stall))) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/livez", 200, "", pid)
        stall.touch()
        becomes(f"{url}/livez", 503, "event loop stalled", pid)
        wait_until(lambda: silence(url, "event_loop") > 1, "a stale heartbeat", pid)
        assert silence(url, "device") < silence(url, "event_loop")
        page_shows(url, "stalled", "event loop stalled", pid)
        stall.unlink()
        becomes(f"{url}/livez", 200, "", pid)
    assert "event_loop" in {line["loop"] for line in events(tmp_path / "log", "service.stalled")}


def test_a_device_stuck_in_a_call_is_told_and_is_over_when_it_goes_on(daemons, tmp_path):
    go = tmp_path / "go"
    stuck = job(tmp_path, "stuck_device", flags={"http.stall_seconds": 0.3}, go=str(go))
    with running(daemons, stuck) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        drop(tmp_path)
        becomes(f"{url}/livez", 503, "device busy on one call", pid)
        wait_until(lambda: silence(url, "device") > 1, "a stale heartbeat", pid)
        assert silence(url, "event_loop") < silence(url, "device")
        page_shows(url, "stalled", "device busy on one call", pid)
        go.touch()
        becomes(f"{url}/livez", 200, "", pid)
        wait_until(lambda: list((tmp_path / "outbox").glob("study-*")), "the results", pid)
        wait_until(lambda: events(tmp_path / "log", "service.recovered"), "the next heartbeat", pid)
    assert [line["loop"] for line in events(tmp_path / "log", "service.stalled")] == ["device"]
    assert [line["loop"] for line in events(tmp_path / "log", "service.recovered")] == ["device"]


needs_syscall = pytest.mark.skipif(
    health_hooks.SYS_EXIT is None, reason="the system call's number is unknown"
)


@pytest.mark.parametrize("when", ["idle", pytest.param("in_a_call", marks=needs_syscall)])
def test_a_device_thread_that_died_is_told_however_long_a_batch_may_take(daemons, tmp_path, when):
    hook, args = killed(when, tmp_path)
    pid = daemons.start(job(tmp_path, hook, **args, dead_seconds=3600.0))
    url = url_of(tmp_path / "log", pid)
    becomes(f"{url}/readyz", 200, "", pid)
    told_to_die(when, tmp_path, pid)
    file = drop(tmp_path)
    becomes(f"{url}/livez", 503, "device thread died", pid)
    wait_until(lambda: silence(url, "device") > 1, "a stale heartbeat", pid)
    assert silence(url, "event_loop") < silence(url, "device")
    page_shows(url, "stalled", "device thread died", pid)
    os.kill(pid, signal.SIGTERM)  # the drain waits for a device that is no more
    becomes(f"{url}/readyz", 503, "draining", pid)
    assert end(daemons, pid) == 3
    assert file.is_file()


@pytest.mark.parametrize("when", ["idle", pytest.param("in_a_call", marks=needs_syscall)])
def test_a_daemon_whose_device_thread_died_ends_by_itself_and_gives_its_files_back(daemons, tmp_path, when):
    hook, args = killed(when, tmp_path)
    pid = daemons.start(job(tmp_path, hook, **args, dead_seconds=2.0))
    becomes(f"{url_of(tmp_path / 'log', pid)}/readyz", 200, "", pid)
    told_to_die(when, tmp_path, pid)
    file = drop(tmp_path)
    assert daemons.wait(pid) == 3
    assert file.is_file()
    assert "the device thread died" in (tmp_path / "log").read_text()
    assert list((tmp_path / "inbox/.claimed").glob("*/")) == []


def killed(when: str, root: Path) -> tuple[str, dict[str, str]]:
    """A hook and its arguments."""
    if when == "in_a_call":
        return "dying_in_a_call", {}
    return "dying_idle", {"die": str(root / "die")}


def told_to_die(when: str, root: Path, pid: int) -> None:
    """Not before the daemon is ready, and idle: in the middle of a call only that call would fail."""
    if when == "idle":
        (root / "die").touch()
        wait_until((root / "die.told").exists, "the thread to be told", pid)


def test_a_daemon_is_ready_once_its_model_is_loaded(daemons, tmp_path):
    go = tmp_path / "go"
    with running(
        daemons, job(tmp_path, "slow_loading", go=str(go), flags={"http.stall_seconds": 0.1})
    ) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/readyz", 503, health.LOADING, pid)
        wait_until(lambda: silence(url, "device") > 0.5, "loading for longer than a batch may take", pid)
        assert get(f"{url}/livez")[0] == 200
        go.touch()
        becomes(f"{url}/readyz", 200, "", pid)


def test_a_daemon_that_drains_is_live_and_not_ready(daemons, tmp_path):
    go = tmp_path / "go"
    pid = daemons.start(job(tmp_path, "stuck_device", go=str(go)))
    url = url_of(tmp_path / "log", pid)
    becomes(f"{url}/readyz", 200, "", pid)
    drop(tmp_path)
    wait_until(lambda: list((tmp_path / "inbox/.claimed").glob("*/*/study.json")), "the claim", pid)
    os.kill(pid, signal.SIGTERM)
    becomes(f"{url}/readyz", 503, "draining", pid)
    assert get(f"{url}/livez")[0] == 200
    go.touch()
    assert daemons.wait(pid) == 0
    assert list((tmp_path / "outbox").glob("study-*"))


def test_a_disk_below_its_floor_is_not_ready(daemons, tmp_path):
    with running(daemons, job(tmp_path, flags={"outbox.min_free_bytes": 1 << 62})) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/readyz", 503, "outbox.min_free_bytes", pid)
        assert pauses(url) == {"disk"}
        page_shows(url, "paused", "outbox.min_free_bytes", pid)
        assert get(f"{url}/livez")[0] == 200


def test_a_disk_that_fills_up_is_not_ready_until_there_is_room(daemons, tmp_path):
    root, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
    root.mkdir()
    with (
        mounted(root, "-t", "tmpfs", "-o", "size=16m", "lensd-test"),
        running(daemons, job(root, flags={"outbox.min_free_bytes": 4 << 20})) as pid,
    ):
        url = url_of(root / "log", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        ballast.write_bytes(bytes(13 << 20))
        becomes(f"{url}/readyz", 503, "outbox.min_free_bytes", pid)
        wait_until(lambda: pauses(url) == {"disk"}, "the metric", pid)
        page_shows(url, "paused", "free some space", pid)
        ballast.unlink()
        becomes(f"{url}/readyz", 200, "", pid)


def test_an_outbox_that_was_mounted_read_only_is_not_ready_until_it_is_no_more(daemons, tmp_path):
    outbox = tmp_path / "outbox"
    outbox.mkdir()
    with running(daemons, job(tmp_path)) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        with mounted(outbox, "-o", "bind,ro", str(outbox)):
            becomes(f"{url}/readyz", 503, "outbox: not readable and writable", pid)
            wait_until(lambda: pauses(url) == {"folders"}, "the metric", pid)
            page_shows(url, "paused", "outbox: not readable and writable", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        drop(tmp_path)
        wait_until(lambda: list(outbox.glob("study-*")), "the results", pid)


def backlog(url: str) -> tuple[int, int]:
    """Files and bytes that wait, where metrics, JSON and page say the same; else nothing that ever waits."""
    files, size = (gauge(url, f"inbox_{unit}") for unit in ("files", "bytes"))
    told = json.loads(get(f"{url}/status.json")[1])["backlog"]
    shown = re.search(r"Waiting.*?(\d+) file", get(url)[1], re.DOTALL)
    assert shown is not None
    return (
        (int(files), int(size))
        if (files, size, files) == (told["files"], told["bytes"], int(shown[1]))
        else (-1, -1)
    )


def gauge(url: str, name: str) -> float:
    match = re.search(rf"^lensd_{name} (\S+)$", get(f"{url}/metrics")[1], re.MULTILINE)
    assert match is not None
    return float(match[1])


def counts(url: str, pid: int, *paths: Path) -> None:
    """Wait until just these files are told to wait."""
    wanted = len(paths), sum(path.stat().st_size for path in paths)
    wait_until(lambda: backlog(url) == wanted, f"a backlog of {wanted}", pid)


def ages(url: str, pid: int) -> None:
    """Wait until the oldest waiting file was told to have grown older."""
    before = gauge(url, "oldest_pending_seconds")
    wait_until(lambda: gauge(url, "oldest_pending_seconds") > before, "a greater age", pid)


def test_what_comes_and_goes_during_a_pause_is_counted(daemons, tmp_path):
    with running(daemons, job(tmp_path, flags={"outbox.min_free_bytes": 1 << 62})) as pid:
        url = url_of(tmp_path / "log", pid)
        becomes(f"{url}/readyz", 503, "outbox.min_free_bytes", pid)
        counts(url, pid)
        first = drop(tmp_path, "first.json")
        counts(url, pid, first)
        ages(url, pid)
        second = drop(tmp_path, "second.json")
        counts(url, pid, first, second)
        first.unlink()
        counts(url, pid, second)
        second.unlink()
        counts(url, pid)
        assert gauge(url, "oldest_pending_seconds") == 0
        assert pauses(url) == {"disk"}


def test_what_waits_for_the_model_is_counted(daemons, tmp_path):
    go = tmp_path / "go"
    file = drop(tmp_path)
    with running(daemons, job(tmp_path, "slow_loading", go=str(go))) as pid:
        url = url_of(tmp_path / "log", pid)
        counts(url, pid, file)
        becomes(f"{url}/readyz", 503, health.LOADING, pid)
        go.touch()
        wait_until(lambda: list((tmp_path / "outbox").glob("study-*")), "the results", pid)


def test_what_waits_in_an_inbox_that_can_not_be_read_goes_on_ageing(daemons, users_root):
    with running(daemons, job(users_root, "quick_bound_by_modes")) as pid:
        url = url_of(users_root / "log", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        (users_root / "outbox").chmod(0o500)
        becomes(f"{url}/readyz", 503, "outbox: not readable and writable", pid)
        file = drop(users_root)
        counts(url, pid, file)
        (users_root / "inbox").chmod(0o000)
        becomes(f"{url}/readyz", 503, "inbox: not readable and writable", pid)
        counts(url, pid, file)
        ages(url, pid)
        (users_root / "inbox").chmod(0o700)
        file.unlink()
        counts(url, pid)
        (users_root / "outbox").chmod(0o700)
        becomes(f"{url}/readyz", 200, "", pid)


@pytest.mark.parametrize("which", ["inbox", "outbox"])
def test_a_folder_that_may_not_be_written_is_not_ready_until_it_may(daemons, users_root, which):
    with running(daemons, job(users_root, "bound_by_modes")) as pid:
        url = url_of(users_root / "log", pid)
        becomes(f"{url}/readyz", 200, "", pid)
        (users_root / which).chmod(0o500)
        becomes(f"{url}/readyz", 503, f"{which}: not readable and writable", pid)
        assert pauses(url) == {"folders"}
        page_shows(url, "paused", f"{which}: not readable and writable", pid)
        assert get(f"{url}/livez")[0] == 200
        (users_root / which).chmod(0o700)
        becomes(f"{url}/readyz", 200, "", pid)


def test_folders_that_do_not_answer_are_a_reason_to_pause(tmp_path):
    now = [100.0]
    pause = Pause()
    watched = Machine(tmp_path, tmp_path, min_free_bytes=0, pause=pause, clock=lambda: now[0])

    def hang() -> str | None:
        now[0] += machine.UNANSWERED_SECONDS
        watched.see_unanswered()
        assert pause.reasons == {}
        now[0] += 1
        watched.see_unanswered()
        assert "no answer for 11 s" in pause.reasons[FOLDERS]
        return None

    watched.folder_trouble = hang  # type: ignore[method-assign]
    watched.look()
    assert pause.reasons == {}
    watched.see_unanswered()
    assert pause.reasons == {}


@pytest.mark.parametrize(("free", "reasons"), [(99, {DISK}), (100, set())])
def test_a_disk_with_exactly_its_floor_free_is_no_reason_to_pause(tmp_path, monkeypatch, free, reasons):
    for name in ("inbox", "outbox"):
        (tmp_path / name).mkdir()
    pause = Pause()
    watched = Machine(tmp_path / "inbox", tmp_path / "outbox", min_free_bytes=100, pause=pause)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    watched.look()
    assert pause.reasons.keys() == reasons


def test_by_default_trouble_shows_in_time():
    assert supervisor.LOOK_SECONDS + health.HEARTBEAT_STALE_SECONDS < VISIBLE_SECONDS
    assert 2 * supervisor.LOOK_SECONDS + machine.UNANSWERED_SECONDS < VISIBLE_SECONDS
    assert 2 * supervisor.LOOK_SECONDS < VISIBLE_SECONDS < supervisor.DEVICE_DEAD_SECONDS
