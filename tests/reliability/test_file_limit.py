"""A limit on the size of files, or a quota, is no file's fault: the daemon waits and says so."""

from __future__ import annotations

import errno
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.daemons import Job
from tests.reliability.feed import Feed
from tests.reliability.handling import claimed, events, running, wait_until
from tests.reliability.ledger import violations
from tests.reliability.test_disk_full import get, job, pauses, url_of

LIMIT = 16 << 10
FILES = 6


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    """Files of one part, whose results are written at one go, and of several, which go through Arrow."""
    feed = Feed(tmp_path / "inbox", random.Random(0), {"json": 1, "parts": 1})
    for kind in ("json", "parts") * (FILES // 2):
        feed.drop(kind)
    return feed


def limited(folder: Path, *, once: bool) -> Job:
    plain = job(folder, folder / "log")
    flags = {**(plain.flags or {}), "http.enabled": not once}
    hook = "tests.reliability.hooks:limited_files"
    return Job(plain.inbox, plain.outbox, plain.log, once, flags, hook, {"size": LIMIT})


def test_a_limit_on_file_sizes_pauses_and_all_completes_when_it_is_raised(daemons, feed, tmp_path):
    log = tmp_path / "log"
    with running(daemons, limited(tmp_path, once=False)) as pid:
        url = url_of(log, pid)
        wait_until(lambda: pauses(url) == {"disk"}, "lensd_paused for the disk", pid)
        status, body = get(f"{url}/readyz")
        assert status == 503
        assert f"may write no file of more than {LIMIT} bytes: raise its limit (ulimit -f)" in body
        assert str(tmp_path / "outbox/.staging") in body
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(lambda: not feed.waiting() and not claimed(feed.inbox), "all published", pid)
    assert violations(feed.inbox, tmp_path / "outbox", feed.dropped) == []


def test_once_under_a_limit_ends_with_exit_code_3_and_puts_the_files_back(daemons, feed, tmp_path):
    for _ in range(4):  # more often than a file may be begun
        assert daemons.run(limited(tmp_path, once=True)) == 3
        assert claimed(feed.inbox) == []
        assert feed.waiting() == FILES
    (message, *_) = [line for line in (tmp_path / "log").read_text().splitlines() if "lensd: " in line]
    assert f"of more than {LIMIT} bytes" in message
    assert str(tmp_path / "outbox/.staging") in message
    assert "Traceback" not in (tmp_path / "log").read_text()
    plain = limited(tmp_path, once=True)
    assert daemons.run(Job(plain.inbox, plain.outbox, plain.log, flags=plain.flags)) == 0
    assert violations(feed.inbox, tmp_path / "outbox", feed.dropped) == []


@pytest.mark.parametrize("name", ["write", "create", "rename"])
@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EXDEV, errno.ETIMEDOUT])
def test_what_the_machine_refuses_once_costs_no_attempt(daemons, feed, tmp_path, name, code):
    hook, args = "tests.reliability.faults:fail_at", {"n": 3, "errno": code, "name": name}
    plain = job(tmp_path, tmp_path / "log", **{"http.enabled": False})
    args["trace"] = str(tmp_path / "trace")
    with running(daemons, Job(plain.inbox, plain.outbox, plain.log, False, plain.flags, hook, args)) as pid:
        wait_until(lambda: not feed.waiting() and not claimed(feed.inbox), "all published", pid)
    assert violations(feed.inbox, tmp_path / "outbox", feed.dropped) == []
    settled = [event["outcome"] for event in events(tmp_path / "log", "file.settled")]
    assert settled == ["committed"] * FILES
