"""Kills the daemon at random moments under load, again and again, then counts every record.

`make torture KILLS=200`. The same seed drops the same files and kills after the same delays; what the
daemon was doing then differs from run to run.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.reliability.daemons import Daemons, Job
from tests.reliability.feed import PART_RECORDS, Feed, Recount, recount
from tests.reliability.handling import finish, say
from tests.reliability.ledger import violations

WAITING = 40  # files kept in the inbox
SETTINGS: dict[str, Any] = {
    "inbox.part_records": PART_RECORDS,
    "inbox.max_attempts": 1000,  # being there at a kill costs an attempt, and that is not what is tested here
}

Moment = Literal["immediate", "start", "work", "step"]
MOMENTS: dict[Moment, int] = {"immediate": 1, "start": 2, "work": 4, "step": 4}
DELAYS: dict[Moment, tuple[float, float]] = {
    "immediate": (0.0, 0.02),
    "start": (0.02, 0.2),
    "work": (0.2, 0.9),
}


@dataclass(frozen=True, slots=True)
class Report:
    kills: int
    files: int
    recount: Recount
    seconds: float
    violations: list[str]

    def __str__(self) -> str:
        return (
            f"kills {self.kills}  files {self.files}  records {self.recount.records}"
            f"  lost {self.recount.lost}  duplicated {self.recount.duplicated}"
            f"  seconds {self.seconds:.0f}  violations {len(self.violations)}"
        )


class Torture:
    """One inbox, one outbox, one daemon at a time that does not live long."""

    def __init__(
        self, daemons: Daemons, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._daemons = daemons
        self._rng = random.Random(seed)
        self._say = say
        self._log = folder / "log"
        self._outbox = folder / "outbox"
        self._feed = Feed(folder / "inbox", self._rng)

    def run(self, kills: int) -> Report:
        """Kill so many times, let a last daemon drain what is left, and check all of it."""
        began = time.monotonic()
        wrong: list[str] = []
        killed = 0
        while killed < kills and not wrong:
            self._feed.top_up(WAITING)
            code = self._start_and_kill()
            if code in (-signal.SIGKILL, -signal.SIGALRM):
                killed += 1
            else:
                wrong.append(f"a daemon ended by itself with exit code {code}: see {self._log}")
            if killed % 20 == 0:
                self._say(f"{killed} kills, {len(self._feed.dropped)} files, {self._feed.waiting()} waiting")
        code = self._daemons.run(self._job(once=True))
        unusable = any(entry.records is None for entry in self._feed.dropped.values())
        if code not in ((0, 1) if unusable else (0,)):
            wrong.append(f"the last daemon ended with exit code {code}: see {self._log}")
        wrong += violations(self._feed.inbox, self._outbox, self._feed.dropped)
        return Report(
            kills=killed,
            files=len(self._feed.dropped),
            recount=recount(self._outbox, self._feed.dropped),
            seconds=time.monotonic() - began,
            violations=wrong,
        )

    def _start_and_kill(self) -> int:
        (moment,) = self._rng.choices(list(MOMENTS), list(MOMENTS.values()))
        if moment == "step":
            step = round(10 ** self._rng.uniform(0, 2.5))
            return self._daemons.wait(self._daemons.start(self._job(step=step)))
        pid = self._daemons.start(self._job())
        time.sleep(self._rng.uniform(*DELAYS[moment]))
        return self._daemons.kill(pid)

    def _job(self, *, once: bool = False, step: int | None = None) -> Job:
        return Job(
            self._feed.inbox,
            self._outbox,
            self._log,
            once=once,
            flags=SETTINGS,
            hook=None if step is None else "tests.reliability.hooks:dying_at",
            hook_args=None if step is None else {"step": step},
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lensd-torture-"))
    with Daemons(folder / "tiny") as daemons:
        report = Torture(daemons, folder, args.seed, say).run(args.kills)
    say(str(report))
    return finish(report.violations, folder)


if __name__ == "__main__":
    sys.exit(main())
