"""`python -m daemon.tools.scaling FILE`: the rate of a daemon by its number of workers on Ray.

For each number of workers a daemon with a cluster of its own is started; once all its workers are ready, a
file of so many samples is dropped, made of those of FILE, no two alike. Numbers of workers take turns, over
and over, so that a slow moment of the machine meets all of them. Reports samples/s from the drop to the
published folder, the share of the workers' time that they did not compute, and when the first result came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from daemon.errors import MachineError
from daemon.tools.samples import numbered

LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """One daemon's work on the file."""

    workers: int
    samples: int
    seconds: float  # from the drop to the published folder
    busy_seconds: float  # of all workers' devices
    first_seconds: float  # from the drop to the first batch that came back

    @property
    def rate(self) -> float:
        return self.samples / self.seconds

    @property
    def overhead(self) -> float:
        """The share of the workers' time in which they did not compute."""
        return 1 - self.busy_seconds / (self.workers * self.seconds)


class Daemon:
    """`lensd run` with so many workers, in a process of its own."""

    def __init__(self, folder: Path, workers: int, flags: list[str]) -> None:
        self.inbox, self.outbox, self._log = folder / "inbox", folder / "outbox", folder / "log"
        self.inbox.mkdir()
        command = [sys.executable, "-m", "daemon.cli", "run", "--executor", "ray", "--workers", str(workers)]
        command += ["--http", "127.0.0.1:0", "--log-format", "json", "--inbox", str(self.inbox)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--outbox", str(self.outbox), *flags],
                env=os.environ | {"LENSD_INBOX__SETTLE_SECONDS": "0"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def told(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def until(self, condition: Callable[[], object]) -> float:
        """When it held, in monotonic seconds. Raises MachineError where the daemon ends before."""
        while not condition():
            if self._process.poll() is not None:
                raise MachineError(f"the daemon ended: {self._log.read_text()[-2000:]}")
            time.sleep(LOOK_SECONDS)
        return time.monotonic()

    def sum_of(self, metric: str) -> float:
        """The metric's value over all its labels."""
        (listening,) = self.told("http.listening")
        with urllib.request.urlopen(f"{listening['url']}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return sum(one.value for family in families for one in family.samples if one.name == metric)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def measure(file: Path, workers: int, samples: int, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory(prefix="lensd-scaling-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        daemon = Daemon(folder, workers, flags)
        stack.callback(daemon.stop)
        daemon.until(lambda: len(daemon.told("worker.ready")) == workers)
        draft = folder / "draft"
        draft.write_text("".join(numbered(file, samples)))
        draft.rename(daemon.inbox / "all.jsonl")
        dropped = time.monotonic()
        first = daemon.until(lambda: daemon.sum_of("lensd_worker_batches_total"))
        done = daemon.until(lambda: daemon.told("file.settled"))
        busy = daemon.sum_of("lensd_worker_busy_seconds_total")
    return Run(workers, samples, done - dropped, busy, first - dropped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, e.g. 1,2")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=3)
    args, flags = parser.parse_known_args()
    numbers = [int(part) for part in args.workers.split(",")]
    runs: list[Run] = []
    for _ in range(args.repetitions):
        for workers in numbers:
            run = measure(args.file, workers, args.samples, flags)
            runs.append(run)
            sys.stderr.write(
                f"{workers} workers: {run.rate:.1f} samples/s, overhead {100 * run.overhead:.1f} %,"
                f" first result after {run.first_seconds:.1f} s\n"
            )
    of = {number: [run for run in runs if run.workers == number] for number in numbers}
    base = statistics.median(run.rate for run in of[numbers[0]])
    for number in numbers:
        rate = statistics.median(run.rate for run in of[number])
        overhead = statistics.median(run.overhead for run in of[number])
        first = statistics.median(run.first_seconds for run in of[number])
        sys.stdout.write(
            f"| {number} | {rate:.1f} | {rate / base:.2f} | {100 * overhead:.1f} % | {first:.1f} s |\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
