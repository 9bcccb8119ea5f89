"""Kills workers, the daemon and the whole cluster while batches run on Ray, then counts every record.

`make workers`. The same seed drops the same files and kills in the same order; what runs then differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

from tests.reliability.daemons import ROOT
from tests.reliability.feed import PART_RECORDS, Feed, recount
from tests.reliability.handling import events, finish, retired, say
from tests.reliability.ledger import violations
from tests.reliability.ray_head import RayHead
from tests.support import tiny

WORKERS = 2
WAITING = 40  # files kept in the inbox
PATIENCE_SECONDS = 300  # for the next file to be done
SECONDS = (0.0, 1.5)  # after a file was done, before the next kill

Victim = Literal["worker", "daemon", "cluster"]


class Torture:
    """One inbox, one outbox, one cluster and one daemon, none of which lives long."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.wrong: list[str] = []
        self._rng = random.Random(seed)
        self._log = folder / "log"
        self._outbox = folder / "outbox"
        self._feed = Feed(folder / "inbox", self._rng)
        self._toml = folder / "lensd.toml"
        self._toml.write_text(tiny.make_tiny(folder).toml())
        self._head = RayHead(WORKERS)
        self._daemon: subprocess.Popen[bytes] | None = None
        self._killed: Counter[Victim] = Counter()
        self._ended_by_ray = 0  # daemons: Ray ends a process whose store of objects is gone while it is used

    def run(self, victims: list[Victim]) -> str:
        """Kill these in turn, each while files come out; drain and check. Returns the counts as a line."""
        began = time.monotonic()
        self._head.start()
        try:
            self._daemon = self._start()
            for number, victim in enumerate(victims):
                self._feed.top_up(WAITING)
                self._await_file()
                time.sleep(self._rng.uniform(*SECONDS))
                if self.wrong:
                    break
                self._kill(victim)
                self._killed[victim] += 1
                if number % 10 == 9:
                    say(f"{number + 1} kills, {len(self._feed.dropped)} files")
            self._drain()
        finally:
            if self._daemon is not None and self._daemon.poll() is None:
                self._daemon.kill()
                self._daemon.wait()
            self._head.kill()
        self.wrong += violations(self._feed.inbox, self._outbox, self._feed.dropped)
        counts = recount(self._outbox, self._feed.dropped)
        killed = " ".join(f"{name} {count}" for name, count in self._killed.items())
        rejects = [
            json.loads(line)
            for path in self._outbox.glob("*/rejects.jsonl")
            for line in path.read_bytes().splitlines()
        ]
        if any(reject["reason"] == "worker_died" for reject in rejects):
            self.wrong.append("a sample was set aside, though workers died of kills alone")
        return (
            f"kills: {killed}  daemons that Ray ended {self._ended_by_ray}"
            f"  restarts of workers {len(events(self._log, 'worker.restarting'))}"
            f"  files {len(self._feed.dropped)}  records {counts.records}  rejects {len(rejects)}"
            f"  lost {counts.lost}  duplicated {counts.duplicated}"
            f"  seconds {time.monotonic() - began:.0f}  violations {len(self.wrong)}"
        )

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        flags: dict[str, Any] = {
            "LENSD_INBOX__PART_RECORDS": PART_RECORDS,
            "LENSD_INBOX__MAX_ATTEMPTS": 1000,  # being there at a kill costs an attempt
            "LENSD_INBOX__SETTLE_SECONDS": 0,
            "LENSD_INBOX__RESCAN_SECONDS": 0.2,
            "LENSD_BATCHING__MAX_BATCH_TOKENS": 512,
        }
        command = [sys.executable, "-m", "daemon.cli", "run", "--no-http", "--log-format", "json", *more]
        command += ["--config", str(self._toml), "--inbox", str(self._feed.inbox)]
        command += ["--outbox", str(self._outbox), "--executor", "ray", "--workers", str(WORKERS)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*command, "--ray-address", self._head.address],
                cwd=ROOT,
                env=os.environ | self._head.environment | {name: str(flag) for name, flag in flags.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _await_file(self) -> None:
        """Wait until one more file is done, starting anew what ended by itself."""
        done, limit = retired(self._feed.inbox), time.monotonic() + PATIENCE_SECONDS
        while retired(self._feed.inbox) == done and not self.wrong:
            assert self._daemon is not None
            if (code := self._daemon.poll()) == 1 and self._killed["cluster"] > self._ended_by_ray:
                self._ended_by_ray += 1
                self._daemon = self._start()
            elif code is not None:
                self.wrong.append(f"the daemon ended by itself with exit code {code}: see {self._log}")
            elif time.monotonic() > limit:
                self.wrong.append(f"no file was done in {PATIENCE_SECONDS} s: see {self._log}")
            time.sleep(0.05)

    def _kill(self, victim: Victim) -> None:
        assert self._daemon is not None
        if victim == "worker":
            if workers := self._head.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._rng.choice(workers), signal.SIGKILL)
        elif victim == "daemon":
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = self._start()
        else:
            self._head.kill()
            time.sleep(self._rng.uniform(*SECONDS))
            self._head.start()

    def _drain(self) -> None:
        """Stop the daemon, and have another one drain what is left."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGTERM)
        try:
            self._daemon.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"the daemon did not end in {PATIENCE_SECONDS} s: see {self._log}")
            self._daemon.kill()
            self._daemon.wait()
        self._daemon = self._start("--once")
        code = self._daemon.wait(2 * PATIENCE_SECONDS)
        if code not in (0, 1):
            self.wrong.append(f"the last daemon ended with exit code {code}: see {self._log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for victim, kills in zip(get_args(Victim), (30, 10, 5), strict=True):
        parser.add_argument(f"--{victim}s", type=int, default=kills, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lensd-workers-"))
    victims: list[Victim] = [
        victim for victim in get_args(Victim) for _ in range(getattr(args, f"{victim}s"))
    ]
    random.Random(args.seed).shuffle(victims)
    torture = Torture(folder, args.seed)
    say(torture.run(victims))
    return finish(torture.wrong, folder)


if __name__ == "__main__":
    sys.exit(main())
