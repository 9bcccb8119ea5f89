"""A disk that fills up for real, on a small tmpfs: the daemon waits for room and loses nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.daemons import Job
from tests.reliability.feed import Feed
from tests.reliability.handling import claimed, end, events, running, wait_until
from tests.reliability.ledger import violations

DISK_BYTES = 32 << 20
DISK_INODES = 700
FILES = 24
LEFT_BYTES = 250 << 10  # for results of some of the files
LEFT_INODES = 60
BALLAST = "ballast"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of a few MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},nr_inodes={DISK_INODES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "lensd-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mount is refused here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_bytes(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def fill_bytes(disk: Path, left: int) -> None:
    """Take all room but `left` bytes."""
    (disk / BALLAST).mkdir()
    with (disk / BALLAST / "bytes").open("wb") as file:
        while (room := free_bytes(disk) - left) > 0:
            file.write(bytes(min(room, 1 << 16)))
            file.flush()


def fill_inodes(disk: Path, left: int) -> None:
    """Take all inodes but `left`; there is room for bytes."""
    (disk / BALLAST).mkdir()
    for number in range(os.statvfs(disk).f_favail - left):
        (disk / BALLAST / str(number)).touch()


def drop_files(disk: Path) -> Feed:
    feed = Feed(disk / "inbox", random.Random(0), {"json": 3, "parts": 2, "bad_records": 1})
    for _ in range(FILES):
        feed.drop()
    return feed


def job(disk: Path, log: Path, **flags: object) -> Job:
    return Job(
        disk / "inbox",
        disk / "outbox",
        log,
        once=False,
        flags={
            "http.enabled": True,
            "http.address": "127.0.0.1:0",
            "inbox.part_records": 16,
            "inbox.max_attempts": 1,
            "outbox.min_free_bytes": 0,
            **flags,
        },
    )


def url_of(log: Path, pid: int) -> str:
    wait_until(lambda: events(log, "http.listening"), "http.listening", pid)
    url: str = events(log, "http.listening")[0]["url"]
    return url


def get(url: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def pauses(url: str) -> set[str]:
    """The reasons for which claiming is paused now."""
    lines = get(f"{url}/metrics")[1].splitlines()
    return {
        line.partition('reason="')[2].partition('"')[0]
        for line in lines
        if line.startswith("lensd_paused{") and float(line.split()[-1])
    }


def attempts(inbox: Path) -> set[str]:
    """How often work on what is claimed has begun."""
    return {path.parent.name for path in claimed(inbox)}


def published(disk: Path) -> int:
    return len(list((disk / "outbox").glob("[!.]*/manifest.json")))


@pytest.mark.parametrize(
    ("fill", "left"), [(fill_bytes, LEFT_BYTES), (fill_inodes, LEFT_INODES)], ids=["bytes", "inodes"]
)
def test_a_full_disk_pauses_and_all_completes_when_there_is_room(daemons, disk, tmp_path, fill, left):
    log = tmp_path / "log"
    feed = drop_files(disk)
    fill(disk, left)
    with running(daemons, job(disk, log)) as pid:
        url = url_of(log, pid)
        wait_until(lambda: pauses(url), "lensd_paused", pid)
        assert get(f"{url}/readyz")[0] == 503
        assert get(f"{url}/livez")[0] == 200
        assert published(disk) < FILES
        assert attempts(feed.inbox) <= {"0", "1"}
        shutil.rmtree(disk / BALLAST)
        wait_until(lambda: published(disk) == FILES and not claimed(feed.inbox), "all published", pid)
        wait_until(lambda: not pauses(url) and get(f"{url}/readyz")[0] == 200, "ready again", pid)
    assert violations(feed.inbox, disk / "outbox", feed.dropped) == []
    assert list((feed.inbox / "failed").iterdir()) == []


def test_a_stop_while_the_disk_is_full_costs_no_file_its_only_attempt(daemons, disk, tmp_path):
    log = tmp_path / "log"
    feed = drop_files(disk)
    fill_bytes(disk, LEFT_BYTES)
    pid = daemons.start(job(disk, log))
    url = url_of(log, pid)
    wait_until(lambda: pauses(url), "lensd_paused", pid)
    assert end(daemons, pid) in (0, 3)
    assert claimed(feed.inbox) == []
    assert feed.waiting() == FILES - published(disk) > 0
    shutil.rmtree(disk / BALLAST)
    with running(daemons, job(disk, log)) as pid:
        wait_until(lambda: published(disk) == FILES and not claimed(feed.inbox), "all published", pid)
    assert violations(feed.inbox, disk / "outbox", feed.dropped) == []


def test_below_its_floor_nothing_is_claimed_before_the_disk_is_full(daemons, disk, tmp_path):
    log = tmp_path / "log"
    feed = drop_files(disk)
    floor = 12 << 20  # far more than the results of the files that are claimed take
    fill_bytes(disk, floor + LEFT_BYTES)
    with running(daemons, job(disk, log, **{"outbox.min_free_bytes": floor})) as pid:
        url = url_of(log, pid)
        wait_until(lambda: pauses(url) == {"disk"}, "lensd_paused for the disk", pid)
        assert get(f"{url}/readyz")[0] == 503
        wait_until(lambda: not claimed(feed.inbox), "the claimed files finished", pid)
        before = published(disk)
        assert before > 0
        name = feed.drop("json")
        wait_until(lambda: pauses(url) == {"disk"}, "still paused", pid)
        assert (feed.inbox / name).exists()
        assert published(disk) == before
        shutil.rmtree(disk / BALLAST)
        wait_until(lambda: published(disk) == FILES + 1 and not claimed(feed.inbox), "all published", pid)
        wait_until(lambda: not pauses(url) and get(f"{url}/readyz")[0] == 200, "ready again", pid)
    assert violations(feed.inbox, disk / "outbox", feed.dropped) == []
    requeued = [event for event in events(log, "file.settled") if event["outcome"] == "requeued"]
    assert requeued == []


def test_once_on_a_full_disk_ends_with_exit_code_3_and_puts_the_files_back(daemons, disk, tmp_path):
    feed = drop_files(disk)
    fill_bytes(disk, LEFT_BYTES)
    full = job(disk, tmp_path / "log")
    once = Job(full.inbox, full.outbox, full.log, flags={**(full.flags or {}), "http.enabled": False})
    assert daemons.run(once) == 3
    assert claimed(feed.inbox) == []
    assert feed.waiting() == FILES - published(disk) > 0
    shutil.rmtree(disk / BALLAST)
    assert daemons.run(once) == 0
    assert violations(feed.inbox, disk / "outbox", feed.dropped) == []
