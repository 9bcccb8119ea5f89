"""Starting, awaiting and ending the daemons under test, and what they left in their log and inbox."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability.daemons import Daemons, Job
from tests.reliability.ledger import REASON_SUFFIX, is_input

HUNG_SECONDS = 60  # after which a daemon told to end is killed


def wait_until(condition: Callable[[], object], what: str, *pids: int, seconds: float = 60) -> None:
    """Raises TimeoutError if `what` does not come, at once if one of the daemons it is to come from ended."""
    limit = time.monotonic() + seconds
    while not condition():
        gone = [pid for pid in pids if ended(pid)]
        if gone or time.monotonic() > limit:
            why = f"daemon {gone[0]} ended" if gone else f"after {seconds:.0f} s"
            raise TimeoutError(f"waited in vain for {what}: {why}")
        time.sleep(0.02)


@contextlib.contextmanager
def running(daemons: Daemons, job: Job) -> Iterator[int]:
    """The process id of a daemon that is told to end with the block, and must then end in order."""
    pid = daemons.start(job)
    try:
        yield pid
    except BaseException:
        daemons.kill(pid)
        raise
    assert end(daemons, pid) == 0, job.log


def end(daemons: Daemons, pid: int) -> int:
    """Tell a daemon to end; its exit code, -9 where it did not."""
    os.kill(pid, signal.SIGTERM)
    watchdog = threading.Timer(HUNG_SECONDS, os.kill, (pid, signal.SIGKILL))
    watchdog.start()
    code = daemons.wait(pid)
    watchdog.cancel()
    return code


def events(log: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a daemon's log about one event."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    parsed = (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}"))
    return [event for event in parsed if event["event"] == name]


def ended(pid: int) -> bool:
    """Whether a daemon ended by itself; nobody waited for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def waiting(inbox: Path) -> list[str]:
    """Names of the input files that nobody works on yet."""
    with os.scandir(inbox) as entries:
        return [
            entry.name for entry in entries if is_input(entry.name) and entry.is_file(follow_symlinks=False)
        ]


def claimed(inbox: Path) -> list[Path]:
    """Files that some daemon, alive or dead, works on. What several move about meanwhile may be missed."""
    held = inbox / ".claimed"
    walk = os.walk(held)  # passes over a folder that goes away
    return [Path(at, name) for at, _, names in walk if Path(at).parent.parent == held for name in names]


def retired(inbox: Path) -> int:
    """How many files daemons are done with, whatever became of them: a count that only grows."""
    places = (inbox / "done", inbox / "failed")
    names = [name for place in places if place.is_dir() for name in os.listdir(place)]
    return sum(not name.endswith(REASON_SUFFIX) for name in names)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def finish(wrong: list[str], folder: Path) -> int:
    """An exit code. The first violations are shown and the folder is left where there are any."""
    for line in wrong[:20]:
        say(f"VIOLATION {line}")
    if wrong:
        say(f"left for a look: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0
