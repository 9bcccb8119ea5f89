"""Several daemons on one inbox and one outbox, killed and restarted while small files rain in.

`make several`. Every record must come out once, whoever worked on it and however often it was begun.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.reliability.daemons import Daemons, Job
from tests.reliability.feed import Feed, recount
from tests.reliability.handling import end, finish, retired, say, wait_until
from tests.reliability.ledger import violations
from tests.reliability.torture import SETTINGS, Report

DRAIN_SECONDS = 400


class Several:
    """Some daemons that share two folders."""

    def __init__(self, daemons: Daemons, folder: Path, *, processes: int, seed: int) -> None:
        self._daemons = daemons
        self._processes = processes
        self._rng = random.Random(seed)
        self._log = folder / "log"
        self._outbox = folder / "outbox"
        self._feed = Feed(folder / "inbox", self._rng, {"single": 19, "duplicate": 1})

    def run(self, files: int, kills: int) -> Report:
        """Drop so many files, killing now and then; end the daemons when all is done, and check."""
        began = time.monotonic()
        wrong: list[str] = []
        alive = [self._start() for _ in range(self._processes)]
        for kill in range(kills):
            self._drop(files * (kill + 1) // (kills + 1))
            time.sleep(self._rng.uniform(0, 0.8))
            victim = self._rng.randrange(len(alive))
            wrong += self._check(self._daemons.kill(alive[victim]), {-signal.SIGKILL})
            alive[victim] = self._start()
        self._drop(files)
        try:
            wait_until(self._drained, "an empty inbox", *alive, seconds=DRAIN_SECONDS)
        except TimeoutError as error:
            wrong.append(str(error))
        for pid in alive:
            wrong += self._check(end(self._daemons, pid), {0, -signal.SIGTERM})
        wrong += violations(self._feed.inbox, self._outbox, self._feed.dropped)
        return Report(
            kills=kills,
            files=len(self._feed.dropped),
            recount=recount(self._outbox, self._feed.dropped),
            seconds=time.monotonic() - began,
            violations=wrong,
        )

    def _start(self) -> int:
        return self._daemons.start(Job(self._feed.inbox, self._outbox, self._log, once=False, flags=SETTINGS))

    def _drop(self, until: int) -> None:
        while len(self._feed.dropped) < until:
            self._feed.drop()

    def _drained(self) -> bool:
        return retired(self._feed.inbox) == len(self._feed.dropped)

    def _check(self, code: int, expected: set[int]) -> list[str]:
        """A daemon that is told to end before it handles signals ends by the signal; that loses nothing."""
        return [] if code in expected else [f"a daemon ended with exit code {code}: see {self._log}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lensd-several-"))
    with Daemons(folder / "tiny") as daemons:
        several = Several(daemons, folder, processes=args.processes, seed=args.seed)
        report = several.run(args.files, args.kills)
    say(str(report))
    return finish(report.violations, folder)


if __name__ == "__main__":
    sys.exit(main())
